"""Augmentation of patches of volumes: a patch as it might have looked, drawn anew each epoch.

What happens to a patch is a function of (seed, epoch, volume, number) alone, see `augment.generator`. All geometry is
one affine map, so image and mask are interpolated once, from the voxels of the volume and not from a patch cut before:
nothing comes in from the edges that is there in the volume. Intensities follow in nnU-Net's order.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from rayseg.data.warp import reach, warped

_ANISOTROPIC = 3  # a patch with an edge of so many times its depth turns in its plane only (nnU-Net)
_OBLONG = 1.5  # a patch of one plane with such a ratio of edges turns but a little
_IN_SPACE, _IN_PLANE, _IN_OBLONG_PLANE = (30.0, 30.0, 30.0), (180.0, 0.0, 0.0), (15.0, 0.0, 0.0)
_DRAWS = (  # one number each in [0, 1), always all of them: turning one transform on does not change the others
    *("mirror_0", "mirror_1", "mirror_2"),
    *("rotate?", "rotate_0", "rotate_1", "rotate_2", "scale?", "scale"),
    *("noise?", "noise", "blur?", "blur", "brightness?", "brightness", "contrast?", "contrast"),
    *("low_resolution?", "low_resolution", "gamma_inverted?", "gamma_inverted", "gamma?", "gamma"),
)
_CUBIC_COLUMNS = 2**15  # that OpenCV's resize takes at once, with room to spare
_BLUR_REACH = 4  # standard deviations


@dataclass(frozen=True)
class VolumeAugment:
    """What may happen to a patch of a volume, how probably and how strongly.

    The defaults are nnU-Net's (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 4). Strengths
    are drawn evenly between their limits. Values are those of `Intensity`: mean about 0 and deviation about 1.
    """

    mirror: tuple[float, float, float] = (0.5, 0.5, 0.5)  # probability, of depth, height and width
    rotate_probability: float = 0.2  # probability of a turn, in space or in the plane
    # Greatest angles, either way, about the axes of depth (a turn in the plane), height and width. Null is nnU-Net's
    # rule: 30 about each, but 180 in the plane alone where an edge of the patch has over 3 times its depth, and 15
    # where it is one plane with edges of over 1.5 times each other
    rotate_degrees: tuple[float, float, float] | None = None
    scale_probability: float = 0.2  # probability of another size
    scale: tuple[float, float] = (0.7, 1.4)  # above 1 magnifies
    noise_probability: float = 0.15  # probability of Gaussian noise
    noise: float = 0.1  # greatest variance of the noise
    blur_probability: float = 0.1  # probability of a Gaussian blur
    blur: tuple[float, float] = (0.5, 1.5)  # its standard deviation in voxels
    brightness_probability: float = 0.15  # probability that values are multiplied
    brightness: tuple[float, float] = (0.7, 1.3)  # by what
    contrast_probability: float = 0.15  # probability that distances to the mean are multiplied, then clipped
    contrast: tuple[float, float] = (0.65, 1.5)  # by what
    low_resolution_probability: float = 0.125  # probability that the image is made of fewer voxels
    low_resolution: tuple[float, float] = (1.0, 2.0)  # so many times fewer each way, or in the plane, as for a turn
    gamma_inverted_probability: float = 0.15  # probability of a gamma of the negative
    gamma_probability: float = 0.15  # probability of a gamma
    gamma: tuple[float, float] = (0.7, 1.5)  # exponent, of the patch's range as 0..1; below 1 is brighter

    def __post_init__(self) -> None:
        probabilities = [key for key in vars(self) if key.endswith("probability")]
        values = [(key, getattr(self, key)) for key in probabilities] + [("mirror", one) for one in self.mirror]
        for key, value in values:
            if not 0 <= value <= 1:
                raise ValueError(f"train.patches.augment.{key}: a number from 0 to 1 expected, got {value}")
        for key, low, high in (
            ("scale", 0.2, 5),
            ("blur", 0.05, 20),
            ("brightness", 0, 10),
            ("contrast", 0, 10),
            ("low_resolution", 1, 10),
            ("gamma", 0.1, 10),
        ):
            least, greatest = getattr(self, key)
            if not low <= least <= greatest <= high:
                raise ValueError(
                    f"train.patches.augment.{key}: [least, greatest] from {low} to {high} expected, got "
                    f"{[least, greatest]}"
                )
        if not 0 <= self.noise <= 10:
            raise ValueError(f"train.patches.augment.noise: a number from 0 to 10 expected, got {self.noise}")
        if self.rotate_degrees is not None and not all(0 <= angle <= 180 for angle in self.rotate_degrees):
            raise ValueError(
                f"train.patches.augment.rotate_degrees: angles from 0 to 180 expected, got {self.rotate_degrees}"
            )

    def draw(
        self, generator: np.random.Generator, patch: tuple[int, int, int], spacing_mm: tuple[float, float, float]
    ) -> "Drawn":
        """What happens to one patch.

        Args:
            generator: of this patch, see `augment.generator`; it gives everything random, the noise last.
            patch: D, H, W.
            spacing_mm: of the volume's voxels; turns are of millimetres.
        """
        drawn = dict(zip(_DRAWS, generator.random(len(_DRAWS)).tolist(), strict=True))
        chances = {key[:-1]: value for key, value in drawn.items() if key.endswith("?")}
        hits = {key for key, value in chances.items() if value < getattr(self, f"{key}_probability")}
        strengths = {key: _between(getattr(self, key), drawn[key]) for key in hits - _OTHERS}
        if "gamma_inverted" in hits:
            strengths["gamma_inverted"] = _between(self.gamma, drawn["gamma_inverted"])
        if "noise" in hits:
            strengths["noise"] = math.sqrt(self.noise * drawn["noise"])
        matrix = np.eye(3)
        if "rotate" in hits:
            greatest = np.deg2rad(self.rotate_degrees or _angles(patch))
            angles = [greatest[axis] * (2 * drawn[f"rotate_{axis}"] - 1) for axis in range(3)]
            millimetres = np.diag(spacing_mm)
            matrix = np.linalg.inv(millimetres) @ _rotation(angles) @ millimetres
        if "scale" in strengths:
            matrix = matrix / strengths.pop("scale")
        signs = [-1 if drawn[f"mirror_{axis}"] < self.mirror[axis] else 1 for axis in range(3)]
        return Drawn(matrix, (signs[0], signs[1], signs[2]), strengths, _is_flat(patch), generator)


_OTHERS = {"rotate", "noise", "gamma_inverted"}  # whose strength is not just between two limits


@dataclass(frozen=True, eq=False)
class Drawn:
    """What happens to one patch.

    matrix: float64 (3, 3), of an offset from the patch's centre to the offset in the volume, without mirrors.
    signs: -1 of the axes that are mirrored, in the end.
    strengths: by the name of the transform of intensities, those that hit.
    flat: whether the patch is so flat that its resolution is lowered in the plane only.
    """

    matrix: np.ndarray
    signs: tuple[int, int, int]
    strengths: dict[str, float]
    flat: bool
    generator: np.random.Generator

    @property
    def moves(self) -> bool:
        """Whether voxels are interpolated."""
        return not np.array_equal(self.matrix, np.eye(3))

    def region(self, first: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The voxels of the volume that the patch from voxel `first` on is made of: the first, and how many."""
        if not self.moves:
            return first, patch
        reached, centre = reach(self.matrix, patch), _centre(first, patch)
        # Of an axis along which nothing moves there are two all the same, of which the second one has no weight.
        begin = np.floor(centre - reached + 1e-6).astype(int)
        end = np.maximum(np.ceil(centre + reached - 1e-6).astype(int), begin + 1)
        return tuple(begin.tolist()), tuple((end - begin + 1).tolist())

    def apply(
        self, image_DHW: np.ndarray, mask_DHW: np.ndarray, first: tuple[int, ...], patch: tuple[int, int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The patch from voxel `first` on: float16 image and uint8 mask (D, H, W).

        Args:
            image_DHW: float16, the voxels of `region`, 0 beyond the volume.
            mask_DHW: uint8, the same.
            first: of the patch.
            patch: D, H, W.
        """
        if self.moves:
            begin, _ = self.region(first, patch)
            centre = _centre(first, patch) - begin
            image, mask = warped(image_DHW.astype(np.float32), mask_DHW, self.matrix, centre, patch)
        else:
            image, mask = image_DHW.astype(np.float32), mask_DHW
        image = self._toned(image)[tuple(slice(None, None, sign) for sign in self.signs)]
        mask = mask[tuple(slice(None, None, sign) for sign in self.signs)]
        return image.astype(np.float16), mask

    def _toned(self, image: np.ndarray) -> np.ndarray:
        """The float32 image with other intensities."""
        strengths = self.strengths
        if (deviation := strengths.get("noise")) is not None:
            image = image + self.generator.standard_normal(image.shape, np.float32) * np.float32(deviation)
        if (deviation := strengths.get("blur")) is not None:
            image = _blurred(image, deviation)
        if (factor := strengths.get("brightness")) is not None:
            image = image * np.float32(factor)
        if (factor := strengths.get("contrast")) is not None:
            mean = image.mean()
            image = np.clip((image - mean) * np.float32(factor) + mean, image.min(), image.max())
        if (factor := strengths.get("low_resolution")) is not None:
            image = _coarse(image, factor, self.flat)
        if (exponent := strengths.get("gamma_inverted")) is not None:
            image = -_gamma(-image, exponent)
        if (exponent := strengths.get("gamma")) is not None:
            image = _gamma(image, exponent)
        return image


def _centre(first: tuple[int, ...], patch: tuple[int, ...]) -> np.ndarray:
    return np.array(first) + (np.array(patch) - 1) / 2


def _is_flat(patch: tuple[int, int, int]) -> bool:
    return max(patch) > _ANISOTROPIC * patch[0]


def _angles(patch: tuple[int, int, int]) -> tuple[float, float, float]:
    """The greatest angles by nnU-Net's rule, degrees."""
    if not _is_flat(patch):
        return _IN_SPACE
    is_oblong = patch[0] == 1 and max(patch) > _OBLONG * min(patch[1:])
    return _IN_OBLONG_PLANE if is_oblong else _IN_PLANE


def _rotation(angles: list[float]) -> np.ndarray:
    """About the axes of depth, height and width, one after the other; radians."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        one, other = (index for index in range(3) if index != axis)
        turn[one, one] = turn[other, other] = math.cos(angle)
        turn[one, other], turn[other, one] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix


def _between(limits: tuple[float, float], drawn: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * drawn


def _blurred(image: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian, separable; the image is mirrored at its ends."""
    taps = 2 * math.ceil(_BLUR_REACH * deviation) + 1
    kernel, one = cv2.getGaussianKernel(taps, deviation, cv2.CV_32F), np.ones(1, np.float32)
    made = np.stack([cv2.sepFilter2D(plane_HW, -1, kernel, kernel) for plane_HW in np.ascontiguousarray(image)])
    across = np.asarray(cv2.sepFilter2D(made.reshape(len(made), -1), -1, one, kernel))
    return across.reshape(image.shape)


def _coarse(image: np.ndarray, factor: float, flat: bool) -> np.ndarray:
    """The image from `factor` times fewer voxels each way: the nearest ones, and cubic interpolation between them."""
    depth, height, width = image.shape
    small = image
    for axis in range(flat, 3):
        size = max(1, round(image.shape[axis] / factor))
        places = (np.arange(size) + 0.5) * image.shape[axis] / size
        small = small.take(places.astype(int), axis)
    planes = np.stack([cv2.resize(plane, (width, height), interpolation=cv2.INTER_CUBIC) for plane in small])
    if len(planes) == depth:
        return planes
    flat_planes = planes.reshape(len(planes), -1)
    columns = [
        cv2.resize(part, (part.shape[1], depth), interpolation=cv2.INTER_CUBIC)
        for part in np.array_split(flat_planes, -(-flat_planes.shape[1] // _CUBIC_COLUMNS), axis=1)
    ]
    return np.concatenate(columns, axis=1).reshape(image.shape)


def _gamma(image: np.ndarray, exponent: float) -> np.ndarray:
    low, high = float(image.min()), float(image.max())
    if low == high:
        return image
    shares = (image - np.float32(low)) / np.float32(high - low)
    return np.power(shares, np.float32(exponent)) * np.float32(high - low) + np.float32(low)
