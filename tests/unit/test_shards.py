"""Which rows a task prepares: whole objects, read once whatever shares them, in shards that the manifest decides."""

import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseg import storage
from rayseg.data import accepted, manifest, synthetic
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.data.samples import Making
from rayseg.data.shards import limited, planned
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.records import MANIFEST
from tests.unit.writing import tasks_of, written

MAKING = Making(Preprocess((8, 8), percentiles=(0, 100)), Labels(), 4)
SHAPE = (6, 5, 12)  # columns, rows, slices


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is read."""
    counted: Counter[str] = Counter()
    read = storage.read
    monkeypatch.setattr(storage, "read", lambda uri, length=None: counted.update([Path(uri).name]) or read(uri, length))
    return counted


def volume(path: Path, values: np.ndarray) -> str:
    nib.Nifti1Image(values, np.eye(4)).to_filename(path)
    return str(path)


def rows_of(image: str, masks: list[str], patient: str) -> list[dict[str, Any]]:
    data = Path(image).read_bytes()
    named = [{"uri": uri, "label": None, "bytes": None, "etag": None} for uri in masks]
    item = manifest.Item(image, Path(image).name, len(data), named, patient)
    return manifest.rows(item, data, Pseudonyms(b"k"))


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def image_files(patients: list[str], **changes: Any) -> pa.Table:
    told = {"verdict": "ok", "kind": "image", "masks": [], "series_key": "s", **changes}
    return table_of([{**told, "uri": f"{number}.png", "patient_key": key} for number, key in enumerate(patients)])


@pytest.mark.parametrize("rows_per_shard", [5, 30, 256])
def test_each_file_is_read_once_whatever_the_shards(
    tmp_path: Path, reads: Counter[str], rows_per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images far apart in the manifest share a label, each image has another one of its own."""
    from rayseg.dicom import volumes

    decoded = []
    for name in ("image", "labels"):
        of = getattr(volumes, name)
        monkeypatch.setattr(volumes, name, lambda *data, of=of: decoded.append(1) or of(*data))
    rng = np.random.default_rng(1)
    rows = []
    for kind in ("t1", "t2"):
        for patient in "abc":
            marks = rng.random(SHAPE)
            shared, own = (tmp_path / f"{patient}{name}.nii.gz" for name in ("", kind + "-own"))
            volume(shared, (marks > 0.9).astype(np.uint8))
            volume(own, (marks < 0.1).astype(np.uint8))
            image = volume(tmp_path / f"{kind}-{patient}.nii.gz", rng.integers(0, 99, SHAPE).astype(np.int16))
            rows += rows_of(image, [str(shared), str(own)], patient)
    shards = written(table_of(rows), tmp_path, MAKING, rows_per_shard=rows_per_shard)
    assert [shard["rejects"] for shard in shards] == [[]] * len(shards)
    assert sum(shard["rows"] for shard in shards) == 6 * SHAPE[2]
    assert all(0 < shard["rows"] <= rows_per_shard for shard in shards)
    assert set(reads.values()) == {1}
    assert len(reads) == 6 + 3 + 6 == len(decoded)


