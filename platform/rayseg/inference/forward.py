"""The network's part of a series: slices in, masks out, with what its files need of pixels and probabilities."""

import operator
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pydicom

from rayseg.data.grey import grey
from rayseg.data.objects import Place
from rayseg.data.preprocess import Preprocess
from rayseg.data.volume import VolumePreprocess
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.inference import quality
from rayseg.inference.kept import Head
from rayseg.inference.outputs import Kind, Segmented, overlay_png
from rayseg.inference.packed import Packed
from rayseg.inference.predictor import AnyPredictor
from rayseg.inference.sources import Sources, geometry
from rayseg.inference.watch import Watch
from rayseg.records import Reject

T = TypeVar("T")


def segmented(
    predictor: AnyPredictor,
    series_key: str,
    kind: Kind,
    profiles: Sequence[str],
    wanted: Sequence[Place],
    refused: dict[int, Reject],
    watch: Watch,
) -> tuple[Segmented, list[Head | None]]:
    """The usable slices with their masks, and the heads of their objects; of pixels only what the profiles ask for.

    The others go into `refused`, by their place in `wanted`.
    """
    numbers: list[int] = []
    datasets: list[pydicom.Dataset] = []
    masks = Packed()
    geometries: list[Geometry] = []
    looks: list[quality.Look] = []
    probabilities = Packed()
    pictures: list[tuple[int, bytes]] = []
    sources = Sources(kind, predictor.color, watch)
    for number, result in watch.each("forward", predictor.judge_series(sources.read(wanted))):
        uri, _ = wanted[number]
        source = result if isinstance(result, Reject) else sources.datasets.get(uri)
        if isinstance(result, Reject) or isinstance(source, Reject):
            assert isinstance(source, Reject)
            refused[number] = source
            continue
        if source is not None:
            datasets.append(source)
        numbers.append(number)
        masks.append(result.mask)
        geometries.append(geometry(result.slice))
        with watch.step("encode"):
            looks.append(quality.look(predictor.bundle.preprocess, result))
            if "seg-fractional" in profiles:
                probabilities.append(_as_bytes(result.probabilities_KHW))
            if "overlays" in profiles and result.mask.any():
                pictures.append((number, picture(predictor.bundle.preprocess, result.slice, result.mask)))
    assert len(numbers) + len(refused) == len(wanted), "every slice has an outcome"
    # A walk along the normal may go against the manifest's order.
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    numbers = _taken(numbers, order)
    series = Segmented(
        series_key,
        kind,
        numbers,
        [wanted[number][1] for number in numbers],
        _taken(geometries, order),
        Packed.of_cells(_taken(masks.cells, order)),
        _taken(looks, order),
        _taken(datasets, order) if datasets else [],
        sources.volume,
        Packed.of_cells(_taken(probabilities.cells, order)) if probabilities else None,
        sorted(pictures, key=operator.itemgetter(0)),
        predictor.known.volumes,
    )
    return series, [sources.heads.get(wanted[number][0]) for number in numbers]


def picture(preprocess: Preprocess | VolumePreprocess, slice: Slice, mask: np.ndarray) -> bytes:
    """An overlay with the grey values that the network sees, on the slice's own grid."""
    return overlay_png(grey(preprocess, slice), mask)


def _taken(items: Sequence[T], order: Sequence[int]) -> list[T]:
    return [items[place] for place in order]


def _as_bytes(probabilities_KHW: np.ndarray) -> np.ndarray:
    """Of the classes without the background, uint8 (rows, columns, classes)."""
    foreground_KHW = probabilities_KHW if len(probabilities_KHW) == 1 else probabilities_KHW[1:]
    return np.rint(np.moveaxis(foreground_KHW, 0, -1) * 255).clip(0, 255).astype(np.uint8)
