"""A file of a series goes to where it is to lie: the store, and for DICOM objects also a PACS."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import pydicom

from rayseg import pacs, storage
from rayseg.inference.outputs import DICOM, File
from rayseg.records import Reason, Reject


def check(service: str, profiles: Sequence[str]) -> None:
    """Raises ValueError where no PACS can be at the URL, or nothing would be stored there."""
    try:
        url = pacs.service(service)
    except ValueError as error:
        raise ValueError(f"segment.pacs: {error}") from None
    if url != service.rstrip("/"):
        raise ValueError("segment.pacs: the URL of a DICOMweb service expected, as https://HOST/dicom-web, and no more")
    if not set(profiles) & set(DICOM):
        raise ValueError(f"segment.pacs: none of the profiles is stored there; those: {', '.join(DICOM)}")


def deliver(file: File, folder: str, service: str | None) -> dict[str, Any] | Reject:
    """Writes the file and, when it is whole, stores it in the PACS, which keeps what it has by the same UID already.

    Args:
        file: what to write.
        folder: URI of the run's folder.
        service: URL of a DICOMweb service, None for none.

    Returns:
        A row of the schema `records.OUTPUTS`; WRITE_FAILED where one of the two did not take it.
    """
    uri = storage.join(folder, file.name)
    try:
        storage.write(uri, file.data)
    except OSError as error:
        return Reject(Reason.WRITE_FAILED, type(error).__name__)
    address = None
    if service is not None and file.profile in DICOM:
        instance = pydicom.dcmread(io.BytesIO(file.data), stop_before_pixels=True)
        try:
            address = pacs.store(service, str(instance.SOPInstanceUID), file.data)
        except OSError as error:  # its text is ours: a status and the service's code
            return Reject(Reason.WRITE_FAILED, f"{file.profile}: PACS: {error}")
    return {
        "profile": file.profile,
        "uri": uri,
        "sha256": hashlib.sha256(file.data).hexdigest(),
        "bytes": len(file.data),
        "pacs": address,
    }
