"""Pictures for MLflow and reports, as PNG bytes. Object interface of matplotlib only: no global state, no display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

# Apart for the colour-blind and on grey (Okabe and Ito): bluish green for truth, vermilion for prediction.
TRUTH, PREDICTION = "#00c896", "#ff7a1a"
_GROUND, _INK, _FAINT = "#0e1116", "#e8ecf1", "#8a94a3"
_DPI = 100


def overlay(image_HW: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray, title: str) -> bytes:
    """The slice as it is and, beside it, with the prediction filled and the truth outlined.

    Args:
        image_HW: grey values; uint8 is shown as 0..255, others from their 0.5 to their 99.5 percentile.
        truth: mask (H, W), not 0 is foreground; None where there is no truth (an archive).
        prediction: mask (H, W), not 0 is foreground.
        title: one line over the picture.
    """
    rows, columns = image_HW.shape
    width_in = 7.2
    figure = Figure(figsize=(width_in, width_in / 2 * rows / columns + 0.62), dpi=_DPI, facecolor=_GROUND)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.36 / figure.get_figheight(), bottom=0.0, wspace=0.02)
    plain, marked = figure.subplots(1, 2)
    low, high = (0, 255) if image_HW.dtype == np.uint8 else np.percentile(image_HW, (0.5, 99.5))
    for axes in (plain, marked):
        axes.imshow(image_HW, cmap="gray", vmin=low, vmax=high, interpolation="antialiased")
        axes.set_axis_off()
    legend: list[Artist] = [Patch(facecolor=PREDICTION, alpha=0.6, label="prediction")]
    _outline(marked, prediction, PREDICTION, 1.2)
    marked.imshow(_tint(prediction, PREDICTION), interpolation="nearest")
    if truth is not None:
        _outline(marked, truth, TRUTH, 1.6)
        legend.insert(0, Line2D([], [], color=TRUTH, linewidth=2, label="truth"))
    figure.text(0.012, 1 - 0.235 / figure.get_figheight(), title, color=_INK, fontsize=9.5, va="center")
    figure.legend(
        handles=legend, loc="center right", bbox_to_anchor=(0.995, 1 - 0.235 / figure.get_figheight()), ncols=2,
        frameon=False, labelcolor=_INK, fontsize=9, borderaxespad=0,
    )  # fmt: skip
    return _png(figure)


def tile(image_HW: np.ndarray, prediction: np.ndarray, side: int = 240) -> bytes:
    """The slice with the prediction tinted, fitted into a black square of `side` pixels: one stone of a mosaic.

    Args:
        image_HW: uint8 grey values.
        prediction: mask (H, W), not 0 is foreground.
        side: of the picture.
    """
    grey = Image.fromarray(image_HW).convert("RGB")
    tint = Image.fromarray(_tint(prediction, PREDICTION))
    grey.paste(tint.convert("RGB"), mask=tint.getchannel("A"))
    scale = side / max(grey.size)
    fitted = grey.resize(
        (max(1, round(grey.width * scale)), max(1, round(grey.height * scale))), Image.Resampling.LANCZOS
    )
    square = Image.new("RGB", (side, side))
    square.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and Dice over the epochs, side by side.

    Args:
        history: one mapping an epoch, of numbers by name. Names with `loss` go to the left, with `dice` to the right;
            `train/...` and `val/...` are told apart by colour. Others (those of single classes, `val/dice_pooled/NAME`,
            too), and values that are None, are left out.
    """
    figure = Figure(figsize=(8.4, 3.0), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, 2), ("loss", "dice"), strict=True):
        names = sorted({name for row in history for name in row if part in name and name.count("/") < 2})
        for name in names:
            points = [
                (row.get("epoch", at), row[name]) for at, row in enumerate(history, 1) if row.get(name) is not None
            ]
            color = "#d1610c" if "val" in name else "#2266aa"
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, linewidth=1.6, label=name)
        axes.set_title(part.capitalize(), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("epoch", fontsize=9, color=_FAINT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8, colors="#55606e", length=0)
        axes.grid(axis="y", color="#e4e8ee", linewidth=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        if part == "dice":
            axes.set_ylim(0, 1)
        if names:
            axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def agreement(mean: np.ndarray, difference: np.ndarray, lines: Sequence[float], unit: str) -> bytes:
    """Bland and Altman's picture: what is found too much, by size; a point a case.

    Args:
        mean: of true and predicted volume, (cases,); cases that are not a number are left out.
        difference: predicted minus true volume.
        lines: the lower limit of agreement, the bias and the upper limit, or the bias alone.
        unit: of all of them.
    """
    figure, axes = _chart(4.6)
    axes.axhline(0, color="#c3cbd6", linewidth=1)
    axes.scatter(mean, difference, s=16, color="#2266aa", alpha=0.65, linewidths=0)
    names = ("lower limit", "bias", "upper limit") if len(lines) == 3 else ("bias",)
    for value, name in zip(lines, names, strict=True):
        axes.axhline(value, color="#d1610c", linewidth=1.4, linestyle="-" if name == "bias" else "--")
        axes.annotate(
            f"{name} {value:.4g}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", fontsize=8, color="#a94b06",
        )  # fmt: skip
    axes.set_xlabel(f"mean of true and predicted volume [{unit}]", fontsize=9, color=_FAINT)
    axes.set_ylabel(f"predicted minus true [{unit}]", fontsize=9, color=_FAINT)
    return _png(figure)


def pairs(across: np.ndarray, up: np.ndarray, names: tuple[str, str], metric: str, *, low: bool = False) -> bytes:
    """Two models on the same cases: a point a case, the line where both are equal.

    Args:
        across: the metric of the one model, (cases,); cases that are not a number in either are left out.
        up: of the other.
        names: of the two.
        metric: its name.
        low: lower is better, so the better side of the line is below it.
    """
    figure, axes = _chart(5.4)
    both = np.isfinite(across) & np.isfinite(up)
    least, most = 0.0, 1.0
    if both.any():
        least = min(0.0, across[both].min(), up[both].min())
        most = max(across[both].max(), up[both].max(), 1e-9)
        most = 1.0 if not low and most <= 1 else most * 1.05
    gains = np.where(both, (across - up if low else up - across), np.nan)
    for chosen, color, label in (
        (gains > 0, "#00977a", f"{names[1]} is better"),
        (gains < 0, "#d1610c", f"{names[0]} is better"),
        (gains == 0, "#8a94a3", "equal"),
    ):
        if chosen.any():
            axes.scatter(across[chosen], up[chosen], s=22, color=color, alpha=0.7, linewidths=0, label=label)
    axes.plot([least, most], [least, most], color="#8a94a3", linewidth=1, linestyle="--")
    axes.set(xlim=(least, most), ylim=(least, most), aspect="equal")
    axes.set_xlabel(f"{metric}, {names[0]}", fontsize=9, color=_FAINT)
    axes.set_ylabel(f"{metric}, {names[1]}", fontsize=9, color=_FAINT)
    if both.any():
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return _png(figure)


def volumes(across: np.ndarray, up: np.ndarray, names: tuple[str, str]) -> bytes:
    """Two runs on the same series: a point a series, the line where both volumes are equal; logarithmic from 1 mL on.

    Args:
        across: millilitres by the one run, (series,).
        up: by the other.
        names: of the two.
    """
    figure, axes = _chart(4.6)
    most = max([1.0, *across.tolist(), *up.tolist()]) * 1.2
    axes.plot([0, most], [0, most], color="#8a94a3", linewidth=1, linestyle="--")
    axes.scatter(across, up, s=20, color="#2266aa", alpha=0.6, linewidths=0)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlim=(-0.05, most), ylim=(-0.05, most), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"{names[0]} [mL]", fontsize=9, color=_FAINT)
    axes.set_ylabel(f"{names[1]} [mL]", fontsize=9, color=_FAINT)
    return _png(figure)


def histogram(values: np.ndarray, name: str, counted: str) -> bytes:
    """How many values lie where, by numpy's automatic bins, 60 at most.

    Args:
        values: (n,), at least one.
        name: of the values, with their unit.
        counted: what there is one value of: `series`.
    """
    figure, axes = _chart(4.6)
    edges = np.histogram_bin_edges(values, "auto")
    if len(edges) > 61:
        edges = np.linspace(edges[0], edges[-1], 61)
    axes.hist(values, edges.tolist(), color="#2266aa", alpha=0.85)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(name, fontsize=9, color=_FAINT)
    axes.set_ylabel(counted, fontsize=9, color=_FAINT)
    return _png(figure)


def reliability(sums: Mapping[str, np.ndarray]) -> bytes:
    """How often pixels of a probability are of the class, and how many pixels there are.

    Args:
        sums: of each class, (bins, 3): pixels, the sum of their probabilities, how many are of the class.
    """
    figure, axes = _chart(4.6)
    axes.plot([0, 1], [0, 1], color="#c3cbd6", linewidth=1, linestyle="--")
    beside = axes.twinx()
    width = 0.8 / max(len(sums), 1)
    for number, (name, of_class) in enumerate(sums.items()):
        bins = len(of_class)
        color = f"C{number}" if len(sums) > 1 else "#2266aa"
        filled = of_class[of_class[:, 0] > 0]
        axes.plot(
            filled[:, 1] / filled[:, 0], filled[:, 2] / filled[:, 0], color=color, marker="o", markersize=4,
            linewidth=1.6, label=name,
        )  # fmt: skip
        places = (np.arange(bins) + 0.1 + (number + 0.5) * width) / bins
        beside.bar(places, of_class[:, 0], width / bins, color=color, alpha=0.18, linewidth=0)
    beside.set_yscale("log")
    beside.set_ylabel("pixels", fontsize=9, color=_FAINT)
    axes.set_zorder(beside.get_zorder() + 1)
    axes.set_frame_on(False)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("mean probability of the pixels in a bin", fontsize=9, color=_FAINT)
    axes.set_ylabel("of them of the class", fontsize=9, color=_FAINT)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.11, 1))
    for one in (axes, beside):
        one.tick_params(which="both", labelsize=8, colors="#55606e", length=0)
    beside.spines[:].set_visible(False)
    return _png(figure)


