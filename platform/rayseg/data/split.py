"""Patients, never slices, are dealt to training, validation and test; and what must not be in two of them, found.

What is promised when data is added: by default a patient's place is a function of the seed and its key alone, so nobody
ever moves. Such a draw cannot look at the other patients and is balanced in expectation only: of n patients a share p
gets n p, give or take sqrt(n p (1 - p)), among those with foreground and those without alike. With `stratify` each of
these two groups is dealt to within a patient or so of the shares, which depends on who else is there; then `standing`,
the split.csv of an earlier set, keeps everyone who is in it in their place, and only new ones are dealt. With
`exact` each part has its number of patients, see `dealing`; `given` is a split of one's own.
"""

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from rayseg.data import dealing
from rayseg.data.duplicates import near_duplicates

SPLITS = ("train", "val", "test")
LEFT_OUT = "none"  # as a part: in no split
LEAK_COLUMNS = ("row_id", "patient_key", "study_key", "split", "fingerprint")  # what `check_leak` looks at
_SHOWN = 5
_FEW = 0.5  # of the patients of a standing split: where fewer are in the data, it may be of other data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The fractions of patients held out for validation and test, or folds; another seed is another draw.

    With `folds` the test share is the same whichever `fold` is taken, and the rest is cut into as many equal parts, of
    which part `fold` (from 0) is the validation; `val` does not count then. With `held_out` that part is the test split
    and the next one validates, so that what chooses epoch and threshold is not what is scored; the test share is then
    in no split, as no fold may see it.
    """

    val: float = 0.15  # share of the patients for validation; with `exact` also their number
    test: float = 0.15  # share of the patients for the test; with `exact` also their number
    seed: str | int = "1"  # another seed is another draw
    folds: int | None = None  # number of folds, in place of `val`
    fold: int = 0  # the fold that is held out, from 0
    held_out: bool = False  # the fold is the test split and the next fold validates, as `crossvalidate` needs it
    stratify: bool = False  # deals patients with and without foreground separately; reads every mask once more
    # As many patients as the shares say, rounded, and one at least, balanced by class and size of lesion; reads every
    # mask once more. From 1 on `val` and `test` are then numbers of patients.
    exact: bool = False
    standing: str | None = None  # URI of the split.csv of an earlier set, whose patients keep their split
    # URI of a CSV with the columns patient,split or file,split, in place of all other keys: train, val, test, or none
    # to leave a patient out. A patient is named by its ID or group, a file by its path below the source.
    given: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", str(self.seed))  # 1 and "1" are one draw
        if self.given is not None and (self.folds or self.stratify or self.exact or self.standing):
            raise ValueError("split.given: without folds, stratify, exact and standing: the file says it all")
        counted = [key for key in ("val", "test") if getattr(self, key) >= 1]
        if self.exact and counted:
            if any(not float(getattr(self, key)).is_integer() for key in counted):
                raise ValueError(f"split.{counted[0]}: a share below 1 or a whole number expected")
        elif self.val < 0 or self.test < 0 or self.test + (0 if self.folds else self.val) >= 1:
            raise ValueError(f"split: val and test must be >= 0 and sum to less than 1, got {self.val} and {self.test}")
        self._check_folds()

    def _check_folds(self) -> None:
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"split.folds: 2 or more expected, or null, got {self.folds}")
        if self.held_out and (self.folds or 0) < 3:
            raise ValueError(
                "split.held_out: folds of 3 or more expected, for one is held out, one validates and the others train; "
                f"got {self.folds}"
            )
        if not 0 <= self.fold < (self.folds or 1):
            raise ValueError(
                f"split.fold: a number from 0, below split.folds ({self.folds}), expected, got {self.fold}"
            )

    def parts(self) -> dict[str, float]:
        """The shares that patients are dealt to: test, val and train, or test and the folds."""
        test, val = (share if share < 1 else 0.0 for share in (self.test, self.val))  # numbers take no share
        if self.folds is None:
            return {"test": self.test, "val": self.val, "train": 1 - test - val}
        return {"test": self.test} | {f"fold-{number}": (1 - test) / self.folds for number in range(self.folds)}

    def split_of(self, part: str) -> str | None:
        """Which of SPLITS a part is; None for one that is left out."""
        if part == LEFT_OUT:
            return None
        if part in SPLITS:
            return None if self.held_out else part
        roles = {f"fold-{self.fold}": "test", self._next_fold: "val"} if self.held_out else {f"fold-{self.fold}": "val"}
        return roles.get(part, "train")

    @property
    def _next_fold(self) -> str:
        return f"fold-{(self.fold + 1) % (self.folds or 1)}"

    def assign(self, patient_key: str) -> str:
        """The part of a patient: a function of the seed and the key alone, whoever else is in the data."""
        position, end = self._position(patient_key), 0.0
        for part, share in self.parts().items():
            end += share
            if position < end:
                return part
        return part

    def deal(
        self,
        patients: Mapping[str, bool],
        standing: Mapping[str, str] | None = None,
        foreground: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, str]:
        """The part of each patient.

        Args:
            patients: by patient key, whether the patient has foreground (only `stratify` looks at it).
            standing: by patient key, the parts of an earlier set: who is in it stays.
            foreground: by patient key, pixels of each class, of those that have any (only `exact` looks at it).

        Raises:
            ValueError: `standing` names a part that this split does not have, or none of these patients.
        """
        parts, kept = self.parts(), dict(standing or {})
        strange = sorted(set(kept.values()) - set(parts))
        if strange:
            raise ValueError(f"split.standing: it has the parts {', '.join(strange)}, this split {', '.join(parts)}")
        dealt = {key: kept[key] for key in patients if key in kept}
        _check_standing(len(dealt), len(kept), len(patients))
        if self.exact:
            held_out = {"test": self.test} | ({} if self.folds else {"val": self.val})
            wanted = dealing.numbers(held_out, [part for part in parts if part not in held_out], len(patients))
            return dealing.deal(list(patients), foreground or {}, wanted, dealt, self._position)
        if not self.stratify:
            return dealt | {key: self.assign(key) for key in patients if key not in dealt}
        for stratum in (True, False):
            members = [key for key, positive in patients.items() if positive == stratum]
            counts = Counter(dealt[key] for key in members if key in dealt)
            new = sorted((key for key in members if key not in dealt), key=self._position)
            for key in new:
                total = counts.total() + 1
                # To the part that lacks most.
                dealt[key] = max(parts, key=lambda part: parts[part] * total - counts[part])
                counts[dealt[key]] += 1
        return dealt

    def wanted(self) -> tuple[str, ...]:
        """The splits that get a share."""
        if self.given is not None:
            return ("train",)
        shares = Counter[str]()
        for part, share in self.parts().items():
            if share and (split := self.split_of(part)):
                shares[split] += 1
        return tuple(name for name in SPLITS if shares[name] > 0)

    def _position(self, patient_key: str) -> float:
        """Where the hash puts a patient in 0..1."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{patient_key}".encode()).digest()[:8]) / 2**64


