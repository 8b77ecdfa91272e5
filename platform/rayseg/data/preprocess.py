"""Preprocess: from a slice to the network's input and from the network's output back onto the slice's own grid.

One frozen object holds every choice; it is saved in the bundle, and training, bulk and online all use that object.
Geometry: the slice is scaled by one factor so that it fits `size`, and centred with padding of the darkest value. Pixel
centres lie at half-integers in both grids, so nothing shifts, neither there nor back.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from rayseg.data import resampling
from rayseg.dicom.reading import Slice


@dataclass(frozen=True)
class Window:
    """A display window in units of the rescaled values (HU for CT), as WindowCenter and WindowWidth of PS3.3 C.11.2."""

    center: float
    width: float

    def __post_init__(self) -> None:
        if not self.width >= 1:
            raise ValueError(f"window.width: at least 1 expected (PS3.3 C.11.2.1.2), got {self.width}")

    def map(self, values: np.ndarray) -> np.ndarray:
        """The linear window function of PS3.3 C.11.2.1.2.1 onto 0..255, rounded to uint8; any shape."""
        center, width = self.center - 0.5, self.width - 1
        if width == 0:
            return np.where(values <= center, 0, 255).astype(np.uint8)
        return _to_uint8((values - center) / width + 0.5)


# In HU, as radiology reads head CT: https://radiopaedia.org/articles/windowing-ct (brain 80 wide at 40, subdural 130 to
# 300 at 50 to 100, temporal bones 2800 at 600); stroke: Turner and Holdsworth, Br J Radiol 2011;84:1061 (40 at 40).
WINDOWS = {
    "brain": Window(40.0, 80.0),
    "subdural": Window(80.0, 200.0),
    "stroke": Window(40.0, 40.0),
    "bone": Window(600.0, 2800.0),
}


@dataclass(frozen=True)
class Preprocess:
    """How a slice becomes the network's input, with the exact inverse of the geometry for its output.

    At most one is set of `window` (fixed values: CT), `percentiles` and `z_score` (of each slice's own values: MR,
    photographs). With none of them the rescaled values are taken as they are, rounded and clipped to 0..255. No window
    applies to the colours of DICOM objects: their luminance is taken as it is, 16 bits as 8.
    """

    size: tuple[int, int] = (256, 256)  # height, width of the network's input
    # A name (brain, subdural, stroke, bone), or center and width; a list makes as many channels. A name becomes its
    # numbers at once, so that a bundle does not depend on what the name means later.
    window: Window | str | tuple[Window | str, ...] | None = None
    percentiles: tuple[float, float] | None = (0.5, 99.5)  # these percentiles of each image's values become 0 and 255
    z_score: float | None = None  # this many standard deviations below and above the mean become 0 and 255
    color: bool = False  # red, green and blue as three channels, each by its own values; a grey slice three times
    neighbours: int = 0  # slices on each side of the series that are further channels (2.5D)
    # How masks come to the network's grid for training: by the filter of images, class by class, or by nearest
    # neighbours, which shifts labels by up to half a source pixel. Bundles that do not say it had "nearest".
    mask_filter: Literal["image", "nearest"] = "image"

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.window, self.percentiles, self.z_score)) > 1:
            raise ValueError("preprocess: set at most one of window, percentiles and z_score, and the others to null")
        if self.color and isinstance(self.window, tuple) and len(self.window) > 1:
            raise ValueError("preprocess: several windows and color both make channels; give one of them")
        if min(self.size) < 1:
            raise ValueError(f"preprocess.size: two positive numbers expected, got {self.size}")
        if self.percentiles is not None and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"preprocess.percentiles: 0 <= low < high <= 100 expected, got {self.percentiles}")
        if self.neighbours < 0:
            raise ValueError(f"preprocess.neighbours: 0 or more slices on each side expected, got {self.neighbours}")
        if self.z_score is not None and not self.z_score > 0:
            raise ValueError(f"preprocess.z_score: a positive number expected, got {self.z_score}")
        if self.window is not None:
            windows = tuple(map(_window, self.window if isinstance(self.window, tuple) else (self.window,)))
            if not windows:
                raise ValueError("preprocess.window: the list is empty; give a window, or null")
            object.__setattr__(self, "window", windows if len(windows) > 1 else windows[0])

    @property
    def channels(self) -> int:
        """Channels of what `apply` gives: those of a slice, times the slices that it is given."""
        return self._channels_of_slice * (2 * self.neighbours + 1)

    @property
    def _channels_of_slice(self) -> int:
        """Three of colours, else as many as windows, else one."""
        return 3 if self.color else len(self._windows)

    def apply(self, *stack: Slice | None) -> np.ndarray:
        """A slice as uint8 (height, width, channels): intensities to 0..255, scaled with anti-aliasing, padded.

        Each slice of the stack is treated by itself, percentiles and scale included, and its channels follow those of
        the slice before: the lowest neighbour's first, the slice's own in the middle, the highest neighbour's last.

        Args:
            stack: 2 * `neighbours` + 1 slices in order of position along the normal of their planes (row direction x
                column direction, PS3.3 C.7.6.2), which is how a manifest has a series; the slice itself is the middle
                one. None where there is no neighbour: the nearest one towards the middle takes its place.
        """
        assert len(stack) == 2 * self.neighbours + 1
        filled = _filled(stack)
        images = {slice: self._image(slice) for slice in dict.fromkeys(filled)}
        return images[filled[0]] if len(filled) == 1 else np.concatenate([images[one] for one in filled], axis=-1)

    def centre(self, image_HWC: np.ndarray) -> np.ndarray:
        """Of what `apply` gives the channels of the slice itself, without its neighbours'."""
        first = self.neighbours * self._channels_of_slice
        return image_HWC[..., first : first + self._channels_of_slice]

    def _image(self, slice: Slice) -> np.ndarray:
        """uint8 (height, width, channels of a slice)."""
        height, width = self._fitted(*slice.shape)
        planes = []
        for grey in self._greys(slice):
            if grey.shape != (height, width):
                # Pillow's filters widen with the scale when shrinking, which is the anti-aliasing.
                grey = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))
            planes.append(self._pad(grey))
        return np.stack(planes * (self._channels_of_slice // len(planes)), axis=-1)

    def _greys(self, slice: Slice) -> Iterator[np.ndarray]:
        """uint8 (rows, columns), one a channel; of a grey slice one where colours are wanted."""
        if slice.is_colour and self._is_fixed:  # a window is of measured values, which colours are not
            yield from [_of_full_scale(slice.stored)] * len(self._windows)
            return
        if slice.stored.ndim == 2:
            yield from self._intensities(slice)
            return
        assert self.color, "a colour image is read where its colours are wanted"
        for channel in range(3):
            yield from self._intensities(dataclasses.replace(slice, stored=slice.stored[..., channel]))

    def apply_mask(self, mask: np.ndarray) -> np.ndarray:
        """A uint8 label map (rows, columns) on the grid of `apply`: uint8 (height, width), see `resampling.resized`.

        A foreground rectangle with nothing else near it survives where each side is at least 1.5 times the shrinking
        factor, or one side at least the factor and the other one three times that. Less may be lost; of thin or tiny
        structures that is more than nearest neighbour loses, which keeps some of their pixels by chance.
        """
        assert mask.dtype == np.uint8
        height, width = self._fitted(*mask.shape)
        if mask.shape == (height, width):
            return self._pad(mask)
        if self.mask_filter == "nearest":
            return self._pad(np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)))
        return self._pad(resampling.resized(mask, height, width))

    def restore(self, plane_HW: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """A float32 plane (height, width) of the network back on the slice's grid (rows, columns), bilinear."""
        assert plane_HW.shape == self.size
        assert plane_HW.dtype == np.float32
        height, width = self._fitted(rows, columns)
        top, left = self._margins(height, width)
        content = np.ascontiguousarray(plane_HW[top : top + height, left : left + width])
        if (height, width) == (rows, columns):
            return content
        return np.array(Image.fromarray(content).resize((columns, rows), Image.Resampling.BILINEAR))

    def scale(self, rows: int, columns: int) -> tuple[float, float]:
        """How many pixels of the network's grid a pixel of the slice's is wide: down a column, along a row."""
        height, width = self._fitted(rows, columns)
        return height / rows, width / columns

    def _fitted(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width that a slice takes within `size`: one factor for both axes, rounded to whole pixels."""
        factor = min(self.size[0] / rows, self.size[1] / columns)
        return max(1, round(rows * factor)), max(1, round(columns * factor))

    def _margins(self, height: int, width: int) -> tuple[int, int]:
        return (self.size[0] - height) // 2, (self.size[1] - width) // 2

    def _pad(self, content: np.ndarray) -> np.ndarray:
        top, left = self._margins(*content.shape)
        padded = np.zeros(self.size, np.uint8)
        padded[top : top + content.shape[0], left : left + content.shape[1]] = content
        return padded

    def _intensities(self, slice: Slice) -> Iterator[np.ndarray]:
        """uint8 (rows, columns) in 0..255, one a channel; by a table of all stored values up to 16 bits."""
        stored, slope, intercept = slice.stored, slice.rescale_slope, slice.rescale_intercept
        if stored.dtype.itemsize > 2:
            values = stored.astype(np.float64) * slope + intercept
            if self._is_fixed:
                yield from (_fixed(window, values) for window in self._windows)
            elif self.percentiles is not None:
                yield _stretch(values, *np.percentile(values, self.percentiles))
            else:
                yield _stretch(values, *self._around(values.mean(), values.std()))
            return
        # Signed values index the table through their two's complement, as `_all_values` lists them.
        index: np.ndarray = np.ascontiguousarray(stored).view(np.uint8 if stored.dtype.itemsize == 1 else np.uint16)
        if self._is_fixed:
            for window in self._windows:
                yield np.take(_fixed_table(window, stored.dtype.name, slope, intercept), index)
            return
        if self.percentiles is not None:
            wanted = self.percentiles if slope >= 0 else _mirrored(self.percentiles)
            # Only of the values between the least and the greatest: of 16 bits a slice has a sixteenth and less.
            least, greatest = int(stored.min()), int(stored.max())
            index = index - index.dtype.type(least % 2 ** (8 * stored.dtype.itemsize))  # modulo, as the complement is
            values = np.arange(least, greatest + 1, dtype=np.float64)
            low, high = _percentiles(index, least, wanted)
        else:
            values = _all_values(stored.dtype.name)
            low, high = self._around(*_moments(index, stored.dtype))
        low, high = sorted((low * slope + intercept, high * slope + intercept))
        yield np.take(_stretch(values * slope + intercept, low, high), index)

    @property
    def _is_fixed(self) -> bool:
        """Whether a value's grey does not depend on the slice's other values."""
        return self.percentiles is None and self.z_score is None

    @property
    def _windows(self) -> tuple[Window | None, ...]:
        """The window of each channel; None: values as they are."""
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        return tuple(None if window is None else _window(window) for window in windows)

    def _around(self, mean: float, deviation: float) -> tuple[float, float]:
        assert self.z_score is not None
        return mean - self.z_score * deviation, mean + self.z_score * deviation


def _filled(stack: Sequence[Slice | None]) -> list[Slice]:
    """The stack with the nearest slice towards the middle in the place of each that is missing."""
    middle = len(stack) // 2
    centre = stack[middle]
    assert centre is not None
    below, above = [centre], [centre]
    for side, found in ((stack[:middle][::-1], below), (stack[middle + 1 :], above)):
        for slice in side:
            found.append(found[-1] if slice is None else slice)
    return [*below[:0:-1], *above]


def _window(window: Window | str) -> Window:
    if isinstance(window, Window):
        return window
    if window not in WINDOWS:
        known = ", ".join(WINDOWS)
        raise ValueError(f"preprocess.window: unknown name {window!r}; give one of {known}, or center and width")
    return WINDOWS[window]


def _of_full_scale(stored: np.ndarray) -> np.ndarray:
    """Luminances as uint8: of 8 bits as they are."""
    if stored.dtype == np.uint8:
        return stored
    return _to_uint8(stored / float(2 ** (8 * stored.dtype.itemsize) - 1))


def _fixed(window: Window | None, values: np.ndarray) -> np.ndarray:
    return _to_uint8(values / 255) if window is None else window.map(values)


@lru_cache(maxsize=4)
def _all_values(dtype: str) -> np.ndarray:
    """Every value of an integer type as float64, at the place its bits give when read as an unsigned number."""
    bits = np.dtype(dtype).itemsize * 8
    return np.arange(2**bits, dtype=f"uint{bits}").view(dtype).astype(np.float64)


@lru_cache(maxsize=32)
def _fixed_table(window: Window | None, dtype: str, slope: float, intercept: float) -> np.ndarray:
    table = _fixed(window, _all_values(dtype) * slope + intercept)
    table.setflags(write=False)
    return table


def _moments(index: np.ndarray, dtype: np.dtype) -> tuple[float, float]:
    """Mean and standard deviation (of the population) of the stored values, by counting."""
    values = _all_values(dtype.name)
    shares = np.bincount(index.ravel(), minlength=len(values)) / index.size
    # Sums, not `@`: that wakes BLAS's threads, which on a busy machine costs ten times what it saves.
    mean = float((shares * values).sum())
    return mean, float(np.sqrt((shares * (values - mean) ** 2).sum()))


def _percentiles(index: np.ndarray, least: int, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Percentiles by counting, as `numpy.percentile` defines them (linear interpolation).

    Args:
        index: unsigned integers: how far each value is above the least one.
        least: that one.
        percentiles: two in 0..100.
    """
    cumulative = np.cumsum(np.bincount(index.ravel()))
    found = []
    for percentile in percentiles:
        rank = percentile / 100 * (index.size - 1)
        below, above = np.searchsorted(cumulative, [np.floor(rank), np.ceil(rank)], side="right") + least
        found.append(float(below + (above - below) * (rank - np.floor(rank))))
    return found[0], found[1]


def _mirrored(percentiles: tuple[float, float]) -> tuple[float, float]:
    """The percentiles of -x that are those of x: a negative slope turns the order round."""
    return 100 - percentiles[1], 100 - percentiles[0]


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` to 0, `high` to 255, clipped; all 0 where the two are equal (a slice of one value)."""
    return _to_uint8((values - low) / (high - low)) if high > low else np.zeros(values.shape, np.uint8)


def _to_uint8(fractions: np.ndarray) -> np.ndarray:
    return (np.clip(fractions, 0, 1) * 255 + 0.5).astype(np.uint8)
