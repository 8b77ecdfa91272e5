"""A repository with the files of this checkout as its only commit: changed ones and new ones too, locks cut short."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
_WHEN = "2026-01-02T03:04:06Z"
_PINS = 3


def repository(folder: Path) -> Path:
    """Makes it in `folder`, which must not be there yet."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for lock in folder.glob("requirements*.lock"):
        pins = lock.read_text().replace("\\\n", "").splitlines()[:_PINS]
        lock.write_text("".join(f"{pin}\n" for pin in pins))
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


def git(folder: Path, *arguments: str) -> str:
    """As somebody with no settings, and on that day."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_DATE": _WHEN,
        "GIT_COMMITTER_DATE": _WHEN,
        **{f"GIT_{who}_{what}": "tests@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
