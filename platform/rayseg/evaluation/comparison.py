"""A comparison's report: one HTML file that holds everything it shows, with no script and nothing to fetch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayseg import pages
from rayseg.evaluation.paired import LOWER_IS_BETTER, Difference

_UNDEFINED = "\u2013"  # en dash


@dataclass(frozen=True)
class Challenger:
    """A model against the baseline: by metric, of all classes together and of each; the picture of single cases."""

    name: str
    together: Mapping[str, Difference]
    classes: Mapping[str, Mapping[str, Difference]]
    scatter: bytes = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """What the report tells."""

    baseline: str
    split: str
    patients: int
    metric: str  # of the pictures
    level: float
    challengers: Sequence[Challenger]


def render(page: Comparison) -> str:
    """The report as HTML text."""
    return pages.render(
        __package__,
        "comparison.html",
        {"number": _number, "signed": _signed, "p_value": _p_value},
        page=page,
        low=LOWER_IS_BETTER,
        headlines=[(one, _headline(page, one)) for one in page.challengers],
    )


def _headline(page: Comparison, one: Challenger) -> tuple[str, Difference] | None:
    """The metric of the pictures, or the first one that is defined."""
    name = page.metric if page.metric in one.together else next(iter(one.together), None)
    return None if name is None else (name, one.together[name])


def _number(value: float | None) -> str:
    if value is None:
        return _UNDEFINED
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if 0.001 <= abs(value) < 100 or value == 0 else f"{value:.3g}"


def _signed(value: float | None) -> str:
    """One digit more than `_number`: a difference is small beside what differs."""
    if value is None:
        return _UNDEFINED
    return (f"{value:+.4f}" if abs(value) < 1 else f"{value:+.3g}").replace("-", "\u2212")


def _p_value(value: float | None) -> str:
    if value is None:
        return _UNDEFINED
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
