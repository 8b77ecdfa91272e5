"""Prepare: the accepted rows of a manifest become fixed-shape samples in Parquet shards, split by patient."""

import dataclasses
import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from tqdm import tqdm

from rayseg import cluster, lease, logs, meters, storage
from rayseg import config as configuration
from rayseg.data import voxels
from rayseg.data.labels import Labels
from rayseg.data.prepared import DESCRIPTION, PATIENTS, READERS, VERSION
from rayseg.data.preprocess import Preprocess
from rayseg.data.samples import PLAN, TAKEN, limited, positive_patients, row_id, write_shards
from rayseg.data.split import LEAK_COLUMNS, SPLITS, Split, check_leak, read_standing, to_csv
from rayseg.data.spool import packed
from rayseg.data.stacks import PLACE, beside
from rayseg.records import MISSING_MASK, REJECTS, MissingMask, Reason

logger = logging.getLogger(__name__)

REJECTS_FILE = "rejects.parquet"
_SHARD = re.compile(rf"split=({'|'.join(SPLITS)})/part-\d+(-[0-9a-f]+)?\.parquet")
# Of the objects: another size or ETag is another shard. Those of masks stand in `masks`.
_CONTENT = ["bytes", "etag", "neighbour_bytes", "neighbour_etags"]
_ROWS_PER_LOOK = 512  # of a task that only looks at masks
# Ray Data starts a task when it has seen another end, which leaves a CPU idle for 0.2 s: a task should take longer.
_MOST_IN_A_TASK = 8
_TASKS_A_CPU = 4  # at least, so that all end at about the same time


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
    resources: dict[str, float] = field(default_factory=dict)  # what each task asks for beside a CPU: {decode: 1}

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
    """Writes the prepared set, or finds that an equal one stands at `output` already. One at a time, see `lease`.

    Names, order and bytes of the shards depend on the manifest, the objects and the configuration alone. The set
    exists from the moment when its description, written last, does; a run that ended before goes on with the shards
    that are there.

    Raises:
        ValueError: no manifest, no accepted row with a mask, a split without rows, too many rejects, or a leak between
            the splits.
    """
    began = time.monotonic()
    cluster.connect()
    cluster.require("prepare", {"CPU": 1, **config.resources}, keys=dict.fromkeys(config.resources, "resources"))
    # As it is read from a recipe: a caller may have given 40 for 40.0, and a digest tells these apart.
    config = configuration.build(PrepareConfig, configuration.plain(config))
    with lease.held(storage.join(storage.absolute(config.output), f"_prepare{lease.SUFFIX}"), "prepare") as held:
        return dataclasses.replace(_prepared(config, held), seconds=time.monotonic() - began)


def _prepared(config: PrepareConfig, held: lease.Lease) -> PrepareResult:
    manifest_uri, output = storage.absolute(config.manifest), storage.absolute(config.output)
    try:
        manifest = storage.read(manifest_uri)
    except FileNotFoundError:
        raise ValueError(f"prepare.manifest: there is no {manifest_uri}; run the catalog job") from None
    missing_mask = _missing_mask(manifest)
    standing_split = _standing_split(config.split.standing)
    digest = _digest(config, hashlib.sha256(manifest).hexdigest(), standing_split)
    standing = _standing(output, digest)
    if standing is not None:
        logger.info("prepare: an equal set stands at %s", output)
        return _result(output, standing, cached=True)

    placing = PLACE if config.preprocess.neighbours else ()
    columns = list(dict.fromkeys([*TAKEN, *placing, *voxels.COLUMNS, "verdict", "bytes", "etag"]))
    taken = _taken(pq.read_table(pa.BufferReader(manifest), columns=columns), config)
    parts = _deal(taken, config, standing_split)
    if config.split.held_out:
        taken, parts = _seen(taken, parts, config.split)
    samples = _samples(taken, parts, config.split)
    plan = _shards(samples, config, missing_mask)
    held.check()
    _clear(output, keep={path for path, _ in plan})
    written = _write(plan, len(samples), output, config, missing_mask)
    rejects = [reject for shard in written for reject in shard["rejects"]]
    held.check()
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
    description = {
        "version": VERSION,
        "digest": _with_unread(digest, rejects),
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "preprocess": configuration.plain(config.preprocess),
        "labels": configuration.plain(config.labels),
        "split": configuration.plain(config.split),
        "limit": config.limit,
        "shape": [*config.preprocess.size, config.preprocess.channels],
        "rows": rows,
        "shards": {split: [shard["path"] for shard in shards[split]] for split in SPLITS},
        "shard_rows": {split: [shard["rows"] for shard in shards[split]] for split in SPLITS},
        "row_group_rows": config.row_group_rows,
        "positive": sum(shard["positive"] for shard in written),
        "reasons": reasons,
    }
    _refuse_empty(rows, config.split, "rows are left")
    keys = _keys(output, filled)
    check_leak(keys)
    patients = _patients(keys, parts)
    held.check()
    storage.write(storage.join(output, PATIENTS), to_csv(patients))
    description["patients"] = len(patients)
    storage.write_json(storage.join(output, DESCRIPTION), description)
    return _result(output, description, cached=False)


