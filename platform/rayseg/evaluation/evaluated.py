"""What an evaluation left in a model's run, read back: the table of cases, and of which rows it is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayseg.evaluation import cases
from rayseg.evaluation.metrics import Columns, columns_of
from rayseg.evaluation.publish import set_tag, tolerance_tag
from rayseg.tracking import registry, runs

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A model's cases of one split.

    name: `models:/NAME/VERSION`, or the name of its run and the beginning of that one's id.
    digest: of the rows, labels and masks that were scored, see `record.Record.digest`; of rows and labels alone,
        without a dash, where an earlier version has evaluated it.
    tolerance: of its normalised surface distances, as its tag tells it; None where none does.
    table: of the schema `cases.CASES`.
    """

    name: str
    run_id: str
    split: str
    digest: str
    tolerance: str | None
    table: pa.Table

    @property
    def labels(self) -> list[str]:
        """The names of its classes."""
        return sorted(set(self.table["class"].to_pylist()))

    @property
    def patients(self) -> list[str]:
        """Their keys, in the order of all columns."""
        return sorted(set(self.table["patient_key"].to_pylist()))

    def classes(self, labels: Sequence[str] | None = None) -> list[Columns]:
        """The numbers of the classes that `labels` names, or of all, by patient: see `metrics.columns_of`."""
        return [columns_of(self.table, label) for label in labels or self.labels]


def read(tracking_uri: str, model: str, split: str) -> Evaluated:
    """The cases of `models:/NAME/VERSION`, `models:/NAME@ALIAS` or of what a run, by its id, trained or evaluated.

    Raises:
        ValueError: there is no such model or run, or it was never evaluated on the split.
    """
    if _RUN_ID.fullmatch(model):
        if not runs.exists(tracking_uri, model):
            raise ValueError(f"run {model}: not found in {tracking_uri}")
        run_id, name = model, f"{runs.client(tracking_uri).get_run(model).info.run_name} {model[:8]}"
    else:
        version = registry.resolve(tracking_uri, model)
        run_id, name = version.run_id, version.uri
    tags = runs.client(tracking_uri).get_run(run_id).data.tags
    digest = tags.get(set_tag(split))
    if digest is None:
        raise ValueError(f"{name} was never evaluated on {split}: run the evaluate job on it first")
    try:
        data = runs.read_bytes(tracking_uri, run_id, f"{split}/{cases.PARQUET}")
    except ValueError as error:
        raise ValueError(f"{name} has no table of its cases on {split}: evaluate it again") from error
    return Evaluated(name, run_id, split, digest, tags.get(tolerance_tag(split)), cases.read(data))


def check_same_set(models: Sequence[Evaluated]) -> None:
    """Raises ValueError where two models were not evaluated on the same rows and masks, with one tolerance."""
    first, *others = models
    for other in others:
        (rows, _, masks), (first_rows, _, first_masks) = other.digest.partition("-"), first.digest.partition("-")
        if rows == first_rows and bool(masks) != bool(first_masks):
            early = first.name if masks else other.name
            raise ValueError(
                f"{early} was evaluated before it was noted which masks were the truth, which may have changed: "
                f"evaluate it on {first.split} again"
            )
        same = rows == first_rows and other.patients == first.patients and other.labels == first.labels
        if same and (masks != first_masks or not _equally_much(first, other)):
            raise ValueError(
                f"{other.name} and {first.name} were evaluated on the same rows of {first.split} with other masks: "
                "the truth was changed in between; evaluate both again"
            )
        if not same:
            raise ValueError(
                f"{other.name} and {first.name} were evaluated on other rows of {first.split}: evaluate both on one "
                "prepared set, or on sets with the same split of the same objects"
            )
        if other.tolerance != first.tolerance:
            raise ValueError(
                f"{other.name} and {first.name} were evaluated with other tolerances of surfaces "
                f"({other.tolerance} and {first.tolerance}): evaluate both with one evaluate.tolerance"
            )


def _equally_much(one: Evaluated, other: Evaluated) -> bool:
    """Whether each case has as many pixels to find in both: digests of earlier versions do not tell masks apart."""
    return all(
        np.array_equal(a["tp"] + a["fn"], b["tp"] + b["fn"])
        for a, b in zip(one.classes(), other.classes(), strict=True)
    )
