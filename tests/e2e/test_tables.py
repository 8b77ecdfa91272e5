"""Tables on a real S3 server: several drivers at once, and readers that know nothing of us."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayseg import retry, snapshots, storage, tables
from rayseg.inference import ledger
from rayseg.records import LEDGER_TABLE, MANIFEST
from tests import appending
from tests.faults import faulty
from tests.unit.archive_runs import row

pytestmark = pytest.mark.e2e

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "read-results.md"
HTTP = {"AWS_ALLOW_HTTP": "true"}  # as the documentation has it, for a server without TLS


def test_two_drivers_at_once_lose_nothing(s3_store: str) -> None:
    appending.check(storage.join(s3_store, "both"), HTTP)


def test_the_documented_commands_read_what_holds(s3_store: str) -> None:
    output = storage.join(s3_store, "documented")
    bad = {"stage": "segment", "reason": "corrupt", "detail": "d", "frame": None, "series_key": "a"}
    ledger.append(output, [row("a", rejected_slices=1), row("b")], [bad | {"uri": "x"}])
    ledger.append(output, [row("a", slices=5, rejected_slices=1)], [bad | {"uri": "y"}])
    ledger.append(output, [row("a", "2")], [bad | {"uri": "z", "stage": "catalog", "series_key": None}])
    slices = [{"uri": f"{number}", "verdict": "ok", "series_key": "ab"[number % 2]} for number in range(5)]
    snapshots.write_table(storage.join(output, "manifest.parquet"), pa.Table.from_pylist(slices, schema=MANIFEST))
    commands = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    known: dict[str, Any] = {}
    for command in commands:
        assert "s3://results/2024" in command or known
        exec(command.replace("s3://results/2024", output), known)
    expected = [(one["series_key"], one["model_version"], one["slices"]) for one in ledger.read(output).to_pylist()]
    assert sorted(expected) == [("a", "1", 5), ("a", "2", 4), ("b", "1", 4)]
    for name in ("by_duckdb", "by_pandas"):
        frame = known[name]
        told = frame[["series_key", "model_version", "slices"]].itertuples(index=False, name=None)
        assert sorted(told) == sorted(expected), name
    assert dict(known["slices"].itertuples(index=False, name=None)) == {"a": 3, "b": 2}
    assert known["rows"]["uri"].tolist() == list("01234")
    assert {*known["refused"]["uri"]} == {"y", "z"} == {one["uri"] for one in ledger.rejects(output).to_pylist()}


def test_answers_that_are_lost_lose_and_double_nothing(
    s3_store: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    uri = storage.join(s3_store, "lost-answers", "ledger")
    with faulty(s3_environment["AWS_ENDPOINT_URL"], seed=5) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        faults.share, faults.kinds = 0.3, ("lost", "500")
        for number in range(8):
            rows = pa.Table.from_pylist([row(f"{number}")], schema=LEDGER_TABLE)
            assert tables.append(uri, rows, ledger.IDENTITY) == number
        faults.share = 0.0
        assert faults.counts["lost"] > 10
        rows = tables.read(uri, ["series_key", tables.SEQUENCE]).sort_by(tables.SEQUENCE).to_pylist()
    assert rows == [{"series_key": f"{number}", tables.SEQUENCE: number} for number in range(8)]


def test_refused_credentials_are_told_as_such(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = storage.join(s3_store, "refused")
    ledger.append(output, [row("a")], [])
    with pytest.raises(FileNotFoundError):
        tables.read("s3://absent-bucket/ledger")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0" * 40)
    for call in (lambda: ledger.append(output, [row("b")], []), lambda: ledger.read(output)):
        with pytest.raises(retry.CredentialsError, match="SignatureDoesNotMatch"):
            call()
