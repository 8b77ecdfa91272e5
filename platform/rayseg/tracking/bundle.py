"""Bundles: a model with all that inference needs, in one folder.

`model.keras`, the same network as OpenVINO reads it (`model.xml`, `model.bin`), `bundle.json` (preprocess, labels,
threshold, range, volumes, digest, what masks the example and the golden slices gave), `example.dcm` and `golden-N.dcm`.
The bundle of a model of volumes has `volume` in the place of `preprocess`, and its examples are volumes, `.nii.gz`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayseg import config
from rayseg.data import walk
from rayseg.data.conformal import VolumeErrors
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import Known, Range
from rayseg.data.stacks import alone
from rayseg.data.volume import VolumePreprocess, geometry
from rayseg.dicom import volumes as volume_files
from rayseg.dicom.reading import Slice, Source, read_slice
from rayseg.geometry.grid import Geometry
from rayseg.models import engine
from rayseg.models.engine import Forward, Network
from rayseg.records import Reason, Reject

# TensorFlow takes seconds and hundreds of MB: only a process that trains or asks for the Keras model imports it.
if TYPE_CHECKING:
    import keras

FORMAT = 2
EXAMPLE_FILE, VOLUME_FILE = "example.dcm", "example.nii.gz"
KERAS_FILE, _DESCRIPTION_FILE = "model.keras", "bundle.json"
_NETWORK_FILES = ("model.xml", "model.bin")


@dataclass(frozen=True)
class Bundle:
    """A model with all that inference needs.

    network: uint8 (N, height, width, channels) to float32 probabilities: (N, height, width, 1) of the one class, or
        (N, height, width, 1 + classes) of the background and several. Of volumes float16 (N, depth, height, width, 1)
        to float32 (N, depth, height, width, the same).
    preprocess: of slices, or of volumes.
    threshold: a pixel is of the one class where its probability, back on the slice's grid, is at least this. Of
        several classes it is of the most probable one there, the background among them.
    digest: SHA-256 over weights, preprocess, labels, threshold, range, volumes and the example's mask; file times
        do not count.
    range: what the model was trained on, to judge inputs by; None where nobody said.
    volumes: how far its volumes are off, see `calibrate`; of no class where nobody said.
    """

    network: Network = field(repr=False)
    preprocess: Preprocess | VolumePreprocess
    labels: Labels
    threshold: float
    digest: str
    example: bytes = field(repr=False)
    range: Range | None = None
    volumes: VolumeErrors = VolumeErrors()  # noqa: RUF009, it is frozen

    def probabilities(self, stack: Sequence[Slice | None], forward: Forward) -> np.ndarray:
        """The one way from a slice to its probabilities: float32 (channels, rows, columns) on the slice's own grid.

        Of a volume it is `data.walk`.

        Args:
            stack: the slice in the middle of its neighbours, as `Preprocess.apply` takes it; alone where that looks at
                none.
            forward: runs the network.
        """
        assert isinstance(self.preprocess, Preprocess)
        return self.restore(forward(self.preprocess.apply(*stack)[np.newaxis])[0], stack)

    def restore(self, probabilities_HWK: np.ndarray, stack: Sequence[Slice | None]) -> np.ndarray:
        """What the network gave for the stack, (channels, rows, columns) on the grid of the slice in its middle."""
        slice = stack[len(stack) // 2]
        assert slice is not None
        assert isinstance(self.preprocess, Preprocess)
        channels = np.ascontiguousarray(np.moveaxis(probabilities_HWK, -1, 0))
        return np.stack([self.preprocess.restore(channel, *slice.shape) for channel in channels])


def decide(probabilities_KHW: np.ndarray, threshold: float) -> np.ndarray:
    """The uint8 label map (rows, columns) of probabilities: of one class, or of the background and several."""
    if len(probabilities_KHW) == 1:
        return (probabilities_KHW[0] >= np.float32(threshold)).astype(np.uint8)
    return np.argmax(probabilities_KHW, axis=0).astype(np.uint8)


def mask_sha256(mask: np.ndarray) -> str:
    """SHA-256 (hex) of a label map's shape and values."""
    return hashlib.sha256(f"{mask.dtype}{mask.shape}".encode() + mask.tobytes()).hexdigest()