def test_a_series_of_files_with_neighbours_and_many_segmentations_is_read_once(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayseg.data import masks

    parsed = []
    parse = masks.parse
    monkeypatch.setattr(masks, "parse", lambda data: parsed.append(1) or parse(data))
    names = [str(tmp_path / f"mask{number}.dcm") for number in range(6)]  # of the series, more than a few
    for name in names:
        Path(name).write_bytes(synthetic.slice_bytes(0, 16))  # an image is a mask, too
    rows = []
    for number in range(9):
        (tmp_path / f"{number}.dcm").write_bytes(synthetic.slice_bytes(number, 16))
        rows.append(
            {
                "uri": str(tmp_path / f"{number}.dcm"), "verdict": "ok", "kind": "dicom", "patient_key": "p",
                "series_key": "s", "instance_number": number, "masks": [{"uri": name, "label": None} for name in names],
            }
        )  # fmt: skip
    making = Making(Preprocess((4, 4), percentiles=None, neighbours=1), Labels(), 4)
    shards = written(table_of(rows), tmp_path, making, rows_per_shard=4)
    assert [shard["rows"] for shard in shards] == [3, 3, 3]
    assert reads == Counter([f"{number}.dcm" for number in range(9)] + [Path(name).name for name in names])
    assert len(parsed) == len(names)


def test_shards_that_stand_are_not_read_for(tmp_path: Path, reads: Counter[str]) -> None:
    rows = []
    for patient in "ab":
        image = volume(tmp_path / f"{patient}.nii", np.ones(SHAPE, np.int16))
        rows += rows_of(image, [image], patient)
    first = written(table_of(rows), tmp_path, MAKING, rows_per_shard=5)
    assert reads == Counter({"a.nii": 1, "b.nii": 1})
    reads.clear()
    (tmp_path / first[1]["path"]).unlink()
    assert written(table_of(rows), tmp_path, MAKING, rows_per_shard=5) == first
    assert reads == Counter({"a.nii": 1})


def test_training_rows_of_a_row_group_are_not_neighbouring_slices(tmp_path: Path) -> None:
    image = volume(tmp_path / "a.nii", np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE))
    for split, shuffled in (("train", True), ("val", False)):
        (shard,) = written(table_of(rows_of(image, [image], "a")), tmp_path, MAKING, split)
        frames = storage.read_table(str(tmp_path / shard["path"]))["frame"].to_pylist()
        assert sorted(frames) == list(range(SHAPE[2]))
        assert any(abs(one - two) > 2 for one, two in pairwise(frames)) == shuffled


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    rows_per_shard=st.integers(1, 50),
    data=st.data(),
)
def test_every_row_is_in_one_task_and_no_unit_in_two(
    sizes: list[int], rows_per_shard: int, data: st.DataObject
) -> None:
    count = len(sizes)
    rows = np.array(sizes)
    together = data.draw(st.none() | st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    splits = data.draw(st.lists(st.integers(-1, 1), min_size=count, max_size=count))
    limit = data.draw(st.none() | st.integers(1, int(rows.sum())))
    if together is not None:  # what is together is of one split
        splits = [splits[leader] for leader in together]
    first = np.cumsum(rows) - rows
    patients = np.repeat(np.arange(count), rows)
    leaders = None if together is None else np.array(together)
    units = accepted.Units(first, rows, np.arange(count), leaders, np.zeros(count, bool), [], set(), 1)
    taken = limited(patients, limit)
    tasks = planned(units, np.array(splits), ["one", "two"], taken, rows_per_shard)
    of_unit: dict[int, set[int]] = {}
    prepared = []
    for number, task in enumerate(tasks):
        every = np.concatenate([np.arange(*one) for one in task.ranges.tolist()])
        rows_of_task = every[task.numbers()]
        assert len(rows_of_task) == task.rows
        assert task.shards == -(-task.rows // rows_per_shard)
        prepared += rows_of_task.tolist()
        for row in rows_of_task:
            unit = int(patients[row])
            assert ["one", "two"][splits[unit]] == task.split
            of_unit.setdefault(unit if together is None else together[unit], set()).add(number)
    wanted = np.arange(rows.sum()) if taken is None else taken
    assert sorted(prepared) == [row for row in wanted.tolist() if splits[patients[row]] >= 0]
    assert all(len(tasks_of_unit) == 1 for tasks_of_unit in of_unit.values())
    for split in ("one", "two"):
        parts = [(task.part, task.shards) for task in tasks if task.split == split]
        assert [part for part, _ in parts] == [sum(n for _, n in parts[:at]) for at in range(len(parts))]


def test_units_are_series_volumes_and_image_files_that_share_a_mask(tmp_path: Path) -> None:
    def mask(name: str) -> list[dict[str, Any]]:
        return [{"uri": name, "label": None}]

    dicom = {"verdict": "ok", "kind": "dicom", "patient_key": "p", "masks": []}
    image = {**dicom, "kind": "image", "series_key": "folder"}
    rows = [
        *({**dicom, "series_key": "s", "uri": name} for name in "ab"),
        *({**dicom, "series_key": f"t-{stack}", "uri": "c", "frame": stack} for stack in range(3)),  # stacks of one
        *({**image, "uri": "v", "frame": frame} for frame in range(4)),
        {**image, "uri": "x", "masks": mask("m")},
        {**image, "uri": "rejected", "verdict": "rejected"},
        {**image, "uri": "y", "masks": mask("m")},
        {**image, "uri": "z"},
        {**image, "uri": "w", "masks": mask("far")},
        {**image, "uri": "other", "patient_key": "q", "masks": mask("far")},
        {**image, "uri": "u", "masks": [*mask("n"), *mask("far")]},
    ]
    storage.write_table(str(tmp_path / "m"), table_of(rows))
    units = accepted.write(tmp_path / "m", tmp_path / "rows")
    assert units.rows.tolist() == [2, 3, 4, 2, 1, 1, 1, 1]
    assert [units.patients[number] for number in units.patient] == [*"pppppp", "q", "p"]
    assert units.together is not None
    assert units.together.tolist() == [0, 1, 2, 3, 4, 5, 6, 5]  # but not of two patients
    assert units.loose.tolist() == [False, False, False, True, True, True, True, True]
    read = accepted.read(str(tmp_path / "rows"), np.array([[9, 11], [0, 1]]))
    assert read["uri"].to_pylist() == ["x", "y", "a"]


def test_rows_beyond_a_batch_are_found(tmp_path: Path) -> None:
    (task,) = tasks_of(image_files(["p"] * 5000), tmp_path, limit=3, rows_per_shard=4)
    rows = accepted.read(str(tmp_path / "rows.arrow"), task.ranges).take(pa.array(task.numbers()))
    assert rows["uri"].to_pylist() == ["833.png", "2500.png", "4166.png"]


def test_an_older_manifest_is_refused(tmp_path: Path) -> None:
    storage.write_table(str(tmp_path / "m"), image_files(["p"]).drop_columns(["etag"]))
    with pytest.raises(ValueError, match=r"prepare\.manifest: it lacks etag; catalog again"):
        accepted.write(tmp_path / "m", tmp_path / "rows")


def test_planning_takes_little_memory(tmp_path: Path) -> None:
    """Python's and numpy's; Arrow's is a piece of the manifest."""
    masks = [{"uri": f"s3://bucket/some/folder/{number}.png", "label": None} for number in range(40_000)]
    rows = image_files([str(number // 100) for number in range(40_000)]).drop_columns(["masks"])
    rows = rows.append_column(
        MANIFEST.field("masks"), pa.array([[mask] for mask in masks], MANIFEST.field("masks").type)
    )
    del masks
    tracemalloc.start()
    try:
        tasks = tasks_of(rows.select(MANIFEST.names), tmp_path)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(task.rows for task in tasks) == 40_000
    assert held < 50 * 40_000


def test_rows_do_not_depend_on_what_else_is_in_their_shard(tmp_path: Path) -> None:
    rows = []
    for patient in "abc":
        values = np.full(SHAPE, ord(patient), np.int16) * np.arange(SHAPE[2], dtype=np.int16)
        image = volume(tmp_path / f"{patient}.nii", values)
        rows += rows_of(image, [image], patient)
    found = []
    for name, ordered, size in (("one", rows, 256), ("two", rows[::-1], 7)):
        folder = tmp_path / name
        folder.mkdir()
        shards = [folder / one["path"] for one in written(table_of(ordered), folder, MAKING, rows_per_shard=size)]
        found.append({row["row_id"]: row for path in shards for row in storage.read_table(str(path)).to_pylist()})
    assert found[0] == found[1]
    assert len(found[0]) == 36
