"""What MLflow's tables hold. SQLite takes anything, so here lengths are compared with what the columns declare; the
same is written to a real PostgreSQL in tests/e2e/test_backend.py."""

import json
import math
import sqlite3

import keras
import pytest
from mlflow import MlflowClient
from mlflow.store.db.base_sql_model import Base
from sqlalchemy import String, Text

from rayseg.data import synthetic
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.tracking import aliases, limits, registry, runs
from rayseg.training.settings import TrainConfig
from tests import long_names

PLACES = {"prepared": "p", "storage": "s", "tracking_uri": "t"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('limits')}/mlflow.db"


@pytest.fixture(scope="module")
def written(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, registry.ModelVersion]:
    bundle = tmp_path_factory.mktemp("bundle") / "bundle"
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(1, 1, activation="sigmoid")]
    model = keras.Sequential([keras.Input((32, 32, 1), dtype="uint8"), *layers])
    registry.save(bundle, model, Preprocess(size=(32, 32)), Labels(), 0.5, synthetic.slice_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "verify_folder", lambda folder: None)  # another process; test_registry has it
        return long_names.write(store, bundle)


def test_no_column_has_more_than_it_declares(store: str, written: tuple[str, registry.ModelVersion]) -> None:
    filled = set()
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        for table in Base.metadata.tables.values():
            for column in table.columns:
                if not isinstance(column.type, String) or isinstance(column.type, Text) or column.type.length is None:
                    continue
                (longest,) = database.execute(f'SELECT max(length("{column.name}")) FROM "{table.name}"').fetchone()
                name = f"{table.name}.{column.name}"
                # The folder of artifacts is that of this test, and on a team's server the server's.
                if name not in ("runs.artifact_uri", "experiments.artifact_location"):
                    assert (longest or 0) <= column.type.length, name
                if longest == column.type.length:
                    filled.add(name)
    assert filled >= {
        *("runs.name", "params.key", "metrics.key", "tags.key", "tags.value", "experiments.name", "datasets.name"),
        *("datasets.digest", "registered_models.name", "model_versions.description"),
    }, "so long are the names of this test"


def test_what_is_cut_says_so_and_is_whole_in_an_artifact(
    store: str, written: tuple[str, registry.ModelVersion]
) -> None:
    run_id, version = written
    run = MlflowClient(store).get_run(run_id)
    whole = json.loads(runs.read_bytes(store, run_id, limits.UNCUT))
    assert run.data.params["short"] == "1"
    assert run.data.params["zero"] == "a\\0b"
    assert run.data.params["value"] == long_names.LONG[:5994] + " [...]"
    assert "short" not in whole["params"]
    assert whole["params"]["value"] == whole["tags"]["note"] == long_names.LONG
    assert [whole["params"][key] for key in long_names.PARAMS if len(key) > 250] == ["a value", "another"]
    keys = [key for key in run.data.params if key.startswith("key.")]
    assert {run.data.params[key] for key in keys} == {"a value", "another"}, "two keys stay two"
    assert sorted(value for key, value in run.data.metrics.items() if key.startswith("val/")) == [0.25, 0.5]
    assert math.isnan(run.data.metrics["nan"])
    assert run.data.metrics["inf"] > 1e308
    assert run.data.tags["reason"].endswith(" [...]")
    assert registry.resolve(store, f"models:/{long_names.MODEL}@{long_names.ALIAS}") == version
    assert [move.version for move in aliases.history(store, long_names.MODEL, long_names.ALIAS)] == [version.version]
    short = runs.start(store, "experiment", "name", {"value": "v" * 6000}, {"note": "n" * 8000})
    assert MlflowClient(store).list_artifacts(short) == [], "nothing is cut"


def test_text_that_no_database_takes_is_written_in_words() -> None:
    assert limits.text("/data/b\udce4der", 250) == "/data/b\\udce4der"
    assert limits.text("ä" * 250, 250) == "ä" * 250
    assert limits.text("a" * 251, 250) == "a" * 244 + " [...]"


def test_names_to_be_found_by_are_refused_before_anything_is_done(store: str) -> None:
    with pytest.raises(ValueError, match=r"^experiment: at most 256 characters expected, .* got 257"):
        runs.start(store, "e" * 257, "name")
    with pytest.raises(ValueError, match=r"^alias: at most 200"):
        aliases.move(store, "m", "a" * 201, "1", "promoted")
    with pytest.raises(ValueError, match=r"^train\.experiment: at most 256"):
        TrainConfig(**PLACES, experiment="e" * 257)
    with pytest.raises(ValueError, match=r"^train\.registered_model: at most 256"):
        TrainConfig(**PLACES, registered_model="m" * 257)
    for name in ("", " ", "..", "brain/mr", "brain:1", "brain@night", "children's"):
        with pytest.raises(ValueError, match=r"^train\.registered_model: a name without any of"):
            TrainConfig(**PLACES, registered_model=name)
    for name in ("l" * 65, ".", ".."):
        with pytest.raises(ValueError, match=r"^labels\.names: letters, .* at most 64"):
            Labels((name,))
