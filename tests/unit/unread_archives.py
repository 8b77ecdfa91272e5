"""Archives planned and segmented without a cluster: the catalog's rows of some files, and the ledger rows of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayseg import storage
from rayseg.data import manifest
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.inference import plan
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Predictor
from rayseg.inference.series import Task, segment_series
from rayseg.records import MANIFEST
from rayseg.tracking.version import ModelVersion

MODEL = ModelVersion("tiny", "1", "models:/tiny/1", "r", "d" * 64)


def cataloged(folder: Path, files: Mapping[str, bytes], volume: int | None = None) -> str:
    """Writes the files below `folder`, in this order, with their manifest, whose URI is given back.

    `volume` chooses one of a file of several.
    """
    rows = []
    for name, data in files.items():
        path = folder / "archive" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        item = manifest.Item(str(path), name, len(data), [], None)
        rows += [row | {"etag": name} for row in manifest.rows(item, data, Pseudonyms(b"key"), volume)]
    uri = str(folder / "manifest.parquet")
    storage.write_table(uri, pa.Table.from_pylist(manifest.in_series(rows), schema=MANIFEST))
    return uri


def rows_of(uri: str) -> list[dict[str, Any]]:
    """Of a manifest."""
    return storage.read_table(uri).to_pylist()


def task(folder: Path, profiles: Sequence[str], **values: Any) -> Task:
    return Task(str(folder / "out"), MODEL, "c" * 64, tuple(profiles), Postprocess(), **values)


def planned(uri: str, of: Task, known: Mapping[str, Any] | None = None) -> plan.Plan:
    """What is to do, where the ledger has the row `known` of each series."""
    return plan.make(uri, of, lambda row: plan.is_done(known, row, False), lambda rows, rejects: None)


def segmented(uri: str, of: Task, predictor: Predictor) -> list[dict[str, Any]]:
    """The ledger rows of what is to do."""
    return [segment_series(predictor, of, **for_network(cell)) for cell in planned(uri, of).todo]


def for_network(cell: bytes) -> dict[str, Any]:
    """Of a planned series what `segment_series` takes."""
    series = plan.unpacked_series(cell)
    assert series.pop("masks") is None
    return series


def written(row: Mapping[str, Any]) -> dict[str, list[bytes]]:
    """A row's files by profile."""
    found: dict[str, list[bytes]] = {}
    for one in row["outputs"]:
        found.setdefault(one["profile"], []).append(Path(one["uri"]).read_bytes())
    return found
