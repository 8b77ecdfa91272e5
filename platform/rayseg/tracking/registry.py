"""The model registry: a bundle is verified in a clean process before it gets a version, and fetched by URI.

In MLflow a bundle (see `bundle`) is the data of a `pyfunc` model whose code is this package, so `mlflow models serve`
and `mlflow.pyfunc.load_model` run the same code as we do. Nothing here uses MLflow's global state: its fluent
`log_model` would, so the model is saved to a temporary folder and handed over through clients of an explicit tracking
URI. `Bundle`, `save` and `load` stand here too, for whoever trains.
"""

import json
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import mlflow.artifacts
import mlflow.pyfunc
import pandas as pd
from mlflow import MlflowClient, MlflowException
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion as RegisteredVersion
from mlflow.models import Model, ModelSignature
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from mlflow.types.schema import ColSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

import rayseg
from rayseg.tracking import runs
from rayseg.tracking.bundle import Bundle, describe, example_file, load, save
from rayseg.tracking.verification import BUNDLE_IN_MODEL, PREDICTOR_MODULE, Verified, verify_folder
from rayseg.tracking.version import ModelVersion

__all__ = ["Bundle", "ModelVersion", "champion", "fetch", "load", "register", "resolve", "save", "set_alias", "verify"]

INITIAL_TAG = "rayseg.init_from"  # of a training run: the version whose weights it started from
_DIGEST_TAG = "bundle_digest"
_MISSING = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+|latest)|@(?P<alias>[^/@]+))")
_NOT_IN_LOGGED = re.compile(r"[/:.%\"']")  # of names that MLflow takes for registered models, and not for logged ones
_REQUIRED = (
    *("mlflow", "keras", "tensorflow", "tensorflow-cpu", "numpy", "pandas", "pyarrow", "pillow", "pydicom"),
    *("imagecodecs", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "nibabel"),
    *("scikit-image", "scipy", "pydantic", "pyyaml"),
)


def register(
    tracking_uri: str, run_id: str, bundle_dir: str | Path, name: str, description: str | None = None
) -> ModelVersion:
    """Verifies the bundle in a clean process, logs it as a model of the run and registers that as a new version.

    The clean process runs the code that is shipped with the model, not the one running here. `description` is Markdown
    that the registry shows with the version.

    Raises:
        ValueError: no sound bundle.
        RuntimeError: the model cannot be loaded there, or gives another mask for the example.
    """
    client = runs.client(tracking_uri)
    digest = describe(Path(bundle_dir))["digest"]
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=_NOT_IN_LOGGED.sub("-", name),
        source_run_id=run_id,
        params=run.data.params,
        tags={_DIGEST_TAG: digest},
        model_type="segmentation",
    )
    try:
        with tempfile.TemporaryDirectory() as temporary:
            model_id = logged.model_id
            content = Model(logged.artifact_location, run_id, model_uuid=model_id, model_id=model_id)
            folder = _save_pyfunc(Path(temporary), Path(bundle_dir), content)
            verify_folder(folder)
            client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    version = _version(
        client.create_model_version(
            name,
            logged.artifact_location,
            run_id,
            tags={_DIGEST_TAG: digest},
            description=description,
            model_id=logged.model_id,
        )
    )
    # As MLflow's fluent API does: the UI shows the version beside the logged model.
    link = [{"name": name, "version": version.version}]
    client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(link)})
    return version


def of_run(tracking_uri: str, run_id: str, name: str) -> ModelVersion | None:
    """The first version of `name` that the run gave, None where it gave none: what a start after a loss goes by."""
    versions = runs.client(tracking_uri).search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return _version(min(versions, key=lambda one: int(one.version))) if versions else None


def resolve(tracking_uri: str, model_uri: str) -> ModelVersion:
    """The version that `models:/NAME/VERSION`, `models:/NAME/latest` or `models:/NAME@ALIAS` stands for now.

    Raises:
        ValueError: another form of URI, or nothing registered under it.
    """
    match = _MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise ValueError(
            f"model_uri {model_uri}: expected models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS"
        )
    client = runs.client(tracking_uri)
    found = _lookup(client, match["name"], match["version"], match["alias"])
    if found is None:
        raise ValueError(f"model_uri {model_uri}: not registered in {tracking_uri}")
    return found


def champion(tracking_uri: str, name: str, alias: str = "champion") -> ModelVersion | None:
    """The version that bears `alias`, None where none does or there is no model of that name."""
    return _lookup(runs.client(tracking_uri), name, None, alias)


