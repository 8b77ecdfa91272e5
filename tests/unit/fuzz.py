"""Requests as an enemy or a broken machine would send them: mutations of every kind of body, heads and tokens."""

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import tifffile
from PIL import Image
from pydicom import uid

from rayseg.data.synthetic import slice_bytes

CANARY = "Canary^Carla"
TYPES = (
    *("application/dicom", "application/zip", "application/octet-stream", "image/png", "image/jpeg", "image/tiff"),
    *("application/nifti", "application/gzip", "multipart/form-data; boundary=b", "multipart/form-data"),
    *(
        "application/json",
        "text/html",
        'application/dicom; x="',
        "multipart/form-data; boundary=" + "b" * 80,
        "",
        "/",
        ";",
    ),
)
ACCEPTS = (
    *(
        "application/json",
        "image/png",
        "application/dicom",
        "application/nifti",
        "model/gltf-binary",
        "*/*",
        "text/html",
    ),
    *("image/png;q=nan", "a" * 300, ";;;", "image/*;q=0.5, application/dicom;q=1e999", ""),
)
QUERIES = (
    *("", "threshold=0.3", "threshold=nan", "threshold=-1e308", "model=champion", "model=99999", "model=../../x"),
    *("slice=0", "slice=-1", "slice=99999999999999999999", "picture=overlay", "preview=true", "priority=bulk"),
    *("priority=%00", "%ff=%fe", "threshold=", "a" * 3000, "model=" + "x" * 100),
)


@dataclass(frozen=True)
class Shot:
    """One request."""

    kind: str
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    chunks: int  # that the body comes in
    stops: bool  # the client is gone before the body's end


def shots(count: int, seed: int, token: str) -> Iterator[Shot]:
    """`count` requests, a function of the seed; nine in ten carry the right token."""
    chance = random.Random(seed)
    samples = _samples()
    for _ in range(count):
        kind = chance.choice([*samples, "zip", "bomb", "form", "noise", "job", "path"])
        body, media_type, target, method = _shot(chance, kind, samples)
        headers = [("content-type", media_type if chance.random() < 0.7 else chance.choice(TYPES))]
        headers.append(("accept", chance.choice(ACCEPTS[:3] if chance.random() < 0.7 else ACCEPTS)))
        if chance.random() < 0.9:
            headers.append(("authorization", f"Bearer {token}"))
        elif chance.random() < 0.8:
            wrong = chance.choice(
                ["Bearer", "Bearer \xff\xfe", f"bearer {token[:-1]}", "Basic eDp5", "Bearer " + "x" * 9000]
            )
            headers.append(("authorization", wrong))
        if chance.random() < 0.05:
            headers.append(
                (
                    chance.choice(["content-encoding", "content-length", "range", "origin"]),
                    chance.choice(["gzip", "\xff", "9" * 30, "-1"]),
                )
            )
        yield Shot(kind, method, target, headers, body, chance.randint(1, 4), chance.random() < 0.02)


def _shot(chance: random.Random, kind: str, samples: dict[str, tuple[bytes, str]]) -> tuple[bytes, str, str, str]:
    target = f"/v1/segment?{chance.choice(QUERIES)}"
    if kind in samples:
        data, media_type = samples[kind]
        return _mutated(chance, data), media_type, target, "POST"
    if kind == "zip":
        return (
            _mutated(chance, _zip(chance, samples)) if chance.random() < 0.5 else _zip(chance, samples),
            TYPES[1],
            target,
            "POST",
        )
    if kind == "bomb":
        return _bomb(chance), TYPES[1] if chance.random() < 0.7 else "application/gzip", target, "POST"
    if kind == "form":
        return _form(chance, samples), "multipart/form-data; boundary=b", target, "POST"
    if kind == "noise":
        return chance.randbytes(chance.choice([0, 1, 2, 131, 132, 133, 5000])), chance.choice(TYPES), target, "POST"
    if kind == "job":
        return _job(chance), "application/json", "/v1/jobs", "POST"
    paths = (
        "/v1/jobs/%2e%2e",
        "/../../etc/passwd",
        "/web/../../x",
        "/web/%2e%2e/%2e%2e/app.py",
        "/v1/models/\xff",
        "//",
        "/v1/segment/",
    )
    method = chance.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "X"])
    return b"", "text/html", chance.choice(paths), method


