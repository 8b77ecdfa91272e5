"""Bundles: a model with all that inference needs, in one folder.

`model.keras`, `bundle.json` (preprocess, labels, threshold, digest, what mask the example gave) and `example.dcm`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayseg import config
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.data.stacks import alone
from rayseg.dicom.reading import Slice, read_slice
from rayseg.records import Reject

# TensorFlow takes seconds and hundreds of MB: only a process that saves, loads or runs a model imports it.
if TYPE_CHECKING:
    import keras

FORMAT = 1
EXAMPLE_FILE = "example.dcm"
_MODEL_FILE, _DESCRIPTION_FILE = "model.keras", "bundle.json"


@dataclass(frozen=True)
class Bundle:
    """A model with all that inference needs.

    model: uint8 (N, height, width, channels) to float32 probabilities: (N, height, width, 1) of the one class, or
        (N, height, width, 1 + classes) of the background and several.
    threshold: a pixel is of the one class where its probability, back on the slice's grid, is at least this. Of
        several classes it is of the most probable one there, the background among them.
    digest: SHA-256 over weights, preprocess, labels, threshold and the example's mask; file times do not count.
    """

    model: "keras.Model" = field(repr=False)
    preprocess: Preprocess
    labels: Labels
    threshold: float
    digest: str
    example: bytes = field(repr=False)

    def compile(self) -> Callable[[Sequence[Slice | None]], np.ndarray]:
        """The one way from a slice to its probabilities, and with `decide` to its mask, on the slice's own grid.

        A function to float32 (channels, rows, columns), of the model's channels. It takes the slice in the middle of
        its neighbours, as `Preprocess.apply` does: alone where that looks at none. The network always runs on exactly
        one image, so a mask cannot depend on what is segmented beside it, nor on how many. A batch would not do:
        TensorFlow adds up group normalisation in another order for each batch size (the last bits differ), and on a CPU
        it is no faster. Traced and warmed up here; safe to call from several threads.
        """
        import tensorflow as tf

        shape_NHWC = (1, *self.preprocess.size, self.preprocess.channels)

        @tf.function(input_signature=[tf.TensorSpec(shape_NHWC, tf.uint8)], autograph=False)
        def network(images_NHWC: Any) -> Any:
            return tf.cast(self.model(images_NHWC, training=False), tf.float32)

        def probabilities(stack: Sequence[Slice | None]) -> np.ndarray:
            image_HWC = self.preprocess.apply(*stack)
            slice = stack[len(stack) // 2]
            assert slice is not None
            probabilities_HWC = network(image_HWC[np.newaxis]).numpy()[0]
            channels = np.ascontiguousarray(np.moveaxis(probabilities_HWC, -1, 0))
            return np.stack([self.preprocess.restore(channel, *slice.shape) for channel in channels])

        network(np.zeros(shape_NHWC, np.uint8))
        return probabilities

    def decide(self, probabilities_KHW: np.ndarray) -> np.ndarray:
        """The uint8 label map (rows, columns) of the probabilities that `compile`'s function gives."""
        if len(probabilities_KHW) == 1:
            return (probabilities_KHW[0] >= np.float32(self.threshold)).astype(np.uint8)
        return np.argmax(probabilities_KHW, axis=0).astype(np.uint8)


def mask_sha256(mask: np.ndarray) -> str:
    """SHA-256 (hex) of a label map's shape and values."""
    return hashlib.sha256(f"{mask.dtype}{mask.shape}".encode() + mask.tobytes()).hexdigest()