def save(
    bundle_dir: str | Path,
    model: "keras.Model",
    preprocess: Preprocess | VolumePreprocess,
    labels: Labels,
    threshold: float,
    example: bytes,
    golden: Sequence[bytes] = (),
    known: Range | None = None,
) -> Bundle:
    """Writes a bundle into the folder `bundle_dir` (made if need be) and returns it.

    Args:
        bundle_dir: where to; what a former bundle left there is replaced.
        model: see `Bundle`; keep the optimizer out of it, it would be saved too.
        preprocess: what the model was trained with.
        labels: the classes.
        threshold: between 0 and 1.
        example: a DICOM instance; its mask, without neighbours, is recorded and compared wherever the bundle is
            verified. For a model of volumes a volume in one file.
        golden: further ones whose masks are recorded and compared likewise.
        known: the range, see `Bundle`.

    Raises:
        ValueError: the model's shapes do not fit `preprocess`, the threshold is no probability, an example no slice or
            volume.
    """
    from rayseg.models.network import output_channels  # Keras comes with it, and the model is Keras's already

    if isinstance(preprocess, Preprocess):
        shape: tuple[int, ...] = (*preprocess.size, preprocess.channels)
        key, example_name = "preprocess", EXAMPLE_FILE
    else:
        shape, key, example_name = (*preprocess.patch, 1), "volume", VOLUME_FILE
    inputs, outputs = (None, *shape), (None, *shape[:-1], output_channels(len(labels.names)))
    if model.input_shape != inputs or model.output_shape != outputs:
        raise ValueError(
            f"bundle: a model from {inputs} to {outputs} expected for its preprocess and labels, got "
            f"{model.input_shape} to {model.output_shape}"
        )
    if not 0 < threshold < 1:
        raise ValueError(f"bundle: threshold between 0 and 1 expected, got {threshold}")
    # As they will be read back: YAML may have given 40 for 40.0, and the digest would tell these apart.
    preprocess, threshold = config.build(type(preprocess), config.plain(preprocess)), float(threshold)
    network = engine.convert(model)
    made = Bundle(network, preprocess, labels, threshold, "", example)
    exact = engine.compile_openvino(network, "float32").exact
    example_mask, *golden_masks = (mask_sha256(_mask(made, blob, exact)) for blob in (example, *golden))
    contents = dict(zip(_NETWORK_FILES, (network.xml, network.weights), strict=True))
    folder = Path(bundle_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / KERAS_FILE)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / example_name).write_bytes(example)
    names = [example_name.replace("example", f"golden-{number}") for number in range(1, len(golden) + 1)]
    for name, blob in zip(names, golden, strict=True):
        (folder / name).write_bytes(blob)
    description = {
        "format": FORMAT,
        key: config.plain(preprocess),
        "labels": config.plain(labels),
        "threshold": threshold,
        "example_mask_sha256": example_mask,
        "golden_masks_sha256": dict(zip(names, golden_masks, strict=True)),
        "network_sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        "weights_sha256": _weights_sha256(model),
        "range": None if known is None else config.plain(known),
    }
    description["digest"] = digest = _digest(description)
    (folder / _DESCRIPTION_FILE).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Bundle(network, preprocess, labels, threshold, digest, example, known)


def calibrate(bundle_dir: str | Path, volumes: VolumeErrors) -> None:
    """Notes in a bundle how far its volumes are off; its masks, which that was measured by, stay as they are."""
    folder = Path(bundle_dir)
    description = describe(folder) | {"volumes": config.plain(volumes)}
    description["digest"] = _digest(description)
    (folder / _DESCRIPTION_FILE).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(bundle_dir: str | Path) -> Bundle:
    """Reads a bundle, without its Keras model; raises ValueError where there is none, or it is damaged."""
    folder = Path(bundle_dir)
    description = describe(folder)
    if _digest(description) != description["digest"]:
        raise ValueError(f"bundle {folder}: {_DESCRIPTION_FILE} does not have the digest that it was saved with")
    xml, weights = (_checked(folder, name, description["network_sha256"][name]) for name in _NETWORK_FILES)
    known = known_of(description)
    return Bundle(
        Network(xml, weights),
        preprocess_of(description),
        config.build(Labels, description["labels"]),
        description["threshold"],
        description["digest"],
        (folder / example_file(description)).read_bytes(),
        known.range,
        known.volumes,
    )


def load_keras(bundle_dir: str | Path) -> "keras.Model":
    """The bundle's Keras model; raises ValueError where it cannot be read, or has other weights than were saved."""
    import keras

    folder = Path(bundle_dir)
    description = describe(folder)
    try:
        model = keras.saving.load_model(folder / KERAS_FILE, compile=False)
    except Exception as error:  # Keras raises many types on files that it cannot read
        raise ValueError(f"bundle {folder}: {KERAS_FILE} cannot be read ({type(error).__name__})") from error
    if _weights_sha256(model) != description["weights_sha256"]:
        raise ValueError(f"bundle {folder}: {KERAS_FILE} does not have the weights that it was saved with")
    return model


