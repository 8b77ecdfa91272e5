"""The copies that docs/how-to/back-up.md tells to make bring everything back: MLflow's two halves, and a ledger."""

import shutil
import subprocess
from pathlib import Path

from rayseg.inference import ledger
from rayseg.inference.series import Task, ledger_row
from rayseg.records import Reason, Reject
from rayseg.tracking import registry
from rayseg.tracking.version import ModelVersion
from tests import bundles


def sqlite3(database: Path, command: str) -> None:
    """As its command line does; by Python where that is not installed."""
    if shutil.which("sqlite3"):
        subprocess.run(["sqlite3", str(database), command], check=True)
        return
    import sqlite3 as library

    assert command.startswith(".backup ")
    target = library.connect(command.removeprefix(".backup "))
    with target, library.connect(database) as source:
        source.backup(target)


def test_mlflow_comes_back_from_database_and_artifacts(tmp_path: Path) -> None:
    home, copies = tmp_path / "mlflow", tmp_path / "copies"
    home.mkdir()
    copies.mkdir()
    tracking_uri = f"sqlite:///{home}/mlflow.db"
    bundles.register(tracking_uri, "tiny", bundles.write_bundle(tmp_path / "1", 100), "champion")
    before = registry.resolve(tracking_uri, "models:/tiny@champion")
    sqlite3(home / "mlflow.db", f".backup {copies}/mlflow.db")
    bundles.register(tracking_uri, "tiny", bundles.write_bundle(tmp_path / "2", 150), "champion")
    shutil.copytree(home, copies / "home", ignore=shutil.ignore_patterns("mlflow.db*"))
    shutil.rmtree(home)

    shutil.copytree(copies / "home", home)
    shutil.copy(copies / "mlflow.db", home)
    restored = f"sqlite:///{home}/../{home.name}/mlflow.db"  # what this process has open is of the database before
    found = registry.resolve(restored, "models:/tiny@champion")
    assert (found.version, found.digest) == ("1", before.digest)
    folder, _ = registry.fetch(restored, "models:/tiny@champion")
    assert (folder / "model.bin").read_bytes() == (tmp_path / "1" / "model.bin").read_bytes()


def test_a_ledger_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    task = Task("out", ModelVersion("tiny", "1", "models:/tiny/1", "r", "d" * 64), "c" * 64)
    output, copy = tmp_path / "output", tmp_path / "copy"
    ledger.append(str(output), [ledger_row(task, "a", "p", None)], [])
    shutil.copytree(output, copy)
    ledger.append(str(output), [ledger_row(task, "b", "p", Reject(Reason.TRUNCATED))], [])
    shutil.rmtree(output)
    shutil.copytree(copy, output)
    rows = ledger.rows_of(str(output), "d" * 64, "c" * 64).to_pylist()
    assert [(row["series_key"], row["verdict"]) for row in rows] == [("a", "segmented")]
