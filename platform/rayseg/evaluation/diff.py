"""Diff: what changed between two runs over one archive, series by series, from their ledgers and segmentations.

Series stream through Ray Data, so what is held at a time are the two segmentations of a series in each task, and in the
driver a row for each series and the slices of the largest changes.
"""

import csv
import dataclasses
import heapq
import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from tqdm import tqdm

from rayseg import cluster, snapshots, storage
from rayseg import config as configuration
from rayseg.evaluation import difference, panes, sides
from rayseg.evaluation.changes import CHANGES, DIFF, compare_series
from rayseg.evaluation.difference import Page, Picture, Summary
from rayseg.evaluation.sides import Side
from rayseg.records import OUTPUTS
from rayseg.tracking import runs

TABLE, CSV, REPORT, PICTURES = "diff.parquet", "diff.csv", "diff.html", "pictures"
_SERIES_PER_TASK = 16
_PAIRS = pa.schema(
    [
        ("series_key", pa.string()),
        ("patient_key", pa.string()),
        ("baseline", OUTPUTS.value_type),  # null: nothing found, and no file written
        ("challenger", OUTPUTS.value_type),
    ]
)


@dataclass(frozen=True)
class DiffConfig:
    """Which two runs, and where to write what changed from the one to the other."""

    baseline: str  # URI of the output of a segment job
    challenger: str  # URI of the output of another segment job, or the same URI
    manifest: str  # URI of the manifest of the archive, for the pictures
    output: str  # URI of a folder for the result
    baseline_model: str | None = None  # NAME/VERSION, or NAME/VERSION/CONFIGURATION, where the ledger has several runs
    challenger_model: str | None = None  # the same of the challenger
    worst: int = 50  # number of largest changes that become pictures
    tracking_uri: str | None = None  # URI of MLflow, where the report is to be kept there too
    experiment: str = "rayseg"  # experiment of the run in MLflow

    def __post_init__(self) -> None:
        if self.worst < 0:
            raise ValueError(f"diff.worst: 0 or more expected, got {self.worst}")


@dataclass(frozen=True)
class DiffResult:
    """What came out: `series` = `compared` + the sum of `not_compared`."""

    baseline: str  # NAME/VERSION/CONFIGURATION
    challenger: str
    series: int
    compared: int
    identical: int
    changed: int
    not_compared: dict[str, int]  # by reason
    summary: dict[str, Any]  # `difference.Summary`, of all classes together
    classes: dict[str, dict[str, Any]]  # the same of each class that both sides know
    report: str  # URI of an HTML file
    table: str  # URI of a Parquet file, schema `changes.DIFF`; diff.csv beside it has the same
    pictures: list[str]  # URIs of PNG files, the largest change first
    run_id: str | None  # in MLflow
    seconds: float


def diff(config: DiffConfig) -> DiffResult:
    """Compares two runs of an archive, series by series; writes a table, pictures and a report.

    Raises:
        ValueError: there is no manifest or ledger, a ledger holds several runs and none is named, or both are the same
            run or have no series in common.
    """
    began = time.monotonic()
    baseline = sides.choose(config.baseline, config.baseline_model, "baseline_model")
    challenger = sides.choose(config.challenger, config.challenger_model, "challenger_model")
    if sides.same(baseline, challenger, (config.baseline, config.challenger)):
        raise ValueError(f"diff.challenger: {challenger.run} is the baseline, too; name another run or output")
    if not baseline.rows.keys() & challenger.rows.keys():
        raise ValueError("diff.challenger: the two ledgers have no series in common; are they of one archive?")
    try:
        snapshots.current(config.manifest)
    except FileNotFoundError:
        raise ValueError(f"diff.manifest: there is no manifest at {config.manifest}") from None
    pairs, others = sides.pair(baseline, challenger)
    cluster.connect()
    found: list[list[dict[str, Any]]] = []
    largest: list[tuple[Any, dict[str, Any]]] = []  # a heap: the least of them first
    for one in _compared(pairs):
        found.append(one["rows"])
        if one["shown"] is not None:
            heapq.heappush(largest, (_rank(one["rows"]), {**one["rows"][0], **one["shown"]}))
            if len(largest) > config.worst:
                heapq.heappop(largest)
    found.sort(key=_rank, reverse=True)
    refused = [{**row, "class": "", "verdict": "not_compared"} for row in others]
    table = pa.Table.from_pylist([row for rows in found for row in rows] + refused, schema=DIFF)
    shown = [one for _, one in sorted(largest, key=lambda item: item[0], reverse=True)]
    # One version with two configurations is told apart by these.
    names = (baseline.run, challenger.run) if baseline.name == challenger.name else (baseline.name, challenger.name)
    pictures = panes.pictures(shown, config.manifest, names)
    page = _page(config, (baseline, challenger), names, table.to_pylist(), pictures)
    files = {
        TABLE: table,
        CSV: _csv(table),
        **{f"{PICTURES}/{rank:03d}.png": one.png for rank, one in enumerate(pictures, start=1)},
        REPORT: difference.render(page).encode(),
    }
    output = storage.absolute(config.output)
    for name, content in files.items():
        write = storage.write_table if isinstance(content, pa.Table) else storage.write
        write(storage.join(output, name), content)
    whole = [row for row in page.rows if row["class"] == ""]
    return DiffResult(
        baseline=baseline.run,
        challenger=challenger.run,
        series=len(whole),
        compared=page.together.identical + page.together.changed,
        identical=page.together.identical,
        changed=page.together.changed,
        not_compared=_reasons(whole),
        summary=dataclasses.asdict(page.together),
        classes={name: dataclasses.asdict(one) for name, one in page.classes.items()},
        report=storage.join(output, REPORT),
        table=storage.join(output, TABLE),
        pictures=[storage.join(output, name) for name in files if name.startswith(PICTURES)],
        run_id=None if config.tracking_uri is None else _keep(config, page, files),
        seconds=time.monotonic() - began,
    )