def set_alias(tracking_uri: str, name: str, alias: str, version: str) -> None:
    """Moves `alias` to `version`: who resolves it from now on gets that one."""
    runs.client(tracking_uri).set_registered_model_alias(name, alias, version)


def fetch(tracking_uri: str, model_uri: str, cache_dir: str | Path | None = None) -> tuple[Path, ModelVersion]:
    """The bundle's local folder, and the version that `model_uri` stood for.

    Args:
        tracking_uri: where the registry is.
        model_uri: as `resolve` takes it.
        cache_dir: each version is downloaded into it once. None: a local artifact store is read in place, and anything
            else is downloaded into a new temporary folder, which the caller may remove.

    Raises:
        ValueError: as `resolve`; or a version that `register` did not make.
    """
    version = resolve(tracking_uri, model_uri)
    part = f"data/{BUNDLE_IN_MODEL}"
    if cache_dir is None:
        return _download(tracking_uri, version, part), version
    cached = Path(cache_dir, f"{version.name}-v{version.version}-{version.digest[:16]}")
    if not cached.is_dir():
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as temporary:
            try:
                _download(tracking_uri, version, part, Path(temporary)).rename(cached)
            except OSError:
                if not cached.is_dir():  # another process was faster otherwise
                    raise
    return cached, version


def verify(tracking_uri: str, version: ModelVersion, repeats: int = 0) -> Verified:
    """Runs a registered model's own code on its recorded slices in a new process, `repeats` times to measure it.

    Raises:
        ValueError: it cannot be fetched.
        RuntimeError: it cannot be loaded there, or gives another mask than was recorded.
    """
    with tempfile.TemporaryDirectory() as temporary:
        return verify_folder(_download(tracking_uri, version, "", Path(temporary)), repeats)


def _download(tracking_uri: str, version: ModelVersion, part: str, folder: Path | None = None) -> Path:
    """A part of an MLflow model, or all of it, into `folder`; see `fetch` for what None does."""
    location = runs.client(tracking_uri).get_model_version_download_uri(version.name, version.version)
    try:
        return Path(
            mlflow.artifacts.download_artifacts(
                f"{location.rstrip('/')}/{part}",
                dst_path=None if folder is None else str(folder),
                tracking_uri=tracking_uri,
                registry_uri=tracking_uri,
            )
        )
    except (MlflowException, OSError) as error:
        raise ValueError(f"model {version.uri}: its bundle cannot be fetched ({type(error).__name__})") from error


def _save_pyfunc(temporary: Path, bundle_dir: Path, content: Model) -> Path:
    """The bundle and our code as an MLflow model in a local folder; nothing is inferred, so no model is loaded here."""
    package = Path(rayseg.__file__).parent
    code = temporary / "code" / package.name
    shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__"))
    bundle = temporary / BUNDLE_IN_MODEL
    shutil.copytree(bundle_dir, bundle)
    folder = temporary / "model"
    mlflow.pyfunc.save_model(
        path=str(folder),
        loader_module=PREDICTOR_MODULE,
        data_path=str(bundle),
        code_paths=[str(code)],
        mlflow_model=content,
        signature=ModelSignature(
            inputs=Schema([ColSpec("binary", "dicom")]),
            outputs=Schema(
                [
                    ColSpec("string", "mask_png", required=False),
                    ColSpec("long", "foreground_pixels", required=False),
                    ColSpec("string", "reason", required=False),
                    ColSpec("string", "detail", required=False),
                ]
            ),
        ),
        input_example=pd.DataFrame({"dicom": [(bundle / example_file(describe(bundle))).read_bytes()]}),
        pip_requirements=_requirements(),
    )
    return folder


def _requirements() -> list[str]:
    installed = {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}
    return [f"{name}=={metadata.version(name)}" for name in _REQUIRED if name in installed]


def _lookup(client: MlflowClient, name: str, version: str | None, alias: str | None) -> ModelVersion | None:
    try:
        if version == "latest":
            versions = client.search_model_versions(f"name = '{name}'")
            return _version(max(versions, key=lambda found: int(found.version))) if versions else None
        if version is not None:
            return _version(client.get_model_version(name, version))
        return _version(client.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in _MISSING:
            return None
        raise


def _version(found: RegisteredVersion) -> ModelVersion:
    return ModelVersion(
        name=found.name,
        version=str(found.version),
        uri=f"models:/{found.name}/{found.version}",
        run_id=found.run_id,
        digest=found.tags.get(_DIGEST_TAG, ""),
    )
