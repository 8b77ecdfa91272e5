"""The demo's report: one HTML file that holds everything it shows, with no script and nothing to fetch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from rayseg import pages, storage
from rayseg.tracking import figures

_CHART_W, _CHART_H = 460, 220  # user units of the SVG
_UNDEFINED = "\u2013"  # en dash
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 448, 12, 192  # the plot's area in it


@dataclass(frozen=True)
class Headline:
    """One large number, with what it is and what to hold it against."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption, which is also what a screen reader says."""

    png: bytes = field(repr=False)
    caption: str = ""


@dataclass(frozen=True)
class Request:
    """An HTTP request that was really made, and what came back."""

    curl: str
    status: int
    answer: Mapping[str, Any]  # the JSON body
    note: str = ""  # what was compared, and the outcome


@dataclass(frozen=True)
class Report:
    """What the report tells. An empty part is left out of the page."""

    title: str
    data: str  # one or two sentences: what it was run on, what subset was taken
    finished: str  # date and time
    seconds: float
    stages: Mapping[str, float]  # seconds by name, in order
    headlines: Sequence[Headline] = ()
    history: Sequence[Mapping[str, Any]] = ()  # one mapping an epoch, as `TrainResult.history`
    untrained_dice: float | None = None  # drawn as a line under the Dice curve
    overlays: Sequence[Picture] = ()  # truth and prediction on held-out slices
    cases: Sequence[Mapping[str, Any]] = ()  # rows of the evaluation's cases.csv
    series: Sequence[Mapping[str, Any]] = ()  # rows of the archive's ledger (`records.LEDGER`)
    rejects: Mapping[str, int] = field(default_factory=dict)  # of all stages, by reason
    gallery: Sequence[Picture] = ()  # slices of the segmented archive
    request: Request | None = None
    commands: Sequence[tuple[str, str]] = ()  # what to run next, and what it is for
    config: Mapping[str, Any] = field(default_factory=dict)  # all sections, plain values


def write_report(path: str, report: Report) -> None:
    """Writes the report as one HTML file to `path` (a local path or URI), which replaces what was there."""
    storage.write(path, render(report).encode())


def render(report: Report) -> str:
    """The report as HTML text."""
    return pages.render(
        __package__,
        "report.html",
        {"score": _score, "duration": _duration, "count": _count},
        report=report,
        charts=[chart for part in ("dice", "loss") if (chart := _chart(report, part))],
        stages=_shares(report.stages),
        answer=json.dumps(report.request.answer, indent=2) if report.request else "",
        config=yaml.safe_dump(dict(report.config), sort_keys=False) if report.config else "",
        truth_color=figures.TRUTH,
        prediction_color=figures.PREDICTION,
    )


@dataclass(frozen=True)
class _Line:
    name: str
    kind: str  # "train", "val" or "": decides the colour
    points: tuple[tuple[float, float], ...]  # in SVG units
    last: str  # the last value, written at its end
    label_y: float  # where it is written: apart from the others'

    @property
    def path(self) -> str:
        return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class _Chart:
    title: str
    lines: tuple[_Line, ...]
    x_ticks: tuple[tuple[float, str], ...]  # place in SVG units, text
    y_ticks: tuple[tuple[float, str], ...]
    floor: tuple[float, str] | None  # a dashed line to compare with


def _chart(report: Report, part: str) -> _Chart | None:
    """The curves whose names contain `part`; None where the history has none."""
    names = sorted(
        {name for row in report.history for name, value in row.items() if part in name and value is not None}
    )
    if not names:
        return None
    series = {
        name: [
            (float(row.get("epoch", at)), float(row[name]))
            for at, row in enumerate(report.history, start=1)
            if row.get(name) is not None
        ]
        for name in names
    }
    epochs = sorted({epoch for points in series.values() for epoch, _ in points})
    top = 1.0 if part == "dice" else _round_up(max(value for points in series.values() for _, value in points))

    def place(epoch: float, value: float) -> tuple[float, float]:
        across = (epoch - epochs[0]) / ((epochs[-1] - epochs[0]) or 1)
        return _LEFT + across * (_RIGHT - _LEFT - 44), _BOTTOM - min(value / top, 1.0) * (_BOTTOM - _TOP)

    labels = _apart({name: place(*points[-1])[1] for name, points in series.items()})
    lines = tuple(
        _Line(
            name, name.partition("/")[0], tuple(place(*point) for point in points), f"{points[-1][1]:.2f}", labels[name]
        )
        for name, points in series.items()
    )
    step = max(1, round(len(epochs) / 8))
    floor = report.untrained_dice if part == "dice" else None
    return _Chart(
        title="Dice" if part == "dice" else "Loss",
        lines=lines,
        x_ticks=tuple((place(epoch, 0)[0], f"{epoch:g}") for epoch in epochs[::step]),
        y_ticks=tuple((place(epochs[0], top * fourth / 4)[1], f"{top * fourth / 4:.2g}") for fourth in range(5)),
        floor=None if floor is None else (place(epochs[0], floor)[1], f"untrained {floor:.2f}"),
    )


def _apart(places: Mapping[str, float], distance: float = 13.0) -> dict[str, float]:
    """The places along an axis, moved up it where two would be closer than `distance`."""
    moved: dict[str, float] = {}
    for name in sorted(places, key=lambda name: places[name]):
        moved[name] = max([places[name], *(place + distance for place in moved.values())])
    return moved


def _round_up(value: float) -> float:
    """The next round number at or above `value`: 1, 1.2, 1.6, 2, 3, 4, 5, 6, 8 times a power of ten."""
    steps = [step * 10.0**power for power in range(-6, 7) for step in (1, 1.2, 1.6, 2, 3, 4, 5, 6, 8)]
    return next((step for step in steps if step >= value), value)


def _shares(stages: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Name, seconds and share in percent of each stage."""
    total = sum(stages.values()) or 1.0
    return [(name, seconds, 100 * seconds / total) for name, seconds in stages.items()]


def _score(value: Any) -> str:
    """Two or three digits of a number or its text; a dash for what is undefined."""
    return _UNDEFINED if value in (None, "") else f"{float(value):.3f}"


def _count(value: Any) -> str:
    return _UNDEFINED if value in (None, "") else f"{int(value):,}".replace(",", "\u202f")


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
