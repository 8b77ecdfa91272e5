"""What network a training job asks for: a preset by name, and what differs from it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

_LEVELS_OF_ENCODER = 5  # an encoder U-Net's way up: from a 32nd of the size, doubled five times


@dataclass(frozen=True)
class NetworkConfig:
    """The network's form. Every key but `preset` is null by default, and then as the preset has it.

    preset: name of a preset.
    widths: filters of each level of a U-Net, from the full resolution down to the bottleneck. Each level halves the
        size of an image, and that of a volume by its `strides`.
    kernels: volumes: [depth, height, width] of each level's convolutions, odd numbers. 3x3 of images.
    strides: volumes: how many times smaller each level is than the one above, as [depth, height, width]; all 1 of the
        first. Transposed convolutions enlarge by the same. Where slices are much further apart than pixels, kernels of
        1 and strides of 1 along the depth come first.
    convolutions: number of convolutions of a block; with `residual`, of a block of the way up.
    residual: residual blocks (of two convolutions) of each level of the way down, which then makes the size smaller by
        strides; empty for plain blocks and pooling.
    normalization: what follows each convolution. `group` and `instance` do not see the batch, so neither the batch
        size nor the number of workers changes what they compute; `batch` is over the global batch. In a U-Net over an
        encoder it is that of the decoder; the encoder keeps its own.
    bias: whether convolutions before a normalisation have a bias. It has no effect but on rounding, as `batch` takes
        the mean away again. Other convolutions always have one.
    activation: what follows each convolution and its normalisation; a leaky ReLU has the slope 0.01 below 0.
    dropout: a rate. Its masks depend on the number of workers.
    dropout_place: `deep`: after the last two levels of the way down (after the encoder; before the last convolution of
        DeepLab); `blocks`: after the first convolution of each block.
    upsampling: `transpose`: a transposed convolution of 2x2, or of the level's strides; `upsample`: nearest neighbours;
        `upsample_conv`: these and a convolution of the same size.
    initializer: Keras's name of the initializer of kernels. An encoder keeps its own.
    head: filters of an extra convolution before the last one; 0 for none.
    deep_supervision: number of auxiliary outputs, from the second finest level down.
    output_stride: DeepLab: how many times smaller its last features are than the image.
    weights: weights of the encoder: `none`; `imagenet`, which Keras downloads; or path or URI of a file.
    """

    preset: str = "unet-small"
    widths: tuple[int, ...] | None = None
    kernels: tuple[tuple[int, int, int], ...] | None = None
    strides: tuple[tuple[int, int, int], ...] | None = None
    convolutions: int | None = None
    residual: tuple[int, ...] | None = None
    normalization: Literal["none", "batch", "group", "instance"] | None = None
    bias: bool | None = None
    activation: Literal["relu", "leaky_relu"] | None = None
    dropout: float | None = None
    dropout_place: Literal["deep", "blocks"] | None = None
    upsampling: Literal["transpose", "upsample", "upsample_conv"] | None = None
    initializer: Literal["he_normal", "he_uniform", "glorot_normal", "glorot_uniform"] | None = None
    head: int | None = None
    deep_supervision: int | None = None
    output_stride: Literal[8, 16] | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"model.preset: one of {', '.join(PRESETS)} expected, got {self.preset!r}")
        for key in self._given():
            if key not in PRESETS[self.preset]:
                raise ValueError(
                    f"model.{key}: does not apply to {self.preset}, which takes {', '.join(PRESETS[self.preset])}"
                )
        if self.widths is not None and (not self.widths or min(self.widths) < 1):
            raise ValueError(f"model.widths: positive numbers of filters expected, got {list(self.widths)}")
        if self.convolutions is not None and self.convolutions < 1:
            raise ValueError(f"model.convolutions: at least 1 expected, got {self.convolutions}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: a rate from 0 to below 1 expected, got {self.dropout}")
        if self.head is not None and self.head < 0:
            raise ValueError(f"model.head: 0 or more filters expected, got {self.head}")
        if self.weights == "":
            raise ValueError("model.weights: none, imagenet or the path or URI of a file expected, got nothing")
        levels = len(self.widths or PRESETS[self.preset].get("widths", ()))
        self._check_axes(levels)
        if self.residual and (len(self.residual) != levels or min(self.residual) < 1):
            raise ValueError(
                f"model.residual: a positive number of blocks for each of the {levels} levels expected, got "
                f"{list(self.residual)}"
            )
        most = self._most_auxiliary()
        if self.deep_supervision is not None and not 0 <= self.deep_supervision <= most:
            raise ValueError(
                f"model.deep_supervision: 0 to {most} auxiliary outputs expected, a level each between the finest and "
                f"the bottleneck, got {self.deep_supervision}"
            )

    def resolved(self) -> "NetworkConfig":
        """The same network with every field set that applies to its preset.

        Where `widths` has another number of levels than the preset, its residual blocks, kernels, strides and auxiliary
        outputs follow: what the last level has stands for deeper ones.
        """
        values = PRESETS[self.preset] | self._given()
        for key in ("residual", "kernels", "strides"):
            if values.get(key):
                levels, of_levels = len(values["widths"]), values[key]
                values[key] = (of_levels + levels * of_levels[-1:])[:levels]
        if "deep_supervision" in values:
            values["deep_supervision"] = min(values["deep_supervision"], self._most_auxiliary())
        return NetworkConfig(preset=self.preset, **values)

    def _check_axes(self, levels: int) -> None:
        """Of `kernels` and `strides`."""
        for key, of_levels in (("kernels", self.kernels), ("strides", self.strides)):
            if of_levels is not None and (len(of_levels) != levels or min(map(min, of_levels)) < 1):
                raise ValueError(
                    f"model.{key}: three positive numbers, of depth, height and width, for each of the {levels} levels "
                    f"expected (those of model.widths), got {[list(one) for one in of_levels]}"
                )
        if self.kernels is not None and any(size % 2 == 0 for kernel in self.kernels for size in kernel):
            raise ValueError(
                f"model.kernels: odd numbers expected, as an even kernel has no middle, got "
                f"{[list(kernel) for kernel in self.kernels]}"
            )
        if self.strides is not None and max(self.strides[0]) > 1:
            raise ValueError(
                f"model.strides: [1, 1, 1] expected of the first level, which has the patch's own size, got "
                f"{list(self.strides[0])}"
            )

    def _given(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _FIELDS if key != "preset" and getattr(self, key) is not None}

    def _most_auxiliary(self) -> int:
        widths = self.widths or PRESETS[self.preset].get("widths")
        return max(0, len(widths) - 2) if widths else _LEVELS_OF_ENCODER - 1


_FIELDS = {field.name: field for field in dataclasses.fields(NetworkConfig)}

_UNET: dict[str, Any] = {
    "widths": (16, 32, 64, 128),
    "convolutions": 2,
    "residual": (),
    "normalization": "group",
    "bias": False,
    "activation": "relu",
    "dropout": 0.0,
    "dropout_place": "deep",
    "upsampling": "transpose",
    "initializer": "he_normal",
    "head": 0,
    "deep_supervision": 0,
}
_UNET_3D: dict[str, Any] = _UNET | {
    "widths": (32, 64, 128, 256),
    "kernels": ((3, 3, 3),) * 4,
    "strides": ((1, 1, 1), *((2, 2, 2),) * 3),
    "normalization": "instance",
    "activation": "leaky_relu",
    "deep_supervision": 1,
}
# The decoder of segmentation_models (Yakubovskiy 2019) and its PyTorch twin.
_ENCODER_UNET: dict[str, Any] = {
    "convolutions": 2,
    "normalization": "batch",
    "bias": False,
    "activation": "relu",
    "dropout": 0.0,
    "dropout_place": "deep",
    "upsampling": "upsample",
    "initializer": "he_normal",
    "deep_supervision": 0,
    "weights": "none",
}
_DEEPLAB: dict[str, Any] = {"dropout": 0.5, "initializer": "he_normal", "output_stride": 16, "weights": "none"}

PRESETS: dict[str, dict[str, Any]] = {
    "unet-small": _UNET,
    # Ronneberger et al. 2015, arXiv:1505.04597, with padding and dropout as Keras users have it since 2017.
    "unet-original": _UNET
    | {
        "widths": (64, 128, 256, 512, 1024),
        "normalization": "none",
        "dropout": 0.5,
        "upsampling": "upsample_conv",
        "head": 2,
    },
    # With the biases that its known parameter count holds.
    "unet-batchnorm": _UNET | {"widths": (64, 128, 256, 512), "normalization": "batch", "bias": True},
    "unet-stroke": _UNET | {"widths": (64, 128, 256, 512, 512), "normalization": "none", "upsampling": "upsample"},
    "unet-dropout": _UNET
    | {"widths": (16, 32, 64, 128, 256), "normalization": "none", "dropout": 0.2, "dropout_place": "blocks"},
    # nnU-Net's residual encoder (Isensee et al. 2024, arXiv:2404.09556), in two dimensions.
    "unet-residual": _UNET
    | {
        "widths": (32, 64, 128, 256, 512, 512),
        "convolutions": 1,
        "residual": (1, 3, 4, 6, 6, 6),
        "normalization": "instance",
        "activation": "leaky_relu",
        "deep_supervision": 3,
    },
    # Çiçek et al. 2016, arXiv:1606.06650, in the form of nnU-Net's plain U-Net (Isensee et al. 2021,
    # doi:10.1038/s41592-020-01008-z): equal filters in a block, instance normalisation, leaky ReLU. Pooling is theirs.
    "unet3d-plain": _UNET_3D,
    # nnU-Net's residual encoder again, as it is.
    "unet3d-residual": _UNET_3D
    | {
        "widths": (32, 64, 128, 256, 320, 320),
        "kernels": ((3, 3, 3),) * 6,
        "strides": ((1, 1, 1), *((2, 2, 2),) * 5),
        "convolutions": 1,
        "residual": (1, 3, 4, 6, 6, 6),
        "deep_supervision": 3,
    },
    "unet-resnet34": _ENCODER_UNET,
    "unet-resnet50": _ENCODER_UNET,
    "unet-resnet101": _ENCODER_UNET,
    "unet-resnext101-32x8d": _ENCODER_UNET,
    "unet-densenet121": _ENCODER_UNET,
    "unet-efficientnet-b0": _ENCODER_UNET,
    "deeplabv3-resnet50": _DEEPLAB,
    "deeplabv3-resnet101": _DEEPLAB,
}
