"""Catalog: every object of a source becomes one row of a manifest, from its header alone, whatever happens."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from rayseg import lease, meters, pacs, snapshots, storage, work
from rayseg.data import manifest, standing
from rayseg.data.layouts import Layout, Mask, plan, read_groups
from rayseg.data.spool import Spool, by_series, packed, unpacked
from rayseg.dicom.pseudonyms import Pseudonyms, from_environment
from rayseg.records import MANIFEST, MASK_FILES, MISSING_MASK, REJECTS, Reason, Reject

logger = logging.getLogger(__name__)

HEADER_BYTES = 64 * 1024  # what is read of an object first: nearly every header ends before
_ROWS_PER_TASK = 256
_ROWS_AT_ONCE = 4096  # of the manifest, in a task

_PLAN = pa.schema(
    [
        ("index", pa.int64()),
        ("uri", pa.string()),
        ("path", pa.string()),  # below the layout's image folder, where it has one
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("masks", MASK_FILES),
        ("group", pa.string()),  # the patient, where the layout names one
    ]
)
_FOUND = MANIFEST.insert(0, pa.field("index", pa.int64()))


@dataclass(frozen=True)
class CatalogConfig:
    """What to catalog and where to write the manifest."""

    source: str  # URI of the folder or prefix that `layout` describes, or a query of a DICOMweb service
    output: str  # URI of the manifest, a table: a folder with one Parquet file
    layout: Layout = field(default_factory=Layout)
    max_reject_fraction: float = 0.2  # the job fails where a greater share of the objects is rejected
    concurrency: int = 4  # tasks at a time
    # what each task asks for beside a CPU, such as {decode: 1}
    resources: dict[str, float] = field(default_factory=dict)
    # patterns of the names of stacks to take, in series of several volumes; null takes all
    stacks: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if pacs.is_dicomweb(self.source) and self.layout != Layout():
            raise ValueError("catalog.layout: a DICOMweb service has no paths: leave it out")
        if self.stacks is not None and not all(self.stack_patterns or [""]):
            raise ValueError("catalog.stacks: no pattern, as 'b=1000*' of names of stacks; null takes all of them")

    @property
    def stack_patterns(self) -> tuple[str, ...] | None:
        """The patterns of stacks; None where all are taken."""
        return (self.stacks,) if isinstance(self.stacks, str) else self.stacks


@dataclass(frozen=True)
class CatalogResult:
    """What was found; `accepted` and `rejected` count rows of the manifest, which are slices: a frame each.

    `patients` and `series` count those with an accepted slice.
    """

    manifest: str
    objects: int
    unchanged: int  # of `objects`: their rows are those of the manifest, or the parts of one, that stood there
    accepted: int
    rejected: int
    reasons: dict[str, int]
    patients: int
    series: int
    seconds: float
    masks_without_image: int = 0  # listed in the table beside the manifest, see `without_image_table`


def without_image_table(manifest: str) -> str:
    """URI of the table, schema `records.REJECTS`, of masks that no image pairs with; none is made without any."""
    return f"{manifest.removesuffix('.parquet')}.masks-without-image.parquet"


def catalog(config: CatalogConfig) -> CatalogResult:
    """Reads the header of every object below the source and writes the manifest, one row an object or frame.

    Where a manifest of the same layout and key stands at `output`, or parts that a catalog has left which was stopped,
    objects whose size and ETag are still the same are not read again. One catalog at a time writes a manifest: another
    one waits, see `lease`. A DICOMweb service tells neither: its instances are read each time, and whole, and what
    stands for their ETag is a digest of the bytes. Memory does not grow with the source but for some 60 bytes an
    object.

    The rows of a series stand together in the order of its slices, series in the order of their first URI. Of a series
    of several volumes each stack is a series, see `manifest.in_series`. All objects of a series that cannot be used as
    one are rejected with the series' reason.

    Raises:
        ValueError: nothing at the source, a layout that does not fit it, no pseudonym key, or, after the manifest is
            written, more rejects than `max_reject_fraction` (stacks that are not wanted do not count).
    """
    began = time.monotonic()
    pseudonyms = from_environment()
    source, output = storage.absolute(config.source), storage.absolute(config.output)
    groups = _groups(source, config.layout)
    mark = standing.mark(config.layout, groups, pseudonyms)
    parts = standing.Parts(output, mark)
    with (
        lease.held(f"{output}{lease.SUFFIX}", "catalog") as held,
        TemporaryDirectory(prefix="rayseg-catalog-") as folder,
        Spool(Path(folder, "found"), _FOUND) as found,
    ):
        table = snapshots.Writer(output)
        earlier = standing.Standing(output, mark, Path(folder, "standing"), parts.uris())
        lonely: list[str] = []
        unread, unchanged = _plan(source, output, config.layout, groups, earlier, found, lonely)
        objects = unread.objects + unchanged
        _headers(unread, config, pseudonyms, found, parts)
        counts = _write(found, Path(folder, "manifest"), mark, config)
        held.check()
        _write_without_image(output, [_below(source, path) for path in lonely])
        if snapshots.is_file(output):  # of an earlier version: between its end and the table's begin nothing is lost
            parts.keep(Path(folder, "manifest"))
        table.write(Path(folder, "manifest"), counts.history(objects))
        parts.remove()
    rows, rejected = counts.accepted + counts.reasons.total(), counts.reasons.total()
    reasons = dict(sorted(counts.reasons.items()))
    logger.info(
        "catalog: %d objects, %d of them unchanged, %d accepted, rejected: %s",
        *(objects, unchanged, counts.accepted, reasons or "none"),
    )
    unwanted = counts.reasons[Reason.STACK_NOT_WANTED]
    if rejected - unwanted > config.max_reject_fraction * (rows - unwanted):
        raise ValueError(
            f"catalog: {rejected - unwanted} of {rows - unwanted} objects rejected, over max_reject_fraction "
            f"{config.max_reject_fraction}: {_counted(reasons)}; the manifest {output} names each"
        )
    return CatalogResult(
        manifest=output,
        objects=objects,
        unchanged=unchanged,
        accepted=counts.accepted,
        rejected=rejected,
        reasons=reasons,
        patients=len(counts.patients),
        series=len(counts.series),
        seconds=time.monotonic() - began,
        masks_without_image=len(lonely),
    )


def _write_without_image(manifest: str, masks: list[str]) -> None:
    table = without_image_table(manifest)
    if not masks and not storage.exists(table):
        return
    rejected = {"stage": "catalog", "reason": Reason.NO_IMAGE.value, "detail": ""}
    snapshots.write_table(table, pa.Table.from_pylist([{"uri": uri, **rejected} for uri in masks], schema=REJECTS))


@dataclass
class _Counts:
    """What has been written so far."""

    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    patients: set[str] = field(default_factory=set)
    series: set[str] = field(default_factory=set)

    def history(self, objects: int) -> dict[str, Any]:
        """What the manifest's history tells of it."""
        return {
            "objects": objects,
            "accepted": self.accepted,
            "rejected": dict(sorted(self.reasons.items())),
            "patients": len(self.patients),
            "series": len(self.series),
        }


