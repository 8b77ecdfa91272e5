"""Prepare: the accepted rows of a manifest become fixed-shape samples in Parquet shards, split by patient."""

import hashlib
import logging
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from tqdm import tqdm

from rayseg import cluster, storage
from rayseg import config as configuration
from rayseg.data.labels import Labels
from rayseg.data.prepared import DESCRIPTION, VERSION
from rayseg.data.preprocess import Preprocess
from rayseg.data.samples import PLAN, limited, write_shards
from rayseg.data.split import SPLITS, Split, check_leak
from rayseg.dicom.reading import slice_uid
from rayseg.records import REJECTS

logger = logging.getLogger(__name__)

REJECTS_FILE = "rejects.parquet"
_SHARD = re.compile(rf"split=({'|'.join(SPLITS)})/part-\d+\.parquet")


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, how, and where to write the set."""

    manifest: str  # URI of a manifest that `catalog` wrote
    output: str  # URI of a folder or prefix for the set alone
    preprocess: Preprocess = field(default_factory=Preprocess)
    labels: Labels = field(default_factory=Labels)
    split: Split = field(default_factory=Split)
    limit: int | None = None  # so many rows, the same from each patient where it has them, spread over its slices
    rows_per_shard: int = 256
    row_group_rows: int = 16
    max_reject_fraction: float = 0.2

    def __post_init__(self) -> None:
        for key in ("limit", "rows_per_shard", "row_group_rows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"prepare.{key}: a positive number expected, got {value}")


@dataclass(frozen=True)
class PrepareResult:
    """What the set holds; `positive` counts rows with foreground; `cached`: it was there already."""

    prepared: str
    rows: int
    train: int
    val: int
    test: int
    positive: int
    patients: int
    rejected: int
    reasons: dict[str, int]
    cached: bool
    seconds: float


def prepare(config: PrepareConfig) -> PrepareResult:
    """Writes the prepared set, or finds that an equal one stands at `output` already.

    Names, order and bytes of the shards depend on the manifest, the objects and the configuration alone. The set
    exists from the moment when its description, written last, does.

    Raises:
        ValueError: no manifest, no accepted row with a mask, a split without rows, or too many rejects.
    """
    began = time.monotonic()
    cluster.connect()
    manifest_uri, output = storage.absolute(config.manifest), storage.absolute(config.output)
    try:
        manifest = storage.read(manifest_uri)
    except FileNotFoundError:
        raise ValueError(f"prepare.manifest: there is no {manifest_uri}; run the catalog job") from None
    digest = _digest(config, hashlib.sha256(manifest).hexdigest())
    standing = _standing(output, digest)
    if standing is not None:
        logger.info("prepare: an equal set stands at %s", output)
        return _result(output, standing, cached=True, seconds=time.monotonic() - began)

    samples = _samples(pq.read_table(pa.BufferReader(manifest)), config)
    _clear(output)
    written = _write(samples, output, config)
    rejects = [reject for shard in written for reject in shard["rejects"]]
    storage.write_table(storage.join(output, REJECTS_FILE), pa.Table.from_pylist(rejects, schema=REJECTS))
    reasons = dict(sorted(Counter(reject["reason"] for reject in rejects).items()))
    if len(rejects) > config.max_reject_fraction * len(samples):
        raise ValueError(
            f"prepare: {len(rejects)} of {len(samples)} rows rejected, over max_reject_fraction "
            f"{config.max_reject_fraction}: {reasons}; {storage.join(output, REJECTS_FILE)} names each"
        )
    filled = [shard for shard in written if shard["rows"]]
    shards = {split: [shard for shard in filled if shard["path"].startswith(f"split={split}/")] for split in SPLITS}
    rows = {split: sum(shard["rows"] for shard in shards[split]) for split in SPLITS}
    refused = {(reject["uri"], reject["frame"]) for reject in rejects}
    description = {
        "version": VERSION,
        "digest": digest,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "preprocess": configuration.plain(config.preprocess),
        "labels": configuration.plain(config.labels),
        "split": configuration.plain(config.split),
        "limit": config.limit,
        "shape": [*config.preprocess.size, config.preprocess.channels],
        "rows": rows,
        "shards": {split: [shard["path"] for shard in shards[split]] for split in SPLITS},
        "positive": sum(shard["positive"] for shard in written),
        "patients": len({sample["patient_key"] for sample in samples if _slice(sample) not in refused}),
        "reasons": reasons,
    }
    _refuse_empty(rows, config.split, "rows are left")
    check_leak(_keys(output, filled))
    storage.write_json(storage.join(output, DESCRIPTION), description)
    return _result(output, description, cached=False, seconds=time.monotonic() - began)


def _digest(config: PrepareConfig, manifest_sha256: str) -> str:
    """Of all that decides the set's content: everything but the places where things lie."""
    values = configuration.plain(config) | {"manifest": manifest_sha256, "output": None, "version": VERSION}
    return configuration.digest(values)


