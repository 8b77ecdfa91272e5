"""Stacks of neighbouring slices: their order, their ends, what is missing, and what a single slice gets."""

import asyncio
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import keras
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from rayseg import storage
from rayseg.config import load
from rayseg.data import accepted, stacks, synthetic
from rayseg.data.labels import Labels
from rayseg.data.prepare import PrepareConfig, _check
from rayseg.data.preprocess import Preprocess, Window
from rayseg.data.samples import Making
from rayseg.demo.pipeline import DemoConfig
from rayseg.dicom import pixels
from rayseg.dicom.reading import Slice, read_slice
from rayseg.inference import predictor as predictor_module
from rayseg.inference.heldout import HeldOut, Judged
from rayseg.inference.predictor import Predictor
from rayseg.records import MANIFEST, PREPARED, Reason, Reject
from rayseg.tracking import bundle
from serving import routes
from serving.health import Checks
from serving.messages import ModelInfo
from serving.replica import ModelReplica
from serving.segment import Settings
from serving.swap import Loaded
from serving.workers import Workers
from tests.unit.writing import written

UNITS = Window(center=128, width=256)  # value v of 0..255 becomes v


def flat(value: int) -> Slice:
    return Slice(np.full((4, 4), value, np.uint8), 1.0, 0.0, None)


def values(image_HWC: np.ndarray) -> list[int]:
    """Of each channel the one value that it has."""
    assert (image_HWC == image_HWC[:1, :1]).all()
    return image_HWC[0, 0].tolist()


def test_a_window_slides_along_a_series_and_holds_no_more_than_itself() -> None:
    taken = []

    def series() -> Any:
        for number in range(5):
            taken.append(number)
            yield number

    stack = stacks.along(series(), 1)
    assert next(stack) == (None, 0, 1)
    assert taken == [0, 1]
    assert list(stack) == [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, None)]
    assert list(stacks.along("ab", 3)) == [
        (None, None, None, "a", "b", None, None),
        (None, None, "a", "b", None, None, None),
    ]
    assert list(stacks.along("ab", 0)) == [("a",), ("b",)]
    assert list(stacks.along("", 2)) == []
    assert stacks.alone("a", 1) == (None, "a", None)


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ([10, 20, 30, 40, 50], [10, 20, 30, 40, 50]),
        ([None, 20, 30, 40, None], [20, 20, 30, 40, 40]),
        ([None, None, 30, None, None], [30, 30, 30, 30, 30]),
        ([10, None, 30, None, 50], [10, 30, 30, 30, 50]),  # the one behind a missing one is still itself
    ],
)
def test_the_channels_run_from_below_to_above_and_the_nearest_stands_in(
    stack: list[int | None], expected: list[int]
) -> None:
    preprocess = Preprocess((4, 4), UNITS, None, neighbours=2)
    assert preprocess.channels == 5
    image_HWC = preprocess.apply(*(None if value is None else flat(value) for value in stack))
    assert values(image_HWC) == expected
    assert values(preprocess.centre(image_HWC)) == [30]


def test_each_slice_has_its_channels_together_by_its_own_values() -> None:
    two = Preprocess((4, 4), (UNITS, Window(center=40, width=80)), None, neighbours=1)
    assert two.channels == 6
    image_HWC = two.apply(flat(10), flat(20), flat(60))
    by_slice = [Preprocess((4, 4), two.window, None).apply(flat(value)) for value in (10, 20, 60)]
    assert np.array_equal(image_HWC, np.concatenate(by_slice, axis=-1))
    assert np.array_equal(two.centre(image_HWC), by_slice[1])
    # Percentiles are each slice's own, and so is its scale: a brighter or larger neighbour changes nothing of others.
    ramp = np.arange(16, dtype=np.uint8).reshape(4, 4)
    stretched = Preprocess((4, 4), percentiles=(0, 100), neighbours=1)
    larger = np.arange(64, dtype=np.uint8).reshape(8, 8)
    one, bright, large = (Slice(stored, 1.0, 0.0, None) for stored in (ramp, ramp * 10, larger))
    image_HWC = stretched.apply(bright, one, large)
    assert np.array_equal(image_HWC[..., 0], image_HWC[..., 1])
    assert np.array_equal(image_HWC[..., 2:], Preprocess((4, 4), percentiles=(0, 100)).apply(large))
    with pytest.raises(ValueError, match=r"preprocess\.neighbours"):
        Preprocess(neighbours=-1)


