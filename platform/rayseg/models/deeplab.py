"""DeepLabV3's head (Chen et al. 2017, arXiv:1706.05587): one picture at several scales through dilated convolutions."""

from typing import Any

from keras import layers

from rayseg.models.blocks import batch_normalization

_FILTERS = 256
_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # of an output stride


def head(values: Any, output_stride: int, dropout: float, initializer: str, policy: str) -> Any:
    """The encoder's last features (N, H, W, C) with their surroundings taken in: (N, H, W, 256).

    Atrous spatial pyramid pooling, then, as torchvision has it, one more convolution.
    """

    def convolved(values: Any, kernel: int, name: str, rate: int = 1) -> Any:
        values = layers.Conv2D(
            _FILTERS,
            kernel,
            padding="same",
            dilation_rate=rate,
            use_bias=False,
            kernel_initializer=initializer,
            dtype=policy,
            name=f"{name}_conv",
        )(values)
        values = batch_normalization(policy, f"{name}_norm")(values)
        return layers.Activation("relu", dtype=policy, name=f"{name}_act")(values)

    height, width = values.shape[1:3]
    scales = [convolved(values, 1, "aspp1")]
    scales += [convolved(values, 3, f"aspp{n}", rate) for n, rate in enumerate(_RATES[output_stride], 2)]
    pooled = layers.GlobalAveragePooling2D(keepdims=True, dtype=policy, name="aspp5_pool")(values)
    pooled = convolved(pooled, 1, "aspp5")
    scales.append(layers.UpSampling2D((height, width), dtype=policy, name="aspp5_upsample")(pooled))
    values = convolved(layers.Concatenate(dtype=policy, name="aspp")(scales), 1, "project")
    if dropout:
        values = layers.Dropout(dropout, dtype=policy, name="project_dropout")(values)
    return convolved(values, 3, "head")
