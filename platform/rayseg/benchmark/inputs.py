"""Inputs of the benchmarks: a 512x512 CT slice in several transfer syntaxes, and prepared sets of any size."""

import gzip
import io
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate

from rayseg import config, storage
from rayseg.data import phantom, synthetic
from rayseg.data.labels import Labels
from rayseg.data.prepared import DESCRIPTION, PATIENTS, VERSION
from rayseg.data.preprocess import Preprocess
from rayseg.records import PREPARED

SIZE = 512
SYNTAXES = {
    "uncompressed": uid.ExplicitVRLittleEndian,
    "rle": uid.RLELossless,
    "jpeg_ls": uid.JPEGLSLossless,
    "jpeg_lossless": uid.JPEGLosslessSV1,
    "jpeg_2000": uid.JPEG2000Lossless,
}
_PRECISION = 12


def ct_slice(syntax: str) -> bytes:
    """The same phantom head, 12 bits of 16, in the named transfer syntax."""
    dataset = pydicom.dcmread(io.BytesIO(synthetic.slice_bytes(0, SIZE)))
    transfer_syntax = SYNTAXES[syntax]
    if syntax == "jpeg_lossless":
        dataset.PixelData = encapsulate([_jpeg_lossless(dataset.pixel_array)])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = transfer_syntax
    elif syntax != "uncompressed":
        dataset.compress(transfer_syntax, generate_instance_uid=False)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def ct_mask() -> bytes:
    """The mask of `ct_slice`, a PNG."""
    _, label = phantom.render(phantom.head(0, 0, 1), 0, SIZE)
    buffer = io.BytesIO()
    Image.fromarray(label).save(buffer, "PNG")
    return buffer.getvalue()


def ct_volume(slices: int) -> tuple[bytes, bytes]:
    """So many slices of the phantom head, and their masks, as gzipped NIfTI volumes."""
    volumes = []
    head = phantom.head(0, 0, slices)
    planes = [phantom.render(head, number, SIZE) for number in range(slices)]
    for stored, dtype in zip(zip(*planes, strict=True), (np.int16, np.uint8), strict=True):
        volume_CRS = np.stack(stored).astype(dtype).T
        volumes.append(gzip.compress(nib.Nifti1Image(volume_CRS, np.eye(4)).to_bytes(), 1, mtime=0))
    return volumes[0], volumes[1]


def _jpeg_lossless(stored: np.ndarray) -> bytes:
    """ITU-T T.81 process 14, selection value 1; a category's Huffman code is its number in five bits."""
    values = stored.astype(np.int64)
    predicted = np.empty_like(values)
    predicted[:, 1:], predicted[1:, 0], predicted[0, 0] = values[:, :-1], values[:-1, 0], 1 << (_PRECISION - 1)
    differences = (values - predicted).ravel().tolist()
    words = []
    for difference in differences:
        size = abs(difference).bit_length()
        extra = difference if difference > 0 else difference + (1 << size) - 1
        words.append(f"{size:05b}" + (f"{extra:0{size}b}" if size else ""))
    bits = "".join(words)
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    rows, columns = stored.shape
    frame = struct.pack(">HBHHBBBB", 11, _PRECISION, rows, columns, 1, 1, 0x11, 0)
    categories = bytes(range(17))
    table = struct.pack(">HB", 19 + len(categories), 0) + bytes([0, 0, 0, 0, 17]) + bytes(11) + categories
    start = struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0)
    return b"\xff\xd8\xff\xc3" + frame + b"\xff\xc4" + table + b"\xff\xda" + start + scan + b"\xff\xd9"


def prepared_set(folder: Path, rows: int, size: int = 32, rows_per_shard: int = 256, validation_rows: int = 0) -> str:
    """A prepared set of noise with so many rows for training and for validation."""
    row_group_rows = 16
    wanted = {"train": rows, "val": validation_rows, "test": 0}
    shards: dict[str, dict[str, int]] = {split: {} for split in wanted}
    for seed, (split, count) in enumerate(wanted.items()):
        table = _noise(split, min(count, rows_per_shard), size, seed)
        for part, start in enumerate(range(0, count, rows_per_shard)):
            path = f"split={split}/part-{part:05d}.parquet"
            shards[split][path] = min(rows_per_shard, count - start)
            storage.write_table(str(folder / path), table.slice(0, shards[split][path]), row_group_rows)
    description = {
        "version": VERSION,
        "digest": f"{rows:064x}",
        "preprocess": config.plain(Preprocess(size=(size, size))),
        "labels": config.plain(Labels()),
        "shape": [size, size, 1],
        "rows": wanted,
        "shards": {split: list(paths) for split, paths in shards.items()},
        "shard_rows": {split: list(paths.values()) for split, paths in shards.items()},
        "row_group_rows": row_group_rows,
    }
    storage.write(str(folder / PATIENTS), b"patient_key,part,split,rows,positive\n")
    storage.write_json(str(folder / DESCRIPTION), description)
    return str(folder)


def _noise(split: str, rows: int, size: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    samples = [
        {
            "row_id": f"{split}{number:060x}",
            "patient_key": f"{split}{number // 8:016x}",
            "split": split,
            "foreground_pixels": size,
            "image": random.integers(0, 256, (size, size, 1), np.uint8).tobytes(),
            "mask": random.integers(0, 2, (size, size), np.uint8).tobytes(),
        }
        for number in range(rows)
    ]
    return pa.Table.from_pylist(samples, schema=PREPARED)
