"""`rayseg init`: a stranger's folder becomes a recipe that catalogs, pairs and prepares all of it."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayseg import config, storage
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout, plan
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.prepared import describe
from rayseg.evaluation.evaluate import EvaluateConfig
from rayseg.evaluation.promote import PromoteConfig
from rayseg.inference.archive import SegmentConfig
from rayseg.starter import facts
from rayseg.starter.facts import Facts
from rayseg.starter.init import init
from rayseg.training.settings import TrainConfig
from tests import folders
from tests.folders import PATIENTS, SIDE, SLICES, disc, encoded, picture

ROWS = PATIENTS * SLICES


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(folder: str) -> tuple[dict[str, Any], str]:
    """The recipe and what was said."""
    said = init(folder, "recipe.yaml", "stranger")
    return config.read_recipe("recipe.yaml"), "\n".join(said)


def prepared_of(**changes: Any) -> tuple[Any, Any]:
    """Catalogs and prepares by the recipe here."""
    cataloged = catalog(config.load(CatalogConfig, "catalog", "recipe.yaml"))
    assert cataloged.rejected == 0, cataloged.reasons
    assert cataloged.masks_without_image == 0
    settings = [f"{key}={value}" for key, value in changes.items()]
    return cataloged, prepare(config.load(PrepareConfig, "prepare", "recipe.yaml", settings))


LAYOUTS: list[tuple[Callable[[str], None], dict[str, Any], dict[str, Any], int]] = [
    (
        folders.stroke,
        {"images": "{label}/DICOM/{slice}.dcm", "masks": "{label}/PNG/{slice}.png"},
        {
            "names": ["hemorrhagic", "ischemic"],
            "sources": {"hemorrhagic": "hemorrhagic", "ischemic": "ischemic"},
        },
        PATIENTS,
    ),
    (
        folders.jpegs,
        {
            "images": "{patient}/brain/{slice}.jpg",
            "masks": "{patient}/brain/{slice}_HGE_Seg.jpg",
            "missing_mask": "empty",
        },
        {"names": ["lesion"], "threshold": 127},
        PATIENTS,
    ),
    (
        folders.windows,
        {
            "images": "{patient}/brain/{slice}.jpg",
            "masks": "{patient}/brain/{slice}_HGE_Seg.jpg",
            "missing_mask": "empty",
        },
        {"names": ["lesion"], "threshold": 127},
        PATIENTS,
    ),
    (
        folders.tifs,
        {"images": "{patient}/{slice}.tif", "masks": "{patient}/{slice}_mask.tif"},
        {"names": ["lesion"]},
        PATIENTS,
    ),
    (
        folders.pictures,
        {"images": "images", "masks": "masks", "groups": "groups.csv"},
        {"names": ["lesion"]},
        PATIENTS,
    ),
    (
        folders.bleeds,
        {"images": "images/{patient:3}{slice}.png", "masks": "masks/{patient:3}{slice}.png"},
        {
            "names": {"red", "blue", "yellow", "cyan", "green"},
            "colors": {
                "#ff0000": "red",
                "#0000ff": "blue",
                "#ffff00": "yellow",
                "#00ffff": "cyan",
                "#00ff00": "green",
            },
        },
        PATIENTS,
    ),
    (
        folders.ischemia,
        {"images": "images/Ischemic_{patient}_{slice}.png", "masks": "masks/Ischemic_{patient}_{slice}.png"},
        {"names": ["lesion"], "colors": {"#00ff00": "lesion"}},
        PATIENTS,
    ),
    (
        folders.dicom_masks,
        {"images": "{study}/image/{slice}.dcm", "masks": "{study}/mask/{slice}.dcm"},
        {"names": ["lesion"]},
        PATIENTS,
    ),
    (
        folders.segmentations,
        {"images": "{study}/ct/{slice}", "masks": "{study}/seg.dcm", "missing_mask": "empty"},
        {"names": {"Hemorrhage", "Infarct"}, "sources": {"Hemorrhage": "Hemorrhage", "Infarct": "Infarct"}},
        PATIENTS,
    ),
    (
        folders.structures,
        {"images": "{study}/ct/{slice}.dcm", "masks": "{study}/rt.dcm", "missing_mask": "empty"},
        {"names": ["Tumour"], "sources": {"Tumour": "Tumour"}},
        PATIENTS,
    ),
    (
        folders.label_volumes,
        {"images": "{study}/ct/{slice}.dcm", "masks": "{study}/label.nii.gz", "missing_mask": "empty"},
        {"names": ["class_1", "class_2"], "values": {1: "class_1", 2: "class_2"}},
        PATIENTS,
    ),
    (
        folders.volumes,
        {"images": "{patient}/ct.nii.gz", "masks": "{patient}/label.nii.gz"},
        {"names": ["class_1", "class_2", "class_4"], "values": {1: "class_1", 2: "class_2", 4: "class_4"}},
        PATIENTS,
    ),
    (
        folders.nnunet,
        {"images": "imagesTr/{patient}_0000.nii.gz", "masks": "labelsTr/{patient}.nii.gz"},
        {"names": ["class_1", "class_2", "class_4"], "values": {1: "class_1", 2: "class_2", 4: "class_4"}},
        PATIENTS,
    ),
    (
        folders.scans,
        {"images": "scans/{slice}.png", "masks": "truth/{slice}_mask.png", "groups": "who.csv"},
        {"names": ["lesion"]},
        PATIENTS,
    ),
    (
        folders.heads,
        {"images": "all/img_{patient}-{slice}.jpg", "masks": "all/mask_{patient}-{slice}.png"},
        {"names": ["class_1", "class_2"], "values": {1: "class_1", 2: "class_2"}},
        PATIENTS,
    ),
]


@pytest.mark.parametrize(("make", "layout", "labels", "patients"), LAYOUTS, ids=[case[0].__name__ for case in LAYOUTS])
def test_a_layout_becomes_a_recipe_that_prepares_all_of_it(
    here: Path, make: Callable[[str], None], layout: dict[str, Any], labels: dict[str, Any], patients: int
) -> None:
    make(str(here))
    recipe, said = recipe_of("source")
    assert recipe["catalog"]["layout"] == layout
    written = recipe["prepare"]["labels"]
    assert {**written, "names": type(labels["names"])(written["names"])} == labels
    cataloged, result = prepared_of(preprocess=f"{{size: [{SIDE}, {SIDE}], percentiles: null}}")
    assert (cataloged.accepted, cataloged.patients) == (ROWS, patients)
    assert (result.rejected, result.rows) == (0, ROWS), result.reasons
    assert result.positive >= ROWS // 2
    assert min(result.train, result.val, result.test) > 0
    seen = set(np.concatenate(masks_of(result.prepared)).tolist())
    assert seen == set(range(len(written["names"]) + 1)), "every class is there"
    for section, config_class in (("train", TrainConfig), ("evaluate", EvaluateConfig), ("promote", PromoteConfig)):
        config.load(config_class, section, "recipe.yaml")
    assert "PATIENTS" not in said


def masks_of(uri: str) -> list[np.ndarray]:
    described = describe(uri)
    rows = [row for split in ("train", "val", "test") for row in described.read_rows(split, ("mask",)).to_pylist()]
    return [np.frombuffer(row["mask"], np.uint8) for row in rows]


def test_without_any_word_of_patients_it_says_so_and_names_the_table_that_is_to_be_written(here: Path) -> None:
    folders.deep(str(here))
    recipe, said = recipe_of("source")
    assert recipe["catalog"]["layout"] == {"images": "images", "masks": "masks", "groups": "groups.csv"}
    assert "NOTHING TELLS THE PATIENTS" in said
    assert "file,group" in said
    text = Path("recipe.yaml").read_text()
    assert "all images count as one patient" in text
    images = sorted(path.name for path in Path("source/images").iterdir())
    rows = "".join(f"{name},{number // 2}\n" for number, name in enumerate(images))
    Path("source/groups.csv").write_text(f"file,group\n{rows}")
    cataloged, result = prepared_of(preprocess=f"{{size: [{SIDE}, {SIDE}]}}")
    assert (cataloged.accepted, cataloged.patients, result.rejected) == (ROWS, PATIENTS, 0)


def test_a_table_whose_names_lack_their_ending_is_told(here: Path) -> None:
    folders.scans(str(here))
    table = Path("source/who.csv")
    table.write_text(table.read_text().replace(".png", ""))
    _, said = recipe_of("source")
    assert "not spelled as they lie" in said
    assert "NOTHING TELLS THE PATIENTS" in said


def test_a_folder_is_never_told_by_its_names(here: Path) -> None:
    for number in range(6):
        storage.write(f"source/Doe_Jane/images/scan{number}.png", encoded(picture(number), "PNG"))
        storage.write(f"source/Doe_Jane/masks/scan{number}.png", encoded(np.ones((8, 8)) * (number % 2), "PNG"))
        storage.write(f"source/Roe_John/images/scan{number}.png", encoded(picture(9 + number), "PNG"))
        storage.write(f"source/Roe_John/masks/scan{number}.png", encoded(disc(number), "PNG"))
    _, said = recipe_of("source")
    assert "another size than their image, as xxx_xxxx/images/xxxx0.png of 32x32 with a mask of 8x8" in said
    assert "2 folders are taken for patients; where they are classes, write {label}" in said
    assert not re.search("Doe|Jane|Roe|John", said)
    assert not re.search("Doe|Jane|Roe|John", Path("recipe.yaml").read_text())


def pairs(images: str, masks: str, image: Callable[[int], np.ndarray], mask: Callable[[int], np.ndarray]) -> None:
    for number in range(8):
        storage.write(f"source/{images}/p{number // 2}_{number}.png", encoded(image(number), "PNG"))
        storage.write(f"source/{masks}/p{number // 2}_{number}.png", encoded(mask(number), "PNG"))


def binary(number: int) -> np.ndarray:
    return disc(number) * np.uint8(255)


def test_swapped_images_and_masks_are_doubted(here: Path) -> None:
    pairs("images", "masks", image=binary, mask=picture)
    recipe, said = recipe_of("source")
    assert recipe["catalog"]["layout"]["images"] == "masks/{patient}_{slice}.png"
    assert "are they swapped?" in said


def test_masks_that_look_like_images_are_doubted(here: Path) -> None:
    pairs("images", "masks", image=picture, mask=lambda number: picture(50 + number))
    assert "what is taken for masks looks like images: are images and masks swapped?" in recipe_of("source")[1]


def test_images_that_look_like_masks_are_doubted(here: Path) -> None:
    pairs("images", "masks", image=binary, mask=binary)
    assert "what is taken for images looks like masks" in recipe_of("source")[1]


def test_inverted_masks_are_doubted(here: Path) -> None:
    pairs("images", "masks", image=picture, mask=lambda number: 255 - binary(number))
    assert re.search(r"8\d% of the pixels of masks are foreground: are masks inverted\?", recipe_of("source")[1])


def test_sets_of_others_are_no_patients(here: Path) -> None:
    for name in ("train", "val"):
        for number in range(6):
            storage.write(f"source/{name}/images/s{number // 2}-{number}.png", encoded(picture(number), "PNG"))
            storage.write(f"source/{name}/masks/s{number // 2}-{number}.png", encoded(binary(number), "PNG"))
    recipe, _ = recipe_of("source")
    assert recipe["catalog"]["layout"]["images"] == "{set}/images/{patient}-{slice}.png"


def test_an_archive_without_labels_can_be_cataloged_and_segmented(here: Path) -> None:
    for patient, slices in enumerate(folders.series(str(here))):
        for number, data in enumerate(slices):
            storage.write(f"source/p{patient}/{number}", data)
    recipe, said = recipe_of("source")
    assert recipe.keys() == {"common", "catalog", "segment"}
    assert catalog(config.load(CatalogConfig, "catalog", "recipe.yaml")).accepted == ROWS
    config.load(SegmentConfig, "segment", "recipe.yaml")
    assert "no labels" in said
    assert "rayseg catalog" in said


@pytest.mark.parametrize(("body_part", "window"), [("HEAD", "brain"), ("CHEST", None)])
def test_the_window_of_ct_is_by_body_part(here: Path, body_part: str, window: str | None) -> None:
    import pydicom

    folders.label_volumes(str(here))
    for path in Path("source").rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.BodyPartExamined = body_part
        dataset.save_as(path)
    preprocess = recipe_of("source")[0]["prepare"]["preprocess"]
    assert preprocess["window"] == window
    assert (preprocess["percentiles"] is None) == (window is not None)


def test_no_recipe_is_written_over_and_a_folder_without_images_is_refused(here: Path) -> None:
    folders.pictures(str(here))
    init("source")
    with pytest.raises(ValueError, match=r"there is source\.yaml already; name another file by --output"):
        init("source")
    with pytest.raises(ValueError, match="there is no folder none"):
        init("none")
    storage.write("other/readme.txt", b"nothing")
    with pytest.raises(ValueError, match="none of the 1 files below other is an image"):
        init("other")


def test_the_command_prints_what_comes_next_without_a_warning(here: Path) -> None:
    folders.windows(str(here))
    done = subprocess.run([sys.executable, "-m", "rayseg.command", "init", "source"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == ["  rayseg run source.yaml", "  rayseg serve --config source.yaml"]
    again = subprocess.run([sys.executable, "-m", "rayseg.command", "init", "source"], capture_output=True, text=True)
    assert again.returncode == 2


@pytest.mark.parametrize(
    ("name", "images", "patients", "source"),
    [
        ("brain-tumor-mri", 2032, 41, "table"),
        ("hemorrhage-ct", 36, 25, "name"),
        ("ischemic-ct", 12, 3, "name"),
        ("hippocampus-mr", 200, 200, "volume"),
    ],
)
def test_real_folders(shared_data: Path, name: str, images: int, patients: int, source: str) -> None:
    seen: Facts = facts.of_folder(str(shared_data / name))
    assert (seen.images, seen.pairs, seen.patients) == (images, images, patients)
    assert seen.told_by is not None
    assert seen.told_by.source == source
    assert seen.layout is not None
    root = shared_data / name
    listed = [(str(path.relative_to(root)), None) for path in root.rglob("*") if path.is_file()]
    assert sum(bool(image.masks) for image in plan(seen.layout, listed, {})) == images
    assert seen.classes is not None
    expected = {"brain-tumor-mri": 1, "hemorrhage-ct": 5, "ischemic-ct": 1, "hippocampus-mr": 2}[name]
    assert len(seen.classes.names) == expected


def test_real_archives_have_no_labels(shared_data: Path) -> None:
    for name, modality, count in (("mr-archive", "MR", 92), ("real-ct", "CT", 28)):
        seen = facts.of_folder(str(shared_data / name))
        assert (seen.layout, seen.images, seen.modality) == (None, count, modality)


def test_sizes_and_amounts_follow_from_the_images(here: Path) -> None:
    def large(number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 256, (300, 200), np.uint8)

    pairs("images", "masks", image=large, mask=lambda number: np.pad(binary(number), ((134, 134), (84, 84))))
    recipe, _ = recipe_of("source")
    assert recipe["prepare"]["preprocess"]["size"] == [256, 256]
    assert recipe["train"]["batch_size"] == 2
    assert Layout(**recipe["catalog"]["layout"])
    assert Image.open(io.BytesIO(Path("source/images/p0_0.png").read_bytes())).size == (200, 300)