def _standing(output: str, digest: str) -> dict[str, Any] | None:
    """The description of the set at `output` where that has this digest and all its shards."""
    try:
        description: dict[str, Any] = storage.read_json(storage.join(output, DESCRIPTION))
    except (FileNotFoundError, ValueError):
        return None
    if description.get("digest") != digest:
        return None
    paths = {info.uri for info in storage.list_files(output, (".parquet",))}
    complete = all(storage.join(output, path) in paths for shards in description["shards"].values() for path in shards)
    return description if complete else None


def _result(output: str, description: dict[str, Any], cached: bool, seconds: float) -> PrepareResult:
    rows, reasons = description["rows"], description["reasons"]
    return PrepareResult(
        prepared=output,
        rows=sum(rows.values()),
        train=rows["train"],
        val=rows["val"],
        test=rows["test"],
        positive=description["positive"],
        patients=description["patients"],
        rejected=sum(reasons.values()),
        reasons=reasons,
        cached=cached,
        seconds=seconds,
    )


def _clear(output: str) -> None:
    """Takes away an older set, its description first: no reader sees a mixture."""
    storage.delete(storage.join(output, DESCRIPTION))
    if storage.exists(output):
        for info in list(storage.list_files(output, (".parquet",))):
            if _SHARD.fullmatch(info.uri[len(output.rstrip("/")) + 1 :]):
                storage.delete(info.uri)


def _samples(manifest: pa.Table, config: PrepareConfig) -> list[dict[str, Any]]:
    """The rows to prepare, in the order of their shards: first all of training, then validation, then test."""
    accepted = [row for row in manifest.to_pylist() if row["verdict"] == "ok"]
    if not any(row["masks"] for row in accepted):
        raise ValueError("prepare.manifest: no accepted row has a mask; name catalog.layout.masks and catalog again")
    config.labels.check_sources({mask["label"] for row in accepted for mask in row["masks"]} - {None})
    samples = [
        {
            "row_id": hashlib.sha256(slice_uid(row["uri"], row["frame"]).encode()).hexdigest(),
            "split": config.split.assign(row["patient_key"]),
            **{name: row[name] for name in ("patient_key", "series_key", "uri", "frame", "masks")},
        }
        for row in limited(accepted, config.limit)
    ]
    counts = Counter(sample["split"] for sample in samples)
    _refuse_empty(counts, config.split, f"of {len({sample['patient_key'] for sample in samples})} patients fell")
    by_split = {split: [sample for sample in samples if sample["split"] == split] for split in SPLITS}
    # Training reads neighbouring rows together: they should not be neighbouring slices of one patient.
    by_split["train"].sort(key=lambda sample: sample["row_id"])
    return [sample for split in SPLITS for sample in by_split[split]]


def _slice(row: dict[str, Any]) -> tuple[str, int | None]:
    return row["uri"], row["frame"]


def _refuse_empty(rows: Counter[str] | dict[str, int], split: Split, what: str) -> None:
    empty = [name for name in split.wanted() if not rows[name]]
    if empty:
        raise ValueError(
            f"prepare.split: no rows for {', '.join(empty)}: none {what} there; raise the share of the split, change "
            "split.seed, or catalog more patients (image files: layout.groups says which file is of which)"
        )


def _write(samples: list[dict[str, Any]], output: str, config: PrepareConfig) -> list[dict[str, Any]]:
    """Prepares the samples, one task a shard; returns rows of `WRITTEN` in the order of the shards."""
    plans = []
    for split in SPLITS:
        of_split = [sample for sample in samples if sample["split"] == split]
        for part, start in enumerate(range(0, len(of_split), config.rows_per_shard)):
            path = f"split={split}/part-{part:05d}.parquet"
            plans.append({"path": path, "samples": of_split[start : start + config.rows_per_shard]})
    dataset = ray.data.from_arrow([pa.Table.from_pylist([plan], schema=PLAN) for plan in plans]).map_batches(
        write_shards,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={
            "output": output,
            "preprocess": config.preprocess,
            "labels": config.labels,
            "row_group_rows": config.row_group_rows,
        },
    )
    written: list[dict[str, Any]] = []
    with tqdm(total=len(samples), desc="prepare", unit=" rows", disable=None) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for shard in batch.to_pylist():
                written.append(shard)
                progress.update(shard["rows"] + len(shard["rejects"]))
    assert len(written) == len(plans), "every shard reports"
    assert sum(shard["rows"] + len(shard["rejects"]) for shard in written) == len(samples), "every row is accounted for"
    order = {plan["path"]: position for position, plan in enumerate(plans)}
    return sorted(written, key=lambda shard: order[shard["path"]])


def _keys(output: str, shards: list[dict[str, Any]]) -> pa.Table:
    """Patient and split of every row as written."""
    columns = ("patient_key", "split")
    return pa.concat_tables([storage.read_table(storage.join(output, shard["path"]), columns) for shard in shards])
