"""Several networks as one: the same masks as the Predictor's own average of the single bundles."""

from pathlib import Path

import keras
import numpy as np
import pytest

from rayseg.data import synthetic
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess, Window
from rayseg.dicom.reading import Slice, read_slice
from rayseg.inference.predictor import FLIPS, Mirror, Predictor
from rayseg.models import ensemble
from rayseg.models.engine import Engine
from rayseg.models.network import build_network
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import bundle

SIZE = 32
PREPROCESS = Preprocess((SIZE, SIZE), Window(center=40, width=400), None)


def network(seed: int, policy: str = "float32") -> keras.Model:
    """Untrained, and not symmetric: noise in its weights says so."""
    keras.utils.set_random_seed(seed)
    form = NetworkConfig(widths=(4, 8), normalization="batch", dropout=0.2)
    model = build_network(form, (SIZE, SIZE, 1), 1, policy)
    random = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name == "kernel":
            weight.assign(weight + 0.3 * random.standard_normal(weight.shape))
    return model


def test_one_network_gives_what_the_single_bundles_and_their_mirror_images_give_together(tmp_path: Path) -> None:
    mirror: Mirror = "both"
    models = [network(seed, policy) for seed, policy in ((1, "float32"), (2, "mixed_bfloat16"))]
    example = synthetic.slice_bytes(0, 48)
    for number, model in enumerate(models):
        bundle.save(tmp_path / str(number), model, PREPROCESS, Labels(), 0.4 + 0.2 * number, example)
    loaded = [bundle.load_keras(tmp_path / str(number)) for number in range(2)]
    bundle.save(tmp_path / "one", ensemble.mean(loaded, FLIPS[mirror]), PREPROCESS, Labels(), 0.5, example)
    bundle.load_keras(tmp_path / "one")  # can be read again, and has its weights

    exact = Engine("openvino", "float32")
    several = Predictor.load(tmp_path / "0", tmp_path / "1", engine=exact, mirror=mirror)
    one = Predictor.load(tmp_path / "one", engine=exact)
    slice = read_slice(synthetic.slice_bytes(3, 40))
    assert isinstance(slice, Slice)
    made, expected = (predictor.judge_stack([slice]) for predictor in (one, several))
    np.testing.assert_allclose(made.probabilities_KHW, expected.probabilities_KHW, atol=1e-5)  # type: ignore[union-attr]
    assert np.ptp(expected.probabilities_KHW) > 0.01, "a flat picture would show nothing"  # type: ignore[union-attr]
    assert one.threshold == several.threshold


def test_networks_of_several_sizes_are_no_single_one() -> None:
    other = keras.Sequential([keras.Input((16, 16, 1), dtype="uint8"), keras.layers.Rescaling(1 / 255)])
    with pytest.raises(ValueError, match="one input and output size"):
        ensemble.mean([network(1), other])
