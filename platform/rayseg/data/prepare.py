"""Prepare: the accepted rows of a manifest become fixed-shape samples, or volumes, split by patient."""

import dataclasses
import hashlib
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from rayseg import config as configuration
from rayseg import lease, meters, snapshots, storage, work
from rayseg.data import accepted, kinds, own_split
from rayseg.data.accepted import Units
from rayseg.data.kinds import Mapped, OfSlices, OfVolumes
from rayseg.data.labels import Labels
from rayseg.data.prepared import DESCRIPTION, PATIENTS, READERS, VERSION
from rayseg.data.preprocess import Preprocess
from rayseg.data.samples import Making, row_id
from rayseg.data.shards import Task, planned
from rayseg.data.split import LEAK_COLUMNS, SPLITS, Split, check_leak, read_standing, to_csv
from rayseg.data.stacks import refuse_unordered
from rayseg.data.volume import VolumePreprocess
from rayseg.data.volume_samples import VolumeMaking
from rayseg.dicom.pseudonyms import from_environment
from rayseg.records import MISSING_MASK, REJECTS, MissingMask, Reason

logger = logging.getLogger(__name__)

REJECTS_FILE = "rejects.parquet"  # a table, see `snapshots`
_SHARD = re.compile(rf"split=({'|'.join(SPLITS)})/(part-\d+(-[0-9a-f]+)?\.parquet|volume-[0-9a-f]+\.arrow)")
_SUFFIXES = (".parquet", ".arrow")
_ROWS_FILE = "_rows.arrow"  # of a run, for its tasks


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, how, and where to write the set."""

    manifest: str  # URI of a manifest that `catalog` wrote
    output: str  # URI of a folder or prefix that holds this set and nothing else
    preprocess: Preprocess = field(default_factory=Preprocess)
    labels: Labels = field(default_factory=Labels)
    split: Split = field(default_factory=Split)
    volume: VolumePreprocess | None = None  # prepares volumes in millimetres; `preprocess` is then not used
    # Take this many slices, or volumes, only: as many from each patient as possible, spread over what it has
    limit: int | None = None
    rows_per_shard: int = 256  # rows of a Parquet file at most
    row_group_rows: int = 16  # rows of a row group; each epoch draws an order of all row groups
    max_reject_fraction: float = 0.2  # the job fails where a greater share of the objects is rejected
    # what each task asks for beside a CPU, such as {decode: 1}
    resources: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("limit", "rows_per_shard", "row_group_rows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"prepare.{key}: a positive number expected, got {value}")


@dataclass(frozen=True)
class PrepareResult:
    """What the set holds; rows are slices or volumes, `positive` counts those with foreground.

    `cached`: it was there already.
    """

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
    # As it is read from a recipe: a caller may have given 40 for 40.0, and a digest tells these apart.
    config = configuration.build(PrepareConfig, configuration.plain(config))
    with lease.held(storage.join(storage.absolute(config.output), f"_prepare{lease.SUFFIX}"), "prepare") as held:
        return dataclasses.replace(_prepared(config, held), seconds=time.monotonic() - began)


def _prepared(config: PrepareConfig, held: lease.Lease) -> PrepareResult:
    manifest_uri, output = storage.absolute(config.manifest), storage.absolute(config.output)
    with TemporaryDirectory(prefix="rayseg-prepare-") as folder:
        manifest, rows_file = Path(folder, "manifest"), Path(folder, "rows")
        try:
            with snapshots.reading(manifest_uri, "prepare") as file_uri:
                storage.fetch(file_uri, manifest)
        except FileNotFoundError:
            raise ValueError(f"prepare.manifest: there is no {manifest_uri}; run the catalog job") from None
        with manifest.open("rb") as file:
            manifest_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        standing_split = _standing_split(config.split.standing)
        digest = _digest(config, manifest_sha256, standing_split)
        standing = _standing(output, digest)
        if standing is not None:
            logger.info("prepare: an equal set stands at %s", output)
            return _result(output, standing, cached=True)
        units = accepted.write(manifest, rows_file)
        _check(units, config)
        kind = _kind(config, manifest, rows_file, units)
        asked = {"CPU": 1, **config.resources}
        amount = min(int(units.rows.sum()), config.limit or sys.maxsize)
        keys = dict.fromkeys(config.resources, "resources")
        mapped = partial(
            work.mapped, cluster=work.in_cluster("prepare", amount, asked, keys=keys), resources=config.resources
        )
        rows_uri = storage.join(output, _ROWS_FILE)
        storage.write_file(rows_uri, rows_file)
    try:
        taken = kind.taken(config.limit)
        parts = _deal(units, taken, config, kind, rows_uri, standing_split, mapped)
        tasks = _tasks(units, taken, parts, config)
        kind = kind.measured(tasks, rows_uri, mapped)
        held.check()
        storage.delete(storage.join(output, DESCRIPTION))  # no reader sees a mixture
        rows_in_all = kind.count(tasks)
        written = _write(tasks, rows_in_all, rows_uri, output, kind, mapped)
    finally:
        storage.delete(rows_uri)
    held.check()
    _clear(output, keep={shard["path"] for shard in written})
    rejects = [reject for shard in written for reject in shard["rejects"]]
    held.check()
    snapshots.write_table(storage.join(output, REJECTS_FILE), pa.Table.from_pylist(rejects, schema=REJECTS))
    reasons = dict(sorted(Counter(reject["reason"] for reject in rejects).items()))
    if len(rejects) > config.max_reject_fraction * rows_in_all:
        raise ValueError(
            f"prepare: {len(rejects)} of {rows_in_all} rows rejected, over max_reject_fraction "
            f"{config.max_reject_fraction}: {reasons}; {storage.join(output, REJECTS_FILE)} names each"
        )
    of_kind = kind.description(output, written)
    rows = {split: sum(of_kind["shard_rows"][split]) for split in SPLITS}
    description = {
        **of_kind,
        "version": VERSION,
        "digest": _with_unread(digest, rejects),
        "manifest_sha256": manifest_sha256,
        "labels": configuration.plain(config.labels),
        "split": configuration.plain(config.split),
        "limit": config.limit,
        "rows": rows,
        "row_group_rows": config.row_group_rows,
        "positive": sum(shard["positive"] for shard in written),
        "reasons": reasons,
    }
    _refuse_empty(rows, config.split, "rows are left")
    keys = _keys(output, [path for split in SPLITS for path in of_kind["shards"][split]], kind.foreground)
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
    if config.volume is None:
        del values["volume"]  # as before there were any
    else:
        del values["preprocess"]
    for key in ("exact", "given"):  # a set of before they were there stays the same
        if not values["split"][key]:
            del values["split"][key]
    if config.split.given is not None:
        values["split"]["given"] = hashlib.sha256(_table(config.split.given)).hexdigest()
    del values["resources"]  # where it is made
    return configuration.digest(values)


def _with_unread(digest: str, rejects: Sequence[Mapping[str, Any]]) -> str:
    """The digest of a set: another one while the store did not give some of its objects, so that no set equals it."""
    unread = [row_id(one["uri"], one["frame"]) for one in rejects if one["reason"] == Reason.READ_FAILED]
    return configuration.digest([digest, sorted(unread)]) if unread else digest


def _missing_mask(manifest: Path) -> MissingMask:
    """What the manifest's layout says of slices that the mask of their series has no plane of."""
    said = (pq.read_schema(manifest).metadata or {}).get(MISSING_MASK, b"reject")
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
    paths = {info.uri for info in storage.list_files(output, _SUFFIXES)}
    files = [*description["shards"].values(), *description.get("volumes", {}).values()]
    complete = all(storage.join(output, path) in paths for of_split in files for path in of_split)
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
    """Takes away the shards of an older set but for those to `keep`.

    While a job reads it they stay, until a later set is prepared here: names of other shards are others.
    """
    if readers := lease.living(storage.join(output, READERS)):
        logger.info("prepare: shards of the set that stood there stay: %s reads them", readers[0])
    elif storage.exists(output):  # a bucket's folder goes with the last object
        for info in list(storage.list_files(output, _SUFFIXES)):
            path = info.uri[len(output.rstrip("/")) + 1 :]
            if _SHARD.fullmatch(path) and path not in keep:
                storage.delete(info.uri)