def _write(found: Spool, path: Path, mark: str, config: CatalogConfig) -> _Counts:
    """Writes the manifest into a local file, some thousand rows at a time; equal rows give equal bytes."""
    counts = _Counts()
    schema = MANIFEST.with_metadata({standing.METADATA: mark, MISSING_MASK: config.layout.missing_mask})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in by_series(found):
            for row in rows:
                del row["index"]
            judged = manifest.in_series(rows, config.stack_patterns)
            writer.write_table(pa.Table.from_pylist(judged, schema=schema))
            accepted = [row for row in judged if row["verdict"] == "ok"]
            reasons = Counter(row["reason"] for row in judged if row["verdict"] != "ok")
            meters.slices("catalog", len(accepted), reasons)
            counts.accepted += len(accepted)
            counts.reasons += reasons
            counts.patients.update(row["patient_key"] for row in accepted)
            counts.series.update(row["series_key"] for row in accepted)
    return counts


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def _groups(source: str, layout: Layout) -> Mapping[str, str]:
    try:
        return {} if layout.groups is None else read_groups(storage.read(storage.join(source, layout.groups)))
    except FileNotFoundError:
        raise ValueError(f"catalog.source: {source} lacks what the layout names ({layout})") from None


@dataclass
class _Unread:
    """The objects to read: compressed tables of `_PLAN`, a task each (some 20 bytes an object)."""

    cells: list[bytes] = field(default_factory=list)
    objects: int = 0


def _plan(
    source: str,
    output: str,
    layout: Layout,
    groups: Mapping[str, str],
    earlier: standing.Standing,
    found: Spool,
    lonely: list[str],
) -> tuple[_Unread, int]:
    """Lists the objects and tells which to read; the rows of unchanged ones, which are counted, go to `found`.

    Paths of masks that no image pairs with go to `lonely`.
    """
    unread, unchanged = _Unread(), 0
    # Of a manifest that is written into its own source.
    tables = output, without_image_table(output), f"{output}{standing.PARTS}"
    ours = f"{output}{lease.SUFFIX}", *(f"{table}/" for table in tables)
    objects = _listed(source, layout, groups, lonely)
    listed = enumerate(one for one in objects if not one["uri"].startswith(ours))
    while some := [{"index": index, **row} for index, row in islice(listed, _ROWS_PER_TASK)]:
        rows = earlier.rows(some)
        known = [{**row, "index": one["index"]} for one, of_one in zip(some, rows, strict=True) for row in of_one]
        planned = [one for one, of_one in zip(some, rows, strict=True) if not of_one]
        if known:
            found.append(pa.Table.from_pylist(known, schema=_FOUND))
        if planned:
            unread.cells.append(packed(pa.Table.from_pylist(planned, schema=_PLAN)))
        unread.objects += len(planned)
        unchanged += len(some) - len(planned)
    return unread, unchanged


