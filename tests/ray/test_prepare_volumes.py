"""Preparing volumes on a Ray cluster: the same bytes as in one process, CT's statistics too."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from rayseg import work
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.intensity import Intensity
from rayseg.data.labels import Labels
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.prepared import describe
from rayseg.data.split import Split
from rayseg.data.volume import VolumePreprocess

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_the_bytes_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        image = rng.integers(-200, 300, (14, 20, 18)).astype(np.int16)
        labels = (image > 250).astype(np.uint8)
        for name, values in (("images", image), ("labels", labels)):
            (tmp_path / name).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1.5, 2, 1])), tmp_path / name / f"{number}.nii.gz")
    layout = Layout(images="images/{case}.nii.gz", masks="labels/{case}.nii.gz")
    manifest = catalog(CatalogConfig(source=str(tmp_path), output=str(tmp_path / "m.parquet"), layout=layout)).manifest
    found = []
    for name in ("cluster", "process"):
        config = PrepareConfig(
            manifest=manifest,
            output=str(tmp_path / name),
            volume=VolumePreprocess((1.5, 1.5, 1.5), (8, 16, 16), Intensity(kind="ct")),
            labels=Labels(names=("bright",)),
            split=Split(val=0.3, test=0, stratify=True),
            rows_per_shard=20,
        )
        assert prepare(config).rows == 6
        volumes = {path.name: path.read_bytes() for path in (tmp_path / name).rglob("volume-*.arrow")}
        found.append((volumes, describe(config.output).volume))
        monkeypatch.setattr(work, "_joined", lambda: False)
    assert found[0] == found[1]
    assert len(found[0][0]) == 6
