"""How far volumes of validation are off, from source objects, against volumes that are counted by hand."""

import dataclasses
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pydicom
import pytest
from PIL import Image

from rayseg import storage
from rayseg.data import conformal, phantom, synthetic
from rayseg.data.conformal import VolumeErrors
from rayseg.data.labels import Labels
from rayseg.data.prepared import PreparedSet
from rayseg.data.preprocess import Preprocess
from rayseg.inference import calibrate
from rayseg.inference.predictor import Prediction, Predictor, mask_png
from rayseg.records import PREPARED
from rayseg.tracking import bundle
from tests.bundles import write_bundle

Validated = tuple[Path, PreparedSet, dict[str, list[list[dict[str, Any]]]]]
SIZE, SLICES, PATIENTS, STEP_MM = 32, 3, 20, 7.0


def series(folder: Path, patient: str, key: str, seed: int) -> list[dict[str, Any]]:
    """Rows of a prepared set, of a phantom's slices and masks of their bleeding, which lie in `folder`."""
    anatomy = phantom.head(seed, 0, SLICES)
    rows = []
    for k in range(SLICES):
        image, mask = phantom.render(anatomy, k, SIZE)[:2]
        dataset = pydicom.dcmread(io.BytesIO(synthetic._ct(anatomy, k, image)))
        dataset.ImagePositionPatient[2] = k * STEP_MM
        stream = io.BytesIO()
        dataset.save_as(stream)
        uri, mask_uri = (str(folder / f"{key}-{k}.{kind}") for kind in ("dcm", "png"))
        storage.write(uri, stream.getvalue())
        storage.write(mask_uri, mask_png((mask > 0).astype(np.uint8)))
        rows.append(
            dict.fromkeys(PREPARED.names)
            | {"row_id": uri, "patient_key": patient, "series_key": key, "uri": uri, "neighbours": []}
            | {"masks": [{"uri": mask_uri, "label": None}], "foreground_mm3": 1.0}
        )
    return rows


def by_hand_ml(predictor: Predictor, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Predicted and true: pixels times spacing times the distance of slices."""
    volumes = np.zeros(2)
    for row in rows:
        data = storage.read(row["uri"])
        (found,) = predictor.segment([data])
        assert isinstance(found, Prediction)
        truth = np.asarray(Image.open(row["masks"][0]["uri"]))
        spacing = pydicom.dcmread(io.BytesIO(data)).PixelSpacing
        volumes += np.array([found.mask.sum(), truth.sum()]) * float(spacing[0]) * float(spacing[1]) * STEP_MM / 1000
    return float(volumes[0]), float(volumes[1])


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Validated:
    """A bundle, a set of 20 patients, the first of two series, and their rows."""
    folder = tmp_path_factory.mktemp("calibrate")
    of_patients = {
        f"p{number:02d}": [
            series(folder, f"p{number:02d}", f"s{number:02d}{part}", 10 * number + part)
            for part in range(1 + (not number))
        ]
        for number in range(PATIENTS)
    }
    rows = [row for of in of_patients.values() for one in of for row in one]
    path = "split=val/part-00000.parquet"
    storage.write_table(str(folder / path), pa.Table.from_pylist(rows, schema=PREPARED))
    prepared = PreparedSet(
        str(folder), (SIZE, SIZE, 1), Preprocess(size=(SIZE, SIZE)), Labels(), {"val": len(rows)}, "", {"val": (path,)},
        {}, 16,
    )  # fmt: skip
    return write_bundle(folder / "bundle", 170.0, size=SIZE), prepared, of_patients


def test_errors_are_those_of_volumes_counted_by_hand(
    validated: Validated,
) -> None:
    folder, prepared, of_patients = validated
    predictor = Predictor.load(folder)
    expected = []
    for of in of_patients.values():
        volumes = [by_hand_ml(predictor, rows) for rows in of]
        expected.append(max(abs(np.cbrt(found) - np.cbrt(true)) for found, true in volumes) * np.cbrt(750 / np.pi))
    assert len({round(one, 3) for one in expected}) > 10, "else the comparison would say little"
    made = calibrate.volume_errors(folder, prepared)
    assert made.patients == (PATIENTS, PATIENTS)
    assert made.radius_mm[0] == pytest.approx(max(expected), abs=2e-4)  # the 20th of 20
    assert made.radius_mm[1] == made.radius_mm[0], "one class is all foreground"


def test_too_few_patients_and_series_that_are_not_whole_have_none(
    validated: Validated,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, prepared, of_patients = validated
    with caplog.at_level(logging.INFO):
        assert calibrate.volume_errors(folder, dataclasses.replace(prepared, limited=True)) == VolumeErrors()
        rows = [row for of in of_patients.values() for one in of for row in one]
        unplaced = [{**row, "foreground_mm3": None} if row["patient_key"] in ("p01", "p02") else row for row in rows]
        storage.write_table(str(tmp_path / prepared.shards["val"][0]), pa.Table.from_pylist(unplaced, schema=PREPARED))
        fewer = dataclasses.replace(prepared, uri=str(tmp_path))
        assert calibrate.volume_errors(folder, fewer) == VolumeErrors()
    assert "18 validation patients have volumes, 19 are needed for 95 %" in caplog.text
    # Objects that are away leave their patient out.
    gone = [{**row, "uri": str(tmp_path / "gone.dcm")} if row["patient_key"] == "p01" else row for row in rows]
    storage.write_table(str(tmp_path / prepared.shards["val"][0]), pa.Table.from_pylist(gone, schema=PREPARED))
    assert calibrate.volume_errors(folder, fewer).patients == (PATIENTS - 1, PATIENTS - 1)


def test_a_bundle_keeps_them_and_an_older_one_has_none(
    validated: Validated,
) -> None:
    folder, *_ = validated
    before = bundle.load(folder)
    assert before.volumes == VolumeErrors()
    errors = conformal.errors([[1.25] * 19, [1.5] * 18])
    bundle.calibrate(folder, errors)
    after = bundle.load(folder)
    assert (after.volumes, after.threshold) == (errors, before.threshold)
    assert after.digest != before.digest
    assert Predictor.load(folder).known.volumes == errors
    spoiled = (folder / "bundle.json").read_text().replace("1.25", "0.25")
    (folder / "bundle.json").write_text(spoiled)
    with pytest.raises(ValueError, match="digest"):
        bundle.load(folder)