def describe(folder: Path) -> dict[str, Any]:
    """What the bundle's `bundle.json` says; raises ValueError where there is none, or of another format."""
    try:
        description = json.loads((folder / _DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"bundle {folder}: {_DESCRIPTION_FILE} cannot be read ({type(error).__name__})") from None
    if description.get("format") != FORMAT:
        raise ValueError(f"bundle {folder}: format {description.get('format')}, this version reads {FORMAT}")
    return description


def example_file(description: Mapping[str, Any]) -> str:
    """The name of the example in a bundle of this description."""
    return VOLUME_FILE if "volume" in description else EXAMPLE_FILE


def read_example(recorded: bytes) -> list[Slice] | Reject:
    """The slices of a volume in one file, a bundle's example, in the file's order."""
    volume = volume_files.read_volume(recorded) if volume_files.is_volume(recorded) else None
    if volume is None:
        return Reject(Reason.NOT_AN_IMAGE, "a volume in one file expected: NIfTI, NRRD or MetaImage")
    if isinstance(volume, Reject):
        return volume
    source, slices = Source(recorded), []
    for number in range(volume.slices):
        slice = source.slice(number)
        if isinstance(slice, Reject):
            return slice
        slices.append(slice)
    return slices


def preprocess_of(description: Mapping[str, Any]) -> Preprocess | VolumePreprocess:
    """That of a bundle's description. One that says nothing of the masks' filter was trained before there was a choice.

    Without further ado the default of today would be read into it.
    """
    if "volume" in description:
        return config.build(VolumePreprocess, description["volume"])
    return config.build(Preprocess, {"mask_filter": "nearest", **description["preprocess"]})


def known_of(description: Mapping[str, Any]) -> Known:
    """What the model's inputs, predictions and volumes are judged by, of a bundle's description."""
    known = description["range"]
    volumes = config.build(VolumeErrors, description.get("volumes", {}))
    return Known(None if known is None else config.build(Range, known), volumes)


def _checked(folder: Path, name: str, sha256: str) -> bytes:
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"bundle {folder}: {name} cannot be read ({type(error).__name__})") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"bundle {folder}: {name} is not as it was saved")
    return content


def _mask(bundle: Bundle, recorded: bytes, exact: Forward) -> np.ndarray:
    """Of an example, uint8 (rows, columns) or (slices, rows, columns); raises ValueError where it cannot be read."""
    preprocess, threshold = bundle.preprocess, bundle.threshold
    if isinstance(preprocess, Preprocess):
        slice = read_slice(recorded)
        if isinstance(slice, Reject):
            raise ValueError(f"bundle: an example is no readable slice ({slice.reason}: {slice.detail})")
        return decide(bundle.probabilities(alone(slice, preprocess.neighbours), exact), threshold)
    slices = read_example(recorded)
    grid = slices if isinstance(slices, Reject) else preprocess.grid([_placed(slice) for slice in slices])
    if isinstance(slices, Reject) or isinstance(grid, Reject):
        assert isinstance(grid, Reject)
        raise ValueError(f"bundle: an example is no readable volume ({grid.reason}: {grid.detail})")
    ordered = [slices[place] for place in grid.order]
    planes = walk.planes(preprocess, grid, ordered, lambda patch_DHWC: exact(patch_DHWC[np.newaxis])[0], map)
    masks: list[np.ndarray | None] = [None] * len(slices)
    for place, plane_KHW in zip(grid.order, planes, strict=True):
        masks[place] = decide(walk.restore(grid, plane_KHW), threshold)
    return np.stack([mask for mask in masks if mask is not None])


def _placed(slice: Slice) -> Geometry:
    place = geometry(slice)
    assert place is not None, "a volume's file says where it lies, or a guess is made"
    return place


def _weights_sha256(model: "keras.Model") -> str:
    weights = [
        [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
        for value in model.get_weights()
    ]
    return config.digest(weights)


def _digest(description: dict[str, Any]) -> str:
    """The example's mask stands for how the layers are wired, which the weights do not tell.

    Of the values as they were written: a bundle made before a setting existed does not name it.
    """
    of = ("format", "weights_sha256", "labels", "threshold", "range", "example_mask_sha256")
    some = {key: description[key] for key in ("preprocess", "volume", "volumes") if key in description}
    return config.digest({key: description[key] for key in of} | some)
