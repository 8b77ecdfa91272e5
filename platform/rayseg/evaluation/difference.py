"""A diff's summary and its report: one HTML file that holds everything it shows, with no script, nothing to fetch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayseg import pages
from rayseg.tracking import figures

_UNDEFINED = "\u2013"  # en dash
_LISTED = 300  # rows of a table in the page; the CSV has all


@dataclass(frozen=True)
class Quartiles:
    """Of one value a series (numpy's, interpolated)."""

    series: int
    low: float  # first quartile
    median: float
    high: float  # third quartile


@dataclass(frozen=True)
class Summary:
    """What changed, over all series that were compared: of all classes together, or of one."""

    identical: int
    changed: int
    dice: Quartiles | None  # of series in which either side found anything
    dice_pooled: float | None  # of all pixels together
    change_ml: Quartiles | None  # challenger minus baseline, of series with volumes, those without a change too
    baseline_ml: float
    challenger_ml: float
    baseline_lesions: int
    challenger_lesions: int
    appeared: int
    vanished: int
    series_appeared: int  # with foreground of the challenger only
    series_vanished: int  # of the baseline only


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption, which is also what a screen reader says."""

    caption: str
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Page:
    """What the report tells. `rows` are those of `changes.DIFF`, the greatest change first."""

    baseline: str
    challenger: str
    asked: Mapping[str, str]  # what was compared, by what it is called
    together: Summary
    classes: Mapping[str, Summary]
    rows: Sequence[Mapping[str, Any]]
    pictures: Sequence[Picture]


def summary(rows: Sequence[Mapping[str, Any]]) -> Summary:
    """Of rows of `changes.DIFF` of one class, or of all together; those that were not compared count nowhere."""
    compared = [row for row in rows if row["verdict"] != "not_compared"]

    def total(name: str) -> Any:
        return sum(row[name] for row in compared if row[name] is not None)

    both_pixels = sum(
        row["dice"] * (row["baseline_pixels"] + row["challenger_pixels"]) for row in compared if row["dice"] is not None
    )
    pixels = total("baseline_pixels") + total("challenger_pixels")
    return Summary(
        identical=sum(row["verdict"] == "identical" for row in compared),
        changed=sum(row["verdict"] == "changed" for row in compared),
        dice=_quartiles([row["dice"] for row in compared]),
        dice_pooled=both_pixels / pixels if pixels else None,
        change_ml=_quartiles([row["change_ml"] for row in compared]),
        baseline_ml=float(total("baseline_ml")),
        challenger_ml=float(total("challenger_ml")),
        baseline_lesions=total("baseline_lesions"),
        challenger_lesions=total("challenger_lesions"),
        appeared=total("appeared"),
        vanished=total("vanished"),
        series_appeared=sum(not row["baseline_pixels"] and row["challenger_pixels"] > 0 for row in compared),
        series_vanished=sum(row["baseline_pixels"] > 0 and not row["challenger_pixels"] for row in compared),
    )


def render(page: Page) -> str:
    """The report as HTML text."""
    whole = [row for row in page.rows if row["class"] == ""]
    changed = [row for row in whole if row["verdict"] == "changed"]
    others = [row for row in whole if row["verdict"] == "not_compared"]
    return pages.render(
        __package__,
        "difference.html",
        {"number": _number, "ml": _ml, "signed": _signed, "short": lambda key: key[:12]},
        page=page,
        charts=_charts(page, whole),
        changed=changed[:_LISTED],
        more_changed=max(len(changed) - _LISTED, 0),
        others=others[:_LISTED],
        more_others=max(len(others) - _LISTED, 0),
        reasons=sorted(Counter(row["reason"] for row in others).items()),
        one_sided_slices=sum(row["one_sided_slices"] or 0 for row in whole),
    )


def _charts(page: Page, rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    placed = [row for row in rows if row.get("change_ml") is not None]
    if not placed:
        return []
    before_ml, after_ml, change_ml = (
        np.array([row[name] for row in placed], float) for name in ("baseline_ml", "challenger_ml", "change_ml")
    )
    moved_ml = change_ml[[row["verdict"] == "changed" for row in placed]]
    made = [
        Picture(
            "Volume of each series; on the dashed line both runs agree.",
            figures.volumes(before_ml, after_ml, (page.baseline, page.challenger)),
        )
    ]
    if moved_ml.size:
        png = figures.histogram(moved_ml, "change of volume, challenger minus baseline [mL]", "series")
        made.append(Picture("Change of volume of the series that changed.", png))
    return made


def _quartiles(values: Sequence[float | None]) -> Quartiles | None:
    found = [value for value in values if value is not None]
    return Quartiles(len(found), *map(float, np.percentile(found, (25, 50, 75)))) if found else None


def _number(value: float | None) -> str:
    if value is None:
        return _UNDEFINED
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{value:.3f}"


def _ml(value: float | None) -> str:
    """Three digits, or those before the point."""
    if value is None:
        return _UNDEFINED
    return f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 1000 else f"{value:.3g}"


def _signed(value: float | None) -> str:
    text = _ml(value)
    return f"+{text}" if value is not None and value > 0 else text.replace("-", "\u2212")
