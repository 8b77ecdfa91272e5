"""Doctor: looks at this machine, and at the places that a recipe names, and says what is missing and what to do."""

import argparse
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil
import yaml

from rayseg import config, pacs, storage
from rayseg.dicom.pseudonyms import from_environment
from rayseg.retry import CredentialsError

_FREE_GIB, _MEMORY_GIB = 5, 4  # what a demo needs
_ANSWER_S = 3.0
_PACKAGES = ("ray", "keras", "mlflow", "openvino", "pydicom")
_DRIVER = Path("/dev/nvidiactl")
_READ = ("source", "manifest", "prepared")  # keys of what must be there, unless an earlier stage makes it
_WRITTEN = ("output", "storage")


@dataclass(frozen=True)
class Finding:
    """What a look at `about` has shown: `good`, worth knowing (`note`), or `bad`: something will not work."""

    about: str
    level: Literal["good", "note", "bad"]
    text: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each look; ends with code 1 where something will not work."""
    parser = argparse.ArgumentParser(prog="rayseg doctor", description=__doc__)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="looks at the places that this recipe names, too")
    options = parser.parse_args(arguments)
    bad = 0
    for finding in findings(options.config):
        bad += finding.level == "bad"
        print(f"{finding.level:5} {finding.about}: {finding.text}", flush=True)
    raise SystemExit(1 if bad else 0)


def findings(recipe: str | None) -> Iterator[Finding]:
    """All looks, as they are taken. None of them writes anything but an empty file that it removes."""
    yield _python()
    yield from _processor()
    yield from _packages()
    yield _gpu()
    yield from (_disk(Path.cwd(), "disk"), _disk(Path(tempfile.gettempdir()), "disk for temporary files"))
    yield _ray()
    yield _key()
    if recipe is None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        yield (
            _mlflow(uri)
            if uri
            else Finding("MLflow", "note", "no MLFLOW_TRACKING_URI; a recipe's tracking_uri decides")
        )
    else:
        yield from _of_recipe(recipe)


def _python() -> Finding:
    right = sys.version_info[:2] == (3, 11)
    return Finding(
        "Python", "good" if right else "bad", platform.python_version() + ("" if right else ": 3.11 is needed")
    )


def _processor() -> Iterator[Finding]:
    cores, gib = os.cpu_count() or 1, psutil.virtual_memory().total / 2**30
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")))
    except OSError:
        flags = set()
    has = [name for flag, name in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in flags]
    native = flags & {"avx512_bf16", "amx_bf16"}
    half = "bfloat16 is native" if native else "no native bfloat16: float32 is faster here"
    yield Finding("processor", "good", f"{cores} cores, {', '.join(has) or 'neither AVX2 nor AVX-512'}; {half}")
    enough = gib >= _MEMORY_GIB
    yield Finding(
        "memory", "good" if enough else "note", f"{gib:.0f} GiB" + ("" if enough else f", {_MEMORY_GIB} are needed")
    )


def _packages() -> Iterator[Finding]:
    missing = [name for name in _PACKAGES if _version(name) is None]
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES if name not in missing)
    if missing:
        yield Finding("packages", "bad", f"{', '.join(missing)} missing: run make setup, or install the lock")
    else:
        yield Finding("packages", "good", versions)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> Finding:
    cpu, gpu = _version("tensorflow-cpu"), _version("tensorflow")
    if cpu is None and gpu is None:
        return Finding("TensorFlow", "bad", "missing: install the extra cpu, or gpu on a machine with a GPU")
    if cpu is not None and gpu is not None:
        return Finding(
            "TensorFlow", "bad", "both builds are installed and share files: install the extra cpu or gpu anew"
        )
    if not _DRIVER.exists():
        idle = "" if gpu is None else ", though its build is for GPUs"
        return Finding("TensorFlow", "good", f"{cpu or gpu} on the CPU: no NVIDIA driver here{idle}")
    if gpu is None:
        advice = "a GPU is here, and this build cannot use it: install the extra gpu (requirements-gpu.lock)"
        return Finding("TensorFlow", "note", f"{cpu}: {advice}")
    return Finding(
        "TensorFlow", "good", f"{gpu} for the GPU of this machine; ask for it by gpus_per_worker, gpus_per_actor"
    )


def _disk(folder: Path, about: str) -> Finding:
    gib = shutil.disk_usage(folder).free / 2**30
    enough = gib >= _FREE_GIB
    return Finding(
        about, "good" if enough else "note", f"{gib:.0f} GiB free" + ("" if enough else f", {_FREE_GIB} are advised")
    )


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding("Ray", "good", "no RAY_ADDRESS: each job starts a cluster on this machine where it needs one")
    if address == "auto":
        return Finding("Ray", "good", "RAY_ADDRESS is auto: jobs join the cluster that runs on this machine")
    host, port = _host(address if "://" in address else f"ray://{address}", 10001)
    return _answering("Ray", f"RAY_ADDRESS {host}:{port}", host, port, "start the cluster, or unset RAY_ADDRESS")


def _key() -> Finding:
    try:
        from_environment()
    except ValueError as error:
        return Finding("pseudonym key", "bad", str(error))
    return Finding("pseudonym key", "good", "given; keep it, as pseudonyms and splits depend on it")


def _mlflow(uri: str) -> Finding:
    address = urlsplit(uri)
    if address.scheme in ("http", "https"):
        host, port = _host(uri, 443 if address.scheme == "https" else 80)
        return _answering("MLflow", f"{host}:{port}", host, port, "start it (make mlflow), or correct tracking_uri")
    if address.scheme == "sqlite":
        file = Path(uri.removeprefix("sqlite:///"))
        if file.exists():
            return Finding("MLflow", "good", f"a database at {file}")
        return _local(f"sqlite:///{file}", file.parent, "MLflow")
    if not address.scheme:
        return Finding("MLflow", "bad", f"{uri} is a path: MLflow's databases are written sqlite:///{uri}")
    return Finding("MLflow", "note", f"{address.scheme} is not looked at")


def _of_recipe(path: str) -> Iterator[Finding]:
    try:
        recipe = config.read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        yield Finding("recipe", "bad", f"{path} cannot be read ({type(error).__name__})")
        return
    if not isinstance(recipe, dict):
        yield Finding("recipe", "bad", f"{path} has no sections")
        return
    sections = {name: values for name, values in recipe.items() if isinstance(values, dict)}
    if unknown := sorted(sections.keys() - config.NAMES):
        yield Finding("recipe", "bad", f"unknown sections: {', '.join(unknown)}")
    outputs = {values[key] for values in sections.values() for key in _WRITTEN if isinstance(values.get(key), str)}
    looks: dict[tuple[str, str], Callable[[str, str], Finding]] = {}
    for name, values in sections.items():
        for key in (*_READ, *_WRITTEN):
            uri = values.get(key)
            if isinstance(uri, str) and uri and (key in _WRITTEN or uri not in outputs):
                looks.setdefault((f"{name}.{key}", uri), _to_write if key in _WRITTEN else _to_read)
    for (about, uri), look in looks.items():
        yield look(about, uri)
    for uri in sorted({values["tracking_uri"] for values in sections.values() if values.get("tracking_uri")}):
        yield _mlflow(uri)


def _to_read(about: str, uri: str) -> Finding:
    if pacs.is_dicomweb(uri):
        return _reached(about, pacs.service(uri).removeprefix("dicomweb+"), "is the PACS up?")
    if uri.startswith("s3://"):
        return _in_store(about, uri, must_be=True)
    there = Path(storage.absolute(uri)).exists()
    return Finding(about, "good" if there else "bad", uri if there else f"there is no {uri}")


def _to_write(about: str, uri: str) -> Finding:
    if uri.startswith("s3://"):
        return _in_store(about, uri, must_be=False)
    if pacs.is_dicomweb(uri):
        return _reached(about, pacs.service(uri).removeprefix("dicomweb+"), "is the PACS up?")
    return _local(uri, Path(storage.absolute(uri)), about)


def _local(shown: str, path: Path, about: str) -> Finding:
    """A file is made and removed in the nearest folder that exists."""
    folder = next(one for one in (path, *path.parents) if one.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding(about, "good", f"{shown} can be written")
    except OSError as error:
        return Finding(about, "bad", f"{shown} cannot be written ({type(error).__name__})")


def _in_store(about: str, uri: str, *, must_be: bool) -> Finding:
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and (answer := _reached(about, endpoint, "is AWS_ENDPOINT_URL right?")).level == "bad":
        return answer
    try:
        there = next(iter(storage.list_files(uri)), None) is not None or storage.exists(uri)
    except FileNotFoundError:
        there = False
    except CredentialsError as error:
        return Finding(about, "bad", str(error))
    except (OSError, ValueError) as error:
        return Finding(
            about, "bad", f"{uri} cannot be listed ({type(error).__name__}): see AWS_* and the bucket's name"
        )
    if must_be and not there:
        return Finding(about, "bad", f"there is nothing at {uri}")
    return Finding(about, "good", f"{uri} answers" if there else f"{uri} answers; nothing is there yet")


def _reached(about: str, url: str, advice: str) -> Finding:
    host, port = _host(url, 443 if url.startswith("https") else 80)
    return _answering(about, f"{host}:{port}", host, port, advice)


def _host(url: str, port: int) -> tuple[str, int]:
    address = urlsplit(url)
    return address.hostname or "", address.port or port


def _answering(about: str, shown: str, host: str, port: int, advice: str) -> Finding:
    """Whether a server takes connections there."""
    try:
        socket.create_connection((host, port), _ANSWER_S).close()
    except socket.gaierror:
        return Finding(about, "bad", f"{shown}: there is no such host: {advice}")
    except OSError as error:
        return Finding(about, "bad", f"{shown} does not answer ({type(error).__name__}): {advice}")
    return Finding(about, "good", f"{shown} answers")
