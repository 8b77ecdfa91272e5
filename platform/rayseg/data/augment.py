"""Augmentation: a training sample as it might have looked, drawn anew each epoch.

What happens to a sample is a function of (seed, epoch, row_id) alone (`generator`): neither the number of workers nor
the batch nor a restart changes it. All geometry is composed into one map, so that image and mask are interpolated once
(bilinear and nearest); what comes from outside the picture is 0 and background, as padding is. Intensities go through
one table of 256 entries. Numpy and OpenCV, which lets go of the GIL.

On one core of an AMD EPYC a sample of 256x256 takes 0.6 ms with the defaults and 1.9 ms with everything on, 0.7 ms of
them for the noise.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

_GRID = 4  # nodes of the elastic field, each way
_DRAWS = (  # one number each in [0, 1), always all of them: turning one transform on does not change the others
    *("flip_horizontal", "flip_vertical", "transpose"),
    *("geometric", "rotate", "scale", "translate_x", "translate_y", "elastic"),
    *("blur?", "blur", "low_resolution?", "low_resolution"),
    *("brightness?", "brightness", "contrast?", "contrast", "gamma?", "gamma", "noise?", "noise"),
)
_OFF = {"blur": 0, "low_resolution": 1, "brightness": 0, "contrast": 0, "gamma": (1, 1), "noise": 0}
_CHANNELS = 4  # that OpenCV takes at once


@dataclass(frozen=True)
class Augment:
    """What may happen to a sample, and how strongly; the defaults are light: a flip, a slight turn and scale, gamma.

    Each strength is drawn between nothing and the greatest allowed, evenly (ratios in their logarithm). The transforms
    of intensity hit independently of each other. They are those of nnU-Net (Isensee et al. 2021,
    doi:10.1038/s41592-020-01008-z, supplementary note 4), which turns and scales one sample in five, by up to 180
    degrees and 0.7 to 1.4, and uses brightness and contrast of 0.25, gamma of 0.7 to 1.5, blur of 1 and a resolution of
    0.5 with probabilities of 0.15 to 0.3, noise with 0.1.
    """

    flip_horizontal: float = 0.5  # probability; left and right change places
    flip_vertical: float = 0.0  # probability
    transpose: float = 0.0  # probability; rows become columns, with both flips any quarter turn
    geometric_probability: float = 1.0  # probability of the next four, together
    rotate_degrees: float = 12.0  # greatest angle, either way; 0 is off
    scale: tuple[float, float] = (0.88, 1.14)  # above 1 magnifies; [1, 1] is off
    translate: float = 0.0  # greatest shift, either way, as a fraction of height and width; 0 is off
    elastic: float = 0.0  # greatest shift by a smooth random field of 4 by 4 nodes, as `translate`; 0 is off
    intensity_probability: float = 1.0  # probability of each of the next seven, by itself
    gamma: tuple[float, float] = (0.8, 1.25)  # exponent, of 0..1; below 1 is brighter; [1, 1] is off
    brightness: float = 0.0  # at most, either way: values times 1 +- brightness; 0 is off
    contrast: float = 0.0  # at most, either way: distances to the mean times 1 +- contrast; 0 is off
    blur: float = 0.0  # greatest sigma of a Gaussian in pixels; 0 is off
    low_resolution: float = 1.0  # least fraction of the pixels, each way, that the image is made from; 1 is off
    bias_field: float = (
        0.0  # at most: values times e to the +- bias_field, a smooth random field as MR coils have; 0 is off
    )
    noise: float = 0.0  # greatest standard deviation in grey levels (0..255), of each pixel and channel; 0 is off

    def __post_init__(self) -> None:
        probabilities = (
            *("flip_horizontal", "flip_vertical", "transpose"),
            *("geometric_probability", "intensity_probability"),
        )
        for keys, low, high in (
            (probabilities, 0, 1),
            (("rotate_degrees",), 0, 180),
            (("translate", "brightness", "contrast"), 0, 0.9),
            (("elastic",), 0, 0.07),  # more folds the picture here and there
            (("noise",), 0, 255),
            (("blur",), 0, 20),
            (("bias_field",), 0, 2),
            (("low_resolution",), 0.05, 1),
        ):
            for key in keys:
                if not low <= getattr(self, key) <= high:
                    raise ValueError(
                        f"train.augment.{key}: a number from {low} to {high} expected, got {getattr(self, key)}"
                    )
        for key in ("scale", "gamma"):
            least, greatest = getattr(self, key)
            if not 0.1 <= least <= greatest <= 10:
                raise ValueError(
                    f"train.augment.{key}: [least, greatest] from 0.1 to 10 expected, got {[least, greatest]}"
                )

    def apply(
        self, image_HWC: np.ndarray, mask_HW: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sample transformed; its image and mask themselves where nothing hits.

        Args:
            image_HWC: uint8, any number of channels; all of them get the same geometry and table.
            mask_HW: uint8 class indices.
            generator: of this sample, see `generator`; it gives everything random, the noise last.

        Returns:
            uint8 image and mask of the same shapes. A transposed image that is not square loses its ends.
        """
        drawn = dict(zip(_DRAWS, generator.random(len(_DRAWS)).tolist(), strict=True))
        field_YX2 = generator.random((_GRID, _GRID, 2), dtype=np.float32) * 2 - 1
        image_HWC, mask_HW = self._warped(image_HWC, mask_HW, drawn, field_YX2)
        hits = {
            key
            for key, off in _OFF.items()
            if getattr(self, key) != off and drawn[f"{key}?"] < self.intensity_probability
        }
        if self.bias_field:
            # From a source of its own, so that it changes nothing that is drawn for the others.
            image_HWC = self._shaded(image_HWC, generator.spawn(1)[0])
        if "blur" in hits:
            sigma = max(0.01, self.blur * drawn["blur"])  # OpenCV takes 0 for "not given"
            image_HWC = _by_channels(image_HWC, lambda part: cv2.GaussianBlur(part, (0, 0), sigma))
        if "low_resolution" in hits:
            image_HWC = _coarse(image_HWC, self.low_resolution + (1 - self.low_resolution) * drawn["low_resolution"])
        if hits & {"brightness", "contrast", "gamma"}:
            table = self._table(image_HWC, drawn, hits)
            image_HWC = _by_channels(image_HWC, lambda part: cv2.LUT(part, table))
        if "noise" in hits:
            noise_HWC = generator.standard_normal(image_HWC.shape, dtype=np.float32)
            noise_HWC *= self.noise * drawn["noise"]
            image_HWC = np.asarray(cv2.add(image_HWC, noise_HWC, dtype=cv2.CV_8U)).reshape(image_HWC.shape)
        return image_HWC, mask_HW

    def _warped(
        self, image_HWC: np.ndarray, mask_HW: np.ndarray, drawn: dict[str, float], field_YX2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask after all geometry."""
        height, width = mask_HW.shape
        # Of a pixel's offset (x, y) from the centre here, the offset where it comes from.
        matrix, shift_x, shift_y, bend = np.eye(2), 0.0, 0.0, 0.0
        if drawn["transpose"] < self.transpose:
            matrix = matrix[::-1]
        signs = [-1 if drawn[key] < getattr(self, key) else 1 for key in ("flip_horizontal", "flip_vertical")]
        matrix = np.diag(signs) @ matrix
        if drawn["geometric"] < self.geometric_probability:
            angle = np.deg2rad(self.rotate_degrees * _either_way(drawn["rotate"]))
            cos, sin = np.cos(angle), np.sin(angle)
            matrix = matrix @ [[cos, -sin], [sin, cos]] / _ratio(self.scale, drawn["scale"])
            shift_x = self.translate * width * _either_way(drawn["translate_x"])
            shift_y = self.translate * height * _either_way(drawn["translate_y"])
            bend = self.elastic * drawn["elastic"]
        if not (shift_x or shift_y or bend) and np.array_equal(matrix, np.eye(2)):
            return image_HWC, mask_HW
        centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
        x_W = np.arange(width, dtype=np.float64) - centre_x
        y_H1 = np.arange(height, dtype=np.float64)[:, np.newaxis] - centre_y
        from_x_HW, from_y_HW = (
            (row[0] * x_W + offset).astype(np.float32) + (row[1] * y_H1).astype(np.float32)
            for row, offset in zip(matrix, (centre_x + shift_x, centre_y + shift_y), strict=True)
        )
        if bend:
            field_YX2 = field_YX2 * np.array([bend * width, bend * height], np.float32)
            field_HW2 = cv2.resize(field_YX2, (width, height), interpolation=cv2.INTER_CUBIC)
            from_x_HW += field_HW2[..., 0]
            from_y_HW += field_HW2[..., 1]
        return (
            _by_channels(image_HWC, lambda part: cv2.remap(part, from_x_HW, from_y_HW, cv2.INTER_LINEAR)),
            np.asarray(cv2.remap(mask_HW, from_x_HW, from_y_HW, cv2.INTER_NEAREST)),
        )

    def _shaded(self, image_HWC: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The image times a smooth field, the same for all its channels."""
        hit, strength = generator.random(2)
        field_YX = generator.random((_GRID, _GRID), dtype=np.float32) * 2 - 1
        if hit >= self.intensity_probability:
            return image_HWC
        height, width = image_HWC.shape[:2]
        field_HW = cv2.resize(field_YX, (width, height), interpolation=cv2.INTER_CUBIC)
        field_HW = np.exp(np.clip(field_HW, -1, 1) * np.float32(self.bias_field * strength))  # cubic ones overshoot
        return np.rint(np.minimum(image_HWC * field_HW[..., np.newaxis], 255)).astype(np.uint8)

    def _table(self, image_HWC: np.ndarray, drawn: dict[str, float], hits: set[str]) -> np.ndarray:
        """What becomes of each grey level, uint8 (256,)."""
        brightness = 1 + self.brightness * _either_way(drawn["brightness"]) * ("brightness" in hits)
        values = np.arange(256) * brightness
        if "contrast" in hits:
            mean = brightness * image_HWC.mean()
            values = mean + (values - mean) * (1 + self.contrast * _either_way(drawn["contrast"]))
        values = np.clip(values / 255, 0, 1)
        if "gamma" in hits:
            values **= _ratio(self.gamma, drawn["gamma"])
        return np.rint(values * 255).astype(np.uint8)


def generator(seed: int, epoch: int, row_id: str) -> np.random.Generator:
    """The source of everything random about a row in an epoch; `row_id` is any text."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{row_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16]))


def _coarse(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """The image from `factor` times the pixels each way: averaged down, and up again by cubic interpolation."""
    height, width = image_HWC.shape[:2]
    size = max(1, round(width * factor)), max(1, round(height * factor))

    def coarse(part: np.ndarray) -> np.ndarray:
        small = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)

    return _by_channels(image_HWC, coarse)


def _by_channels(image_HWC: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The image after `function`, which gets as many channels as OpenCV takes and may drop the axis of a single one."""
    parts = [image_HWC[..., first : first + _CHANNELS] for first in range(0, image_HWC.shape[-1], _CHANNELS)]
    made = [np.asarray(function(part)).reshape(part.shape) for part in parts]
    return made[0] if len(made) == 1 else np.concatenate(made, axis=-1)


def _either_way(drawn: float) -> float:
    """From -1 to 1."""
    return 2 * drawn - 1


def _ratio(limits: tuple[float, float], drawn: float) -> float:
    """Between the limits, evenly in the logarithm."""
    return limits[0] * (limits[1] / limits[0]) ** drawn
