"""A driver that appends to a ledger beside others: `python -m tests.appending OUTPUT NAME APPENDS`, and what is to be.

Each append has a row of a series of its own and one of a series that all drivers do, with a reject for both.
"""

import os
import subprocess
import sys
from pathlib import Path

from deltalake import DeltaTable

from rayseg import tables
from rayseg.inference import ledger

COMMITS_PER_COMPACTION = 5  # so that files are put together meanwhile
ROOT = Path(__file__).parents[1]


def main(output: str, name: str, appends: int) -> None:
    tables.COMMITS_PER_COMPACTION = COMMITS_PER_COMPACTION
    for number in range(appends):
        base = {"model_digest": "m", "config_digest": "c", "verdict": "segmented", "rejected_slices": 1}
        keys = ["both", f"{name}{number}"]
        rejects = [{"uri": key, "frame": number, "stage": "segment", "reason": name, "series_key": key} for key in keys]
        ledger.append(output, [base | {"series_key": key, "slices": number, "detail": name} for key in keys], rejects)


def check(output: str, options: dict[str, str] | None = None, appends: int = 6) -> None:
    """Two drivers at once, by processes of their own, lose and double nothing."""
    command = [sys.executable, "-m", "tests.appending", output]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    drivers = [subprocess.Popen([*command, name, str(appends)], cwd=ROOT, env=environment) for name in "pq"]
    assert [driver.wait() for driver in drivers] == [0, 0]
    rows = {one["series_key"]: one for one in ledger.read(output).to_pylist()}
    assert rows.keys() == {"both", *(f"{name}{number}" for name in "pq" for number in range(appends))}
    table = DeltaTable(f"{output}/ledger", storage_options=options)
    every = table.to_pandas()
    assert len(every) == 4 * appends
    assert every["sequence"].nunique() == 2 * appends  # each append has a number of its own
    assert "OPTIMIZE" in {commit["operation"] for commit in table.history()}
    last = every[every["series_key"] == "both"].sort_values("sequence").iloc[-1]
    assert (rows["both"]["slices"], rows["both"]["detail"]) == (last["slices"], last["detail"])
    assert last["slices"] == appends - 1
    rejects = {one["uri"]: (one["frame"], one["reason"]) for one in ledger.rejects(output).to_pylist()}
    assert rejects == {key: (one["slices"], one["detail"]) for key, one in rows.items()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
