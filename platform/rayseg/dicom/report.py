"""Measurements of a segmentation as a DICOM structured report by TID 1500 (PS3.16); equal input gives equal bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import pydicom
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from rayseg.dicom.parsing import silence_libraries
from rayseg.dicom.segmentation import finding, hashed_uid, long_string
from rayseg.records import QualityFlag, Reason, Reject

_DIAMETER = Code("L0JK", "IBSI", "Maximum 3D Diameter of a Mesh")  # PS3.16 CID 7470
_PROCEDURE = Code("363679005", "SCT", "Imaging procedure")
# The standard has the concept of a quality finding (111052, PS3.16 annex D) and no codes for these; a scheme whose name
# begins with 99 is a private one (PS3.3 8.2).
_SCHEME = "99RAYSEG"
_FINDINGS = {
    QualityFlag.MODALITY: Code("modality", _SCHEME, "Modality unlike the training data"),
    QualityFlag.BODY_PART: Code("body_part", _SCHEME, "Body part unlike the training data"),
    QualityFlag.SPACING: Code("spacing", _SCHEME, "Pixel spacing unlike the training data"),
    QualityFlag.INTENSITY: Code("intensity", _SCHEME, "Intensities unlike the training data"),
    QualityFlag.AREA: Code("area", _SCHEME, "Segmented area implausibly large"),
    QualityFlag.VOLUME: Code("volume", _SCHEME, "Segmented volume implausibly large"),
    QualityFlag.FRAGMENTS: Code("fragments", _SCHEME, "Segmentation in implausibly many pieces"),
    QualityFlag.ENTROPY: Code("entropy", _SCHEME, "Segmentation unusually uncertain"),
}


@dataclass(frozen=True)
class Measured:
    """What is reported of a class."""

    volume_ml: float | None  # None where positions do not give one
    max_diameter_mm: float | None  # of its largest lesion; None where nothing was found


def encode(
    segmentation: bytes,
    labels: Sequence[str],
    measured: Sequence[Measured],
    model_name: str,
    model_version: str,
    flags: Sequence[QualityFlag] = (),
) -> bytes | Reject:
    """A Comprehensive 3D SR about the segments of a DICOM Segmentation that `segmentation.encode` made.

    Args:
        segmentation: the object; patient and study are its.
        labels: of its segments, in order.
        measured: of the same.
        model_name, model_version: the registered model, named as the device that observed.
        flags: quality findings about the series, told of each segment.

    Returns:
        The object's bytes; WRITE_FAILED where it cannot be expressed.
    """
    silence_libraries()
    try:
        return _encoded(pydicom.dcmread(BytesIO(segmentation)), labels, measured, model_name, model_version, flags)
    except Exception as error:  # as of segmentations
        return Reject(Reason.WRITE_FAILED, f"the report cannot be made: {type(error).__name__}")


def _encoded(
    segmentation: Dataset,
    labels: Sequence[str],
    measured: Sequence[Measured],
    model_name: str,
    model_version: str,
    flags: Sequence[QualityFlag],
) -> bytes:
    identity = [str(segmentation.SOPInstanceUID), "TID 1500"]
    source_series = str(segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID)
    device = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=hashed_uid("device", [model_name, model_version]),
            name=long_string(f"{model_name} v{model_version}"),
            manufacturer_name="rayseg",
            model_name=long_string(model_name),
        ),
    )
    groups = [
        sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(
                uid=hashed_uid("tracking", [*identity, number]), identifier=long_string(label)
            ),
            referenced_segment=sr.ReferencedSegment(
                sop_class_uid=str(segmentation.SOPClassUID),
                sop_instance_uid=str(segmentation.SOPInstanceUID),
                segment_number=number,
                source_series=sr.SourceSeriesForSegmentation(source_series),
            ),
            finding_type=finding(label),
            measurements=_measurements(values),
            qualitative_evaluations=[
                sr.QualitativeEvaluation(codes.DCM.QualityFinding, _FINDINGS[flag]) for flag in flags
            ],
        )
        for number, (label, values) in enumerate(zip(labels, measured, strict=True), start=1)
    ]
    report = sr.Comprehensive3DSR(
        evidence=[segmentation],
        content=sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=device),
            procedure_reported=_PROCEDURE,
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )[0],
        series_instance_uid=hashed_uid("report series", identity),
        series_number=9002,
        sop_instance_uid=hashed_uid("report", identity),
        instance_number=1,
        manufacturer="rayseg",
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    report.SeriesDescription = long_string(f"{model_name} v{model_version} measurements, research only")
    for name in ("ContentDate", "ContentTime", "InstanceCreationDate", "InstanceCreationTime"):
        setattr(report, name, segmentation.get(name))
    for item in report.get("ContributingEquipmentSequence", ()):
        item.ContributionDateTime = f"{report.ContentDate}{report.ContentTime}"
    stream = BytesIO()
    report.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _measurements(values: Measured) -> list[sr.Measurement]:
    found = []
    if values.volume_ml is not None:
        volume_mm3 = round(1000 * values.volume_ml, 3)
        found.append(sr.Measurement(codes.SCT.Volume, volume_mm3, codes.UCUM.CubicMillimeter))
    if values.max_diameter_mm is not None:
        found.append(sr.Measurement(_DIAMETER, round(values.max_diameter_mm, 3), codes.UCUM.Millimeter))
    return found