def test_a_neighbour_that_cannot_be_used_is_missing_unless_the_store_failed() -> None:
    one, two = flat(1), flat(2)
    broken, lost = Reject(Reason.DECODE_FAILED), Reject(Reason.READ_FAILED, "object: TimeoutError")
    assert stacks.usable([broken, one, two]) == [None, one, two]
    assert stacks.usable([one, broken, two]) == broken
    assert stacks.usable([one, two, lost]) == Reject(Reason.READ_FAILED, "neighbour: object: TimeoutError")


def manifest(*rows: tuple[str, str, str], **changes: Any) -> pa.Table:
    """Accepted rows: patient, series and URI; sizes are 100, 101, ..."""
    told = [
        {
            "verdict": "ok",
            "kind": "dicom",
            "patient_key": patient,
            "series_key": series,
            "uri": uri,
            "bytes": 100 + number,
            "etag": f"etag {number}",
            "image_position_mm": [0.0, 0.0, float(number)],
            "masks": [{"uri": f"{uri}.png", "label": None, "bytes": 7, "etag": f"mask {number}"}],
            **{name: values[number] for name, values in changes.items()},
        }
        for number, (patient, series, uri) in enumerate(rows)
    ]
    return pa.Table.from_pylist(told, schema=MANIFEST)


def uris(neighbours: pa.Array) -> list[list[str | None]]:
    return [[one and one["uri"] for one in row] for row in neighbours.to_pylist()]


def test_neighbours_are_those_of_the_series_in_the_manifests_order() -> None:
    table = manifest(*((*"ps", name) for name in "abcd"), *((*"pt", name) for name in "ef"), ("q", "t", "g"))
    found, sizes, etags = stacks.beside(table, range(7), 1)
    assert uris(found) == [
        [None, "b"], ["a", "c"], ["b", "d"], ["c", None], [None, "f"], ["e", None], [None, None],
    ]  # fmt: skip
    assert sizes.to_pylist()[1] == [100, 102]
    assert etags.to_pylist()[1] == ["etag 0", "etag 2"]
    # Of chosen rows too: the others are neighbours all the same.
    found, sizes, etags = stacks.beside(table, [0, 2], 2)
    assert uris(found) == [[None, None, "b", "c"], ["a", "b", "d", None]]
    assert sizes.to_pylist() == [[None, None, 101, 102], [100, 101, 103, None]]
    assert uris(stacks.beside(table, [0, 2], 0)[0]) == [[], []]
    assert found.type == PREPARED.field("neighbours").type


def test_frames_are_slices_and_what_nothing_orders_has_no_neighbours() -> None:
    rows = [(*"ps", "volume")] * 3
    of_volume = manifest(*rows, frame=[0, 1, 2], kind=["image"] * 3)
    (row,) = stacks.beside(of_volume, [1], 1)[0].to_pylist()
    assert row == [{"uri": "volume", "frame": 0}, {"uri": "volume", "frame": 2}]
    unplaced = {"image_position_mm": [None] * 4}
    numbered = manifest(*((*"ps", name) for name in "abcd"), instance_number=[1, 2, 3, 4], **unplaced)
    assert uris(stacks.beside(numbered, [1], 1)[0]) == [["a", "c"]]
    nothing = manifest(*((*"ps", name) for name in "abcd"), instance_number=[1, 2, None, None], **unplaced)
    assert uris(stacks.beside(nothing, range(4), 1)[0]) == [[None, "b"], ["a", None], [None, None], [None, None]]


def test_image_files_have_no_order(tmp_path: Path) -> None:
    files = manifest(*((*"ps", name) for name in "ab"), kind=["image"] * 2)
    storage.write_table(str(tmp_path / "m"), files)
    units = accepted.write(tmp_path / "m", tmp_path / "rows")
    with pytest.raises(ValueError, match=r"prepare\.preprocess\.neighbours: 2 of 2 rows are image files"):
        _check(units, PrepareConfig("m", "o", Preprocess(neighbours=1)))
    _check(units, PrepareConfig("m", "o"))
    assert uris(stacks.beside(files, [0, 1], 0)[0]) == [[], []]


