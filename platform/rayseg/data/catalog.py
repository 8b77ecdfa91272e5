"""Catalog: every object of a source becomes one row of a manifest, from its header alone, whatever happens."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray.data
from tqdm import tqdm

from rayseg import cluster, storage
from rayseg.data import manifest
from rayseg.data.layouts import Layout, plan, read_groups
from rayseg.dicom.pseudonyms import Pseudonyms, from_environment
from rayseg.records import MANIFEST, MASKS, Reason, Reject

logger = logging.getLogger(__name__)

HEADER_BYTES = 64 * 1024  # what is read of an object first: nearly every header ends before
_ROWS_PER_TASK = (64, 1024)

_PLAN = pa.schema(
    [
        ("index", pa.int64()),
        ("uri", pa.string()),
        ("path", pa.string()),  # below the layout's image folder, where it has one
        ("bytes", pa.int64()),
        ("masks", MASKS),
        ("group", pa.string()),  # the patient, where the layout names one
    ]
)
_FOUND = MANIFEST.insert(0, pa.field("index", pa.int64()))


@dataclass(frozen=True)
class CatalogConfig:
    """What to catalog and where to write the manifest."""

    source: str  # URI of the folder or prefix that `layout` describes
    output: str  # URI of the manifest, a Parquet file
    layout: Layout = field(default_factory=Layout)
    max_reject_fraction: float = 0.2
    concurrency: int = 4  # tasks at a time


@dataclass(frozen=True)
class CatalogResult:
    """What was found; `accepted` and `rejected` count rows of the manifest, which are slices: a frame each.

    `patients` and `series` count those with an accepted slice.
    """

    manifest: str
    objects: int
    accepted: int
    rejected: int
    reasons: dict[str, int]
    patients: int
    series: int
    seconds: float


def catalog(config: CatalogConfig) -> CatalogResult:
    """Reads the header of every object below the source and writes the manifest, one row an object or frame.

    The rows of a series stand together in the order of its slices, series in the order of their first URI. All objects
    of a series that cannot be used as one are rejected with the series' reason.

    Raises:
        ValueError: nothing at the source, a layout that does not fit it, no pseudonym key, or, after the manifest is
            written, more rejects than `max_reject_fraction`.
    """
    began = time.monotonic()
    cluster.connect()
    source, output = storage.absolute(config.source), storage.absolute(config.output)
    pseudonyms = from_environment()
    objects = _plan(source, config.layout)
    rows = manifest.in_series(_headers(objects, config, pseudonyms))
    storage.write_table(output, pa.Table.from_pylist(rows, schema=MANIFEST))
    accepted = [row for row in rows if row["verdict"] == "ok"]
    reasons = dict(sorted(Counter(row["reason"] for row in rows if row["verdict"] != "ok").items()))
    rejected = len(rows) - len(accepted)
    logger.info("catalog: %d objects, %d accepted, rejected: %s", len(objects), len(accepted), reasons or "none")
    if rejected > config.max_reject_fraction * len(rows):
        raise ValueError(
            f"catalog: {rejected} of {len(rows)} objects rejected, over max_reject_fraction "
            f"{config.max_reject_fraction}: {_counted(reasons)}; the manifest {output} names each"
        )
    return CatalogResult(
        manifest=output,
        objects=len(objects),
        accepted=len(accepted),
        rejected=rejected,
        reasons=reasons,
        patients=len({row["patient_key"] for row in accepted}),
        series=len({row["series_key"] for row in accepted}),
        seconds=time.monotonic() - began,
    )


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def _plan(source: str, layout: Layout) -> pa.Table:
    """The objects to read, by the listing, with the masks and the group of each; schema `_PLAN`."""

    def listed() -> Iterator[tuple[str, int]]:
        for folder in layout.folders():
            for info in storage.list_files(storage.join(source, folder)):
                yield info.uri[len(source.rstrip("/")) + 1 :], info.size

    try:
        groups = {} if layout.groups is None else read_groups(storage.read(storage.join(source, layout.groups)))
        progress = tqdm(listed(), desc="catalog: list", unit=" objects", disable=None)
        images = list(plan(layout, progress, groups))
    except FileNotFoundError:
        raise ValueError(f"catalog.source: {source} lacks what the layout names ({layout})") from None
    if not images:
        raise ValueError(f"catalog.source: there are no objects below {source} where the layout looks ({layout})")
    columns = {
        "index": range(len(images)),
        "uri": [storage.join(source, image.path) for image in images],
        "path": [image.name for image in images],
        "bytes": [image.bytes for image in images],
        "masks": [
            [{"uri": storage.join(source, mask.path), "label": mask.label} for mask in image.masks] for image in images
        ],
        "group": [image.group for image in images],
    }
    return pa.table({name: pa.array(values, _PLAN.field(name).type) for name, values in columns.items()})


def _headers(plan: pa.Table, config: CatalogConfig, pseudonyms: Pseudonyms) -> list[dict[str, Any]]:
    """The manifest rows of the plan, in its order, without series verdicts, from tasks of some hundred objects each."""
    least, most = _ROWS_PER_TASK
    rows_per_task = min(max(-(-len(plan) // (4 * config.concurrency)), least), most)
    blocks = [plan.slice(start, rows_per_task) for start in range(0, len(plan), rows_per_task)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _read_headers,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"layout": config.layout, "pseudonyms": pseudonyms},
        compute=ray.data.TaskPoolStrategy(size=min(config.concurrency, len(blocks))),
    )
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(plan), desc="catalog: headers", unit=" objects", disable=None) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows.extend(batch.to_pylist())
            progress.update(len(batch["index"].unique()))
    assert len({row["index"] for row in rows}) == len(plan), "every object is one row or, of frames, several"
    rows.sort(key=lambda row: row.pop("index"))
    return rows


def _read_headers(plan: pa.Table, layout: Layout, pseudonyms: Pseudonyms) -> pa.Table:
    """A task: rows of the plan to rows of the manifest."""
    indexes = plan["index"].to_pylist()
    items = [manifest.Item(**values) for values in plan.drop_columns("index").to_pylist()]
    beginnings = storage.read_each((item.uri for item in items), HEADER_BYTES)
    needs_mask = layout.masks is not None and layout.missing_mask == "reject"
    rows = []
    for index, item, beginning in zip(indexes, items, beginnings, strict=True):
        for row in manifest.rows(item, beginning, pseudonyms):
            if row["verdict"] == "ok" and layout.groups is not None and item.group is None:
                row = manifest.refused(row, Reject(Reason.MISSING_ATTRIBUTE, "not in the layout's CSV of groups"))
            elif row["verdict"] == "ok" and needs_mask and not item.masks:
                row = manifest.refused(row, Reject(Reason.NO_MASK))
            rows.append({"index": index, **row})
    return pa.Table.from_pylist(rows, schema=_FOUND)
