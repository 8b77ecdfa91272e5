"""`mixed_precision: auto` on real workers: measured once, and from then on part of the run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rayseg.models.engine import has_bfloat16
from rayseg.tracking import runs
from rayseg.training import precision, record, trainer
from rayseg.training.trainer import TrainConfig, fit
from tests.long_runs import config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_decision_is_kept_by_the_run_its_next_start_and_its_repetition(
    discs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = config(discs, tmp_path, mixed_precision="auto", epochs=1)
    trained: list[TrainConfig] = []

    def interrupted(config: TrainConfig, *_: object) -> None:
        trained.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_train", interrupted)  # before the first step
    with pytest.raises(KeyboardInterrupt):
        fit(job)
    [file] = Path(job.storage).glob("*.unfinished.json")
    mark = json.loads(file.read_text())
    policy, reason = mark["precision"]["policy"], mark["precision"]["reason"]
    assert policy in ("float32", "mixed_bfloat16")
    assert has_bfloat16(on_gpu=False) is ("s a step" in reason), "measured where that can help"

    def measured(*_: object) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(precision, "_measured", measured)
    with pytest.raises(KeyboardInterrupt):
        fit(job)
    assert trained == [dataclasses.replace(job, mixed_precision=policy)] * 2
    run = runs.client(job.tracking_uri).get_run(mark["run_id"])
    assert run.data.params["mixed_precision"] == policy
    assert run.data.tags["rayseg.mixed_precision"] == f"auto: {reason}"
    again = TrainConfig(reproduce=mark["run_id"], tracking_uri=job.tracking_uri)
    assert record.to_repeat(again).mixed_precision == policy
