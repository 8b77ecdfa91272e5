"""Bundles and registered versions without TensorFlow: a network of one threshold, whose masks are known beforehand."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from rayseg import config
from rayseg.data import phantom_volumes
from rayseg.data.intensity import Intensity
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess, Window
from rayseg.data.range import Range
from rayseg.data.synthetic import slice_bytes
from rayseg.data.volume import VolumePreprocess
from rayseg.inference.predictor import Predictor
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.models.engine import Engine, _openvino
from rayseg.tracking import bundle, registry, runs
from rayseg.tracking.bundle import mask_sha256
from rayseg.tracking.registry import ModelVersion
from rayseg.tracking.verification import BUNDLE_IN_MODEL

SIZE = 64


def write_bundle(folder: Path, level: float, neighbours: int = 0, size: int = SIZE) -> Path:
    """A model that finds what is brighter than `level` (of 0 to 255) in the mean over a slice and its neighbours.

    It says that it was trained on MR; the phantoms are CT.
    """
    openvino = _openvino()
    ops = openvino.opset13
    channels = 2 * neighbours + 1
    image = ops.parameter([1, size, size, channels], np.uint8)
    mean = ops.reduce_mean(ops.convert(image, "f32"), np.array([3]), keep_dims=True)
    probability = ops.sigmoid(ops.subtract(mean, np.float32(level)))
    folder.mkdir(parents=True)
    openvino.save_model(openvino.Model([probability], [image]), folder / "model.xml", compress_to_fp16=False)
    (folder / "example.dcm").write_bytes(slice_bytes(0, size))
    (folder / "golden-1.dcm").write_bytes(slice_bytes(1, size))
    preprocess = Preprocess((size, size), Window(center=40.0, width=80.0), None, neighbours=neighbours)
    description: dict[str, Any] = {
        "format": bundle.FORMAT,
        "preprocess": config.plain(preprocess),
        "labels": config.plain(Labels(("lesion",))),
        "threshold": 0.5,
        "example_mask_sha256": "",
        "golden_masks_sha256": {},
        "network_sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.xml", "model.bin")
        },
        "weights_sha256": f"{level}",
        "range": config.plain(Range(modalities=("MR",))),
    }
    _write(folder, description)
    predictor = Predictor.load(folder, engine=Engine("openvino", "float32"))
    masks = {
        name: mask_sha256(predictor.segment_alone((folder / name).read_bytes()).mask)
        for name in ("example.dcm", "golden-1.dcm")
    }
    description["example_mask_sha256"] = masks.pop("example.dcm")
    description["golden_masks_sha256"] = masks
    _write(folder, description)
    return folder


def write_volume_bundle(folder: Path, level: float, patch: tuple[int, int, int] = (4, 32, 32)) -> Path:
    """A model of volumes that finds what is brighter than `level`, in HU, in voxels of 4 x 2.5 x 2.5 mm."""
    openvino = _openvino()
    ops = openvino.opset13
    image = ops.parameter([1, *patch, 1], np.float16)
    above = ops.subtract(ops.convert(image, "f32"), np.float32(level / 100))
    probability = ops.sigmoid(ops.multiply(above, np.float32(20)))
    folder.mkdir(parents=True)
    openvino.save_model(openvino.Model([probability], [image]), folder / "model.xml", compress_to_fp16=False)
    intensity = Intensity("ct", low=-100.0, high=200.0, mean=0.0, deviation=100.0)
    preprocess = VolumePreprocess((4.0, 2.5, 2.5), patch, intensity)
    example, golden = phantom_volumes.of_bundle(preprocess)
    (folder / "example.nii.gz").write_bytes(example)
    (folder / "golden-1.nii.gz").write_bytes(golden)
    description: dict[str, Any] = {
        "format": bundle.FORMAT,
        "volume": config.plain(preprocess),
        "labels": config.plain(Labels(("lesion",))),
        "threshold": 0.5,
        "example_mask_sha256": "",
        "golden_masks_sha256": {},
        "network_sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.xml", "model.bin")
        },
        "weights_sha256": f"{level}",
        "range": config.plain(Range(modalities=("MR",), spacing_mm=(0.5, 1.0))),
    }
    _write(folder, description)
    predictor = VolumePredictor.load(folder, engine=Engine("openvino", "float32"))
    description["example_mask_sha256"] = mask_sha256(predictor.segment_example().mask)
    description["golden_masks_sha256"] = {"golden-1.nii.gz": mask_sha256(predictor.segment_alone(golden).mask)}
    _write(folder, description)
    return folder


def spoil(folder: Path, **changed: Any) -> Path:
    """The bundle with something else recorded than its network gives."""
    description = json.loads((folder / "bundle.json").read_text())
    _write(folder, description | changed)
    return folder


def register(tracking_uri: str, name: str, folder: Path, alias: str | None = None) -> ModelVersion:
    """Puts the bundle into the registry as `registry.register` would, unverified."""
    client = runs.client(tracking_uri)
    artifact = folder.parent / f"{folder.name}-artifact"
    shutil.copytree(folder, artifact / "data" / BUNDLE_IN_MODEL)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    digest = bundle.describe(folder)["digest"]
    run_id = runs.start(tracking_uri, "tests", folder.name, {}, {})
    made = client.create_model_version(name, str(artifact), run_id, tags={"bundle_digest": digest})
    if alias is not None:
        registry.set_alias(tracking_uri, name, alias, str(made.version))
    return registry.resolve(tracking_uri, f"models:/{name}/{made.version}")


def _write(folder: Path, description: dict[str, Any]) -> None:
    description["digest"] = bundle._digest(description)
    (folder / "bundle.json").write_text(json.dumps(description))
