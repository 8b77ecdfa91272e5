"""What MLflow is told of a training run beside its values: enough to know what it was, and to repeat it."""

import dataclasses
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rayseg import build
from rayseg import config as configuration
from rayseg.data.prepared import PreparedSet
from rayseg.tracking import card as cards
from rayseg.tracking import figures, registry, runs
from rayseg.training.callbacks import HISTORY_FILE
from rayseg.training.card import card
from rayseg.training.settings import TrainConfig
from rayseg.training.state import State

logger = logging.getLogger(__name__)

CONFIG_FILE, EPOCHS_FILE, _ENVIRONMENT_FILE = "config.json", "history.json", "environment.txt"
_TIMES = ("stall_percent", "rows_per_s", "workers")  # of an epoch: another run has others


def begin(config: TrainConfig, prepared: PreparedSet, more_tags: Mapping[str, str]) -> str:
    """Creates the run and logs what is known before training: configuration, data, split, code, environment."""
    uri = config.tracking_uri
    resolved = dataclasses.replace(config, model=config.model.resolved())
    parameters = configuration.flat(resolved) | {
        "scaled_learning_rate": config.scaled_learning_rate,
        "prepared_digest": prepared.digest,
        **{f"preprocess.{key}": value for key, value in configuration.flat(prepared.model_preprocess).items()},
    }
    tags = {**_at_a_glance(resolved, prepared), **more_tags}
    if config.init_from:
        tags[registry.INITIAL_TAG] = registry.resolve(uri, config.init_from).uri
    if config.reproduce:
        tags["rayseg.reproduces"] = config.reproduce
    run_id = runs.start(uri, config.experiment, config.name, parameters, tags)
    profile = {"rows": prepared.rows, "shape": prepared.shape, "labels": prepared.labels.names}
    kept = {"train": configuration.plain(config), "prepared_digest": prepared.digest}
    try:
        runs.log_dataset(uri, run_id, config.prepared, prepared.digest, json.dumps(profile), "training")
        runs.log_bytes(uri, run_id, CONFIG_FILE, json.dumps(kept, indent=2).encode())
        runs.log_bytes(uri, run_id, _ENVIRONMENT_FILE, "\n".join(_environment()).encode())
        runs.log_bytes(uri, run_id, "split.csv", prepared.read_split())
    except BaseException:
        runs.finish(uri, run_id, "FAILED")  # nobody knows of it yet, who could go on with it
        raise
    return run_id


def end(
    config: TrainConfig,
    prepared: PreparedSet,
    state: State,
    model: Any,
    pictures: Sequence[tuple[str, bytes]],
    outputs: Path,
    run_id: str,
) -> str:
    """Logs tables, curves, pictures and the model card; returns the card.

    Args:
        config: the run.
        prepared: its data.
        state: its last checkpoint.
        model: the Keras model of its best epoch.
        pictures: names and PNGs of what it makes of validation.
        outputs: the folder of files that its callbacks wrote.
        run_id: in MLflow.
    """
    uri = config.tracking_uri
    epochs = {"untrained": state.untrained, "history": state.history}
    runs.log_bytes(uri, run_id, EPOCHS_FILE, json.dumps(epochs).encode())
    runs.log_file(uri, run_id, HISTORY_FILE, outputs / HISTORY_FILE)
    runs.log_bytes(uri, run_id, "curves.png", figures.curves(state.history))
    runs.client(uri).set_tag(run_id, "rayseg.parameters", f"{model.count_params():,}")
    for name, picture in pictures:
        runs.log_bytes(uri, run_id, f"val/{name}.png", picture)
    for file in sorted((outputs / "tensorboard").rglob("*")):
        if file.is_file():
            runs.log_file(uri, run_id, str(file.relative_to(outputs)), file)
    return cards.log(uri, card(config, prepared, state, run_id))


def to_repeat(config: TrainConfig) -> TrainConfig:
    """The configuration of the run that `config.reproduce` names, with the places that `config` names itself.

    Raises:
        ValueError: there is no such run of ours.
    """
    assert config.reproduce is not None, "asked for"
    kept = json.loads(runs.read_bytes(config.tracking_uri, config.reproduce, CONFIG_FILE))
    kept["train"].pop("feed_tasks", None)  # of older runs: how they were fed, which changed no batch
    places = {name: getattr(config, name) for name in ("prepared", "storage") if getattr(config, name)}
    here = {"tracking_uri": config.tracking_uri, "reproduce": config.reproduce}
    return configuration.build(TrainConfig, kept["train"] | places | here)


def check_repeatable(config: TrainConfig, prepared: PreparedSet) -> None:
    """Raises ValueError where the run to repeat had other data; warns where its libraries or code were others."""
    assert config.reproduce is not None, "asked for"
    uri, run_id = config.tracking_uri, config.reproduce
    digest = json.loads(runs.read_bytes(uri, run_id, CONFIG_FILE))["prepared_digest"]
    if digest != prepared.digest:
        raise ValueError(
            f"train.reproduce: run {run_id} had a prepared set of digest {digest[:12]}, {config.prepared} has "
            f"{prepared.digest[:12]}; prepare it again as it was, or name where it lies in train.prepared"
        )
    then = set(runs.read_bytes(uri, run_id, _ENVIRONMENT_FILE).decode().splitlines())
    for line in sorted(then ^ set(_environment())):
        logger.warning("train.reproduce: %s %s", "then, not now:" if line in then else "now, not then:", line)
    if runs.client(uri).get_run(run_id).data.tags.get("rayseg.code_sha256") != build.sha256("rayseg"):
        logger.warning("train.reproduce: the code of rayseg is not that of run %s", run_id)


def repeated(config: TrainConfig, state: State, run_id: str) -> bool:
    """Whether every value of every epoch is equal to that of the run that was to be repeated; told as a tag, too."""
    assert config.reproduce is not None, "asked for"
    before = json.loads(runs.read_bytes(config.tracking_uri, config.reproduce, EPOCHS_FILE))
    equal = before == {"untrained": state.untrained, "history": state.history}
    if not equal:
        pairs = zip(_lasting(before["history"]), _lasting(state.history), strict=False)
        equal = len(before["history"]) == len(state.history) and all(one == other for one, other in pairs)
    runs.client(config.tracking_uri).set_tag(run_id, "rayseg.reproduced", str(equal).lower())
    if not equal:
        logger.warning("train.reproduce: the values are not those of run %s", config.reproduce)
    return equal


def _lasting(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in _TIMES} for row in history]


def _at_a_glance(config: TrainConfig, prepared: PreparedSet) -> dict[str, str]:
    """Tags that tell one model from another in MLflow's list of runs, and where it compares them."""
    widths = config.model.widths
    form = config.model.preset if widths is None else f"{config.model.preset} {'-'.join(map(str, widths))}"
    return {
        "rayseg.model": form,
        "rayseg.input": "x".join(map(str, prepared.shape)),
        "rayseg.augment": "none" if config.augment is None else "on",
    }


def _environment() -> list[str]:
    """Python, processor and every installed distribution."""
    installed = {f"{found.name}=={found.version}" for found in metadata.distributions() if found.name}
    return [f"python=={platform.python_version()}", f"machine: {platform.machine()}", *sorted(installed)]
