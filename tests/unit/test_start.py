"""Where weights start: what the driver brings into a run's folder is what a worker's network gets."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from rayseg import config as configuration
from rayseg.data import synthetic
from rayseg.data.labels import Labels
from rayseg.data.prepared import describe
from rayseg.data.preprocess import Preprocess
from rayseg.models.network import portable
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import bundle, registry, runs
from rayseg.training import record, start, trainer
from rayseg.training.settings import TrainConfig
from tests.unit.evaluated_models import register

SMALL = NetworkConfig(widths=(4, 8), convolutions=1)
BATCH = NetworkConfig(widths=(4, 8), normalization="batch")


def config(discs: str, **changes: Any) -> TrainConfig:
    places = {"prepared": discs, "storage": "unused", "tracking_uri": "unused"}
    values: dict[str, Any] = {**places, "model": SMALL, "mixed_precision": "float32"}
    return TrainConfig(**(values | changes))


def network(settings: TrainConfig, seed: int) -> keras.Model:
    keras.utils.clear_session()  # names are counted
    keras.utils.set_random_seed(seed)
    return start.network(settings, describe(settings.prepared))


def test_without_a_source_weights_are_those_of_the_seed(discs: str, tmp_path: Path) -> None:
    settings = config(discs)
    start.bring_initial(settings, describe(discs), str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    model, other = network(settings, 1), network(settings, 1)
    start.set_initial(model, str(tmp_path))
    for ours, others in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, others)


def test_a_run_goes_on_from_a_registered_model(discs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(discs, init_from="models:/discs/1")
    trained = network(settings, 7)
    folder = tmp_path / "bundle"
    bundle.save(folder, portable(trained), Preprocess(size=(32, 32)), Labels(), 0.5, synthetic.slice_bytes(0, 64))
    monkeypatch.setattr(registry, "fetch", lambda uri, model: (folder, None))
    run = tmp_path / "run"
    start.bring_initial(settings, describe(discs), str(run))
    model = network(settings, 1)
    start.set_initial(model, str(run))
    for ours, others in zip(model.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, others)
    wider = config(discs, init_from="models:/discs/1", model=NetworkConfig(widths=(4, 16), convolutions=1))
    with pytest.raises(ValueError, match=r"train\.init_from: layer"):
        start.bring_initial(wider, describe(discs), str(tmp_path / "other"))


def test_another_way_of_masks_is_told_and_the_same_one_is_not(
    discs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings, folder = config(discs, init_from="models:/discs/1"), tmp_path / "bundle"
    monkeypatch.setattr(registry, "fetch", lambda uri, model: (folder, None))
    for mask_filter in ("image", "nearest"):
        preprocess = Preprocess(size=(32, 32), mask_filter=mask_filter)
        bundle.save(folder, portable(network(settings, 7)), preprocess, Labels(), 0.5, synthetic.slice_bytes(0, 64))
        start.bring_initial(settings, describe(discs), str(tmp_path / mask_filter))
        warned = [one.getMessage() for one in caplog.records if "mask_filter" in one.getMessage()]
        assert len(warned) == (mask_filter == "nearest")
    assert "was trained on masks with mask_filter nearest, this set has them with image" in warned[0]


def test_the_run_tells_which_version_it_went_on_from(discs: str, tracking_uri: str) -> None:
    uri = register(tracking_uri, "before", None)
    registry.set_alias(tracking_uri, "before", "champion", "1")
    settings = config(discs, init_from="models:/before@champion", tracking_uri=tracking_uri)
    run = runs.client(tracking_uri).get_run(record.begin(settings, describe(discs), {}))
    assert run.data.tags[registry.INITIAL_TAG] == uri, "the alias may be elsewhere when it is promoted"


def test_workers_take_a_pretrained_encoder_from_the_folder(discs: str, tmp_path: Path) -> None:
    plain = config(discs, model=NetworkConfig(preset="unet-efficientnet-b0"))
    pretrained = network(plain, 7)
    file = tmp_path / "encoder.weights.h5"
    pretrained.save_weights(file)
    settings = config(discs, model=NetworkConfig(preset="unet-efficientnet-b0", weights=str(file)))
    start.bring_initial(settings, describe(discs), str(tmp_path / "run"))
    file.unlink()  # a worker may be on a machine without it
    model = network(settings, 1)
    before = {layer.name: layer.get_weights() for layer in model.layers}
    start.set_initial(model, str(tmp_path / "run"))
    for layer in model.layers:
        wanted = pretrained.get_layer(layer.name).get_weights() if layer.name.startswith("encoder_") else None
        for place, value in enumerate(layer.get_weights()):
            if wanted is not None:
                np.testing.assert_array_equal(value, wanted[place])
            else:  # the decoder's come from the seed
                np.testing.assert_array_equal(value, before[layer.name][place])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 8, "num_workers": 2, "accumulation": 3}, "batch_size"),
        ({"ema_momentum": 1.0}, "ema_momentum"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"freeze_epochs": -1}, "freeze_epochs"),
        ({"base_batch_size": 0}, "base_batch_size"),
        ({"prepared": ""}, "prepared"),
        ({"num_workers": 0}, "num_workers"),
        ({"num_workers": (0, 2)}, "num_workers"),
        ({"num_workers": (3, 2)}, "num_workers"),
        ({"num_workers": (1, 9)}, "batch_size"),
        ({"num_workers": (1, 4), "accumulation": 3}, "batch_size"),
        ({"num_workers": (1, 2), "gpus_per_worker": 0.5}, "gpus_per_worker"),
        ({"feed_threads": 0}, "feed_threads"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(discs: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"train.{key}"):
        config(discs, **changes)


@pytest.mark.parametrize(
    ("text", "least", "most", "told"),
    [
        ("4", 4, 4, None),
        ("[2, 8]", 2, 8, None),
        ("[3, 3]", 3, 3, None),
        ("[2]", 0, 0, "config key num_workers"),
        ("[1, 2, 3]", 0, 0, "config key num_workers"),
        ("[1.5, 2]", 0, 0, "config key num_workers"),
        ("two", 0, 0, "config key num_workers"),
        ("[2, 1]", 0, 0, r"train.num_workers: .* got \[2, 1\]"),
    ],
)
def test_the_number_of_workers_is_one_or_the_least_and_the_most(
    text: str, least: int, most: int, told: str | None
) -> None:
    given = ["prepared=p", "storage=s", "tracking_uri=t", f"num_workers={text}"]
    if told is not None:
        with pytest.raises(ValueError, match=told):
            configuration.load(TrainConfig, "train", None, given)
        return
    settings = configuration.load(TrainConfig, "train", None, given)
    assert (settings.least_workers, settings.most_workers, settings.elastic) == (least, most, text.startswith("["))
    assert configuration.build(TrainConfig, configuration.plain(settings)) == settings


def test_a_gpu_is_fed_by_as_many_threads_as_the_worker_has_cpus_and_by_four_at_least(discs: str) -> None:
    assert config(discs, cpus_per_worker=8).feed_threads_per_worker == 1
    assert config(discs, cpus_per_worker=8, gpus_per_worker=1).feed_threads_per_worker == 8
    assert config(discs, gpus_per_worker=1).feed_threads_per_worker == 4
    assert config(discs, gpus_per_worker=1, feed_threads=2).feed_threads_per_worker == 2


def test_a_run_that_was_fed_by_tasks_can_be_repeated(discs: str, tracking_uri: str) -> None:
    run_id = record.begin(config(discs, tracking_uri=tracking_uri, seed=5), describe(discs), {})
    kept = json.loads(runs.read_bytes(tracking_uri, run_id, record.CONFIG_FILE))
    kept["train"]["feed_tasks"] = 4
    runs.log_bytes(tracking_uri, run_id, record.CONFIG_FILE, json.dumps(kept).encode())
    assert record.to_repeat(config(discs, tracking_uri=tracking_uri, reproduce=run_id)).seed == 5


def test_a_rate_is_scaled_to_the_batch(discs: str) -> None:
    of_batch = {"batch_size": 32, "base_batch_size": 8, "learning_rate": 0.001}
    assert config(discs, **of_batch).scaled_learning_rate == pytest.approx(0.004)
    assert config(discs, **of_batch, scaling_rule="sqrt").scaled_learning_rate == pytest.approx(0.002)
    assert config(discs, batch_size=32).scaled_learning_rate == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"freeze_epochs": 1}, "train.freeze_epochs"),
        ({"jit_compile": True, "model": BATCH}, "train.jit_compile"),
        ({"num_workers": (1, 4), "model": BATCH}, "train.num_workers: .* 3 have none of 8"),
        ({"num_workers": (1, 2), "batch_size": 6, "accumulation": 2, "model": BATCH}, "train.num_workers: .* 2 have"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_before_any_worker_starts(
    discs: str, changes: dict[str, Any], key: str
) -> None:
    for changes_that_fit in ({"jit_compile": True}, {"num_workers": (1, 4)}, {"num_workers": (1, 2), "model": BATCH}):
        trainer.check(config(discs, **changes_that_fit), describe(discs))
    with pytest.raises(ValueError, match=key):
        trainer.check(config(discs, **changes), describe(discs))
