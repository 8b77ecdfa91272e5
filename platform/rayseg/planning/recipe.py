"""The recipe of a plan: the sections `prepare` and `train`, with what each value follows from beside it."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from rayseg.data.labels import Labels
from rayseg.planning import topology
from rayseg.planning.fingerprint import Fingerprint
from rayseg.planning.rules import MOST_OF_SET, Plan
from rayseg.planning.topology import Network

_AXES = ("distance of slices", "distance of rows", "distance of columns")
_WIDTH = 120
_BATCHES = 250  # of an epoch, nnU-Net's
_CT = "CT"  # Modality


def write(
    plan: Plan,
    fingerprint: Fingerprint,
    *,
    manifest: str,
    name: str,
    labels: Labels,
    network: Network,
    memory_gb: float,
) -> str:
    """The recipe's text, YAML.

    Args:
        plan: what was planned.
        fingerprint: of the volumes that it was planned for.
        manifest: URI of theirs.
        name: of the recipe, its folder and its model.
        labels: as `prepare` takes them.
        network: the form that it was planned for.
        memory_gb: what it was planned for.
    """
    dimensions = len(plan.network.patch)
    lines = [
        *_comment(
            0,
            f"Planned for {len(fingerprint.shapes)} volumes and {memory_gb:g} GB of GPU memory, by nnU-Net's rules "
            "(Isensee et al. 2021, doi:10.1038/s41592-020-01008-z). Axes are depth (along the normal of the slices), "
            "height, width.",
        ),
        f"#   rayseg prepare --config {name}.yaml, then rayseg train likewise",
        *_of_set(fingerprint),
        "prepare:",
        f"  manifest: {_text(manifest)}",
        f"  output: {_text(f'work/{name}/prepared')}",
        f"  labels: {_labels(labels)}",
        "  volume:",
        *_spacing(plan, fingerprint, dimensions),
        *_patch(plan, dimensions),
        *_intensity(fingerprint),
        "",
        "train:",
        f"  prepared: {_text(f'work/{name}/prepared')}",
        f"  storage: {_text(f'work/{name}/runs')}",
        "  tracking_uri: sqlite:///work/mlflow.db",
        f"  name: {_text(name)}",
        f"  registered_model: {_text(name)}",
        *_network(plan, network),
        *_batch(plan, len(fingerprint.shapes), memory_gb),
        "  num_workers: 1",
    ]
    return "\n".join([*lines, ""])


def _of_set(fingerprint: Fingerprint) -> list[str]:
    shapes, spacings_mm = fingerprint.shapes, fingerprint.spacings_mm
    sentences = [
        f"Shapes: median {_numbers(np.median(shapes, axis=0))}, {_numbers(shapes.min(axis=0))} to "
        f"{_numbers(shapes.max(axis=0))}.",
        f"Spacings: median {_numbers(np.median(spacings_mm, axis=0))} mm, {_numbers(spacings_mm.min(axis=0))} to "
        f"{_numbers(spacings_mm.max(axis=0))} mm.",
    ]
    if fingerprint.unplaced:
        sentences.append(f"Left out: {fingerprint.unplaced} slices that do not say where they lie.")
    return _comment(0, *sentences)


def _spacing(plan: Plan, fingerprint: Fingerprint, dimensions: int) -> list[str]:
    spacing_mm: list[float | None] = [round(mm, 5) for mm in plan.spacing_mm]
    sentences = ["The median of each axis."]
    if plan.coarse is not None:
        median_mm = float(np.median(fingerprint.spacings_mm[:, plan.coarse]))
        sentences.append(
            f"But the {_AXES[plan.coarse]} is more than three times that of the other axes (median {median_mm:g} mm): "
            "its tenth percentile, so that volumes with thin slices keep them."
        )
    if dimensions == 2:
        sentences.append("Slices stay as they are, as the network sees one of them.")
        spacing_mm[0] = None
    sentences.append(f"The median volume becomes {_numbers(plan.shape)}.")
    return [*_comment(4, *sentences), f"    spacing_mm: {_list(spacing_mm)}"]


def _patch(plan: Plan, dimensions: int) -> list[str]:
    patch, whole = plan.network.patch, "median volume" if dimensions == 3 else "slice of the median volume"
    if patch == plan.start and all(edge >= axis for edge, axis in zip(patch, plan.shape[-dimensions:], strict=True)):
        first = f"The whole {whole}."
    elif patch == plan.start:
        first = "A cube in millimetres, or a square, and no longer than the median volume."
    else:
        first = (
            f"Made smaller, from {_numbers(plan.start)}, until the feature maps fit: each time along the axis that "
            f"covered most of the {whole}."
        )
    second = f"The network's strides divide it by {_numbers(plan.network.divisor)}."
    return [*_comment(4, first, second), f"    patch: {_list((1, *patch) if dimensions == 2 else patch)}"]


def _intensity(fingerprint: Fingerprint) -> list[str]:
    modalities = fingerprint.modalities
    if modalities.get(_CT, 0) * 2 > len(fingerprint.shapes):
        kind = "ct"
        sentence = "Most volumes are CT, where a value means the same in all of them: prepare measures the foreground."
    else:
        kind = "z_score"
        known = f"of {', '.join(sorted(modalities))}" if modalities else "of a modality that the files do not tell"
        sentence = f"The volumes are {known}: each has a scale of its own. Set `kind: ct` where values are HU."
    return [*_comment(4, sentence), f"    intensity: {{kind: {kind}}}"]


def _network(plan: Plan, network: Network) -> list[str]:
    levels = len(plan.network.strides)
    strides, kernels = plan.network.strides, plan.network.kernels
    if len(plan.network.patch) == 2:
        strides, kernels = (tuple((1, *one) for one in of_levels) for of_levels in (strides, kernels))
    lines = [
        "  model:",
        f"    preset: unet3d-{network}",
        f"    widths: {_list(plan.widths)}  # twice those of the level above, {plan.most_filters} at most",
        *_comment(4, "1 along an axis until its spacing is less than twice the finest one of the level."),
        f"    kernels: {_list(kernels)}",
        *_comment(
            4,
            f"An axis is halved while half of it has {topology.LEAST_EDGE} samples, and its spacing is less than twice "
            "the finest one of such axes.",
        ),
        f"    strides: {_list(strides)}",
    ]
    if network == "residual":
        lines.append(f"    residual: {_list(topology.blocks(levels))}")
    return [*lines, f"    deep_supervision: {max(0, levels - 3)}  # but for the two smallest levels and the full size"]


def _batch(plan: Plan, volumes: int, memory_gb: float) -> list[str]:
    sentences = [
        f"A patch has {plan.numbers / 1e6:.0f} million numbers in its feature maps, and {memory_gb:g} GB take "
        f"{plan.fitting} of these where nnU-Net trains."
    ]
    if plan.batch < plan.fitting:
        sentences.append(f"A batch has {MOST_OF_SET:.0%} of the set's voxels at most.")
    elif plan.batch > plan.fitting:
        sentences.append("A batch has two at least.")
    per_volume = max(1, round(_BATCHES * plan.batch / volumes))
    return [
        *_comment(2, *sentences),
        f"  batch_size: {plan.batch}",
        f"  patches: {{per_volume: {per_volume}, augment: {{}}}}  # about {_BATCHES} batches an epoch",
    ]


def _labels(labels: Labels) -> str:
    given = {key: value for key, value in asdict(labels).items() if value != getattr(Labels(), key) or key == "names"}
    return json.dumps(given, ensure_ascii=False)


def _comment(indent: int, *sentences: str) -> list[str]:
    start = f"{' ' * indent}# "
    return textwrap.wrap(" ".join(sentences), _WIDTH, initial_indent=start, subsequent_indent=start)


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{round(float(value), 3):g}" for value in values)


def _list(values: Sequence[object]) -> str:
    return json.dumps(values)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
