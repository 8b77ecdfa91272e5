"""Training on volumes with real Ray Train workers: equal work gives equal weights, a killed worker changes nothing."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayseg.data.patches import Patches
from rayseg.data.prepared import describe
from rayseg.data.volume_augment import VolumeAugment
from rayseg.models.presets import NetworkConfig
from rayseg.training import record, trainer
from rayseg.training.settings import TrainConfig
from tests import balls
from tests.long_runs import config
from tests.ray.test_train import TOLERANCE, _train_workers, apart, unequal, when_there_is

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

FORM = NetworkConfig(
    preset="unet3d-plain",
    widths=(4, 8),
    convolutions=1,
    kernels=((1, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2)),
)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return balls.prepare(tmp_path_factory.mktemp("balls"))


def trained(volumes: str, folder: Path, **changes: Any) -> tuple[TrainConfig, int]:
    """The workers' part of a run: its configuration, and how often they began."""
    patches = Patches(2, augment=VolumeAugment())
    values: dict[str, Any] = {"model": FORM, "patches": patches, "batch_size": 4, "tensorboard": False}
    job, prepared = config(volumes, folder, **(values | changes)), describe(volumes)
    run_id = record.begin(job, prepared, trainer.check(job, prepared))
    return job, trainer._train(job, prepared, f"{job.storage}/run", run_id, None, ())


@pytest.fixture(scope="module")
def undisturbed(volumes: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of two workers from start to end."""
    job, attempts = trained(volumes, tmp_path_factory.mktemp("undisturbed"))
    assert attempts == 1
    return job


def test_one_worker_ends_with_the_weights_of_two(volumes: str, tmp_path: Path, undisturbed: TrainConfig) -> None:
    alone, _ = trained(volumes, tmp_path, num_workers=1, feed_threads=2)
    differences = apart(alone, undisturbed)
    assert any("logits" in name for name in differences)
    assert max(differences.values()) < TOLERANCE, differences


def test_a_killed_worker_changes_nothing(volumes: str, tmp_path: Path, undisturbed: TrainConfig) -> None:
    def kill_a_worker() -> None:
        os.kill(_train_workers()[-1], signal.SIGKILL)

    with when_there_is(tmp_path, "runs/*/epoch-00001/state.json", kill_a_worker):
        again, attempts = trained(volumes, tmp_path)
    assert attempts == 2
    assert unequal(again, undisturbed) == []
    assert np.isfinite(max(apart(again, undisturbed).values()))