def risk_coverage(curves: Mapping[str, np.ndarray], oracle: np.ndarray, at_random: float) -> bytes:
    """The mean risk of the share of patients that is least suspect, by each of several orders.

    Args:
        curves: by name, (patients,) risks of the least suspect one, two, ... patients.
        oracle: the same by the risk itself.
        at_random: the mean risk.
    """
    figure, axes = _chart(4.6)
    shares = np.arange(1, len(oracle) + 1) / len(oracle)
    axes.axhline(at_random, color="#8a94a3", linewidth=1, linestyle=":", label="at random")
    axes.plot(shares, oracle, color="#8a94a3", linewidth=1, linestyle="--", label="best possible")
    for name, risks in sorted(curves.items(), key=lambda one: float(np.mean(one[1]))):
        axes.plot(shares, risks, linewidth=1.5, label=f"{name} {np.mean(risks):.3f}")
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.set_xlabel("share of patients accepted, the least suspect first", fontsize=9, color=_FAINT)
    axes.set_ylabel("mean of 1 \u2212 Dice over them", fontsize=9, color=_FAINT)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper", title="area under it", title_fontsize=8)
    return _png(figure)


def _chart(height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, height_in), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.tick_params(labelsize=8, colors="#55606e", length=0)
    axes.grid(color="#eef1f5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3cbd6")
    return figure, axes