def _samples() -> dict[str, tuple[bytes, str]]:
    dataset = pydicom.dcmread(io.BytesIO(slice_bytes(3, 32)))
    dataset.PatientName = CANARY
    found = {"dicom": (_saved(dataset), "application/dicom")}
    for name, syntax in (
        ("rle", uid.RLELossless),
        ("jpeg-ls", uid.JPEGLSLossless),
        ("jpeg-2000", uid.JPEG2000Lossless),
    ):
        packed = pydicom.dcmread(io.BytesIO(_saved(dataset)))
        packed.compress(syntax, generate_instance_uid=False)
        found[name] = (_saved(packed), "application/dicom")
    deflated = pydicom.dcmread(io.BytesIO(_saved(dataset)))
    deflated.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    found["deflated"] = (_saved(deflated), "application/dicom")
    picture = Image.fromarray((np.indices((24, 24)).sum(0) * 5).astype(np.uint8))
    for name in ("png", "jpeg", "tiff"):
        buffer = io.BytesIO()
        picture.save(buffer, name)
        found[name] = (buffer.getvalue(), f"image/{name}")
    deep = np.indices((24, 24)).sum(0).astype(np.uint16) * 900
    options: tuple[dict[str, Any], ...] = (
        {"tile": (16, 16), "compression": "lzw", "bigtiff": True},
        {"byteorder": ">"},
    )
    for number, chosen in enumerate((*options, {"compression": "deflate", "rowsperstrip": 5})):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, deep, **chosen)
        found[f"tiff-{number}"] = (buffer.getvalue(), "image/tiff")
    found["png-deep"] = (imagecodecs.png_encode(np.dstack([deep] * 4)), "image/png")
    volume = nib.Nifti1Image(np.indices((12, 12, 3)).sum(0).astype(np.int16), np.diag([1.0, 1.0, 5.0, 1.0]))
    found["nifti"] = (volume.to_bytes(), "application/nifti")
    return found


def _saved(dataset: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _mutated(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([0, 1, 1, 2, 5, 30])):
        if not changed:
            break
        # Heads decide most: half of the changes are there.
        at = chance.randrange(min(len(changed), 1200) if chance.random() < 0.5 else len(changed))
        match chance.randrange(7):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at : at + 4] = struct.pack(
                    "<I", chance.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF, 0x80000000])
                )
            case 2:
                del changed[at : at + chance.randint(1, 64)]
            case 3:
                changed[at:at] = changed[at : at + chance.randint(1, 256)]
            case 4:
                changed[at : at + 2] = chance.randbytes(2)
            case 5:
                del changed[at:]
            case 6:
                changed[at:at] = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" * chance.randint(1, 40)  # items within items
    return bytes(changed)


def _zip(chance: random.Random, samples: dict[str, tuple[bytes, str]]) -> bytes:
    names = (
        "../../evil",
        "/etc/passwd",
        "C:\\evil",
        "a/../../b",
        "..\\..\\b",
        "x" * 300,
        f"{CANARY}.dcm",
        "a",
        "DICOMDIR",
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    ) as archive:
        for number in range(chance.choice([0, 1, 3, 40])):
            name = f"{number}" if chance.random() < 0.7 else f"{chance.choice(names)}{number}"
            archive.writestr(name, _mutated(chance, chance.choice(list(samples.values()))[0]))
    return buffer.getvalue()


def _bomb(chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    match chance.randrange(4):
        case 0:  # much of nothing
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for number in range(chance.choice([1, 4])):
                    archive.writestr(str(number), bytes(4 * 2**20))
        case 1:  # many of nothing
            with zipfile.ZipFile(buffer, "w") as archive:
                for number in range(100):
                    archive.writestr(str(number), b"")
        case 2:  # one within the other
            inner = zlib.compress(bytes(2 * 2**20))
            for _ in range(4):
                with zipfile.ZipFile(nested := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr("0", inner)
                inner = nested.getvalue()
            return inner
        case _:  # a volume that is said to be large, in gzip
            head = bytearray(nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes())
            head[40:56] = struct.pack("<8h", 3, 32767, 32767, chance.choice([1, 32767]), 1, 1, 1, 1)
            packer = zlib.compressobj(1, zlib.DEFLATED, 31)
            return packer.compress(bytes(head) + bytes(4 * 2**20)) + packer.flush()
    return buffer.getvalue()


def _form(chance: random.Random, samples: dict[str, tuple[bytes, str]]) -> bytes:
    parts = []
    for _ in range(chance.choice([0, 1, 2, 20])):
        name = chance.choice(["file", "file", "file", "other", "../x", ""])
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="../{CANARY}"\r\n\r\n'
        parts.append(
            b"--b\r\n" + disposition.encode() + _mutated(chance, chance.choice(list(samples.values()))[0]) + b"\r\n"
        )
    return _mutated(chance, b"".join(parts) + b"--b--\r\n") if chance.random() < 0.5 else b"".join(parts) + b"--b--\r\n"


def _job(chance: random.Random) -> bytes:
    places = ("/etc", "s3://other/x", "../x", "file:///etc", "\0", "x" * 2000, "s3://archive/ct/../..", 7, None, [], {})
    keys = ("source", "manifest", "destination", "model", "profiles", "pacs", "x")
    request = {key: chance.choice(places) for key in keys if chance.random() < 0.6}
    return _mutated(chance, json.dumps(request).encode())
