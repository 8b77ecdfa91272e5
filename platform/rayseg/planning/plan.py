"""Plan: the volumes of a manifest to a recipe with spacing, patch, network and batch."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from rayseg.data.labels import Labels
from rayseg.planning import fingerprint, recipe, rules
from rayseg.planning.topology import Network


@dataclass(frozen=True)
class PlanConfig:
    """What to plan for, and where to write the recipe."""

    manifest: str  # URI of a manifest that `catalog` wrote
    output: str  # path of the recipe, a local file NAME.yaml that is not there yet; NAME names folders and the model
    labels: Labels = field(default_factory=Labels)
    network: Network = "plain"  # form of the network: plain, or with a residual encoder, which is larger
    dimensions: int = 3  # 3, or 2 for a network that sees one slice
    memory_gb: float = 8.0  # memory of the GPU that trains; patch and batch are made to fit, as nnU-Net has measured it
    filters: int = 32  # of the first level; fewer make training faster, and patch or batch larger

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.\-]+\.ya?ml", Path(self.output).name):
            raise ValueError(
                f"plan.output: a file NAME.yaml of letters, digits and any of _.- expected, got {self.output!r}"
            )
        if self.dimensions not in (2, 3):
            raise ValueError(f"plan.dimensions: 2 or 3 expected, got {self.dimensions}")
        if not self.memory_gb > 0:
            raise ValueError(f"plan.memory_gb: a positive number expected, got {self.memory_gb}")
        if self.filters < 1:
            raise ValueError(f"plan.filters: a positive number expected, got {self.filters}")


@dataclass(frozen=True)
class PlanResult:
    """What was planned; axes are depth, height, width. `spacing_mm` has no depth where slices stay as they are."""

    recipe: str
    volumes: int
    spacing_mm: tuple[float | None, float, float]
    patch: tuple[int, ...]
    levels: int
    batch_size: int
    seconds: float


def plan(config: PlanConfig) -> PlanResult:
    """Writes the recipe.

    Raises:
        ValueError: there is no manifest, it has no volumes, a file stands at `output`, or nothing fits.
    """
    began = time.monotonic()
    path = Path(config.output)
    if path.exists():
        raise ValueError(f"plan.output: {config.output} is there already; give another name, or remove it")
    volumes = fingerprint.of_manifest(config.manifest)
    planned = rules.plan(
        volumes, config.network, config.dimensions, config.memory_gb, config.filters, len(config.labels.names) + 1
    )
    text = recipe.write(
        planned, volumes, manifest=config.manifest, name=path.stem, labels=config.labels, network=config.network,
        memory_gb=config.memory_gb,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    flat = config.dimensions == 2
    return PlanResult(
        recipe=config.output,
        volumes=len(volumes.shapes),
        spacing_mm=(None if flat else planned.spacing_mm[0], *planned.spacing_mm[1:]),
        patch=(1, *planned.network.patch) if flat else planned.network.patch,
        levels=len(planned.network.strides),
        batch_size=planned.batch,
        seconds=time.monotonic() - began,
    )
