"""What a preset stands for: its size, its fields, and what may be changed."""

import keras
import numpy as np
import pytest

from rayseg import config as configuration
from rayseg.models.encoders import encoder_layers
from rayseg.models.network import build_network
from rayseg.models.presets import PRESETS, NetworkConfig

# Trainable parameters of torchvision's, less its last layer of 1,000 classes; all of Keras's without top.
TORCHVISION = {"resnet34": 21_797_672 - 513_000, "resnext101-32x8d": 88_791_336 - 2_049_000}
KERAS = {"resnet50": 23_587_712, "resnet101": 42_658_176, "densenet121": 7_037_504}
KERAS["efficientnet-b0"] = 4_049_571 - 7  # of its own normalisation, which is ours here
# As their users count them (count_params), and as added up by hand for unet-stroke; the rest as they came out.
TOTAL = {
    "unet-small": (1, 482_449),
    "unet-original": (1, 31_031_685),
    "unet-batchnorm": (3, 7_708_609),
    "unet-stroke": (1, 19_580_289),
    "unet-dropout": (3, 1_941_105),
    "unet-residual": (1, 71_797_220),
    # For two classes nnU-Net's own, see test_unet3d: a channel of 33 and 65, of 33, 65, 129 and 257 is two less here.
    "unet3d-plain": (1, 5_601_382 - 2 * (33 + 65)),
    "unet3d-residual": (1, 102_336_556 - 2 * (33 + 65 + 129 + 257)),
    "unet-resnet34": (3, 24_455_249),
    "unet-resnet50": (3, 32_602_641),
    "unet-resnet101": (3, 51_673_105),
    "unet-resnext101-32x8d": (3, 95_960_145),
    "unet-densenet121": (3, 13_693_137),
    "unet-efficientnet-b0": (3, 10_115_373),
    "deeplabv3-resnet50": (3, 39_716_993),
    "deeplabv3-resnet101": (3, 58_787_457),
}


def parameters(weights: list) -> int:
    return sum(int(np.prod(weight.shape)) for weight in weights)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_parameters_of_its_source_and_batch_statistics_over_all_workers(preset: str) -> None:
    channels, total = TOTAL[preset]
    # Weights without values: the largest network has 400 MB of them.
    with keras.StatelessScope(initialize_variables=False):
        axes = 3 if preset.startswith("unet3d") else 2
        model = build_network(NetworkConfig(preset=preset), (*[64] * axes, channels))
    keras.utils.clear_session()  # else the next scope would fill them
    assert model.count_params() == total
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert all(layer.synchronized for layer in layers)
    encoder, name = encoder_layers(model), preset.partition("-")[2]
    if name in TORCHVISION:
        assert parameters([weight for layer in encoder for weight in layer.trainable_weights]) == TORCHVISION[name]
    elif name in KERAS:
        assert parameters([weight for layer in encoder for weight in layer.weights]) == KERAS[name]
    else:
        assert not encoder
    if preset.startswith("deeplab"):
        # The paper's multi-grid of 1, 2 and 4, doubled at a 16th of the size; at a 16th the stage before is as it was.
        names = [f"encoder_conv5_block{block}_2_conv" for block in (1, 2, 3)]
        rates = [model.get_layer(name).dilation_rate for name in [*names, "encoder_conv4_block2_2_conv"]]
        assert rates == [(2, 2), (4, 4), (8, 8), (1, 1)]


def test_a_recipe_may_change_single_values_and_keeps_the_rest() -> None:
    config = configuration.build(NetworkConfig, {"preset": "unet-original", "dropout": 0.3}).resolved()
    assert (config.widths, config.dropout, config.head) == ((64, 128, 256, 512, 1024), 0.3, 2)
    assert config.weights is None, "has no pretrained encoder"
    config = configuration.build(NetworkConfig, {"widths": [8, 16]}).resolved()
    assert (config.preset, config.widths, config.normalization) == ("unet-small", (8, 16), "group")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_form_stands_for_itself(preset: str) -> None:
    resolved = NetworkConfig(preset=preset).resolved()
    assert resolved.resolved() == resolved
    assert configuration.build(NetworkConfig, configuration.plain(resolved)) == resolved


def test_residual_blocks_and_auxiliary_outputs_follow_the_number_of_levels() -> None:
    def form(**changed: object) -> NetworkConfig:
        return NetworkConfig(preset="unet-residual", **changed).resolved()  # type: ignore[arg-type]

    assert (form().residual, form().deep_supervision) == ((1, 3, 4, 6, 6, 6), 3)
    short = form(widths=(8, 16, 32))
    assert (short.residual, short.deep_supervision) == ((1, 3, 4), 1)
    deep = form(widths=(8,) * 8)
    assert (deep.residual, deep.deep_supervision) == ((1, 3, 4, 6, 6, 6, 6, 6), 3)
    assert form(widths=(8, 16), residual=(2, 2)).residual == (2, 2)
    assert form(residual=()).residual == (), "none at all: plain blocks"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "unet-big"}, r"model\.preset: one of unet-small, .* expected, got 'unet-big'"),
        ({"preset": "unet-resnet50", "widths": [8]}, r"model\.widths: does not apply to unet-resnet50, which takes"),
        ({"preset": "deeplabv3-resnet50", "deep_supervision": 1}, r"model\.deep_supervision: does not apply"),
        ({"preset": "unet-small", "weights": "imagenet"}, r"model\.weights: does not apply to unet-small"),
        ({"normalization": "layer"}, r"normalization: .*'none', 'batch', 'group' or 'instance'"),
        ({"output_stride": 8}, r"model\.output_stride: does not apply"),
        ({"widths": []}, r"model\.widths"),
        ({"widths": [8, 0]}, r"model\.widths"),
        ({"convolutions": 0}, r"model\.convolutions"),
        ({"dropout": 1.0}, r"model\.dropout"),
        ({"head": -1}, r"model\.head"),
        ({"residual": [1, 1]}, r"model\.residual: a positive number of blocks for each of the 4 levels"),
        ({"residual": [1, 1, 0, 1]}, r"model\.residual"),
        ({"deep_supervision": 3}, r"model\.deep_supervision: 0 to 2 auxiliary outputs"),
        ({"preset": "unet-resnet50", "deep_supervision": 5}, r"model\.deep_supervision: 0 to 4"),
        ({"preset": "unet-resnet50", "weights": ""}, r"model\.weights: none, imagenet or the path"),
    ],
)
def test_what_does_not_fit_the_preset_is_refused_with_the_key(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration.build(NetworkConfig, values)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (NetworkConfig(), (20, 24, 1), r"model\.widths: 4 levels need .* divisible by 8.*20 x 24"),
        (NetworkConfig(preset="unet-resnet50"), (32, 48, 1), r"model\.preset: unet-resnet50 needs .* divisible by 32"),
        (NetworkConfig(preset="deeplabv3-resnet50"), (40, 32, 1), r"model\.preset: .* divisible by 16"),
        (NetworkConfig(normalization="instance"), (8, 8, 1), r"model\.normalization: .* one pixel"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_before_anything_is_built(
    config: NetworkConfig, shape: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(config, shape)