def trials(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """What the trials of a sweep took and scored: a scatter of two numbers, parallel coordinates of anything else.

    Args:
        rows: one mapping a trial: `values` by key, `status` (`completed`, `stopped` or `failed`) and `val_dice`, None
            of one that failed.
    """
    keys = sorted(rows[0]["values"])
    figure = Figure(figsize=(max(6.4, 2.2 * len(keys)), 4.2), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    scored = [row["val_dice"] for row in rows if row["val_dice"] is not None]
    colours = ScalarMappable(Normalize(min(scored, default=0), max(scored, default=1)), "viridis")
    draw = _scatter if len(keys) == 2 and _numbers(rows, keys[0]) and _numbers(rows, keys[1]) else _parallel
    draw(axes, rows, keys, colours)
    figure.colorbar(colours, ax=axes, label="validation Dice", pad=0.02)
    axes.set_title("Trials", loc="left", fontsize=10, fontweight="bold")
    axes.tick_params(labelsize=8, colors="#55606e", length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def _scatter(axes: Axes, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], colours: ScalarMappable) -> None:
    """The second key over the first; its score at each point."""
    across, up = keys[1], keys[0]
    for row in rows:
        x, y, dice = row["values"][across], row["values"][up], row["val_dice"]
        if dice is None:
            axes.scatter(x, y, marker="x", s=50, color=_FAINT)
            continue
        size = 130 if row["status"] == "completed" else 40
        axes.scatter(x, y, s=size, color=colours.to_rgba(dice), edgecolors="#55606e", linewidths=0.6)
        axes.annotate(f"{dice:.2f}", (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=7)
    for key, axis, set_scale in ((across, axes.xaxis, axes.set_xscale), (up, axes.yaxis, axes.set_yscale)):
        values = sorted({row["values"][key] for row in rows})
        if values[0] > 0 and values[-1] >= 4 * values[0]:
            set_scale("log")
        if len(values) <= 6:
            axis.set_major_locator(FixedLocator(values))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axis.set_minor_locator(NullLocator())
    axes.margins(0.12)
    axes.grid(color="#e4e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{across}   (large: completed, small: stopped, x: failed)", fontsize=9, color=_FAINT)
    axes.set_ylabel(up, fontsize=9, color=_FAINT)


def _parallel(axes: Axes, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], colours: ScalarMappable) -> None:
    """An upright a key, each from its least value to its greatest, and a line a trial."""
    places = [_places(rows, key) for key in keys]
    for number, row in enumerate(rows):
        dice = row["val_dice"]
        style = {"color": _FAINT, "linestyle": ":"} if dice is None else {"color": colours.to_rgba(dice)}
        heights = [heights[number] for heights in places]
        if len(keys) == 1:
            axes.plot([-0.1, 0.1], heights * 2, linewidth=2.0, **style)
        else:
            axes.plot(range(len(keys)), heights, linewidth=2.2 if row["status"] == "completed" else 0.9, **style)
    for at, key in enumerate(keys):
        axes.axvline(at, color="#c9d0d9", linewidth=0.8, zorder=0)
        labels = {(height, _shown(row["values"][key])) for height, row in zip(places[at], rows, strict=True)}
        for height, value in sorted(labels):
            axes.annotate(value, (at, height), (4, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_xticks(range(len(keys)), keys)
    axes.set_yticks([])
    axes.set_xlabel("thick: completed, thin: stopped, dotted: failed", fontsize=9, color=_FAINT)


def _numbers(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return all(isinstance(row["values"][key], int | float) for row in rows)


def _places(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Where each trial's value lies between the least, 0, and the greatest, 1; what is no number by its order."""
    values = [row["values"][key] for row in rows]
    if not _numbers(rows, key):
        order = list(dict.fromkeys(map(str, values)))
        values = [order.index(str(value)) for value in values]
    elif min(values) > 0 and max(values) >= 4 * min(values):
        values = [float(np.log(value)) for value in values]
    span = max(values) - min(values)
    return [(value - min(values)) / span if span else 0.5 for value in values]


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _outline(axes: Axes, mask: np.ndarray, color: str, width: float) -> None:
    """The mask's border along the edges of its pixels, so that a single pixel and one at the image's edge show."""
    inside = np.pad(mask != 0, 1)
    # A pixel (row, column) covers row - 0.5 .. row + 0.5 of the axes; `inside` is shifted by one.
    rows, columns = np.nonzero(inside[1:] != inside[:-1])
    axes.hlines(rows - 0.5, columns - 1.5, columns - 0.5, colors=color, linewidth=width)
    rows, columns = np.nonzero(inside[:, 1:] != inside[:, :-1])
    axes.vlines(columns - 0.5, rows - 1.5, rows - 0.5, colors=color, linewidth=width)


def _tint(mask: np.ndarray, color: str) -> np.ndarray:
    """uint8 (H, W, 4): `color` at 40 % where the mask is, else transparent."""
    rgba_HWC = np.zeros((*mask.shape, 4), np.uint8)
    rgba_HWC[mask != 0] = (*bytes.fromhex(color[1:]), 102)
    return rgba_HWC


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
