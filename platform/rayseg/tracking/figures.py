"""Pictures for MLflow and reports, as PNG bytes. Object interface of matplotlib only: no global state, no display."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
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
            f"{name} {value:.3g}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", fontsize=8, color="#a94b06",
        )  # fmt: skip
    axes.set_xlabel(f"mean of true and predicted volume [{unit}]", fontsize=9, color=_FAINT)
    axes.set_ylabel(f"predicted minus true [{unit}]", fontsize=9, color=_FAINT)
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
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    for one in (axes, beside):
        one.tick_params(labelsize=8, colors="#55606e", length=0)
    beside.spines[:].set_visible(False)
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