def _listed(source: str, layout: Layout, groups: Mapping[str, str], lonely: list[str]) -> Iterator[dict[str, Any]]:
    """The images in the order of the listing, with the masks and the group of each: `_PLAN` without the index.

    An archive without masks is streamed. To pair images with masks all of their paths are needed first.
    """
    shown = source.partition("?")[0] if pacs.is_dicomweb(source) else source  # a query may identify

    def objects() -> Iterator[tuple[str, storage.FileInfo]]:
        try:
            for folder in layout.folders():
                for info in storage.list_files(storage.join(source, folder)):
                    yield info.uri[len(shown.rstrip("/")) + 1 :], info
        except ValueError as error:
            raise ValueError(f"catalog.source: {error}") from None

    empty = True
    try:
        listing = tqdm(objects(), desc="catalog: list", unit=" objects", disable=None)
        for image in plan(layout, listing, groups, lonely):
            empty = False
            yield {
                "uri": image.file.uri,
                "path": image.name,
                "bytes": image.file.size,
                "etag": image.file.etag,
                "masks": [_mask(mask) for mask in image.masks],
                "group": image.group,
            }
    except FileNotFoundError:
        raise ValueError(f"catalog.source: {shown} lacks what the layout names ({layout})") from None
    except PermissionError as error:
        if not pacs.is_dicomweb(source):
            raise
        raise ValueError(f"catalog.source: {shown} refuses: {error}") from None
    if empty:
        raise ValueError(f"catalog.source: there are no objects below {shown} where the layout looks ({layout})")


def _mask(mask: Mask[storage.FileInfo]) -> dict[str, Any]:
    """A row of `records.MASK_FILES`."""
    return {"uri": mask.file.uri, "label": mask.label, "bytes": mask.file.size, "etag": mask.file.etag}


def _below(source: str, path: str) -> str:
    """The URI of a listed path: slashes in it stay as they are, as they are part of an S3 key."""
    return f"{source.rstrip('/')}/{path}"


def _headers(
    unread: _Unread, config: CatalogConfig, pseudonyms: Pseudonyms, found: Spool, parts: standing.Parts
) -> None:
    """Puts the rows of the unread objects, without series verdicts, into `found` and `parts`; tasks read them."""
    if not unread.cells:
        return
    asked = {"CPU": 1, **config.resources}
    in_cluster = work.in_cluster("catalog", unread.objects, asked, keys=dict.fromkeys(config.resources, "resources"))
    read = partial(_read_headers, layout=config.layout, pseudonyms=pseudonyms)
    every = work.mapped(read, unread.cells, cluster=in_cluster, resources=config.resources, at_once=config.concurrency)
    waiting = unread.objects
    with tqdm(total=waiting, desc="catalog: headers", unit=" objects", disable=None) as progress:
        for _, cells in every:
            for cell in cells:
                rows = unpacked(cell)
                found.append(rows)
                parts.add(rows)
                ended = len(rows["index"].unique())
                waiting -= ended
                progress.update(ended)
            meters.show("rayseg_waiting", waiting, stage="catalog")
    assert waiting == 0, "every object has a row"


def _read_headers(cell: bytes, layout: Layout, pseudonyms: Pseudonyms) -> list[bytes]:
    """A task: packed rows of the plan to some packed tables of rows of the manifest, each with all of its objects."""
    plan = unpacked(cell)
    indexes, etags = plan["index"].to_pylist(), plan["etag"].to_pylist()
    items = [manifest.Item(**values) for values in plan.drop_columns(["index", "etag"]).to_pylist()]
    # What a DICOMweb service has comes whole.
    length = None if pacs.is_dicomweb(items[0].uri) else HEADER_BYTES
    beginnings = storage.read_each((item.uri for item in items), length)
    needs_mask = layout.masks is not None and layout.missing_mask == "reject"
    cells: list[bytes] = []
    rows: list[dict[str, Any]] = []
    for index, etag, item, beginning in zip(indexes, etags, items, beginnings, strict=True):
        for row in manifest.rows(item, beginning, pseudonyms, layout.volume):
            if row["verdict"] == "ok" and layout.groups is not None and item.group is None:
                row = manifest.refused(row, Reject(Reason.MISSING_ATTRIBUTE, "not in the layout's CSV of groups"))
            elif row["verdict"] == "ok" and needs_mask and not item.masks:
                row = manifest.refused(row, Reject(Reason.NO_MASK))
            rows.append({"index": index, "etag": etag, **row})
        if len(rows) >= _ROWS_AT_ONCE:  # of volumes: an object has as many as slices
            cells.append(packed(pa.Table.from_pylist(rows, schema=_FOUND)))
            rows = []
    return [*cells, packed(pa.Table.from_pylist(rows, schema=_FOUND))] if rows else cells