def _digest(config: PrepareConfig, manifest_sha256: str, standing_split: Mapping[str, str]) -> str:
    """Of all that decides the set's content: everything but the places where things lie."""
    values = configuration.plain(config) | {"manifest": manifest_sha256, "output": None, "version": VERSION}
    values["split"]["standing"] = dict(standing_split)
    del values["resources"]  # where it is made
    return configuration.digest(values)


def _with_unread(digest: str, rejects: Sequence[Mapping[str, Any]]) -> str:
    """The digest of a set: another one while the store did not give some of its objects, so that no set equals it."""
    unread = [row_id(one["uri"], one["frame"]) for one in rejects if one["reason"] == Reason.READ_FAILED]
    return configuration.digest([digest, sorted(unread)]) if unread else digest


def _missing_mask(manifest: bytes) -> MissingMask:
    """What the manifest's layout says of slices that the mask of their series has no plane of."""
    said = (pq.read_schema(pa.BufferReader(manifest)).metadata or {}).get(MISSING_MASK, b"reject")
    return "empty" if said == b"empty" else "reject"


def _standing_split(uri: str | None) -> Mapping[str, str]:
    """The part of each patient by `split.standing`."""
    try:
        return {} if uri is None else read_standing(storage.read(uri))
    except FileNotFoundError:
        raise ValueError(f"prepare.split.standing: there is no {uri}") from None


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


def _result(output: str, description: dict[str, Any], cached: bool) -> PrepareResult:
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
        seconds=0.0,
    )


def _clear(output: str, keep: set[str]) -> None:
    """Takes away an older set but for the shards to `keep`, its description first: no reader sees a mixture.

    While a job reads it its shards stay, until a later set is prepared here: names of other shards are others.
    """
    storage.delete(storage.join(output, DESCRIPTION))
    if readers := lease.living(storage.join(output, READERS)):
        logger.info("prepare: shards of the set that stood there stay: %s reads them", readers[0])
    elif storage.exists(output):
        for info in list(storage.list_files(output, (".parquet",))):
            path = info.uri[len(output.rstrip("/")) + 1 :]
            if _SHARD.fullmatch(path) and path not in keep:
                storage.delete(info.uri)


def _taken(manifest: pa.Table, config: PrepareConfig) -> pa.Table:
    """The accepted rows that are prepared, in the manifest's order: TAKEN, `neighbours` and `_CONTENT`.

    And `voxel_mm3`, for which those count too that the limit leaves out.
    """
    accepted = manifest.filter(pc.equal(manifest["verdict"], "ok"))
    masks = pc.list_flatten(accepted["masks"])
    if not len(masks):
        raise ValueError("prepare.manifest: no accepted row has a mask; name catalog.layout.masks and catalog again")
    config.labels.check_sources(set(pc.unique(pc.struct_field(masks, "label")).to_pylist()) - {None})
    rows = limited(accepted["patient_key"].to_pylist(), config.limit)
    # Those that the limit leaves out are neighbours all the same.
    neighbours, sizes, etags = beside(accepted, rows, config.preprocess.neighbours)
    measured = accepted.select([*TAKEN, "bytes", "etag"]).append_column("voxel_mm3", voxels.of_rows(accepted))
    taken = measured.take(pa.array(rows, pa.int64()))
    taken = taken.append_column("neighbours", neighbours)
    return taken.append_column("neighbour_bytes", sizes).append_column("neighbour_etags", etags)


def _deal(taken: pa.Table, config: PrepareConfig, standing: Mapping[str, str]) -> dict[str, str]:
    """The part of each patient."""
    patients = dict.fromkeys(taken["patient_key"].to_pylist(), False)
    if config.split.stratify:
        cells = [
            ("", packed(taken.slice(start, _ROWS_PER_LOOK).select(TAKEN)))
            for start in range(0, len(taken), _ROWS_PER_LOOK)
        ]
        arguments = {"preprocess": config.preprocess, "labels": config.labels}
        for batch in (
            _planned(cells)
            .map_batches(
                logs.carried(positive_patients),
                batch_size=None,
                batch_format="pyarrow",
                fn_kwargs=arguments,
                resources=config.resources,
            )
            .iter_batches(batch_size=None, batch_format="pyarrow")
        ):
            patients |= dict.fromkeys(batch["patient_key"].to_pylist(), True)
    return config.split.deal(patients, standing)


def _seen(taken: pa.Table, parts: Mapping[str, str], split: Split) -> tuple[pa.Table, dict[str, str]]:
    """Rows and parts of the patients who are in a split at all."""
    seen = {key: part for key, part in parts.items() if split.split_of(part) is not None}
    return taken.filter(pc.is_in(taken["patient_key"], pa.array(list(seen), pa.string()))), seen


