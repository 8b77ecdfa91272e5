import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from rayseg.data import synthetic
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess, Window
from rayseg.data.range import Range
from rayseg.tracking import bundle, registry, runs

SIZE = (32, 32)
EXAMPLE = synthetic.slice_bytes(0, 64)


def network(seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((*SIZE, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.GroupNormalization(4),
            layers.Conv2D(1, 1, activation="sigmoid"),
        ]
    )


def save(folder: Path, seed: int = 0, preprocess: Preprocess | None = None, **changes: object) -> bundle.Bundle:
    values = {"labels": Labels(), "threshold": 0.5, "example": EXAMPLE} | changes
    return registry.save(folder, network(seed), preprocess or Preprocess(size=SIZE), **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def registered(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[registry.ModelVersion, bundle.Bundle]:
    folder = tmp_path_factory.mktemp("bundle")
    saved = save(folder, golden=[synthetic.slice_bytes(3, 96)])
    run_id = runs.start(store, "registry", "train", {"learning_rate": 0.1})
    return registry.register(store, run_id, folder, "brain"), saved


def test_several_classes_need_as_many_channels_and_the_background(tmp_path: Path) -> None:
    labels = Labels(("bleed", "infarct"), values={1: "bleed", 7: "infarct"})
    with pytest.raises(ValueError, match=r"to \(None, 32, 32, 3\) expected .* to \(None, 32, 32, 1\)"):
        save(tmp_path, labels=labels)
    inputs = keras.Input((*SIZE, 1), dtype="uint8")
    logits = keras.layers.Conv2D(3, 1)(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Softmax()(logits))
    saved = registry.save(tmp_path, model, Preprocess(size=SIZE), labels, 0.5, EXAMPLE)
    loaded = registry.load(tmp_path)
    assert loaded.labels == labels
    assert loaded.digest == saved.digest


def test_a_bundle_of_before_labels_had_rules_is_still_read(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "bundle.json"
    told = json.loads(path.read_text())
    told["labels"] = {"names": ["lesion"], "threshold": 0}
    del told["preprocess"]["color"]
    path.write_text(json.dumps(told | {"digest": bundle._digest(told)}))
    assert registry.load(tmp_path).labels == Labels()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    preprocess = Preprocess(SIZE, Window(40, 80), None)
    saved = save(tmp_path, preprocess=preprocess, labels=Labels(("bleed",), 127), threshold=0.3)
    loaded = registry.load(tmp_path)
    assert (loaded.preprocess, loaded.labels, loaded.threshold) == (preprocess, Labels(("bleed",), 127), 0.3)
    assert loaded.example == EXAMPLE
    assert loaded.digest == saved.digest
    assert loaded.network == saved.network
    for there, here in zip(bundle.load_keras(tmp_path).get_weights(), network(0).get_weights(), strict=True):
        assert np.array_equal(there, here)


def test_the_range_of_the_training_set_is_part_of_a_bundle_that_has_one(tmp_path: Path) -> None:
    known = Range(("CT",), ("HEAD",), (0.5, 0.5), (40.25, 60.0), None, 1 / 3, 12.0, 3, 0.2)
    without, saved = save(tmp_path / "a"), save(tmp_path / "b", known=known)
    loaded = registry.load(tmp_path / "b")
    assert loaded.range == saved.range == known
    assert loaded.digest == saved.digest != without.digest
    path = tmp_path / "b" / "bundle.json"
    path.write_text(path.read_text().replace("40.25", "41.25"))
    with pytest.raises(ValueError, match="does not have the digest"):
        registry.load(tmp_path / "b")
    assert registry.load(tmp_path / "a").range is None


def test_a_bundle_from_before_a_setting_existed_is_still_read(tmp_path: Path) -> None:
    saved = save(tmp_path)
    told = json.loads((tmp_path / "bundle.json").read_text())
    del told["preprocess"]["z_score"]
    told["digest"] = bundle._digest(told)
    (tmp_path / "bundle.json").write_text(json.dumps(told))
    assert registry.load(tmp_path).preprocess == saved.preprocess


def test_a_bundle_that_says_nothing_of_its_masks_had_them_by_nearest_neighbour(tmp_path: Path) -> None:
    """Its digest, of which outputs' UIDs are made, stays; a new one says what it had."""
    saved = save(tmp_path)
    assert saved.preprocess.mask_filter == registry.load(tmp_path).preprocess.mask_filter == "image"
    told = json.loads((tmp_path / "bundle.json").read_text())
    del told["preprocess"]["mask_filter"]
    told["digest"] = bundle._digest(told)
    assert told["digest"] != saved.digest
    (tmp_path / "bundle.json").write_text(json.dumps(told))
    loaded = registry.load(tmp_path)
    assert loaded.digest == told["digest"]
    assert loaded.preprocess == replace(saved.preprocess, mask_filter="nearest")


def test_the_digest_is_of_the_content_and_of_nothing_else(tmp_path: Path) -> None:
    first = save(tmp_path / "a")
    os.utime(tmp_path / "a" / "model.keras", (0, 0))
    assert registry.load(tmp_path / "a").digest == first.digest
    assert save(tmp_path / "b").digest == first.digest
    others = [
        save(tmp_path / "c", seed=1),
        save(tmp_path / "d", preprocess=Preprocess(SIZE, Window(40, 80), None)),
        save(tmp_path / "e", labels=Labels(("bleed",))),
        save(tmp_path / "f", threshold=0.4),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 5


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bundle\.json cannot be read"):
        registry.load(tmp_path)
    save(tmp_path / "other", seed=1)
    save(tmp_path)
    model, description = tmp_path / "model.keras", tmp_path / "bundle.json"
    sound = model.read_bytes()
    model.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ValueError, match=r"model\.keras cannot be read"):
        bundle.load_keras(tmp_path)
    model.write_bytes((tmp_path / "other" / "model.keras").read_bytes())
    with pytest.raises(ValueError, match="does not have the weights"):
        bundle.load_keras(tmp_path)
    model.write_bytes(sound)
    weights = tmp_path / "model.bin"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.bin is not as it was saved"):
        registry.load(tmp_path)
    weights.write_bytes(sound)
    told = json.loads(description.read_text())
    description.write_text(json.dumps(told | {"threshold": 0.6}))
    with pytest.raises(ValueError, match="does not have the digest"):
        registry.load(tmp_path)
    description.write_text(json.dumps(told | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        registry.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocess": Preprocess(size=(64, 64))}, "a model from"),
        ({"threshold": 1.0}, "threshold between 0 and 1"),
        ({"example": b"text"}, "no readable slice"),
    ],
)
def test_what_does_not_fit_is_not_saved(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save(tmp_path, **changes)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_another_process_with_other_threads_gives_the_same_mask(tmp_path: Path) -> None:
    save(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "rayseg.inference.predictor", str(tmp_path)],
        env=os.environ | {"TF_NUM_INTRAOP_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    told = json.loads((tmp_path / "bundle.json").read_text())
    masks = ("digest", "example_mask_sha256", "golden_masks_sha256")
    assert json.loads(done.stdout) == {key: told[key] for key in masks}


def test_a_registered_version_is_found_by_every_name(
    store: str, registered: tuple[registry.ModelVersion, bundle.Bundle]
) -> None:
    version, saved = registered
    assert (version.name, version.version, version.uri) == ("brain", "1", "models:/brain/1")
    assert version.digest == saved.digest
    assert registry.resolve(store, "models:/brain/1") == version
    assert registry.resolve(store, "models:/brain/latest") == version
    assert registry.champion(store, "brain", "champion") is None
    registry.set_alias(store, "brain", "champion", "1")
    assert registry.champion(store, "brain", "champion") == version
    assert registry.resolve(store, "models:/brain@champion") == version
    for unknown in ("models:/brain/2", "models:/brain@nobody", "models:/other/1", "models:/other/latest"):
        with pytest.raises(ValueError, match="not registered"):
            registry.resolve(store, unknown)
    for malformed in ("runs:/1/model", "models:/brain", "models:/brain/newest", "brain"):
        with pytest.raises(ValueError, match="expected models:/NAME/VERSION"):
            registry.resolve(store, malformed)
    assert registry.champion(store, "other", "champion") is None
    assert registry.of_run(store, version.run_id, "brain") == version
    assert registry.of_run(store, version.run_id, "other") is None
    assert registry.of_run(store, "0" * 32, "brain") is None


def test_mlflow_shows_the_model_with_its_signature_and_its_run(
    store: str, registered: tuple[registry.ModelVersion, bundle.Bundle]
) -> None:
    version, _ = registered
    client = MlflowClient(store)
    shown = client.get_model_version("brain", "1")
    assert shown.run_id == version.run_id
    assert shown.status == "READY"
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "brain", "version": "1"}]
    assert (model.source_run_id, model.status, model.params) == (version.run_id, "READY", {"learning_rate": "0.1"})
    location = client.get_model_version_download_uri("brain", "1")
    content = mlflow.models.Model.load(mlflow.artifacts.download_artifacts(location))
    assert [(column.name, column.type.name) for column in content.signature.inputs] == [("dicom", "binary")]
    assert [column.name for column in content.signature.outputs][:2] == ["mask_png", "foreground_pixels"]
    assert content.saved_input_example_info is not None


def test_a_bundle_is_fetched_in_place_or_into_a_cache_once(
    store: str, registered: tuple[registry.ModelVersion, bundle.Bundle], tmp_path: Path
) -> None:
    version, saved = registered
    in_place, resolved = registry.fetch(store, version.uri)
    assert resolved == version
    assert registry.load(in_place).digest == saved.digest
    cached, _ = registry.fetch(store, version.uri, tmp_path)
    assert cached.parent == tmp_path
    assert registry.load(cached).digest == saved.digest
    before = (cached / "model.keras").stat().st_mtime_ns
    assert registry.fetch(store, version.uri, tmp_path)[0] == cached
    assert (cached / "model.keras").stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [cached]


def test_registering_touches_no_global_state(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "verify_folder", lambda folder: None)  # another process; tested below
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    save(tmp_path / "bundle")
    registry.register(store, runs.start(store, "registry", "a"), tmp_path / "bundle", "other")
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == before
    assert mlflow.active_run() is None
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_registered_version_is_verified_and_measured_in_a_clean_process(
    store: str, registered: tuple[registry.ModelVersion, bundle.Bundle]
) -> None:
    version, _ = registered
    assert np.ones(300_000_000, np.uint8).any()
    here_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    found = registry.verify(store, version, repeats=3)
    assert found.latency_s is not None
    assert found.memory_mb is not None
    assert 0 < found.latency_s < 60
    assert 100 < found.memory_mb < here_mb, "a child's own getrusage would count what its parent took"
    folder, _ = registry.fetch(store, version.uri)
    description = folder / "bundle.json"
    sound = description.read_text()
    told = json.loads(sound)
    assert list(told["golden_masks_sha256"]) == ["golden-1.dcm"]
    description.write_text(json.dumps(told | {"golden_masks_sha256": {"golden-1.dcm": "0" * 64}}))
    try:
        with pytest.raises(RuntimeError, match=r"golden_masks_sha256 is .* in a clean process, .*0000"):
            registry.verify(store, version)
    finally:
        description.write_text(sound)


def test_a_bundle_that_gives_another_mask_elsewhere_gets_no_version(store: str, tmp_path: Path) -> None:
    save(tmp_path)
    description = tmp_path / "bundle.json"
    told = json.loads(description.read_text())
    told["example_mask_sha256"] = "0" * 64
    told["digest"] = bundle._digest(told)
    description.write_text(json.dumps(told))
    run_id = runs.start(store, "registry", "bad")
    with pytest.raises(RuntimeError, match=r"example_mask_sha256 is .* in a clean process, 0000"):
        registry.register(store, run_id, tmp_path, "bad")
    assert registry.champion(store, "bad", "champion") is None
    assert MlflowClient(store).search_registered_models("name = 'bad'") == []


def test_a_bundle_that_cannot_be_loaded_elsewhere_gets_no_version(store: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.keras").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"(?s)cannot be loaded in a clean process.*model\.keras cannot be read"):
        registry.register(store, runs.start(store, "registry", "bad"), tmp_path, "worse")
