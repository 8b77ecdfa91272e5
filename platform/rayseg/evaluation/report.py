"""An evaluation's report: one HTML file that holds everything it shows, with no script and nothing to fetch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayseg import pages
from rayseg.evaluation.metrics import COUNTS, METRICS, Estimate
from rayseg.evaluation.record import Findings

_UNDEFINED = "\u2013"  # en dash
_HEADLINES = ("dice_pooled", "dice_per_case", "lesion_f1", "nsd_mm_per_case", "nsd_px_per_case", "average_precision")
_PARTS = {
    "Overlap": ("dice", "iou", "precision", "recall", "f1", "accuracy", "average"),
    "Surfaces": ("hd95", "assd", "nsd"),
    "Lesions": ("lesion",),
    "Volumes": ("volume", "false"),
    "Probabilities": ("brier", "ece"),
    "Cases": ("cases",),
}


@dataclass(frozen=True)
class Picture:
    """A PNG with its name and its caption, which is also what a screen reader says."""

    name: str
    caption: str
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Report:
    """What the report tells."""

    model: str
    doubts: Sequence[str]  # what speaks against the numbers
    split: str
    patients: int
    slices: int
    rejects: int
    tolerance: str  # of nsd
    findings: Findings
    charts: Sequence[Picture]
    worst: Sequence[Picture]
    cases: Sequence[Mapping[str, str]]  # rows of cases.csv
    risk_chart: Picture | None = None


def render(report: Report) -> str:
    """The report as HTML text."""
    together, classes = report.findings.together, report.findings.classes
    shown = [{"together": together}, classes][len(classes) > 1]
    if len(classes) > 1:
        shown = {"all classes": together, **classes}
    return pages.render(
        __package__,
        "report.html",
        {"number": _number, "interval": _interval, "cell": _cell},
        report=report,
        headlines=[(name, together[name]) for name in _HEADLINES if name in together],
        shown=shown,
        parts={part: names for part, begins in _PARTS.items() if (names := _named(begins, together))},
        groups=report.findings.groups,
        group_metrics=sorted({name for group in report.findings.groups for name in group.metrics}),
        columns=_columns(report.cases),
    )


def _named(begins: Sequence[str], defined: Mapping[str, Estimate]) -> list[str]:
    return [name for name in (*METRICS, *COUNTS) if name in defined and name.startswith(tuple(begins))]


def _columns(cases: Sequence[Mapping[str, str]]) -> list[str]:
    """Those of the table in which anything stands."""
    return [name for name in cases[0] if any(case[name] != "" for case in cases)] if cases else []


def _number(one: Estimate | None) -> str:
    if one is None:
        return _UNDEFINED
    return f"{one.value:,}".replace(",", "\u202f") if isinstance(one.value, int) else _three(one.value)


def _interval(one: Estimate | None) -> str:
    return "" if one is None or one.low is None or one.high is None else f"{_three(one.low)} to {_three(one.high)}"


def _three(value: float) -> str:
    """Three digits after the point, or those that matter of what is larger or very small."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"


def _cell(text: str) -> str:
    if text == "":
        return _UNDEFINED
    try:
        return text if text.lstrip("-").isdigit() else _three(float(text))
    except ValueError:
        return text[:12]
