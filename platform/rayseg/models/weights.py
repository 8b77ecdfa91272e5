"""Weights from elsewhere: of an encoder trained on ImageNet, of a file, of another network. All go by layer names.

A file is what Keras saves (`.keras`, `.weights.h5`), or what Keras keeps in its cache once it has downloaded an
encoder (`..._notop.h5`): of a network of ours, or of an encoder alone, whose layers are then named as in
`keras.applications`, or as `models.resnet` says. It is read as data: no code in it is run.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import h5py
import keras
import numpy as np

from rayseg import storage
from rayseg.models.encoders import APPLICATIONS, PREFIX, encoder_layers

AUXILIARY = "aux"  # begins the names of auxiliary outputs' layers
_IN_ARCHIVE = "model.weights.h5"
_RGB = 3
Weights = Mapping[str, list[np.ndarray]]  # of layers, by name, in the order of `layer.get_weights()`


def load_encoder(model: keras.Model, source: str, name: str) -> None:
    """Sets the weights of the network's encoder.

    The first kernel of ImageNet's weights is for red, green and blue. Other channels share these out, so that equal
    channels give what equal colours would: one channel gets their sum, for a grey picture is one whose colours are
    equal; more get them in turn, which unlike one mean for all tells the channels apart while the encoder is frozen.

    Args:
        model: of `network.build_network`.
        source: `imagenet`, or path or URI of a file.
        name: of the encoder, as `encoders.encode` takes it.

    Raises:
        ValueError: Keras has no weights of this encoder or cannot download them; the file is missing, no weights file,
            lacks a layer or has it in another shape.
    """
    weights = _imagenet(name) if source == "imagenet" else read(source)
    # Without the prefix they come from an encoder alone, which may want its colours in another order than ours.
    ours = any(layer.startswith(PREFIX) for layer in weights)
    bgr = not ours and name in APPLICATIONS and APPLICATIONS[name].bgr
    if ours:
        weights = {key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)}
    targets = {layer.name.removeprefix(PREFIX): layer for layer in encoder_layers(model) if layer.weights}
    first = next(iter(targets))
    channels = model.input_shape[-1]
    if first in weights and weights[first][0].ndim == 4:
        kernel, *rest = weights[first]
        weights = {**weights, first: [_for_channels(kernel[:, :, ::-1] if bgr else kernel, channels), *rest]}
    _assign(targets, weights, "model.weights", source)


def start_from(model: keras.Model, source: keras.Model) -> None:
    """Sets the weights of `model` to those of `source`, a network of the same form.

    Either may lack the auxiliary outputs: those of `model` then stay as they are.

    Raises:
        ValueError: a layer that the other lacks, or has in another shape, named.
    """
    given = {layer.name: layer.get_weights() for layer in source.layers if layer.weights}
    targets = {layer.name: layer for layer in model.layers if layer.weights}
    for name in targets.keys() - given.keys():
        if name.startswith(AUXILIARY):
            del targets[name]
    for name in given:
        if name not in targets and not name.startswith(AUXILIARY):
            raise ValueError(f"train.init_from: its network has a layer {name}, which train.model has not")
    _assign(targets, given, "train.init_from", "its network")


def read(uri: str) -> Weights:
    """The weights in a file that Keras has saved, by layer; raises ValueError where there is none that is readable."""
    try:
        data: Any = io.BytesIO(storage.read(uri))
    except FileNotFoundError:
        raise ValueError(f"model.weights: there is no file {uri}") from None
    try:
        if zipfile.is_zipfile(data):
            with zipfile.ZipFile(data) as archive:
                data = io.BytesIO(archive.read(_IN_ARCHIVE))
        with h5py.File(data) as file:
            found = _legacy(file.get("model_weights", file)) if _is_legacy(file) else _current(file)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"model.weights: {uri} is no weights file of Keras (.keras, .weights.h5, .h5): {type(error).__name__}"
        ) from None
    if not found:
        raise ValueError(f"model.weights: {uri} names no layers; save the model anew, with a Keras that is not older")
    return found


def _imagenet(name: str) -> Weights:
    if name not in APPLICATIONS:
        raise ValueError(
            f"model.weights: Keras has no ImageNet weights of {name}, but of {', '.join(APPLICATIONS)}; give the path "
            "or URI of a file"
        )
    try:
        model = getattr(keras.applications, APPLICATIONS[name].application)(include_top=False, weights="imagenet")
    except Exception as error:  # Keras raises a bare Exception where it cannot download
        raise ValueError(
            f"model.weights: the ImageNet weights of {name} cannot be downloaded ({type(error).__name__}); give "
            "the path or URI of a file, such as the one that Keras keeps in ~/.keras/models where there is a network"
        ) from error
    return {layer.name: layer.get_weights() for layer in model.layers if layer.weights}


def _for_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A kernel (height, width, 3, filters) for so many input channels; one that is not for three stays as it is."""
    if kernel.shape[2] != _RGB or channels == _RGB:
        return kernel
    turns = np.arange(max(channels, _RGB))
    share = np.zeros((channels, _RGB), kernel.dtype)
    share[turns % channels, turns % _RGB] = 1
    return np.einsum("cr,hwrf->hwcf", share / share.sum(axis=0), kernel)


def _assign(targets: Mapping[str, keras.Layer], weights: Weights, key: str, source: str) -> None:
    """Sets all or, where one does not fit, none."""
    for name, layer in targets.items():
        if name not in weights:
            raise ValueError(f"{key}: {source} has no layer {name}")
        wanted, given = ([tuple(value.shape) for value in values] for values in (layer.weights, weights[name]))
        if wanted != given:
            raise ValueError(f"{key}: layer {name} has the shapes {wanted} in train.model and {given} in {source}")
    for name, layer in targets.items():
        layer.set_weights(weights[name])


def _is_legacy(file: h5py.File) -> bool:
    return "layer_names" in file.attrs or "model_weights" in file


def _legacy(group: h5py.Group) -> dict[str, list[np.ndarray]]:
    """Keras 2's format: names of layers and of their weights stand in attributes. Slashes were allowed in them."""

    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    layers = {text(name): group[text(name)] for name in group.attrs["layer_names"]}
    return {
        name.replace("/", "_"): [np.asarray(layer[text(weight)]) for weight in layer.attrs["weight_names"]]
        for name, layer in layers.items()
        if len(layer.attrs["weight_names"])
    }


def _current(file: h5py.File) -> dict[str, list[np.ndarray]]:
    """Keras 3's format: a layer has a group `vars`, with its name as an attribute and its weights by number."""
    found: dict[str, list[np.ndarray]] = {}

    def visit(path: str, item: Any) -> None:
        if path.endswith("/vars") and "name" in item.attrs and len(item) and all(key.isdigit() for key in item):
            found[str(item.attrs["name"])] = [np.asarray(item[key]) for key in sorted(item, key=int)]

    file.visititems(visit)
    return found
