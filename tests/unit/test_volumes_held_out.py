"""Slices of a set of volumes beside their truth: what a model of volumes makes of whole series, row by row."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayseg.data import synthetic
from rayseg.data.labels import Labels
from rayseg.dicom.reading import Slice, read_slice
from rayseg.evaluation.cases import Tolerance
from rayseg.evaluation.scorer import Scorer
from rayseg.inference.heldout import COLUMNS, HeldOut, Judged, slice_rows
from rayseg.inference.predictor import load_any
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.records import Reason, Reject
from tests import bundles
from tests.kills import undecodable

SLICES = 8


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> VolumePredictor:
    found = load_any(bundles.write_volume_bundle(tmp_path_factory.mktemp("model") / "bundle", 55.0))
    assert isinstance(found, VolumePredictor)
    return found


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    synthetic.write_studies(str(folder), patients=2, slices=SLICES, size=64, seed=3)
    return folder


def volumes(studies: Path) -> list[dict[str, object]]:
    """As rows of a set of volumes name them: one of each patient, its slices in order along the normal."""
    rows = []
    for patient in sorted((studies / "images").iterdir()):
        files = sorted(patient.glob("*.dcm"), key=lambda path: place_mm(path))
        masks = [studies / "masks" / patient.name / f"{path.stem}.png" for path in files]
        slices = [
            {"uri": str(path), "frame": None, "masks": [{"uri": str(mask), "label": None}]}
            for path, mask in zip(files, masks, strict=True)
        ]
        rows.append({"patient_key": patient.name, "series_key": f"{patient.name}-s", "slices": slices})
    return rows


def place_mm(path: Path) -> float:
    slice = read_slice(path.read_bytes())
    assert isinstance(slice, Slice)
    assert slice.header is not None
    return slice.header.geometry.image_position_mm[2]  # type: ignore[index]


@pytest.mark.parametrize("step", [1, -1])
def test_each_slice_has_the_mask_of_its_volume_beside_its_truth(
    predictor: VolumePredictor, studies: Path, step: int
) -> None:
    """Whatever way the rows of a series go."""
    sets = [volume | {"slices": volume["slices"][::step]} for volume in volumes(studies)]  # type: ignore[index]
    rows = slice_rows(sets)
    assert all(set(row) == {*COLUMNS} for row in rows)
    assert len({row["row_id"] for row in rows}) == 2 * SLICES
    judged = list(HeldOut(predictor, Labels()).judged(rows))
    assert len(judged) == len(rows)
    for first in (0, SLICES):
        some = rows[first : first + SLICES]
        read = [read_slice(Path(row["uri"]).read_bytes()) for row in some]
        expected = predictor.predict([one for one in read if isinstance(one, Slice)])
        for row, one, mask in zip(some, judged[first : first + SLICES], expected, strict=True):
            assert isinstance(one, Judged)
            assert np.array_equal(one.prediction, mask)
            assert np.array_equal(one.truth, np.asarray(Image.open(row["masks"][0]["uri"])) > 0)
            assert one.look.pixel_share == 1 / mask.size


def test_a_patient_is_scored_by_its_volume(predictor: VolumePredictor, studies: Path, tmp_path: Path) -> None:
    """Against Dice of the whole volume; a slice that cannot be decoded is a reject, and the others stay."""
    (volume, *_) = volumes(studies)
    broken = tmp_path / "broken.dcm"
    slices = volume["slices"]
    assert isinstance(slices, list)
    broken.write_bytes(undecodable(Path(slices[2]["uri"]).read_bytes()))
    slices[2] = slices[2] | {"uri": str(broken)}
    rows = slice_rows([volume])
    judged = list(HeldOut(predictor, Labels()).judged(rows))
    assert isinstance(judged[2], Reject)
    assert judged[2].reason == Reason.DECODE_FAILED
    known = [one for one in judged if isinstance(one, Judged)]
    assert len(known) == SLICES - 1
    found, truth = np.stack([one.prediction for one in known]) > 0, np.stack([one.truth for one in known]) > 0
    scored = Scorer(predictor, Labels(), Tolerance()).score(rows)
    (case,) = scored["cases"]
    assert (case["tp"], case["fp"], case["fn"]) == (
        np.count_nonzero(found & truth), np.count_nonzero(found & ~truth), np.count_nonzero(~found & truth),
    )  # fmt: skip
    assert [one["reason"] for one in scored["rejects"]] == ["decode_failed"]
