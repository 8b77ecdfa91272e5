"""A release (`make release`): what a cluster is given of a commit, the same bytes whenever and wherever it is made.

- the wheel of `rayseg`,
- the zip that Ray unpacks on each node as a working directory: `serving/`, `jobs/`, `configs/` and `rayseg/`,
- `serve.yaml` for `serve deploy`, which names the zip,
- a bill of materials (CycloneDX) of each lock, with the licences of what is installed here,
- `SHA256SUMS` of all of these.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rayseg.build import COMMIT

LOCKS = ("requirements.lock", "requirements-gpu.lock", "requirements-viewer.lock")
SUMS = "SHA256SUMS"
_BUCKET = "s3://YOUR-BUCKET/releases"
_ZIP_IN_CONFIG = f"{_BUCKET}/rayseg.zip"  # what serving/config.yaml names


def build(root: Path, output: Path, releases: str = _BUCKET) -> list[Path]:
    """Makes the files of the commit that is checked out at `root`, a clone of the repository.

    Args:
        root: of the clone, without changes.
        output: folder for the files; of earlier ones none but those of equal names are touched.
        releases: URI of the folder that the zip will be put into.

    Raises:
        ValueError: files differ from the commit, or are new.
    """
    if changed := _git(root, "status", "--porcelain").decode().splitlines():
        raise ValueError(
            f"release: commit first, {len(changed)} files differ from the commit (as {changed[0].strip()})"
        )
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    made = int(_git(root, "log", "-1", "--format=%ct"))
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rayseg-release-") as folder:
        tree = Path(folder)
        with tarfile.open(fileobj=io.BytesIO(_git(root, "archive", "HEAD"))) as archive:
            archive.extractall(tree, filter="data")
        baked = tree / "platform" / "rayseg" / COMMIT
        baked.write_text(f"{commit}\n", encoding="ascii")
        baked.chmod(0o644)  # as the others, whatever the umask
        version = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        # The commit is in its name as Ray unpacks a URI once a node: other bytes under a known name would not be seen.
        package = output / f"rayseg-{version}-{commit[:12]}.zip"
        _pack(package, tree, f"rayseg-{version}", made)
        files = [_wheel(tree, output, made), package, _serve_config(tree, output, f"{releases}/{package.name}")]
        files += [_bill(tree, lock, output) for lock in LOCKS]
    sums = output / SUMS
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(files)]
    sums.write_text("".join(lines), encoding="ascii")
    return [*files, sums]


def _git(root: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def _pack(path: Path, tree: Path, top: str, made: int) -> None:
    """The zip: one folder at the top, which Ray takes off, no times and owners but those of the commit."""
    when = datetime.fromtimestamp(made, UTC).timetuple()[:6]
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in sorted(_packed(tree)):
            entry = zipfile.ZipInfo(f"{top}/{name}", when)
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o100644 << 16
            archive.writestr(entry, file.read_bytes())


def _packed(tree: Path) -> Iterator[tuple[str, Path]]:
    for parent, folder in ((tree, "serving"), (tree, "jobs"), (tree, "configs"), (tree / "platform", "rayseg")):
        for file in (parent / folder).rglob("*"):
            if file.is_file():
                yield file.relative_to(parent).as_posix(), file


def _wheel(tree: Path, output: Path, made: int) -> Path:
    with tempfile.TemporaryDirectory(prefix="rayseg-wheel-") as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(made), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        # The umask is in the modes of files that setuptools writes.
        subprocess.run([*command, "--wheel-dir", folder, str(tree)], check=True, env=environment, umask=0o022)
        (wheel,) = Path(folder).iterdir()
        (output / wheel.name).write_bytes(wheel.read_bytes())
    return output / wheel.name


def _serve_config(tree: Path, output: Path, uri: str) -> Path:
    """serving/config.yaml with the zip's own URI, comments and all."""
    text = (tree / "serving" / "config.yaml").read_text(encoding="utf-8")
    assert text.count(_ZIP_IN_CONFIG) == 1, "serving/config.yaml names the zip"
    config = output / "serve.yaml"
    config.write_text(text.replace(_ZIP_IN_CONFIG, uri), encoding="utf-8")
    return config


def _bill(tree: Path, lock: str, output: Path) -> Path:
    """What the lock pins, with hashes, as CycloneDX JSON."""
    bill = output / f"{Path(lock).stem}.cdx.json"
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--output-reproducible", "--no-validate"]
    command += ["--output-format", "JSON", "--pyproject", str(tree / "pyproject.toml"), "--output-file", str(bill)]
    subprocess.run([*command, str(tree / lock)], check=True, stderr=subprocess.DEVNULL)
    content = json.loads(bill.read_text(encoding="utf-8"))
    for component in content["components"]:
        del component["description"]  # the line of the lock, once more
        if licences := _licences(component["name"], component["version"]):
            component["licenses"] = licences
    bill.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return bill


def _licences(name: str, version: str) -> list[dict[str, Any]]:
    """What the distribution says of itself, in CycloneDX's words; nothing where this one is not installed."""
    try:
        told = metadata.metadata(name).json
    except metadata.PackageNotFoundError:
        return []
    if told["version"] != version:
        return []
    if expression := told.get("license_expression"):
        return [{"expression": expression, "acknowledgement": "declared"}]
    classified = [line.rpartition(" :: ")[2] for line in told.get("classifier", ()) if line.startswith("License ::")]
    # Some put the whole text there: its first line is what it is called.
    names = classified or str(told.get("license", "")).strip().splitlines()[:1]
    return [{"license": {"name": found, "acknowledgement": "declared"}} for found in names]


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the release of the clone in the current folder."""
    parser = argparse.ArgumentParser(prog="python -m rayseg.release", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("dist"), metavar="FOLDER")
    parser.add_argument("--releases", default=_BUCKET, metavar="URI", help="folder that the zip will be put into")
    options = parser.parse_args(arguments)
    try:
        files = build(Path.cwd(), options.output, options.releases.rstrip("/"))
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    for file in files:
        print(f"{file}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
