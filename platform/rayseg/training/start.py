"""Where a run's weights start: from the seed, from a pretrained encoder, or from a registered model.

What does not come from the seed is brought by the driver, once, as a file in the run's folder: workers need neither a
network nor the registry, and a run that is started again starts from the same.
"""

import io

import keras
import numpy as np

from rayseg import storage
from rayseg.data.prepared import PreparedSet
from rayseg.models.unet import build_unet
from rayseg.tracking import bundle, registry
from rayseg.training.settings import TrainConfig

_FILE = "initial.npz"


def bring_initial(config: TrainConfig, prepared: PreparedSet, folder: str) -> None:
    """Puts the weights to start from into the run's folder, where the configuration names any.

    Raises:
        ValueError: they cannot be had, or do not fit the network.
    """
    if config.init_from is None:
        return
    model = build_unet(config.model, prepared.shape, len(prepared.labels.names), config.mixed_precision)
    if config.init_from is not None:
        path, _ = registry.fetch(config.tracking_uri, config.init_from)
        model.set_weights(bundle.load(path).model.get_weights())
    buffer = io.BytesIO()
    np.savez(buffer, **{str(index): weight for index, weight in enumerate(model.get_weights())})
    storage.write(storage.join(folder, _FILE), buffer.getvalue())


def set_initial(model: keras.Model, folder: str) -> None:
    """Gives the model the weights that `bring_initial` brought; without any it keeps those of its seed."""
    try:
        data = storage.read(storage.join(folder, _FILE))
    except FileNotFoundError:
        return
    with np.load(io.BytesIO(data)) as arrays:
        model.set_weights([arrays[str(index)] for index in range(len(arrays.files))])


def encoder(model: keras.Model) -> list[keras.Layer]:
    """The layers that `freeze_epochs` leaves as they are."""
    return []