def _check(units: Units, config: PrepareConfig) -> None:
    """Refuses a manifest that nothing can be prepared of with these settings."""
    if not units.masks:
        raise ValueError("prepare.manifest: no accepted row has a mask; name catalog.layout.masks and catalog again")
    config.labels.check_sources({label for label in units.labels if label is not None})
    if config.preprocess.neighbours and config.volume is None:
        refuse_unordered(int(units.rows[units.loose].sum()), int(units.rows.sum()))


def _kind(config: PrepareConfig, manifest: Path, rows: Path, units: Units) -> OfSlices | OfVolumes:
    missing_mask = _missing_mask(manifest)
    if config.volume is None:
        return OfSlices(Making(config.preprocess, config.labels, config.row_group_rows, missing_mask), units)
    return kinds.of_volumes(manifest, rows, units, VolumeMaking(config.volume, config.labels, missing_mask))


def _deal(
    units: Units,
    taken: np.ndarray | None,
    config: PrepareConfig,
    kind: OfSlices | OfVolumes,
    rows_uri: str,
    standing: Mapping[str, str],
    mapped: Mapped,
) -> dict[str, str]:
    """The part of each patient."""
    if config.split.given is not None:
        return _given(units, config.split.given, rows_uri)
    pixels: dict[str, np.ndarray] = {}
    if config.split.stratify or config.split.exact:
        every = planned(units, np.zeros(len(units.first), np.int8), ["any"], taken, config.rows_per_shard)
        for _, of_task in mapped(kind.looking(rows_uri), every):
            for patient, counts in of_task.items():
                pixels[patient] = pixels.get(patient, 0) + np.array(counts)
    patients = {patient: patient in pixels for patient in units.patients}
    return config.split.deal(patients, standing, {patient: counts.tolist() for patient, counts in pixels.items()})


