"""The two sides of a diff: which run of a ledger is meant, and which of its series can be compared. Knows no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayseg import storage
from rayseg.inference import kept, ledger

# Profiles that label maps can be read from, the smaller file first.
_READABLE = ("seg-labelmap", "seg")
MASKS = "masks"  # in place of a profile: masks that the run has kept
_RUN = ("model_name", "model_version", "config_digest", "model_digest")
_SHOWN_DIGITS = 12  # of a configuration's digest


@dataclass(frozen=True)
class Side:
    """What one model with one configuration made of an archive."""

    name: str  # NAME/VERSION
    config_digest: str
    engines: tuple[str, ...]  # of the ledger, where it tells
    output: str  # URI of the folder that a segment job wrote
    rows: Mapping[str, dict[str, Any]] = field(repr=False)  # of `records.LEDGER`, by series key

    @property
    def run(self) -> str:
        """NAME/VERSION/CONFIGURATION, with the beginning of the configuration's digest."""
        return f"{self.name}/{self.config_digest[:_SHOWN_DIGITS]}"


def choose(output: str, wanted: str | None, key: str) -> Side:
    """The run of the ledger below `output` that `wanted` names.

    Args:
        output: URI of the folder that a segment job wrote.
        wanted: NAME/VERSION or NAME/VERSION/CONFIGURATION, where the last is the beginning of a `config_digest`; None
            where the ledger holds exactly one run.
        key: of the configuration, that errors name for `wanted`; the one for `output` is it without `_model`.

    Raises:
        ValueError: there is no ledger, or none or several of its runs are meant; with what is there.
    """
    rows = ledger.read(output).to_pylist()
    folder_key = key.removesuffix("_model")
    if not rows:
        raise ValueError(f"diff.{folder_key}: there is no ledger below {output}; name the output of a segment job")
    runs: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(tuple(str(row[name]) for name in _RUN), {})[row["series_key"]] = row
    meant = [run for run in runs if wanted is None or _names(wanted, run)]
    if len(meant) != 1:
        there = ", ".join(f"{'/'.join(run[:2])}/{run[2][:_SHOWN_DIGITS]}" for run in sorted(runs))
        found = f"{wanted} is {'none' if not meant else len(meant)}" if wanted else f"{output} has {len(meant)}"
        raise ValueError(
            f"diff.{key}: {found} of its runs (NAME/VERSION/CONFIGURATION): {there}; name one, the configuration where "
            "the version has several"
        )
    (run,) = meant
    engines = {str(row["engine"]) for row in runs[run].values() if row.get("engine")}
    return Side(f"{run[0]}/{run[1]}", run[2], tuple(sorted(engines)), output, runs[run])


def _names(wanted: str, run: Sequence[str]) -> bool:
    name, version, digest, _ = run
    return wanted == f"{name}/{version}" or (
        wanted.startswith(f"{name}/{version}/") and digest.startswith(wanted.removeprefix(f"{name}/{version}/"))
    )


def pair(baseline: Side, challenger: Side) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Series that can be compared, and the others with a reason, both by series key.

    The former have `series_key`, `patient_key`, and as `baseline` and `challenger` the file to read, as
    `records.OUTPUTS` has it: None where the run found nothing and wrote no files of such series. Where one of the two
    has no segmentation, it is the kept masks of both, `profile` MASKS. The latter have `series_key`, `patient_key`,
    `reason` and `detail`.
    """
    pairs, others = [], []
    for key in sorted(baseline.rows.keys() | challenger.rows.keys()):
        left, right = baseline.rows.get(key), challenger.rows.get(key)
        base = {"series_key": key, "patient_key": (left or right or {}).get("patient_key")}
        reason = _reason(left, right)
        if reason is not None:
            others.append({**base, "reason": reason[0], "detail": reason[1]})
            continue
        assert left is not None
        assert right is not None
        files = _file(left), _file(right)
        if _lacking(left, right):
            files = _masks(baseline, left), _masks(challenger, right)
        pairs.append({**base, "baseline": files[0], "challenger": files[1]})
    return pairs, others


def _reason(left: dict[str, Any] | None, right: dict[str, Any] | None) -> tuple[str, str] | None:
    """Why two rows cannot be compared, as a code and in words; None where they can."""
    if left is None or right is None:
        return f"only_in_{'baseline' if right is None else 'challenger'}", ""
    rejected = {side: row["reason"] for side, row in (("baseline", left), ("challenger", right)) if row["reason"]}
    if rejected:
        where = "both" if len(rejected) == 2 else next(iter(rejected))
        return f"rejected_in_{where}", ", ".join(dict.fromkeys(rejected.values()))
    if left["input_digest"] != right["input_digest"]:
        return "other_input", "the runs were given other objects, by URI, frame or ETag"
    lacking = _lacking(left, right)
    if lacking and not all(row.get("masks") for row in (left, right)):
        wrote = f"the {lacking[0]} wrote neither of the profiles {', '.join(_READABLE)}"
        return "no_segmentation", f"{wrote}, and masks are not kept of both"
    return None


def _lacking(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """The sides that have something and no file that it can be read from."""
    sides = (("baseline", left), ("challenger", right))
    return [side for side, row in sides if _file(row) is None and (row["outputs"] or row["foreground_pixels"])]


def _masks(side: Side, row: Mapping[str, Any]) -> dict[str, Any]:
    masks = row["masks"]
    uri = kept.Keep(side.output, masks["digest"]).uri(row["series_key"])
    return {"profile": MASKS, "uri": uri, "sha256": masks["sha256"], "bytes": masks["bytes"]}


def _file(row: Mapping[str, Any]) -> dict[str, Any] | None:
    files = {file["profile"]: file for file in row["outputs"] or ()}
    return next((files[profile] for profile in _READABLE if profile in files), None)


def same(baseline: Side, challenger: Side, outputs: tuple[str, str]) -> bool:
    """Whether both are one run in one folder."""
    here, there = map(storage.absolute, outputs)
    return (baseline.run, here.rstrip("/")) == (challenger.run, there.rstrip("/"))