def test_another_object_in_the_place_of_one_makes_another_shard(tmp_path: Path) -> None:
    def paths(table: pa.Table, neighbours: int = 1) -> list[str]:
        making = Making(Preprocess((4, 4), UNITS, None, neighbours=neighbours), Labels(), 16)
        shards = written(table, tmp_path, making, limit=2)  # nothing is there: all that there are is names
        assert [reject["uri"] for shard in shards for reject in shard["rejects"]] == ["b", "d"]
        return [shard["path"] for shard in shards]

    rows = [(*"ps", name) for name in "abcd"]
    first = paths(manifest(*rows))
    assert paths(manifest(*rows)) == first
    assert paths(manifest(*rows, bytes=[100, 101, 7, 103])) != first  # c, which the limit leaves out
    assert paths(manifest(*rows[:2], (*"ps", "x"), rows[3])) != first
    alone = paths(manifest(*rows), neighbours=0)
    # Of the same length, with another ETag: a slice (b), a neighbour that the limit leaves out (c), a mask (of d).
    etags = [f"etag {number}" for number in range(4)]
    assert paths(manifest(*rows, etag=[etags[0], "new", *etags[2:]]), neighbours=0) != alone
    assert paths(manifest(*rows, etag=[*etags[:2], "new", etags[3]])) != first
    assert paths(manifest(*rows, etag=[*etags[:2], "new", etags[3]]), neighbours=0) == alone
    masks = [
        [{"uri": f"{name}.png", "label": None, "bytes": 7, "etag": f"mask {at}"}] for at, name in enumerate("abcd")
    ]
    assert paths(manifest(*rows, masks=masks)) == first
    masks[3][0]["etag"] = "corrected"
    assert paths(manifest(*rows, masks=masks)) != first
    # Stores that give no ETag.
    assert paths(manifest(*rows, etag=[None] * 4)) == paths(manifest(*rows, etag=[None] * 4))
    assert alone != first
    assert paths(manifest(*rows, bytes=[100, 101, 7, 103]), neighbours=0) == alone


def test_a_task_reads_what_the_next_sample_needs_too_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    names = [str(tmp_path / f"{number}.png") for number in range(5)]
    for number, name in enumerate(names):
        if number != 3:
            Image.new("L", (4, 4), 10 * (number + 1)).save(name)
    Path(names[3]).write_bytes(b"no image")
    reads = []
    read_each = storage.read_each
    monkeypatch.setattr(storage, "read_each", lambda uris: read_each(reads.append(uri) or uri for uri in uris))
    table = manifest(*((*"ps", name) for name in names), masks=[[]] * 5)
    (shard,) = written(table, tmp_path, Making(Preprocess((4, 4), UNITS, None, neighbours=1), Labels(), 16))
    assert reads == names
    assert [reject["uri"] for reject in shard["rejects"]] == [names[3]]
    rows = storage.read_table(str(tmp_path / shard["path"])).to_pylist()
    found = [values(np.frombuffer(row["image"], np.uint8).reshape(4, 4, 3)) for row in rows]
    assert found == [[10, 10, 20], [10, 20, 30], [20, 30, 30], [50, 50, 50]]
    assert rows[0]["neighbours"] == [None, {"uri": names[1], "frame": None}]


def test_each_frame_is_decoded_once_for_all_stacks(
    enhanced: Any, as_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "a.dcm")
    words_NHW = np.repeat(np.arange(6, dtype=np.uint16), 16).reshape(6, 4, 4)
    Path(uri).write_bytes(as_file(enhanced(words_NHW, intercepts=[0] * 6)))  # slope 2: 0, 2, 4, ...
    reads, decoded = [], []
    read_each, frame_of = storage.read_each, pixels.PixelData.frame
    monkeypatch.setattr(storage, "read_each", lambda uris: read_each(reads.append(uri) or uri for uri in uris))
    monkeypatch.setattr(pixels.PixelData, "frame", lambda self, at: decoded.append(at) or frame_of(self, at))
    table = manifest(*[(*"ps", uri)] * 6, frame=list(range(6)), masks=[[]] * 6)
    (shard,) = written(table, tmp_path, Making(Preprocess((4, 4), UNITS, None, neighbours=1), Labels(), 16))
    assert (reads, decoded) == ([uri], list(range(6)))
    rows = storage.read_table(str(tmp_path / shard["path"])).to_pylist()
    found = [values(np.frombuffer(row["image"], np.uint8).reshape(4, 4, 3)) for row in rows]
    assert found == [[0, 0, 2], [0, 2, 4], [2, 4, 6], [4, 6, 8], [6, 8, 10], [8, 10, 10]]