def _check_standing(stay: int, standing: int, patients: int) -> None:
    """Refuses a standing split that keeps nobody, and warns of one that keeps few."""
    if not standing:
        return
    told = (
        f"split.standing: {stay or 'none'} of its {standing} patients are among the {patients} here; pseudonyms depend "
        "on the key that the catalog ran with (RAYSEG_PSEUDONYM_KEY_FILE)"
    )
    if not stay:
        raise ValueError(
            f"{told}: catalog again with the key of that split.csv, or name another one; else who was trained on "
            "could come to test"
        )
    if stay < _FEW * standing:
        logger.warning("%s: is it the split of these data?", told)


def to_csv(patients: pa.Table) -> bytes:
    """A table of patients (`patient_key`, `part`, `split`, `rows`, `positive`) as CSV."""
    buffer = io.BytesIO()
    csv.write_csv(patients, buffer, csv.WriteOptions(quoting_style="none"))
    return buffer.getvalue()


def read_standing(data: bytes) -> dict[str, str]:
    """The part of each patient in a split.csv; raises ValueError where it is none."""
    try:
        options = csv.ConvertOptions(column_types={"patient_key": pa.string(), "part": pa.string()})
        table = csv.read_csv(io.BytesIO(data), convert_options=options)
        return dict(zip(table["patient_key"].to_pylist(), table["part"].to_pylist(), strict=True))
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"split.standing: not the split.csv of a prepared set ({type(error).__name__})") from None


def check_leak(table: pa.Table) -> None:
    """Raises ValueError, naming pseudonyms, where the splits of `table` share what they must not.

    That is a patient, a study, or a picture: near-duplicates, see `duplicates`. Within a split these are no leak.

    Args:
        table: with the columns `patient_key` and `split`, and `study_key`, `fingerprint` with `row_id` if it has them.
    """
    if table["patient_key"].null_count or table["split"].null_count:
        raise ValueError("split: rows without a patient_key or split; no leak check is possible, prepare again")
    found = []
    for kind, plural in (("patient", "patients"), ("study", "studies")):
        leaked = _in_several(table, f"{kind}_key") if f"{kind}_key" in table.column_names else []
        if leaked:
            found.append(f"{len(leaked)} {plural} are in more than one split: {_some(leaked)}")
    if "fingerprint" in table.column_names:
        pairs = near_duplicates(table["fingerprint"].to_pylist(), table["split"].to_pylist())
        shown = [
            " and ".join(_row(table.slice(index, 1).to_pylist()[0]) for index in (pair.first, pair.second))
            for pair in pairs[:_SHOWN]
        ]
        if pairs:
            more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
            found.append(
                f"{len(pairs)} pairs of rows in different splits show the same picture: {'; '.join(shown)}{more} "
                "(patients that are one need one key: layout.groups)"
            )
    if found:
        raise ValueError(f"split: {'; '.join(found)}; a score on such data means nothing, prepare again")


def _in_several(table: pa.Table, key: str) -> list[str]:
    """The values of a column that stand in more than one split, sorted."""
    splits = table.select([key, "split"]).group_by(key).aggregate([("split", "count_distinct")])
    several = splits.filter(pc.and_(pc.is_valid(splits[key]), pc.greater(splits["split_count_distinct"], 1)))
    return sorted(several[key].to_pylist())


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + ("" if len(keys) <= _SHOWN else f" and {len(keys) - _SHOWN} more")


def _row(row: dict[str, str]) -> str:
    return f"row {row['row_id'][:12]} of patient {row['patient_key']} in {row['split']}"
