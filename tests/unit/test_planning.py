"""Planning against nnU-Net's own planner: what `nnunetv2` 2.8.1 says for five made-up sets, and for a real one.

`ExperimentPlanner` is theirs of plain networks, `nnUNetPlannerResEncM` of residual encoders, which has no limit of a
batch to 5 % of the set's voxels; the memory is 8 GB, of the prostates 24.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayseg import config, snapshots
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.labels import Labels
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig
from rayseg.data.volume import VolumePreprocess
from rayseg.planning import fingerprint, rules, topology
from rayseg.planning.fingerprint import Fingerprint
from rayseg.planning.plan import PlanConfig, plan
from rayseg.records import MANIFEST
from rayseg.training.settings import TrainConfig

Case = tuple[tuple[int, int, int], tuple[float, float, float]]  # shape and spacing in millimetres


def cases(
    count: int, shape: Callable[[int], tuple[int, int, int]], between_mm: Sequence[float], pixel_mm: Sequence[float]
) -> list[Case]:
    """So many volumes; distances of slices and pixel sizes take turns."""
    return [(shape(i), (between_mm[i % len(between_mm)], *(pixel_mm[i % len(pixel_mm)],) * 2)) for i in range(count)]


def steps(first: float, step: float, count: int) -> list[float]:
    return [first + step * number for number in range(count)]


# Volumes, classes without the background, gigabytes.
SETS: dict[str, tuple[list[Case], int, float]] = {
    "thorax CT": (cases(40, lambda i: (280 + 10 * i, 512, 512), steps(1.0, 0.05, 6), steps(0.65, 0.02, 12)), 25, 8),
    "CT of thick slices": (cases(24, lambda i: (60 + 3 * i, 512, 512), (5, 5, 3, 7), steps(0.7, 0.03, 8)), 2, 8),
    "heart MR": (
        cases(100, lambda i: (8 + i % 5, 224 + 8 * (i % 6), 216 + 8 * (i % 5)), (10, 10, 8, 5), steps(1.3, 0.06, 7)),
        3, 8,
    ),
    "brain MR": (cases(60, lambda i: (150 + i % 8, 240 - 2 * (i % 3), 236 + i % 9), (1,), (1,)), 3, 8),
    "prostate MR": (
        cases(32, lambda i: (18 + i % 7, 320, 320), (3.6, 3.0, 2.2, 3.6, 4.0), steps(0.6, 0.01, 5)), 2, 24,
    ),
}  # fmt: skip

# Set, network, dimensions, and what nnU-Net says: spacing, patch, batch, strides and kernels by level.
THEIRS = """
thorax CT | plain | 3 | 1.1 0.75 0.75 | 128 128 128 | 2 | 111 222 222 222 222 222 | 333 333 333 333 333 333
thorax CT | plain | 2 | 0.75 0.75 | 512 512 | 11 | 11 22 22 22 22 22 22 22 | 33 33 33 33 33 33 33 33
thorax CT | residual | 3 | 1.1 0.75 0.75 | 128 128 128 | 2 | 111 222 222 222 222 222 | 333 333 333 333 333 333
thorax CT | residual | 2 | 0.75 0.75 | 512 448 | 14 | 11 22 22 22 22 22 22 | 33 33 33 33 33 33 33
CT of thick slices | plain | 3 | 3.0 0.805 0.805 | 56 192 192 | 2 | 111 122 222 222 222 122 | 133 333 333 333 333 333
CT of thick slices | plain | 2 | 0.805 0.805 | 512 512 | 12 | 11 22 22 22 22 22 22 22 | 33 33 33 33 33 33 33 33
CT of thick slices | residual | 3 | 3.0 0.805 0.805 | 56 192 160 | 2 | 111 122 222 222 222 122 | 133 333 333 333 333 333
CT of thick slices | residual | 2 | 0.805 0.805 | 512 512 | 12 | 11 22 22 22 22 22 22 22 | 33 33 33 33 33 33 33 33
heart MR | plain | 3 | 5.0 1.48 1.48 | 20 256 256 | 3 | 111 122 222 222 122 122 122 | 133 333 333 333 333 333 333
heart MR | plain | 2 | 1.48 1.48 | 256 256 | 49 | 11 22 22 22 22 22 22 | 33 33 33 33 33 33 33
heart MR | residual | 3 | 5.0 1.48 1.48 | 20 256 256 | 3 | 111 122 222 222 122 122 122 | 133 333 333 333 333 333 333
heart MR | residual | 2 | 1.48 1.48 | 256 256 | 50 | 11 22 22 22 22 22 22 | 33 33 33 33 33 33 33
brain MR | plain | 3 | 1.0 1.0 1.0 | 96 160 160 | 2 | 111 222 222 222 222 122 | 333 333 333 333 333 333
brain MR | plain | 2 | 1.0 1.0 | 256 256 | 49 | 11 22 22 22 22 22 22 | 33 33 33 33 33 33 33
brain MR | residual | 3 | 1.0 1.0 1.0 | 96 160 160 | 2 | 111 222 222 222 222 122 | 333 333 333 333 333 333
brain MR | residual | 2 | 1.0 1.0 | 256 256 | 50 | 11 22 22 22 22 22 22 | 33 33 33 33 33 33 33
prostate MR | plain | 3 | 2.2 0.62 0.62 | 32 320 320 | 2 | 111 122 222 222 222 122 122 | 133 333 333 333 333 333 333
prostate MR | plain | 2 | 0.62 0.62 | 320 320 | 51 | 11 22 22 22 22 22 22 | 33 33 33 33 33 33 33
prostate MR | residual | 3 | 2.2 0.62 0.62 | 32 320 320 | 3 | 111 122 222 222 222 122 122 | 133 333 333 333 333 333 333
prostate MR | residual | 2 | 0.62 0.62 | 320 320 | 96 | 11 22 22 22 22 22 22 | 33 33 33 33 33 33 33
"""


def of(volumes: list[Case]) -> Fingerprint:
    return Fingerprint(np.array([shape for shape, _ in volumes]), np.array([mm for _, mm in volumes]))


def digits(levels: tuple[tuple[int, ...], ...]) -> str:
    return " ".join("".join(map(str, level)) for level in levels)


@pytest.mark.parametrize("row", THEIRS.strip().splitlines())
def test_a_plan_is_that_of_nnunets_planner(row: str) -> None:
    name, form, axes, spacing_mm, patch, batch, strides, kernels = row.split(" | ")
    volumes, classes, memory_gb = SETS[name]
    network: topology.Network = "residual" if form == "residual" else "plain"
    dimensions = int(axes)
    planned = rules.plan(of(volumes), network, dimensions, memory_gb, 32, classes + 1)
    assert planned.spacing_mm[-dimensions:] == pytest.approx([float(mm) for mm in spacing_mm.split()], abs=1e-5)
    assert planned.network.patch == tuple(int(edge) for edge in patch.split())
    assert digits(planned.network.strides) == strides
    assert digits(planned.network.kernels) == kernels
    most = 512 if dimensions == 2 else 320
    assert planned.widths == tuple(min(32 * 2**level, most) for level in range(len(strides.split())))
    assert (planned.fitting if network == "residual" else planned.batch) == int(batch)
    assert planned.batch <= int(batch)


def hippocampus(shared_data: Path, folder: Path) -> str:
    manifest = str(folder / "manifest")
    catalog(CatalogConfig(str(shared_data / "hippocampus-mr"), manifest, Layout(images="images", masks="labels")))
    return manifest


def test_the_plan_of_the_hippocampus_set_is_nnunets(shared_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "hippocampus-3d.yaml"
    labels = Labels(("anterior", "posterior"))
    result = plan(PlanConfig(hippocampus(shared_data, tmp_path), str(output), labels))
    assert (result.volumes, result.spacing_mm, result.patch, result.batch_size) == (200, (1, 1, 1), (40, 56, 40), 7)
    recipe = config.read_yaml(output.read_text())
    assert config.build(VolumePreprocess, recipe["prepare"]["volume"]) == VolumePreprocess(
        (1.0, 1.0, 1.0), (40, 56, 40)
    )
    assert config.build(Labels, recipe["prepare"]["labels"]) == labels
    assert recipe["train"]["model"]["widths"] == [32, 64, 128, 256]
    flat = plan(PlanConfig(str(tmp_path / "manifest"), str(tmp_path / "flat.yaml"), labels, "residual", 2, filters=8))
    assert (flat.spacing_mm, flat.patch) == ((None, 1, 1), (1, 56, 40))


def test_the_median_spacing_but_of_thick_slices_the_tenth_percentile() -> None:
    thick = [((20, 200, 200), (mm, 1.0, 0.9)) for mm in (2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 5.0, 5.0, 6.0, 6.0, 6.0)]
    spacing_mm, coarse = rules.target_spacing_mm(of(thick))
    assert (spacing_mm.tolist(), coarse) == ([4.0, 1.0, 0.9], 0)
    # As many slices as a third of the rows: the median.
    many = [((70, 200, 200), mm) for _, mm in thick]
    assert rules.target_spacing_mm(of(many))[0].tolist() == [5.0, 1.0, 0.9]
    # Not more than three times as far apart.
    assert rules.target_spacing_mm(of([((20, 200, 200), (3.0, 1.0, 1.0))] * 4))[0].tolist() == [3.0, 1.0, 1.0]
    # It stays the coarsest axis.
    finer = [((20, 200, 200), (mm, 1.0, 0.9)) for mm in (0.5, 0.5, 4.0, 4.0, 5.0, 5.0)]
    assert rules.target_spacing_mm(of(finer))[0][0] == pytest.approx(1.00001)


def test_levels_of_a_patch_worked_out_by_hand() -> None:
    levels = topology.topology((5.0, 1.0, 1.0), (12, 40, 24))
    # 1 mm axes alone until 4 mm, then all three; 24 can be halved twice, 40 three times.
    assert levels.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 1))
    assert levels.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert (levels.patch, levels.divisor) == ((12, 40, 24), (2, 8, 4))
    assert topology.topology((1.0, 1.0, 1.0), (7, 7, 7)).strides == ((1, 1, 1),)
    assert topology.topology((1.0, 1.0), (9.5, 17)).patch == (10, 18)  # 9 alone is too little for once more
    assert topology.topology((1.0, 1.0), (9.5, 23)).patch == (10, 24)


def test_numbers_in_feature_maps_by_hand() -> None:
    levels = topology.topology((1.0, 1.0), (8, 8))
    assert levels.strides == ((1, 1), (2, 2))
    # Two levels of 64 x 2 and 16 x 4: two convolutions each, up a transposed one and two, three classes.
    assert topology.feature_maps(levels, (2, 4), 3, "plain") == 2 * (128 + 64) + 3 * 128 + 3 * 64
    # The stem, a block of two convolutions, three such blocks, the first with one beside it; up one and one.
    assert topology.feature_maps(levels, (2, 4), 3, "residual") == 128 + 2 * 128 + 7 * 64 + 2 * 128 + 3 * 64


@pytest.mark.parametrize("memory_gb", [1.0, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("network", ["plain", "residual"])
def test_a_plan_fits_and_its_strides_divide_its_patch(memory_gb: float, network: topology.Network) -> None:
    for volumes, classes, _ in SETS.values():
        planned = rules.plan(of(volumes), network, 3, memory_gb, 16, classes + 1)
        budget = {"plain": 560e6, "residual": 680e6}[network] * memory_gb / 8
        assert planned.numbers <= budget
        assert planned.batch == 2 or planned.batch * planned.numbers <= 2.5 * budget
        assert all(size % by == 0 for size, by in zip(planned.network.patch, planned.network.divisor, strict=True))
        assert min(size // by for size, by in zip(planned.network.patch, planned.network.divisor, strict=True)) >= 4


def test_too_little_memory_is_told() -> None:
    with pytest.raises(ValueError, match=r"plan\.memory_gb"):
        rules.plan(of(SETS["brain MR"][0]), "plain", 3, 1e-6, 32, 2)


def rows(key: str | None, count: int, **changed: object) -> list[dict]:
    tilt = math.sin(math.radians(20))
    made = []
    for number in range(count):
        row = dict.fromkeys(MANIFEST.names)
        row |= {
            "uri": f"{key}/{number}", "verdict": "ok", "series_key": key, "rows": 40, "columns": 30, "modality": "CT",
            "pixel_spacing_mm": [0.7, 0.8], "slice_thickness_mm": 9.0,
            "image_position_mm": [1.0, number * tilt, -2.5 * number], "image_orientation": [1.0, 0, 0, 0, -1.0, 0],
        }  # fmt: skip
        made.append(row | changed)
    return made


def written(folder: Path, *parts: list[dict]) -> str:
    table = pa.Table.from_pylist([row for part in parts for row in part], schema=MANIFEST)
    snapshots.write_table(str(folder / "manifest"), table)
    return str(folder / "manifest")


def test_shapes_and_spacings_come_from_where_the_slices_lie(tmp_path: Path) -> None:
    backwards = rows("a", 7)[::-1]
    others = [rows("b", 1), rows("c", 1, slice_thickness_mm=None), rows("d", 4, verdict="rejected")]
    lost = [rows("e", 2, image_position_mm=None), rows(None, 3)]
    mr = rows("f", 3, modality="MR", rows=50, pixel_spacing_mm=[1.0, 1.0])
    found = fingerprint.of_manifest(written(tmp_path, backwards, *others, *lost, mr))
    assert found.shapes.tolist() == [[7, 40, 30], [1, 40, 30], [3, 50, 30]]
    assert found.spacings_mm.tolist() == [[2.5, 0.7, 0.8], [9.0, 0.7, 0.8], [2.5, 1.0, 1.0]]
    assert (found.modalities, found.unplaced) == ({"CT": 2, "MR": 1}, 1 + 2 + 3)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    output = str(tmp_path / "one.yaml")
    with pytest.raises(ValueError, match="run the catalog job"):
        plan(PlanConfig(str(tmp_path / "nothing"), output))
    manifest = written(tmp_path, rows(None, 3))
    with pytest.raises(ValueError, match="plans are made of volumes"):
        plan(PlanConfig(manifest, output))
    (tmp_path / "one.yaml").write_text("prepare: {}")
    with pytest.raises(ValueError, match=r"plan.output: .* is there already"):
        plan(PlanConfig(manifest, output))
    for values, key in (
        ({"output": "recipe"}, "plan.output"),
        ({"dimensions": 4}, "plan.dimensions"),
        ({"memory_gb": 0.0}, "plan.memory_gb"),
        ({"filters": 0}, "plan.filters"),
    ):
        with pytest.raises(ValueError, match=key):
            config.build(PlanConfig, {"manifest": "m", "output": "a.yaml"} | values)


def test_a_recipe_says_why_and_is_one_that_the_jobs_take(tmp_path: Path) -> None:
    thick = [
        rows(f"{number}", 30, image_orientation=[1.0, 0, 0, 0, 1.0, 0], rows=512, columns=512) for number in range(6)
    ]
    for number, series in enumerate(thick):
        for slice, row in enumerate(series):
            row["image_position_mm"] = [0.0, 0.0, slice * (3.0 if number == 0 else 5.0)]
    output = tmp_path / "liver.yaml"
    labels = Labels(("liver", "lesion"), values={1: "liver", 3: "lesion"})
    result = plan(PlanConfig(written(tmp_path, *thick), str(output), labels))
    text = output.read_text()
    assert max(map(len, text.splitlines())) <= 160
    assert "three times that of the other axes" in text
    assert "Most volumes are CT" in text
    recipe = config.read_yaml(text)
    assert set(recipe) == {"prepare", "train"}
    volume = config.build(VolumePreprocess, recipe["prepare"]["volume"])
    assert (volume.spacing_mm, volume.patch, volume.intensity.kind) == (result.spacing_mm, result.patch, "ct")
    assert volume.spacing_mm == (4.0, 0.7, 0.8)  # of 3 and five times 5, by linear interpolation
    prepare = config.build(PrepareConfig, recipe["prepare"])
    assert prepare.labels == labels
    train = config.build(TrainConfig, recipe["train"])
    assert train.batch_size == result.batch_size
    strides = np.prod(train.model.strides, axis=0)
    assert (np.array(result.patch) % strides == 0).all()
