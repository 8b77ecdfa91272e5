"""Where a run's weights start: from the seed, from a pretrained encoder, or from a registered model.

What does not come from the seed is brought by the driver, once, as a file in the run's folder: workers need neither a
network nor the registry, and a run that is started again starts from the same.
"""

import dataclasses
import io
import logging

import keras
import numpy as np

from rayseg import storage
from rayseg.data.patches import Patches
from rayseg.data.prepared import PreparedSet
from rayseg.data.preprocess import Preprocess
from rayseg.models.network import build_network
from rayseg.models.weights import start_from
from rayseg.tracking import bundle, registry
from rayseg.training.settings import TrainConfig

logger = logging.getLogger(__name__)

_FILE = "initial.npz"


def network(config: TrainConfig, prepared: PreparedSet) -> keras.Model:
    """The run's network with weights of the seed; raises ValueError where it does not fit the prepared images."""
    assert config.mixed_precision != "auto", "decided before, see `precision`"
    form = dataclasses.replace(config.model, weights=None)
    return build_network(form, prepared.shape, len(prepared.labels.names), config.mixed_precision)


def check_augmentation(config: TrainConfig, prepared: PreparedSet) -> None:
    """Raises ValueError where augmentation is given that the set's kind does not use."""
    if prepared.volume is not None and config.augment is not None:
        raise ValueError(
            "train.augment: is of images, and the prepared set has volumes; give train.patches.augment in its place"
        )
    if prepared.volume is None and config.patches != Patches():
        raise ValueError(
            "train.patches: is of volumes, and the prepared set has images; leave it out, and give train.augment for "
            "augmentation"
        )


def bring_initial(config: TrainConfig, prepared: PreparedSet, folder: str) -> None:
    """Puts the weights to start from into the run's folder, where the configuration names any.

    Raises:
        ValueError: they cannot be had, or do not fit the network.
    """
    uri = storage.join(folder, _FILE)
    pretrained = config.model.weights not in (None, "none")
    if not (pretrained or config.init_from) or storage.exists(uri):
        return
    keras.utils.set_random_seed(config.seed)  # for the layers that the source lacks
    model = build_network(config.model, prepared.shape, len(prepared.labels.names), config.mixed_precision)
    if config.init_from:
        path, _ = registry.fetch(config.tracking_uri, config.init_from)
        start_from(model, bundle.load_keras(path))
        before = bundle.preprocess_of(bundle.describe(path))
        if isinstance(before, Preprocess) and prepared.volume is None:  # masks of volumes have one way only
            _tell_of_masks(config.init_from, before, prepared)
    buffer = io.BytesIO()
    np.savez(buffer, **{str(index): weight for index, weight in enumerate(model.get_weights())})
    storage.write(uri, buffer.getvalue())


def _tell_of_masks(uri: str, before: Preprocess, prepared: PreparedSet) -> None:
    if before.mask_filter != prepared.preprocess.mask_filter:
        logger.warning(
            "train.init_from: %s was trained on masks with mask_filter %s, this set has them with %s: where slices "
            "shrink by an even factor the labels of the two lie half a source pixel apart",
            *(uri, before.mask_filter, prepared.preprocess.mask_filter),
        )


def set_initial(model: keras.Model, folder: str) -> None:
    """Gives the model the weights that `bring_initial` brought; without any it keeps those of its seed."""
    try:
        data = storage.read(storage.join(folder, _FILE))
    except FileNotFoundError:
        return
    with np.load(io.BytesIO(data)) as arrays:
        model.set_weights([arrays[str(index)] for index in range(len(arrays.files))])
