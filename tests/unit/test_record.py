"""What an evaluation leaves in a run: a real MLflow store (SQLite), rows made by hand, no model."""

import csv
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayseg import storage
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice
from rayseg.evaluation.record import Record, read_truth, set_tag
from rayseg.records import Reason, Reject
from rayseg.tracking import runs

SIDE = 16


def row(folder: Path, patient: str, number: int, prediction: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """A row as the scorer makes it, of an image and a mask that lie in `folder`."""
    name = f"{patient}-{number}.png"
    for kind, pixels in (("images", np.full((SIDE, SIDE), 50 * number, np.uint8)), ("masks", truth)):
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / name)
    tp = int((prediction & truth).sum())
    fp, fn = int(prediction.sum()) - tp, int(truth.sum()) - tp
    return {
        "row_id": f"id-{name}", "patient_key": patient, "reason": None, "detail": None,
        "uri": str(folder / "images" / name), "frame": None,
        "masks": [{"uri": str(folder / "masks" / name), "label": None}],
        "tp": [tp], "fp": [fp], "fn": [fn], "tn": [truth.size - tp - fp - fn],
        "prediction": zlib.compress(prediction.tobytes()) if tp + fp + fn else None,
    }  # fmt: skip


def block(rows: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:rows, :4] = 1
    return mask


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the module, as making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    made = [row(tmp_path, "healthy", 1, block(0), block(0))]
    for number, patient in enumerate(("worst", "poor", "fair", "best"), start=1):
        made.append(row(tmp_path, patient, 1, block(1), block(1)))  # small, found
        made.append(row(tmp_path, patient, 2, block(2 * number), block(8)))  # large, found in part
    return made


def test_pictures_are_of_the_largest_slices_from_the_worst_case_to_the_best(
    rows: list[dict[str, Any]], tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []

    def drawn(image_HW: np.ndarray, truth: np.ndarray, prediction: np.ndarray, title: str) -> bytes:
        titles.append(title)
        assert truth.sum() == 8 * 4
        assert image_HW.shape == prediction.shape == (SIDE, SIDE)
        return title.encode()

    monkeypatch.setattr("rayseg.tracking.figures.overlay", drawn)
    record = Record("test", Labels())
    for one in rows:
        record.add(one)
    run_id = runs.start(tracking, "record", "run")
    artifacts = record.log(tracking, run_id, Preprocess(size=(8, 8)), overlays=3)
    # Dice of the large slices: 2 * 2n / (2n + 8) for n = 1 .. 4.
    assert titles == ["case worst · Dice 0.40", "case fair · Dice 0.86", "case best · Dice 1.00"]
    assert [storage.read(uri).decode() for uri in artifacts.overlays] == titles
    table = list(csv.DictReader(io.StringIO(storage.read(artifacts.cases_table).decode())))
    assert [line["patient_key"] for line in table] == ["worst", "poor", "fair", "best", "healthy"]
    assert [line["dice"] for line in table] == ["0.500000", "0.714286", "0.875000", "1.000000", ""]
    logged = runs.client(tracking).get_run(run_id).data.metrics
    assert logged["test/cases_true_negative"] == 1
    assert logged["test/cases_scored"] == 4
    assert logged["test/rejected"] == 0
    assert logged["test/dice_per_case"] == pytest.approx((1 / 2 + 5 / 7 + 7 / 8 + 1) / 4)


def test_several_classes_are_told_one_by_one_and_together(tmp_path: Path, tracking: str) -> None:
    rows = [row(tmp_path, patient, 1, block(2), block(4)) for patient in ("one", "two")]
    for number, one in enumerate(rows):  # a second class: found whole in the first patient, nowhere in the second
        for name, value in (("tp", 5 if number == 0 else 0), ("fp", 0), ("fn", 0), ("tn", 251 if number == 0 else 256)):
            one[name].append(value)
    record = Record("test", Labels(("a", "b")))
    for one in rows:
        record.add(one)
    run_id = runs.start(tracking, "record", "run")
    artifacts = record.log(tracking, run_id, Preprocess(), overlays=1)
    metrics = runs.client(tracking).get_run(run_id).data.metrics
    assert metrics["test/dice_pooled/a"] == pytest.approx(2 / 3)
    assert metrics["test/dice_pooled/b"] == 1
    assert metrics["test/dice_pooled"] == pytest.approx(5 / 6)
    assert (metrics["test/cases_true_negative/b"], metrics["test/cases_scored"]) == (1, 3)
    table = [line.split(",") for line in storage.read(artifacts.cases_table).decode().splitlines()]
    assert [(line[0], line[1], line[7]) for line in table[1:]] == [
        ("one", "a", "0.666667"),
        ("two", "a", "0.666667"),
        ("one", "b", "1.000000"),
        ("two", "b", ""),
    ]


def test_rejects_are_listed_without_their_uris(rows: list[dict[str, Any]], tracking: str) -> None:
    record = Record("val", Labels())
    record.add(rows[0])
    refused = {"row_id": "id-x", "patient_key": "key", "uri": "/in/DOE^JANE/1.dcm", "masks": []}
    record.add(refused | {"reason": "not_found", "detail": "object"})
    run_id = runs.start(tracking, "record", "run")
    artifacts = record.log(tracking, run_id, Preprocess(), overlays=2)
    assert artifacts.overlays == []
    table = storage.read(artifacts.cases_table.replace("cases.csv", "rejects.csv")).decode()
    assert table.splitlines() == ["row_id,patient_key,reason,detail", "id-x,key,not_found,object"]
    metrics = runs.client(tracking).get_run(run_id).data.metrics
    assert metrics["val/rejected"] == 1
    assert "val/dice_pooled" not in metrics  # nothing to find and nothing found: undefined, so not logged


def test_the_tag_names_the_rows_and_labels_whatever_their_order(rows: list[dict[str, Any]], tracking: str) -> None:
    def tag(of: list[dict[str, Any]], labels: Labels) -> str:
        record = Record("test", labels)
        for one in of:
            record.add(one)
        run_id = runs.start(tracking, "record", "run")
        record.log(tracking, run_id, Preprocess(), overlays=0)
        return str(runs.client(tracking).get_run(run_id).data.tags[set_tag("test")])

    first = tag(rows, Labels())
    assert tag(rows[::-1], Labels()) == first
    assert tag(rows[1:], Labels()) != first
    assert tag(rows, Labels(threshold=3)) != first


def test_truth_is_empty_without_a_mask_and_refused_on_another_grid(tmp_path: Path) -> None:
    Image.fromarray(block(3) * 200).save(tmp_path / "mask.png")
    uri = str(tmp_path / "mask.png")
    row = {"masks": [{"uri": uri, "label": None}], "frame": None}
    slice, other = (Slice(np.zeros((SIDE, SIDE + more), np.uint8), 1.0, 0.0, None) for more in (0, 1))
    assert np.array_equal(read_truth(row, slice, Labels(threshold=127)), block(3))
    assert not np.any(read_truth(row | {"masks": []}, slice, Labels()))
    refused = read_truth(row, other, Labels())
    assert isinstance(refused, Reject)
    assert refused.reason is Reason.MASK_MISMATCH
