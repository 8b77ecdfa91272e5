"""The search for canaries finds one wherever it was planted, and only there."""

import gzip
import io
import sqlite3
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rayseg.data.synthetic import slice_bytes
from tests.canaries import KEYWORDS, PLACES, Allowed, Canaries, Search

TEXT = "Zqxkv000f^Zqxkv000g"


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", data)
    return buffer.getvalue()


def parquet(column: pa.Array, metadata: dict | None = None) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"found": column})
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue()


def sqlite(folder: Path) -> bytes:
    with sqlite3.connect(folder / "made.db") as connection:
        connection.execute("create table t (a text)")
        connection.execute("insert into t values (?)", [f"patient {TEXT} came"])
    data = (folder / "made.db").read_bytes()
    (folder / "made.db").unlink()
    return data


def png(compressed: bool) -> bytes:
    buffer, told = io.BytesIO(), PngInfo()
    told.add_text("Comment", f"of {TEXT}, taken", zip=compressed)
    Image.new("L", (8, 8)).save(buffer, "PNG", pnginfo=told)
    return buffer.getvalue()


PLANTED = {
    "a line of a log": lambda folder: f"2026 INFO read /x/{TEXT}.dcm\n".encode(),
    "in capitals": lambda folder: TEXT.upper().encode(),
    "UTF-16": lambda folder: TEXT.encode("utf-16"),
    "UTF-16, the other order": lambda folder: TEXT.encode("utf-16-be") + b"\0",
    "gzip": lambda folder: gzip.compress(TEXT.encode()),
    "zip": lambda folder: zipped(TEXT.encode()),
    "gzip in a zip": lambda folder: zipped(gzip.compress(TEXT.encode())),
    "Parquet, text": lambda folder: parquet(pa.array([None, TEXT])),
    "Parquet, bytes": lambda folder: parquet(pa.array([TEXT.encode()])),
    "Parquet, repeated": lambda folder: parquet(pa.array([TEXT, TEXT]).dictionary_encode()),
    "Parquet, nested": lambda folder: parquet(pa.array([[{"a": 1, "b": TEXT}], None, []])),
    "Parquet, metadata": lambda folder: parquet(pa.array([1]), {"k": TEXT}),
    "SQLite": sqlite,
    "PNG": lambda folder: png(False),
    "PNG, deflated": lambda folder: png(True),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_canary_is_found(tmp_path: Path, kind: str) -> None:
    canaries = Canaries()
    assert canaries.new("PatientName", "PN") == TEXT
    (tmp_path / "clean").write_bytes(b"Zqxkv is not enough")
    assert Search(canaries).folder(tmp_path) == []
    (tmp_path / "planted").write_bytes(PLANTED[kind](tmp_path))
    assert {(leak.path, leak.kind) for leak in Search(canaries).folder(tmp_path)} == {("planted", "PatientName")}


def test_one_in_a_name_is_found(tmp_path: Path) -> None:
    canaries = Canaries()
    (tmp_path / canaries.new(PLACES)).mkdir()
    assert [leak.place for leak in Search(canaries).folder(tmp_path)] == ["name"]


def test_what_is_allowed_is_allowed_there_alone(tmp_path: Path) -> None:
    canaries = Canaries()
    name, place = canaries.new("PatientName", "PN"), canaries.new(PLACES)
    table = pa.table({"uri": [f"/{place}/1.dcm"], "detail": ["fine"]})
    pq.write_table(table, tmp_path / "manifest.parquet")
    allowed = [Allowed("manifest.parquet", "needed to read it", "uri", (PLACES,))]
    assert Search(canaries, allowed).folder(tmp_path) == []
    for spoiled in ({"uri": [name]}, {"detail": [place]}):
        pq.write_table(pa.table(table.to_pydict() | spoiled), tmp_path / "manifest.parquet")
        assert len(Search(canaries, allowed).folder(tmp_path)) == 1


def test_a_date_is_no_part_of_a_digest(tmp_path: Path) -> None:
    canaries = Canaries()
    date = canaries.new("PatientBirthDate", "DA")
    (tmp_path / "digest").write_text(f"a{date}b 3{date} {date}7f")
    assert Search(canaries).folder(tmp_path) == []
    (tmp_path / "date").write_text(f"born ({date}), or {date[:4]}")
    assert [leak.kind for leak in Search(canaries).folder(tmp_path)] == ["PatientBirthDate"]


def test_a_study_is_filled_and_stays_readable() -> None:
    dataset = pydicom.dcmread(io.BytesIO(slice_bytes(7, 32)))
    canaries = Canaries()
    canaries.fill(dataset, "somebody")
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    again = pydicom.dcmread(io.BytesIO(buffer.getvalue()))
    assert len(KEYWORDS) >= 50
    for keyword in KEYWORDS:
        assert any(part.lower() in canaries.told for part in str(again[keyword].value).split("^")), keyword
    assert len(canaries.told) > 75
