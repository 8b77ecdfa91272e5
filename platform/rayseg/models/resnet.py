"""Residual networks that Keras does not have (He et al. 2016, arXiv:1512.03385; Xie et al. 2017, arXiv:1611.05431).

Their form is torchvision's to the padding and the place of the strides, so that its weights fit once each layer has
the name that it has here: after a prefix, those that Keras gives in residual networks, `conv1_conv`, `conv1_bn`,
`conv2_block1_1_conv`, ..., with `conv2_block1_0_conv` for the short cut.
"""

from typing import Any

from keras import layers

from rayseg.models.blocks import GroupedConv2D, batch_normalization

BLOCKS = {"resnet34": (3, 4, 6, 3), "resnext101-32x8d": (3, 4, 23, 3)}
_EPSILON = 1e-5
_GROUPS, _GROUP_WIDTH = 32, 8  # of the ResNeXt; a stage of twice the filters has groups of twice the width


def resnet(values: Any, name: str, policy: str, prefix: str) -> list[Any]:
    """The features of (N, H, W, C) at a half, 4th, 8th, 16th and 32nd of its size.

    Args:
        values: H and W divisible by 32.
        name: of `BLOCKS`.
        policy: Keras dtype policy of the layers.
        prefix: of their names.
    """

    def convolved(values: Any, filters: int, kernel: int, strides: int, name: str, groups: int = 1) -> Any:
        # With strides Keras's "same" would pad at the end alone.
        if strides > 1 and kernel > 1:
            values = layers.ZeroPadding2D(kernel // 2, dtype=policy, name=f"{prefix}{name}_pad")(values)
        form = GroupedConv2D if groups > 1 else layers.Conv2D
        values = form(
            filters,
            kernel,
            strides=strides,
            padding="valid" if strides > 1 else "same",
            groups=groups,
            use_bias=False,
            kernel_initializer="he_normal",
            dtype=policy,
            name=f"{prefix}{name}_conv",
        )(values)
        return batch_normalization(policy, f"{prefix}{name}_bn", _EPSILON)(values)

    def relu(values: Any, name: str) -> Any:
        return layers.Activation("relu", dtype=policy, name=f"{prefix}{name}")(values)

    def basic(values: Any, filters: int, strides: int, name: str) -> Any:
        values = relu(convolved(values, filters, 3, strides, f"{name}_1"), f"{name}_1_relu")
        return convolved(values, filters, 3, 1, f"{name}_2")

    def bottleneck(values: Any, filters: int, strides: int, name: str) -> Any:
        inner = filters * _GROUPS * _GROUP_WIDTH // 64
        values = relu(convolved(values, inner, 1, 1, f"{name}_1"), f"{name}_1_relu")
        values = relu(convolved(values, inner, 3, strides, f"{name}_2", _GROUPS), f"{name}_2_relu")
        return convolved(values, 4 * filters, 1, 1, f"{name}_3")

    block, expansion = (basic, 1) if name == "resnet34" else (bottleneck, 4)
    values = relu(convolved(values, 64, 7, 2, "conv1"), "conv1_relu")
    features = [values]
    values = layers.ZeroPadding2D(1, dtype=policy, name=f"{prefix}pool1_pad")(values)
    values = layers.MaxPooling2D(3, strides=2, dtype=policy, name=f"{prefix}pool1_pool")(values)
    for stage, count in enumerate(BLOCKS[name], 2):
        filters = 64 * 2 ** (stage - 2)
        for index in range(1, count + 1):
            strides = 2 if stage > 2 and index == 1 else 1
            place = f"conv{stage}_block{index}"
            short = values
            if index == 1 and (strides > 1 or values.shape[-1] != expansion * filters):
                short = convolved(values, expansion * filters, 1, strides, f"{place}_0")
            values = layers.Add(dtype=policy, name=f"{prefix}{place}_add")(
                [short, block(values, filters, strides, place)]
            )
            values = relu(values, f"{place}_out")
        features.append(values)
    return features
