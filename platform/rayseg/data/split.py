"""Patients, never slices, are dealt to training, validation and test: by a hash, so that new data moves nobody."""

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

SPLITS = ("train", "val", "test")
_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """The fractions of patients held out for validation and test; another seed is another draw."""

    val: float = 0.15
    test: float = 0.15
    seed: str = "1"

    def __post_init__(self) -> None:
        if self.val < 0 or self.test < 0 or self.val + self.test >= 1:
            raise ValueError(f"split: val and test must be >= 0 and sum to less than 1, got {self.val} and {self.test}")

    def assign(self, patient_key: str) -> str:
        """The split of a patient: a function of the seed and the key alone, whoever else is in the data."""
        hashed = hashlib.sha256(f"{self.seed}:{patient_key}".encode()).digest()
        position = int.from_bytes(hashed[:8]) / 2**64
        if position < self.test:
            return "test"
        return "val" if position < self.test + self.val else "train"

    def wanted(self) -> tuple[str, ...]:
        """The splits that get a share."""
        return tuple(name for name, share in (("train", 1.0), ("val", self.val), ("test", self.test)) if share > 0)


def check_leak(table: pa.Table) -> None:
    """Raises ValueError, naming pseudonyms, where a patient stands in two splits or a row has no patient.

    Args:
        table: with the string columns `patient_key` and `split`.
    """
    if table["patient_key"].null_count or table["split"].null_count:
        raise ValueError("split: rows without a patient_key or split; no leak check is possible, prepare again")
    splits = table.select(["patient_key", "split"]).group_by("patient_key").aggregate([("split", "count_distinct")])
    leaked = splits.filter(pc.greater(splits["split_count_distinct"], 1))["patient_key"].to_pylist()
    if leaked:
        more = "" if len(leaked) <= _SHOWN else f" and {len(leaked) - _SHOWN} more"
        raise ValueError(
            f"split: {len(leaked)} patients are in more than one split: {', '.join(sorted(leaked)[:_SHOWN])}{more}; "
            "a score on such data means nothing, prepare again"
        )
