"""What a model makes of validation: pictures of its best, median and worst cases, and how they usually look."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data import chunks
from rayseg.data.prepared import PreparedSet
from rayseg.data.range import entropy_bits, pieces
from rayseg.data.shards import limited
from rayseg.data.volume import VolumePreprocess
from rayseg.geometry.windows import Windows
from rayseg.models.metrics import pooled_dice
from rayseg.tracking import figures

_ROWS = 200  # looked at, evenly over the patients: the driver may have no GPU
_WINDOWS = 200  # of volumes, likewise
_PERCENTILES = (0.5, 99.5)  # of a volume's intensities: black and white of its pictures
_Judged = tuple[str, np.ndarray, np.ndarray, np.ndarray]  # patient, picture, true classes, probabilities (H, W, K)
_COLUMNS = ["patient_key", "image", "mask"]


@dataclass(frozen=True)
class Cases:
    """pictures: name and PNG of the best, the median and the worst case by Dice, each its slice with most to find.
    pieces: the most that the foreground found in a slice lies in.
    entropy_bits: the greatest mean over the foreground found in a patient; None where nothing was found.
    """

    pictures: list[tuple[str, bytes]]
    pieces: int
    entropy_bits: float | None


def look(model: Any, prepared: PreparedSet, threshold: float) -> Cases:
    """Runs the model over validation.

    Args:
        model: Keras model, uint8 (1, H, W, C) to probabilities; of volumes float16 (1, D, H, W, 1).
        prepared: its data; at most 200 rows, or windows, of the validation split are looked at.
        threshold: of a model of one class.
    """
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3, np.int64))
    largest: dict[str, tuple[int, np.ndarray, np.ndarray, np.ndarray]] = {}
    entropies: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    most = 0
    judged = _of_slices(model, prepared) if prepared.volume is None else _of_volumes(model, prepared, prepared.volume)
    for patient, picture_HW, truth_HW, probability_HWC in judged:
        if probability_HWC.shape[-1] == 1:
            found_HW = (probability_HWC[..., 0] >= threshold).astype(np.uint8)
        else:
            found_HW = np.argmax(probability_HWC, axis=-1).astype(np.uint8)
        agreed = np.count_nonzero((found_HW == truth_HW) & (truth_HW > 0))
        most = max(most, pieces(found_HW))
        entropies[patient] += entropy_bits(np.moveaxis(probability_HWC, -1, 0), found_HW)
        counts[patient] += [agreed, np.count_nonzero(found_HW) - agreed, np.count_nonzero(truth_HW) - agreed]
        foreground = int(np.count_nonzero(truth_HW))
        if patient not in largest or foreground > largest[patient][0]:
            largest[patient] = (foreground, picture_HW.copy(), truth_HW.copy(), found_HW)
    means = [bits / pixels for bits, pixels in entropies.values() if pixels]
    # Rounded, as it becomes part of a bundle's digest, and processors differ in last bits.
    return Cases(_pictures(counts, largest), most, round(float(max(means)), 4) if means else None)


def _of_slices(model: Any, prepared: PreparedSet) -> Iterator[_Judged]:
    height, width, channels = prepared.shape
    for row in _rows(prepared):
        image_HWC = np.frombuffer(row["image"], np.uint8).reshape(height, width, channels)
        truth_HW = np.frombuffer(row["mask"], np.uint8).reshape(height, width)
        probability_HWC = np.asarray(model(image_HWC[np.newaxis], training=False))[0]
        yield row["patient_key"], prepared.preprocess.centre(image_HWC)[..., 0], truth_HW, probability_HWC


def _of_volumes(model: Any, prepared: PreparedSet, volume: VolumePreprocess) -> Iterator[_Judged]:
    """Planes of whole volumes, by windows as in inference; as many volumes as the windows allow, the first at least."""
    left = _WINDOWS
    patients = prepared.read_rows("val", ["patient_key"])["patient_key"].to_pylist()
    for patient, path in zip(patients, prepared.volumes["val"], strict=True):
        uri = storage.join(prepared.uri, path)
        index = chunks.index(uri)
        windows = Windows(index.shape, volume.patch, volume.step, volume.sigma)
        if left < min(_WINDOWS, len(windows)):
            continue
        left -= len(windows)
        image_DHW, truth_DHW = index.read(uri, (0, 0, 0), index.shape)
        patches = windows.patches(image_HW[..., np.newaxis] for image_HW in image_DHW)
        outputs = (np.asarray(model(patch_DHWC[np.newaxis], training=False))[0] for patch_DHWC in patches)
        low, high = np.percentile(image_DHW.astype(np.float32), _PERCENTILES)
        for image_HW, truth_HW, mean_HWK in zip(
            image_DHW, truth_DHW, windows.means(windows.weighed(one) for one in outputs), strict=True
        ):
            grey_HW = np.clip((image_HW.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * 255
            yield patient, grey_HW.astype(np.uint8), truth_HW, mean_HWK


def _pictures(
    counts: dict[str, np.ndarray], largest: dict[str, tuple[int, np.ndarray, np.ndarray, np.ndarray]]
) -> list[tuple[str, bytes]]:
    """Of each patient agreed, false and missed pixels, and foreground, picture, truth and mask of a slice."""
    dice = {patient: pooled_dice(*(int(count) for count in counts[patient])) for patient in counts}
    ranked = sorted((value, patient) for patient, value in dice.items() if value is not None)
    if not ranked:
        return []
    places = {"worst": 0, "median": len(ranked) // 2, "best": len(ranked) - 1}
    shown = []
    for name, place in places.items():
        value, patient = ranked[place]
        title = f"{name} of {len(ranked)} validation cases: {patient[:10]} · Dice {value:.2f}"
        shown.append((name, figures.overlay(*largest[patient][1:], title)))
    return shown


def _rows(prepared: PreparedSet) -> Iterator[dict[str, Any]]:
    """The rows that are looked at; of the others only the keys are read, and of one shard at a time the pixels."""
    keys = [storage.read_table(uri, ["patient_key"])["patient_key"].to_pylist() for uri in prepared.files("val")]
    patients = pa.array([key for of_file in keys for key in of_file]).dictionary_encode().indices.to_numpy()
    taken = limited(patients, _ROWS)
    wanted = np.arange(len(patients)) if taken is None else taken
    first = 0
    for uri, of_file in zip(prepared.files("val"), keys, strict=True):
        within = wanted[(wanted >= first) & (wanted < first + len(of_file))] - first
        if len(within):
            yield from storage.read_table(uri, _COLUMNS).take(within).to_pylist()
        first += len(of_file)
