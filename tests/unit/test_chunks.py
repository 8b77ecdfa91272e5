"""A prepared volume is one file: any box of it comes back, and only the chunks of that box are read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseg import storage
from rayseg.data import chunks, ranges

SHAPE = (21, 70, 130)


def voxels(shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal(shape).astype(np.float16), rng.integers(0, 4, shape, np.uint8)


def written(path: Path, image: np.ndarray, mask: np.ndarray, edges: tuple[int, int, int]) -> chunks.Index:
    with chunks.Writer(path, image.shape, edges) as writer:
        for image_HW, mask_HW in zip(image, mask, strict=True):
            writer.add(image_HW, mask_HW)
        writer.finish({"told": "this", "spacing_mm": [1, 2, 3]}, np.arange(5))
    return chunks.read_index(str(path))


def padded(array: np.ndarray, first: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """The box by numpy's indices alone: 0 around the array."""
    box = np.zeros(size, array.dtype)
    numbers = [np.arange(low, low + count) for low, count in zip(first, size, strict=True)]
    inside = [(one >= 0) & (one < length) for one, length in zip(numbers, array.shape, strict=True)]
    kept = [one[within] for one, within in zip(numbers, inside, strict=True)]
    box[np.ix_(*(np.flatnonzero(within) for within in inside))] = array[np.ix_(*kept)]
    return box


@pytest.fixture(scope="module", params=[(8, 32, 64), (1, 64, 64), (21, 70, 130)], ids=str)
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, chunks.Index]:
    path = tmp_path_factory.mktemp("volume") / "v.arrow"
    return path, written(path, *voxels(), request.param)


@settings(max_examples=60, deadline=None)
@given(
    first=st.tuples(*(st.integers(-20, length + 10) for length in SHAPE)),
    size=st.tuples(*(st.integers(1, length + 30) for length in SHAPE)),
)
def test_any_box_comes_back_with_nothing_around_the_volume(
    volume: tuple[Path, chunks.Index], first: tuple[int, ...], size: tuple[int, ...]
) -> None:
    path, index = volume
    image, mask = index.read(str(path), first, size)
    expected = [padded(array, first, size) for array in voxels()]
    assert np.array_equal(image, expected[0])
    assert np.array_equal(mask, expected[1])
    assert (image.dtype, mask.dtype) == (np.float16, np.uint8)


def test_what_is_told_comes_back(volume: tuple[Path, chunks.Index]) -> None:
    _, index = volume
    assert index.shape == SHAPE
    assert index.told == {"told": "this", "spacing_mm": [1, 2, 3]}
    assert index.spacing_mm == (1, 2, 3)
    assert index.places.tolist() == [0, 1, 2, 3, 4]


def test_only_the_chunks_of_the_box_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.arrow"
    index = written(path, *voxels((32, 128, 256)), (8, 32, 64))  # 4 x 4 x 4 chunks
    asked: list[tuple[int, int]] = []
    original = ranges.read
    monkeypatch.setattr(ranges, "read", lambda uri, spans: asked.extend(spans) or original(uri, spans))
    index.read(str(path), (7, 33, 0), (2, 20, 65))  # 2 x 1 x 2 of them
    assert len(asked) == 4
    assert sum(end - first for first, end in asked) < 1.2 * path.stat().st_size * 4 / 64


def test_the_file_is_one_that_arrow_reads(tmp_path: Path) -> None:
    path = tmp_path / "v.arrow"
    image, mask = voxels()
    written(path, image, mask, (8, 32, 64))
    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    boxes = [row for row in rows if row["image"] is not None]
    assert len(boxes) == 3 * 3 * 3
    assert np.array_equal(np.frombuffer(boxes[0]["image"], np.float16).reshape(8, 32, 64), image[:8, :32, :64])
    last = np.frombuffer(boxes[-1]["mask"], np.uint8).reshape(5, 6, 2)
    assert np.array_equal(last, mask[16:, 64:, 128:])


def test_equal_volumes_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / name, *voxels(), (8, 32, 64))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.arrow"
    written(path, *voxels(), (8, 32, 64))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole volume"):
        chunks.read_index(str(path))


def test_chunks_are_no_deeper_than_a_patch() -> None:
    assert chunks.edges((1, 256, 256)) == (1, 64, 64)
    assert chunks.edges((12, 256, 256))[0] == 12
    assert chunks.edges((128, 128, 128))[0] == 32


def test_close_ranges_come_with_one_request(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(400_000)
    (tmp_path / "x").write_bytes(data)
    spans = [(0, 10), (10, 20), (300, 1000), (200_000, 200_001), (399_000, 400_000)]
    assert [bytes(piece) for piece in ranges.read(str(tmp_path / "x"), spans)] == [data[a:b] for a, b in spans]
    assert ranges._together(spans) == [(0, 1000), (200_000, 200_001), (399_000, 400_000)]


def test_an_object_that_ends_before_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayseg.retry.sleep", lambda seconds: None)
    (tmp_path / "x").write_bytes(bytes(100))
    with pytest.raises(OSError, match="ends before"):
        ranges.read(str(tmp_path / "x"), [(90, 101)])
    with pytest.raises(FileNotFoundError):
        ranges.read(str(tmp_path / "y"), [(0, 1)])


def test_it_reads_from_s3_too(s3_store: str, tmp_path: Path) -> None:
    image, mask = voxels()
    written(tmp_path / "v", image, mask, (8, 32, 64))
    uri = f"{s3_store}/volumes/v.arrow"
    storage.write_file(uri, tmp_path / "v")
    found = chunks.read_index(uri).read(uri, (3, 10, 20), (12, 50, 100))
    assert np.array_equal(found[0], image[3:15, 10:60, 20:120])
    assert np.array_equal(found[1], mask[3:15, 10:60, 20:120])