def _compared(pairs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a row of `CHANGES` for each pair, in no certain order."""
    if not pairs:
        return
    per_task = min(max(len(pairs) // 64, 1), _SERIES_PER_TASK)
    blocks = [
        pa.Table.from_pylist(list(pairs[first : first + per_task]), schema=_PAIRS)
        for first in range(0, len(pairs), per_task)
    ]
    dataset = ray.data.from_arrow(blocks).map_batches(_compare_block, batch_size=None, batch_format="pyarrow")
    with tqdm(total=len(pairs), desc="diff", unit=" series", disable=None) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()
            progress.update(len(batch))


def _compare_block(block: pa.Table) -> pa.Table:
    return pa.Table.from_pylist([compare_series(pair) for pair in block.to_pylist()], schema=CHANGES)


def _rank(rows: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """The greater, the larger the change; what has no volume, and then what was not compared, comes last."""
    row = rows[0]
    compared = row["verdict"] != "not_compared"
    return compared, row["changed_ml"] is not None, row["changed_ml"] or 0.0, row["changed_pixels"], row["series_key"]


def _page(
    config: DiffConfig,
    both: tuple[Side, Side],
    names: tuple[str, str],
    rows: list[dict[str, Any]],
    pictures: Sequence[Picture],
) -> Page:
    asked = {}
    folders = (config.baseline, config.challenger)
    for name, side, output in zip(("baseline", "challenger"), both, folders, strict=True):
        asked[name] = f"{side.run}, {len(side.rows)} series in the ledger of {storage.absolute(output)}"
        asked[f"{name}'s engine"] = ", ".join(side.engines) or "the ledger does not tell"
    asked["manifest"] = storage.absolute(config.manifest)
    by_class: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_class.setdefault(row["class"], []).append(row)
    classes = {name: difference.summary(of) for name, of in sorted(by_class.items()) if name}
    return Page(*names, asked, difference.summary(by_class[""]), classes, rows, pictures)


def _csv(table: pa.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in table.to_pylist():
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row.values()])
    return text.getvalue().encode()


def _reasons(whole: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(row["reason"] for row in whole if row["verdict"] == "not_compared").items()))


def _keep(config: DiffConfig, page: Page, files: dict[str, Any]) -> str:
    """A run with the summary's numbers as metrics and the files as artifacts, but for the table that can be large."""
    uri = config.tracking_uri
    assert uri is not None
    told = {"diff/not_compared": float(sum(row["verdict"] == "not_compared" for row in page.rows))}
    told |= _metrics(page.together, "")
    for name, one in page.classes.items():
        told |= _metrics(one, f"/{name}") if len(page.classes) > 1 else {}
    with runs.running(
        uri,
        config.experiment,
        f"diff-{page.challenger}-{page.baseline}".replace("/", "-"),
        configuration.flat(config),
        {"rayseg.kind": "diff", "rayseg.baseline": page.baseline, "rayseg.challenger": page.challenger},
    ) as run_id:
        runs.log_metrics(uri, run_id, told)
        for name in (REPORT, CSV):
            runs.log_bytes(uri, run_id, name, files[name])
    return run_id


def _metrics(one: Summary, suffix: str) -> dict[str, float]:
    """By their names in MLflow: `diff/NAME`, of quartiles `diff/NAME_low` and so on, of a class `.../CLASS`."""
    told: dict[str, float] = {}
    for name, value in dataclasses.asdict(one).items():
        if isinstance(value, dict):
            told |= {f"diff/{name}_{part}{suffix}": number for part, number in value.items()}
        elif value is not None:
            told[f"diff/{name}{suffix}"] = value
    return told