def _given(units: Units, uri: str, rows_uri: str) -> dict[str, str]:
    """The split of each patient by the owner's own table."""
    named, splits = own_split.read(_table(uri))
    if named == "patient":
        return own_split.of_patients(units.patients, splits, from_environment())
    last = int(units.first[-1] + units.rows[-1])
    rows = accepted.read(rows_uri, np.array([[0, last]]))
    files = zip(rows["uri"].to_pylist(), rows["patient_key"].to_pylist(), strict=True)
    return own_split.of_files(units.patients, files, splits)


def _table(uri: str) -> bytes:
    try:
        return storage.read(uri)
    except FileNotFoundError:
        raise ValueError(f"prepare.split.given: there is no {uri}") from None


def _tasks(units: Units, taken: np.ndarray | None, parts: Mapping[str, str], config: PrepareConfig) -> list[Task]:
    """The tasks of all splits."""
    split_of = [config.split.split_of(parts[key]) for key in units.patients]
    numbers = np.array([-1 if split is None else SPLITS.index(split) for split in split_of], np.int8)
    tasks = planned(units, numbers[units.patient], SPLITS, taken, config.rows_per_shard)
    patients = sum(split is not None for split in split_of)
    _refuse_empty(Counter(task.split for task in tasks), config.split, f"of {patients} patients fell")
    return tasks


def _refuse_empty(rows: Counter[str] | dict[str, int], split: Split, what: str) -> None:
    empty = [name for name in split.wanted() if not rows[name]]
    if empty:
        raise ValueError(
            f"prepare.split: no rows for {', '.join(empty)}: none {what} there; raise the share of the split, change "
            "split.seed, or catalog more patients (image files: layout.groups says which file is of which)"
        )


def _write(
    tasks: Sequence[Task], rows: int, rows_uri: str, output: str, kind: OfSlices | OfVolumes, mapped: Mapped
) -> list[dict[str, Any]]:
    """Prepares `rows` rows; returns what is told of each shard or volume, in their order."""
    write = kind.writing(rows_uri, output)
    written: dict[int, list[dict[str, Any]]] = {}
    # The largest first: a volume of thousands of slices should not be begun when all else is done.
    order = sorted(range(len(tasks)), key=lambda number: -tasks[number].shards)
    with tqdm(total=rows, desc="prepare", unit=" rows", disable=None) as progress:
        for place, shards in mapped(write, (tasks[number] for number in order)):
            written[order[place]] = shards
            for shard in shards:
                progress.update(shard["rows"] + len(shard["rejects"]))
                meters.slices("prepare", shard["rows"], Counter(reject["reason"] for reject in shard["rejects"]))
                meters.show("rayseg_waiting", rows - progress.n, stage="prepare")
    every = [shard for number in range(len(tasks)) for shard in written[number]]
    assert sum(shard["rows"] + len(shard["rejects"]) for shard in every) == rows, "every row is accounted for"
    return every


def _keys(output: str, shards: Sequence[str], foreground: str) -> pa.Table:
    """Of every row as written, what the leak check and the table of patients need; `foreground` is a column."""
    columns = (*LEAK_COLUMNS, foreground)
    tables = [storage.read_table(storage.join(output, path), columns) for path in shards]
    return pa.concat_tables(table.replace_schema_metadata() for table in tables)


def _patients(keys: pa.Table, parts: Mapping[str, str]) -> pa.Table:
    """The split as a table: `patient_key`, `part`, `split`, and how many `rows`, and `positive` ones, a patient has."""
    keys = keys.append_column("positive", pc.cast(pc.greater(keys.column(len(LEAK_COLUMNS)), 0), pa.int64()))
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
