"""A segment run's report: one HTML file that holds everything it shows, with no script and nothing to fetch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayseg import pages
from rayseg.inference.refusals import Refusals
from rayseg.tracking import figures

NAME = "report.html"  # below the run's output
_UNDEFINED = "\u2013"  # en dash
_SLOWEST = 20
_FLAGGED = 100  # series listed; the ledger has all
_STAGE_END = "_s"  # columns of the ledger that say what a series' seconds went to: `read_s`, ...


@dataclass(frozen=True)
class Run:
    """How a run ended, in numbers of series but for the last."""

    segmented: int
    rejected: int
    skipped: int  # done before
    seconds: float  # of the whole run, by the clock


@dataclass(frozen=True)
class _NotMade:
    """A profile that could not be made for one reason."""

    profile: str
    reason: str
    series: int  # segmented ones
    detail: str  # of one of them


@dataclass(frozen=True)
class _Refused:
    """What was refused for one reason."""

    reason: str
    series: int  # of which nothing could be used
    objects: int
    detail: str  # of one of them


def render(run: Run, asked: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], refusals: Refusals) -> str:
    """The report as HTML text.

    Args:
        run: how it ended.
        asked: its configuration, by key.
        rows: of `records.LEDGER`, of all series of the manifest, those done before too. `engine`, `flags` (a list of
            codes) with `flags_detail`, `not_made`, and seconds by stage (`read_s`, ...), are told where rows have them.
        refusals: of this run.
    """
    segmented = [row for row in rows if row["verdict"] == "segmented"]
    slices = sum(row["slices"] for row in segmented)
    timed = [row for row in segmented if row.get("seconds") is not None and row["slices"]]
    volumes_ml = [row["volume_ml"] for row in segmented if row.get("volume_ml") is not None]
    found_ml = np.array([volume for volume in volumes_ml if volume > 0])
    flags = Counter(flag for row in rows for flag in row.get("flags") or ())
    flagged = [row for row in rows if row.get("flags")]
    return pages.render(
        __package__,
        NAME,
        {"number": _number, "seconds": _seconds, "value": _value, "short": lambda key: key[:12]},
        run=run,
        asked=asked,
        engines=sorted({str(row["engine"]) for row in rows if row.get("engine")}),
        slices=slices,
        a_slice_s=sum(row["seconds"] for row in timed) / sum(row["slices"] for row in timed) if timed else None,
        refused=_refused(rows, refusals),
        objects=refusals.reasons.total(),
        histogram=figures.histogram(found_ml, "volume of what was found [mL]", "series") if found_ml.size else None,
        measured=int(found_ml.size),
        median_ml=float(np.median(found_ml)) if found_ml.size else None,
        total_ml=float(found_ml.sum()),
        found=sum(row["foreground_pixels"] > 0 for row in segmented),
        nothing=sum(row["foreground_pixels"] == 0 for row in segmented),
        unmeasured=len(segmented) - len(volumes_ml),
        stages=_stages(timed),
        slowest=sorted(timed, key=lambda row: row["seconds"], reverse=True)[:_SLOWEST],
        flags=flags.most_common(),
        flagged=flagged[:_FLAGGED],
        more_flagged=max(len(flagged) - _FLAGGED, 0),
        not_made=_not_made(segmented),
        short_of_any=sum(bool(row.get("not_made")) for row in segmented),
    )


def _not_made(segmented: Sequence[Mapping[str, Any]]) -> list[_NotMade]:
    """By profile and reason, the most frequent first."""
    lacking = [one for row in segmented for one in row.get("not_made") or ()]
    counts = Counter((one["profile"], one["reason"]) for one in lacking)
    details = {(one["profile"], one["reason"]): one["detail"] for one in reversed(lacking)}
    return [_NotMade(*which, count, details[which] or "") for which, count in counts.most_common()]


def _refused(rows: Sequence[Mapping[str, Any]], refusals: Refusals) -> list[_Refused]:
    """By reason, the most frequent first."""
    rejected = [row for row in rows if row["verdict"] == "rejected"]
    series = Counter(row["reason"] for row in rejected)
    details = {row["reason"]: row.get("detail") or "" for row in reversed(rejected)}
    details |= {reason: detail for reason, detail in refusals.details.items() if detail or reason not in details}
    objects = refusals.reasons
    reasons = sorted(details, key=lambda reason: (-objects[reason], -series[reason], reason))
    return [_Refused(name, series[name], objects[name], details[name]) for name in reasons]


def _stages(timed: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Name, seconds and share of all series' seconds, in the ledger's order, and what no column accounts for."""
    names = list(dict.fromkeys(name for row in timed for name in row if name.endswith(_STAGE_END)))
    sums = {name.removesuffix(_STAGE_END): sum(row.get(name) or 0.0 for row in timed) for name in names}
    whole = sum(row["seconds"] for row in timed)
    if not any(sums.values()) or not whole:
        return []
    rest = whole - sum(sums.values())
    if rest > 0:
        sums["other"] = rest
    most = max(whole, sum(sums.values()))  # stages of one series may run at the same time
    return [(name, seconds, seconds / most) for name, seconds in sums.items()]


def _number(value: float | None) -> str:
    if value is None:
        return _UNDEFINED
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", "\u202f")


def _seconds(value: float | None) -> str:
    if value is None:
        return _UNDEFINED
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 100:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _value(value: Any) -> str:
    if value is None:
        return _UNDEFINED
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