# A model that looks at neighbours, and gets a slice alone


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Input((32, 32, 3), dtype="uint8"), keras.layers.Rescaling(1 / 255)])
    model.add(keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid"))
    preprocess = Preprocess((32, 32), Window(40, 80), None, neighbours=1)
    bundle.save(folder, model, preprocess, Labels(), 0.5, synthetic.slice_bytes(0, 64))
    return folder


def test_rows_of_a_volume_are_judged_from_one_reading_of_image_and_labels(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nibabel import Nifti1Image

    rng = np.random.default_rng(4)
    image, label = (str(tmp_path / f"{name}.nii.gz") for name in ("image", "label"))
    marks = rng.integers(0, 2, (32, 32, 6)).astype(np.uint8)
    Nifti1Image(rng.integers(0, 99, marks.shape).astype(np.int16), np.eye(4)).to_filename(image)
    Nifti1Image(marks, np.eye(4)).to_filename(label)
    reads = []
    read = storage.read
    monkeypatch.setattr(storage, "read", lambda uri, length=None: reads.append(uri) or read(uri, length))
    places = [{"uri": image, "frame": frame} if 0 <= frame < 6 else None for frame in range(-1, 7)]
    rows = [
        {**places[at], "neighbours": [places[at - 1], places[at + 1]], "masks": [{"uri": label, "label": None}]}  # type: ignore[dict-item]
        for at in range(1, 7)
    ]
    judged = list(HeldOut(Predictor.load(saved), Labels()).judged(rows))
    assert sorted(reads) == [image, label]
    for index, one in enumerate(judged):
        assert isinstance(one, Judged)
        # NIfTI's columns run to the right and its rows to the front, DICOM's to the left and the back.
        assert np.array_equal(one.truth, marks[::-1, ::-1, index].T)


def test_the_example_is_its_own_neighbours_and_verifies(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictor_module._main(str(saved))
    found = json.loads(capsys.readouterr().out)
    assert found["example_mask_sha256"] == bundle.describe(saved)["example_mask_sha256"]
    predictor = Predictor.load(saved)
    example = read_slice(predictor.bundle.example)
    assert isinstance(example, Slice)
    (alone,) = predictor.predict([example])
    repeated = predictor.predict([example] * 3)[1]
    assert 0 < alone.mean() < 1
    assert alone.tobytes() == repeated.tobytes() == predictor.segment_example().mask.tobytes()


def test_a_slice_alone_is_refused_with_a_reason_and_unreadable_bytes_with_theirs(saved: Path) -> None:
    slice = synthetic.slice_bytes(1, 64)
    found = predictor_module._load_pyfunc(str(saved)).predict(pd.DataFrame({"dicom": [slice, b"no image"]}))
    assert found["reason"].to_list() == ["needs_neighbours", "not_dicom"]
    assert found["mask_png"].to_list() == [None, None]
    assert "1 slices on each side" in found["detail"][0]


def test_the_service_answers_422_and_is_healthy(saved: Path) -> None:
    predictor = Predictor.load(saved)
    values = predictor.bundle
    info = ModelInfo("m", "1", None, "d", "r", values.labels.names, values.preprocess, values.threshold)
    loaded = Loaded(info, predictor, bundle.describe(saved)["example_mask_sha256"], 0.0)
    model = ModelReplica.__new__(ModelReplica)
    model._versions = SimpleNamespace(get=lambda wanted, load=True: loaded, current=loaded, shadow=None)
    model._workers = Workers(1, 8)
    model._checks = Checks(lambda: loaded, model._workers)
    app = routes.create(model, Settings(2**20))

    async def post(body: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://rayseg") as client:
            return await client.post("/v1/segment", content=body, headers={"content-type": "application/dicom"})

    refused = asyncio.run(post(synthetic.slice_bytes(1, 64)))
    assert refused.status_code == 422
    assert refused.json()["reason"] == "needs_neighbours"
    assert asyncio.run(post(b"no image")).json()["reason"] == "not_dicom"
    assert asyncio.run(model.health()).matches


def test_a_store_that_fails_for_a_neighbour_rejects_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for name in "ab":
        Image.new("L", (4, 4), 10).save(tmp_path / f"{name}.png")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    monkeypatch.setattr(
        storage,
        "read_each",
        lambda uris: (OSError("busy") if uri == b else io.FileIO(uri).read() for uri in uris),
    )
    table = manifest((*"ps", a), (*"ps", b), masks=[[]] * 2)
    making = Making(Preprocess((4, 4), UNITS, None, neighbours=1), Labels(), 16)
    (shard,) = written(table, tmp_path, making)
    assert [reject["detail"] for reject in shard["rejects"]] == ["neighbour: object: OSError", "object: OSError"]
    (shard,) = written(table.slice(0, 1), tmp_path, making)
    assert shard["rows"] == 1


def test_the_demo_refuses_what_its_service_would() -> None:
    with pytest.raises(ValueError, match=r"prepare\.preprocess\.neighbours: the demo asks .* single slices"):
        load(DemoConfig, None, Path(__file__).parents[2] / "configs/demo.yaml", ["prepare.preprocess.neighbours=1"])
