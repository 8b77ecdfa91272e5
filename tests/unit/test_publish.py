"""What an evaluation leaves in a run: a real MLflow store (SQLite), images made by hand, a predictor that paints."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
from PIL import Image

from rayseg import storage
from rayseg.config import plain
from rayseg.data.conformal import VolumeErrors
from rayseg.data.labels import Labels
from rayseg.data.prepared import PreparedSet
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import Known, Range
from rayseg.dicom.reading import Slice
from rayseg.evaluation import cases
from rayseg.evaluation import publish as publish_module
from rayseg.evaluation.cases import Tolerance
from rayseg.evaluation.publish import Artifacts, add_to_card, publish, set_tag
from rayseg.evaluation.record import Record
from rayseg.evaluation.scorer import Scorer
from rayseg.inference.heldout import read_truth
from rayseg.inference.predictor import Judgement
from rayseg.records import Reason, Reject
from rayseg.tracking import card, judged, limits, registry, runs

SIDE = 16
OPTIONS = {"resamples": 100, "min_patients": 3}


class Painted:
    """Stands for a `Predictor`: what it finds is painted into the image, 100 for each class."""

    def __init__(self, classes: int) -> None:
        self.neighbours, self.color, self._classes = 0, False, classes
        self.bundle = type("Bundle", (), {"preprocess": Preprocess()})
        self.known = Known()

    def judge_stack(self, stack: Sequence[Slice | Reject | None]) -> Judgement | Reject:
        (slice,) = stack
        assert slice is not None
        if isinstance(slice, Reject):
            return slice
        mask = (slice.stored // 100).astype(np.uint8)
        channels = [0.1 + 0.8 * (mask == index) for index in range(self._classes + 1)]
        chosen = channels[1:] if self._classes == 1 else channels
        found_KHW = np.stack(chosen).astype(np.float32)
        return Judgement(slice, mask, Preprocess().apply(slice), lambda: found_KHW)


def row(folder: Path, patient: str, number: int, prediction: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """A row of a prepared set, of an image and a mask that lie in `folder`."""
    name = f"{patient}-{number}.png"
    for kind, pixels in (("images", prediction * 100 + number), ("masks", truth)):
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / name)
    return {
        "row_id": f"id-{name}", "patient_key": patient, "series_key": "s", "neighbours": [],
        "uri": str(folder / "images" / name), "frame": None,
        "masks": [{"uri": str(folder / "masks" / name), "label": None}],
    }  # fmt: skip


def block(rows: int, label: int = 1) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:rows, :4] = label
    return mask


def recorded(split: str, labels: Labels, rows: Sequence[dict[str, Any]]) -> Record:
    record = Record(split, labels)
    scorer: Any = Scorer(Painted(len(labels.names)), labels, Tolerance())  # type: ignore[arg-type]
    for patient in dict.fromkeys(one["patient_key"] for one in rows):
        record.add(scorer.score([one for one in rows if one["patient_key"] == patient]))
    return record


def published(tracking: str, record: Record, version: registry.ModelVersion, **wanted: int) -> Artifacts:
    held_out = PreparedSet("", (8, 8, 1), Preprocess(size=(8, 8)), record.labels, {}, "d" * 64, {}, {}, 1)
    pictures = {"overlays": 0, "worst": 0} | wanted
    findings = record.findings(**OPTIONS)
    made = publish(
        tracking, version.run_id, version.uri, held_out, record, findings, tolerance="2 mm, 2 px", **pictures
    )
    add_to_card(tracking, version, held_out, record, findings, tolerance="2 mm, 2 px")
    return made


def version_of(tracking: str) -> registry.ModelVersion:
    run_id = runs.start(tracking, "publish", "run")
    return registry.ModelVersion("m", "1", "models:/<m>/1", run_id, "")


def metrics_of(tracking: str, version: registry.ModelVersion) -> dict[str, float]:
    return dict(runs.client(tracking).get_run(version.run_id).data.metrics)


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


def test_tables_pictures_report_and_metrics_of_one_class(
    rows: list[dict[str, Any]], tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []

    def drawn(image_HW: np.ndarray, truth: np.ndarray, prediction: np.ndarray, title: str) -> bytes:
        titles.append(title)
        assert truth.sum() == 8 * 4
        assert image_HW.shape == prediction.shape == (SIDE, SIDE)
        return title.encode()

    monkeypatch.setattr("rayseg.tracking.figures.overlay", drawn)
    version = version_of(tracking)
    artifacts = published(tracking, recorded("test", Labels(), rows), version, overlays=3, worst=2)
    # Dice of the large slices: 2 * 2n / (2n + 8) for n = 1 .. 4; of the cases with the small one: (4n + 2) / (2n + 10).
    worst = "case worst · Dice 0.50 · of this slice 0.40"
    spread = [worst, "case fair · Dice 0.88 · of this slice 0.86", "case best · Dice 1.00 · of this slice 1.00"]
    assert titles == [*spread, worst, "case poor · Dice 0.71 · of this slice 0.67"]
    assert [storage.read(uri).decode() for uri in artifacts.overlays] == spread
    folder = artifacts.cases_table.removesuffix("cases.csv")
    assert storage.read(f"{folder}worst-02.png").decode() == titles[4]

    told = list(csv.DictReader(io.StringIO(storage.read(artifacts.cases_table).decode())))
    assert [line["patient_key"] for line in told] == ["worst", "poor", "fair", "best", "healthy"]
    assert [line["dice"] for line in told] == ["0.5", "0.714286", "0.875", "1", ""]
    table = cases.read(storage.read(f"{folder}cases.parquet"))
    assert table.schema.equals(cases.CASES)
    assert table["patient_key"].to_pylist() == ["best", "fair", "healthy", "poor", "worst"]
    assert table["slices"].to_pylist() == [2, 2, 1, 2, 2]
    groups = list(csv.DictReader(io.StringIO(storage.read(f"{folder}subgroups.csv").decode())))
    assert {(line["class"], line["by"]) for line in groups} == {("lesion", "size")}

    logged = metrics_of(tracking, version)
    assert logged["test/cases_true_negative"] == 1
    assert logged["test/cases_scored"] == 4
    assert logged["test/rejected"] == 0
    assert logged["test/dice_per_case"] == pytest.approx((1 / 2 + 5 / 7 + 7 / 8 + 1) / 4)
    assert logged["test/dice_per_case_low"] < logged["test/dice_per_case"] < logged["test/dice_per_case_high"]
    assert logged["test/brier"] == pytest.approx((0.01 * (9 * 256 - 48) + 0.81 * 48) / (9 * 256))  # 48 pixels missed

    # Risks 0 (nothing to find), 0, 1/8, 2/7, 1/2. All that is found is equally sure, and where nothing is it has no
    # entropy: the first has risk 0, each of the others the mean of the four.
    assert logged["test/aurc_optimum"] == pytest.approx(0.0652976, abs=1e-6)
    assert logged["test/aurc_at_random"] == pytest.approx(0.1821429, abs=1e-6)
    assert logged["test/aurc_entropy"] == pytest.approx(0.1237054, abs=1e-6)
    assert logged["test/eaurc_entropy"] == pytest.approx(0.1237054 - 0.0652976, abs=1e-6)
    assert "test/aurc_pairwise_dice" not in logged

    page = storage.read(artifacts.report).decode()
    assert "Does it know when it fails?" in page
    assert "not a medical device" in page
    assert "http://" not in page and "https://" not in page  # noqa: PT018
    assert all(words in page for words in ("dice_pooled", "hd95_px_per_case", f"2. {titles[4]}", "nothing to find"))
    assert page.count("data:image/png;base64,") == 3 + 2  # three charts, two cases


def test_several_classes_are_told_one_by_one_and_together(tmp_path: Path, tracking: str) -> None:
    # Class b: found whole in the first patient, nowhere in the second.
    both, only = block(4) + block(16, 2) - block(4, 2), block(4)
    found = block(2) + block(16, 2) - block(4, 2)
    labels = Labels(("a", "b"), values={1: "a", 2: "b"})
    rows = [row(tmp_path, "one", 1, found, both), row(tmp_path, "two", 1, block(2), only)]
    version = version_of(tracking)
    artifacts = published(tracking, recorded("test", labels, rows), version)
    metrics = metrics_of(tracking, version)
    assert metrics["test/dice_pooled/a"] == pytest.approx(2 / 3)
    assert metrics["test/dice_pooled/b"] == 1
    assert metrics["test/brier/a"] == pytest.approx((0.81 * 16 + 0.01 * (512 - 16)) / 512)  # 16 pixels of 512 missed
    assert metrics["test/average_precision/b"] == 1
    assert metrics["test/dice_pooled"] == pytest.approx(5 / 6)
    assert (metrics["test/cases_true_negative/b"], metrics["test/cases_scored"]) == (1, 3)
    told = csv.DictReader(io.StringIO(storage.read(artifacts.cases_table).decode()))
    assert [(line["patient_key"], line["class"], line["dice"]) for line in told] == [
        ("one", "a", "0.666667"),
        ("two", "a", "0.666667"),
        ("one", "b", "1"),
        ("two", "b", ""),
    ]
    page = storage.read(artifacts.report).decode()
    assert all(f"<th>{name}</th>" in page for name in ("all classes", "a", "b"))
    assert "models:/&lt;m&gt;/1" in page
    assert "models:/<m>/1" not in page


def test_of_equally_bad_cases_the_one_with_most_wrong_pixels_is_first(tmp_path: Path) -> None:
    missed = {"a": block(2), "b": block(6), "c": block(4)}
    rows = [row(tmp_path, patient, 1, block(0), truth) for patient, truth in missed.items()]
    ranked = publish_module._ranked(recorded("test", Labels(), [*rows, row(tmp_path, "d", 1, block(1), block(1))]))
    assert [patient["wrongest"]["patient_key"] for patient in ranked] == ["b", "c", "a", "d"]


def test_rejects_are_listed_without_their_uris(rows: list[dict[str, Any]], tracking: str) -> None:
    gone = {**rows[0], "row_id": "id-x", "uri": "/in/DOE^JANE/1.png", "masks": []}
    version = version_of(tracking)
    record = recorded("val", Labels(), [rows[0], gone])
    artifacts = published(tracking, record, version, overlays=2)
    assert artifacts.overlays == []
    table = storage.read(artifacts.cases_table.replace("cases.csv", "rejects.csv")).decode()
    assert table.splitlines() == [
        "row_id,patient_key,reason,detail",
        "id-x,healthy,not_found,object: FileNotFoundError",
    ]
    metrics = metrics_of(tracking, version)
    assert metrics["val/rejected"] == 1
    assert "val/dice_pooled" not in metrics  # nothing to find and nothing found: undefined, so not logged


def test_the_tag_names_the_rows_labels_and_masks_whatever_their_order(
    rows: list[dict[str, Any]], tracking: str, tmp_path: Path
) -> None:
    def tag(of: list[dict[str, Any]], labels: Labels) -> str:
        return recorded("test", labels, of).digest()

    first = tag(rows, Labels())
    assert tag(rows[::-1], Labels()) == first
    assert tag(rows[1:], Labels()) != first
    assert tag(rows, Labels(threshold=3)) != first
    # A mask of as many pixels elsewhere is another truth, and one without any, too; the prediction is none.
    poor = next(index for index, one in enumerate(rows) if one["patient_key"] == "poor")
    for truth in (block(4)[::-1].copy(), block(0)):
        folder = tmp_path / str(truth.sum())
        folder.mkdir()
        moved = row(folder, "poor", 1, block(1), truth) | {"row_id": rows[poor]["row_id"]}
        changed = tag([*rows[:poor], moved, *rows[poor + 1 :]], Labels())
        assert changed != first
        assert changed.split("-")[0] == first.split("-")[0], "the rows are the same"
    other = row(tmp_path / "0", "poor", 1, block(5), block(1)) | {"row_id": rows[poor]["row_id"]}
    assert tag([*rows[:poor], other, *rows[poor + 1 :]], Labels()) == first
    version = version_of(tracking)
    published(tracking, recorded("test", Labels(), rows), version)
    tags = runs.client(tracking).get_run(version.run_id).data.tags
    assert (tags[set_tag("test")], tags["rayseg.test_tolerance"]) == (first, str(Tolerance()))


def test_the_card_is_written_anew_with_each_split(rows: list[dict[str, Any]], tracking: str) -> None:
    version = version_of(tracking)
    made = card.Card(
        name="m 0.1", run_id=version.run_id, labels=("lesion",), shape=(8, 8, 1), threshold=0.4321,
        threshold_chosen=True, digest="d" * 16, rows={"train": 7, "val": 2, "test": 3}, preprocess=plain(Preprocess()),
        label_settings=plain(Labels()), model={"preset": "unet"}, epochs=3, best_epoch=2, batch_size=8, rate=1e-3,
        schedule="cosine", precision="float32", seed=1, validation={"val/dice_pooled": 0.5},
    )  # fmt: skip
    before = card.log(tracking, made)
    assert "None yet" in before
    assert "from a probability of 0.4321" in before
    client = runs.client(tracking)
    client.create_registered_model("m")
    client.create_model_version("m", "file:///nowhere", version.run_id, description=before)
    for split in ("test", "test"):
        published(tracking, recorded(split, Labels(), rows), version)
    text = client.get_model_version("m", "1").description
    assert text == runs.read_bytes(tracking, version.run_id, card.MARKDOWN).decode()
    logged = metrics_of(tracking, version)
    low, high = (logged[f"test/dice_pooled_{end}"] for end in ("low", "high"))
    line = f"| dice_pooled | {logged['test/dice_pooled']:.4g} | {low:.4g} to {high:.4g} |"
    assert text.count(line) == text.count("## Scores on test\n") == 1
    assert "None yet" not in text
    assert "test: 5 patients only" in text
    assert "| lesion | size: nothing to find | 1 |" not in text  # it has no Dice
    assert "| val/dice_pooled | 0.5000 |" in text
    assert "### test: which flags find failures" in text
    assert f"at random {logged['test/aurc_at_random']:.4g}, at best {logged['test/aurc_optimum']:.4g}" in text
    assert f"| entropy | {logged['test/aurc_entropy']:.4g} |" in text


@pytest.mark.parametrize(("classes", "splits"), [(1, ("test",)), (5, ("test", "val")), (40, ("test", "train", "val"))])
def test_a_description_fits_the_registry_and_the_run_has_the_whole_card(
    tracking: str, classes: int, splits: tuple[str, ...]
) -> None:
    ends = (0.7123, 0.6512, 0.7734)
    names = tuple(f"class number {number}" for number in range(classes))
    scores = dict.fromkeys(("dice_pooled", "dice_per_case", "lesion_f1"), ends)
    evaluations = tuple(
        card.Evaluation(
            split, "d" * 16, 40, 1200, 0, "2 px", scores, dict.fromkeys(names, scores),
            [
                card.Group(name, "size", size, 12, {"dice_per_case": ends})
                for name in names
                for size in ("small", "large")
            ],
            card.Failures({"entropy": ends}, 0.3, 0.1, dict.fromkeys(names, (19, 20))),
        )
        for split in splits
    )  # fmt: skip
    version = version_of(tracking)
    model = card.Card(
        name="m 0.1", run_id=version.run_id, labels=names, shape=(8, 8, 1), threshold=0.5, threshold_chosen=False,
        digest="d" * 16, rows={"train": 7}, preprocess=plain(Preprocess()), label_settings=plain(Labels(names)),
        model={"preset": "unet"}, epochs=3, best_epoch=2, batch_size=8, rate=1e-3, schedule="cosine",
        precision="float32", seed=1, validation={f"val/dice_pooled/{name}": 0.5 for name in names} | {"val/loss": 0.25},
        evaluations=evaluations,
    )  # fmt: skip
    column = SqlModelVersion.__table__.c.description.type
    assert column.length == limits.DESCRIPTION
    description = card.log(tracking, model)
    whole = runs.read_bytes(tracking, version.run_id, card.MARKDOWN).decode()
    assert len(description) <= column.length
    for text in ("not a medical device", "| val/loss | 0.2500 |", *(f"## Scores on {split}" for split in splits)):
        assert text in description
    assert all(whole.count(f"| {name} | size: small | 12 |") == len(splits) for name in names)
    assert whole.count(f"{names[0]} 19 of 20") == len(splits)
    assert (description == whole) == (len(whole) <= column.length)
    assert (card.MARKDOWN in description) == (description != whole)


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


def test_what_several_are_judged_by_is_found_by_who_they_are(tracking: str) -> None:
    first, second, third = (
        registry.ModelVersion("m", number, f"models:/m/{number}", runs.start(tracking, "judged", number), number)
        for number in "123"
    )
    one, later = (
        Known(Range(modalities=("CT",), pairwise_dice=dice), VolumeErrors((1.0, 1.0), (19, 19))) for dice in (0.5, 0.6)
    )
    assert judged.find(tracking, [first, second], None) is None
    for known in (one, later):
        judged.keep(tracking, runs.start(tracking, "judged", "evaluate"), [first, second], None, known)
    assert judged.find(tracking, [first, second], None) == later
    for versions, mirror in (([first, third], None), ([first, second], "both"), ([first], None)):
        assert judged.find(tracking, versions, mirror) is None