def _samples(taken: pa.Table, parts: Mapping[str, str], split: Split) -> pa.Table:
    """The rows to prepare with their `split`, in the order of their shards: all of training, then validation, test."""
    dealt = [split.split_of(parts[key]) or "" for key in taken["patient_key"].to_pylist()]
    _refuse_empty(Counter(dealt), split, f"of {len(parts)} patients fell")
    place = np.array([SPLITS.index(name) for name in dealt])
    # Training reads neighbouring rows together: they should not be neighbouring slices of one patient.
    ids = (
        int(row_id(uri, frame)[:16], 16) if name == "train" else 0
        for uri, frame, name in zip(taken["uri"].to_pylist(), taken["frame"].to_pylist(), dealt, strict=True)
    )
    order = np.lexsort((np.fromiter(ids, np.uint64, len(taken)), place))
    return taken.append_column("split", pa.array(dealt)).take(pa.array(order))


def _shards(samples: pa.Table, config: PrepareConfig, missing_mask: MissingMask) -> list[tuple[str, bytes]]:
    """Path and packed samples of each shard; the path's digest is of all that the shard is made from."""
    made_with = map(configuration.plain, (config.preprocess, config.labels))
    settings = [VERSION, config.row_group_rows, missing_mask, *made_with]
    shards = []
    for split in SPLITS:
        of_split = samples.filter(pc.equal(samples["split"], split))
        for part, start in enumerate(range(0, len(of_split), config.rows_per_shard)):
            rows = of_split.slice(start, config.rows_per_shard)
            digest = configuration.digest([settings, rows.to_pylist()])[:16]
            shards.append((f"split={split}/part-{part:05d}-{digest}.parquet", packed(rows.drop_columns(_CONTENT))))
    return shards


def _refuse_empty(rows: Counter[str] | dict[str, int], split: Split, what: str) -> None:
    empty = [name for name in split.wanted() if not rows[name]]
    if empty:
        raise ValueError(
            f"prepare.split: no rows for {', '.join(empty)}: none {what} there; raise the share of the split, change "
            "split.seed, or catalog more patients (image files: layout.groups says which file is of which)"
        )


def _write(
    plan: list[tuple[str, bytes]], rows: int, output: str, config: PrepareConfig, missing_mask: MissingMask
) -> list[dict[str, Any]]:
    """Prepares the shards, a task each; returns rows of `WRITTEN` in the order of the shards."""
    dataset = _planned(plan).map_batches(
        logs.carried(write_shards),
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={
            "output": output,
            "preprocess": config.preprocess,
            "labels": config.labels,
            "row_group_rows": config.row_group_rows,
            "missing_mask": missing_mask,
        },
        resources=config.resources,
    )
    written: list[dict[str, Any]] = []
    with tqdm(total=rows, desc="prepare", unit=" rows", disable=None) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for shard in batch.to_pylist():
                written.append(shard)
                progress.update(shard["rows"] + len(shard["rejects"]))
                meters.slices("prepare", shard["rows"], Counter(reject["reason"] for reject in shard["rejects"]))
                meters.show("rayseg_waiting", rows - progress.n, stage="prepare")
    assert len(written) == len(plan), "every shard reports"
    assert sum(shard["rows"] + len(shard["rejects"]) for shard in written) == rows, "every row is accounted for"
    order = {path: position for position, (path, _) in enumerate(plan)}
    return sorted(written, key=lambda shard: order[shard["path"]])


def _planned(cells: Sequence[tuple[str, bytes]]) -> ray.data.Dataset:
    """A data set of `PLAN`, a block a task. No pixels go through Ray's store: a task writes what it makes itself."""
    tasks = _TASKS_A_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = min(_MOST_IN_A_TASK, max(1, len(cells) // tasks))
    table = pa.table({"path": [path for path, _ in cells], "samples": [cell for _, cell in cells]}, schema=PLAN)
    return ray.data.from_arrow([table.slice(start, size) for start in range(0, len(cells), size)])


def _keys(output: str, shards: list[dict[str, Any]]) -> pa.Table:
    """Of every row as written, what the leak check and the table of patients need."""
    columns = (*LEAK_COLUMNS, "foreground_pixels")
    tables = [storage.read_table(storage.join(output, shard["path"]), columns) for shard in shards]
    return pa.concat_tables(table.replace_schema_metadata() for table in tables)


def _patients(keys: pa.Table, parts: Mapping[str, str]) -> pa.Table:
    """The split as a table: `patient_key`, `part`, `split`, and how many `rows`, and `positive` ones, a patient has."""
    keys = keys.append_column("positive", pc.cast(pc.greater(keys["foreground_pixels"], 0), pa.int64()))
    counted = keys.group_by(["patient_key", "split"]).aggregate([("positive", "count"), ("positive", "sum")])
    counted = counted.sort_by("patient_key")
    return pa.table(
        {
            "patient_key": counted["patient_key"],
            "part": [parts[key] for key in counted["patient_key"].to_pylist()],
            "split": counted["split"],
            "rows": counted["positive_count"],
            "positive": counted["positive_sum"],
        }
    )
