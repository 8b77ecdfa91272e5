"""Which code this is: told by every process at its start, and the same in all processes of a job.

A driver hands what it is to its workers (`RAYSEG_CODE` in their environment, which `cluster.connect` sets, or an
argument of a Serve replica), and a worker that is something else refuses to work. What counts is a digest of the files
themselves: a cluster's nodes have no repository to ask, and a working tree may differ from its commit.
"""

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayseg import __version__

VARIABLE = "RAYSEG_CODE"
SILENT = "RAYSEG_CODE_SILENT"  # in the environment of workers that need not say what they are
COMMIT = "COMMIT"  # a file in the package of a release, see `release`
_SUFFIXES = {".py", ".html", ".css", ".js", ".svg"}


@dataclass(frozen=True)
class Build:
    """The code of one process, or what one told another of its own."""

    version: str
    commit: str | None  # begins the commit's hash, `+` behind it: with changes; None where nobody tells
    sha256: str

    def __str__(self) -> str:
        """For people."""
        return f"{self.version} (commit {self.commit or 'unknown'}, code {self.sha256[:12]})"

    def told(self) -> str:
        """For another process; see `require`."""
        return f"{self.version} {self.commit or '-'} {self.sha256}"


def current(*packages: str) -> Build:
    """This process's version, commit and SHA-256 over the sources of `rayseg` and of further `packages`."""
    asked = git()
    commit = f"{asked['commit'][:12]}{'+' if asked['changed'] == 'true' else ''}" if asked else None
    return Build(__version__, commit, sha256("rayseg", *packages))


def where() -> str:
    """The folder that `rayseg` was imported from."""
    return str(Path(__file__).parent)


def require(told: str, *packages: str) -> None:
    """Tells this process's code on standard error, or refuses where that is not its driver's.

    Args:
        told: what the driver is (`Build.told`), of the same `packages`.
        packages: beside `rayseg`.

    Raises:
        RuntimeError: it is not; both are named.
    """
    version, commit, wanted = told.split()
    driver = Build(version, commit if commit != "-" else None, wanted)
    # Equal files are of an equal commit: no need to ask for it again in each worker.
    own = Build(__version__, driver.commit, sha256("rayseg", *packages))
    names = " and ".join(("rayseg", *packages))
    if own.sha256 != driver.sha256:
        own = current(*packages)
        raise RuntimeError(
            f"{names} {own} at {where()} is not the driver's, {driver}: two versions would mix. Take the package off "
            "the nodes, and let our code travel with each job (--runtime-env configs/runtime_env.yaml, or a release)"
        )
    if SILENT not in os.environ:
        print(f"{names} {own} from {where()}", file=sys.stderr, flush=True)


@functools.cache
def sha256(*packages: str) -> str:
    """SHA-256 (hex) over names and bytes of the packages' files, without those that Python makes."""
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec, package
        assert spec.origin, package
        root = Path(spec.origin).parent
        for file in sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES):
            content = file.read_bytes()
            digest.update(f"{package}/{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.cache
def git() -> Mapping[str, str]:
    """`commit` that the code is of, and `changed`, "true" or "false": whether it differs; empty where nobody knows."""
    folder = Path(__file__).parent
    if (folder / COMMIT).is_file():
        return {"commit": (folder / COMMIT).read_text(encoding="ascii").strip(), "changed": "false"}

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]  # of the path, as a user's shell finds it
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if not ask("ls-files", "__init__.py"):  # a repository of something else, around an installed package
            return {}
        changed = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "HEAD"), "changed": str(changed).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