def save(
    bundle_dir: str | Path,
    model: "keras.Model",
    preprocess: Preprocess,
    labels: Labels,
    threshold: float,
    example: bytes,
) -> Bundle:
    """Writes a bundle into the folder `bundle_dir` (made if need be) and returns it.

    Args:
        bundle_dir: where to; what a former bundle left there is replaced.
        model: see `Bundle`; keep the optimizer out of it, it would be saved too.
        preprocess: what the model was trained with.
        labels: the classes.
        threshold: between 0 and 1.
        example: a DICOM instance; its mask, without neighbours, is recorded and compared wherever the bundle is
            verified.

    Raises:
        ValueError: the model's shapes do not fit `preprocess`, the threshold is no probability, the example no slice.
    """
    from rayseg.models.network import output_channels  # Keras comes with it, and the model is Keras's already

    inputs = (None, *preprocess.size, preprocess.channels)
    outputs = (None, *preprocess.size, output_channels(len(labels.names)))
    if model.input_shape != inputs or model.output_shape != outputs:
        raise ValueError(
            f"bundle: a model from {inputs} to {outputs} expected for its preprocess and labels, got "
            f"{model.input_shape} to {model.output_shape}"
        )
    if not 0 < threshold < 1:
        raise ValueError(f"bundle: threshold between 0 and 1 expected, got {threshold}")
    slice = read_slice(example)
    if isinstance(slice, Reject):
        raise ValueError(f"bundle: the example is no readable slice ({slice.reason}: {slice.detail})")
    # As they will be read back: YAML may have given 40 for 40.0, and the digest would tell these apart.
    preprocess, threshold = config.build(Preprocess, config.plain(preprocess)), float(threshold)
    made = Bundle(model, preprocess, labels, threshold, "", example)
    example_mask = mask_sha256(made.decide(made.compile()(alone(slice, preprocess.neighbours))))
    digest = _digest(model, config.plain(preprocess), config.plain(labels), threshold, example_mask)
    folder = Path(bundle_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / _MODEL_FILE)
    (folder / EXAMPLE_FILE).write_bytes(example)
    description = {
        "format": FORMAT,
        "preprocess": config.plain(preprocess),
        "labels": config.plain(labels),
        "threshold": threshold,
        "example_mask_sha256": example_mask,
        "digest": digest,
    }
    (folder / _DESCRIPTION_FILE).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Bundle(model, preprocess, labels, threshold, digest, example)


def load(bundle_dir: str | Path) -> Bundle:
    """Reads a bundle; raises ValueError where there is none, or it is damaged or of another format."""
    import keras

    folder = Path(bundle_dir)
    description = describe(folder)
    preprocess = config.build(Preprocess, description["preprocess"])
    labels = config.build(Labels, description["labels"])
    try:
        model = keras.saving.load_model(folder / _MODEL_FILE, compile=False)
    except Exception as error:  # Keras raises many types on files that it cannot read
        raise ValueError(f"bundle {folder}: {_MODEL_FILE} cannot be read ({type(error).__name__})") from error
    threshold = description["threshold"]
    # Of the values as they were written: a bundle made before a setting existed does not name it.
    written = description["preprocess"], description["labels"]
    if _digest(model, *written, threshold, description["example_mask_sha256"]) != description["digest"]:
        raise ValueError(f"bundle {folder}: its content does not have the digest that it was saved with")
    return Bundle(model, preprocess, labels, threshold, description["digest"], (folder / EXAMPLE_FILE).read_bytes())


def describe(folder: Path) -> dict[str, Any]:
    """What the bundle's `bundle.json` says; raises ValueError where there is none, or of another format."""
    try:
        description = json.loads((folder / _DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"bundle {folder}: {_DESCRIPTION_FILE} cannot be read ({type(error).__name__})") from None
    if description.get("format") != FORMAT:
        raise ValueError(f"bundle {folder}: format {description.get('format')}, this version reads {FORMAT}")
    return description


def _digest(
    model: "keras.Model", preprocess: dict[str, Any], labels: dict[str, Any], threshold: float, example_mask: str
) -> str:
    """The example's mask stands for how the layers are wired, which the weights do not tell."""
    weights = [
        [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
        for value in model.get_weights()
    ]
    return config.digest(
        {
            "format": FORMAT,
            "weights": weights,
            "preprocess": preprocess,
            "labels": labels,
            "threshold": threshold,
            "example_mask_sha256": example_mask,
        }
    )
