"""The catalog on a Ray cluster: one row an object whatever it is, and the same bytes each time."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import ray.data
import yaml
from deltalake import DeltaTable
from PIL import Image

from rayseg import config as configuration
from rayseg import snapshots, storage
from rayseg.data import catalog as module
from rayseg.data import standing, synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout
from rayseg.dicom.pseudonyms import from_environment
from rayseg.records import MANIFEST, REJECTS
from tests.drivers import kill_when
from tests.unit.mr_images import image

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PHANTOM = Layout(images="images", masks="masks")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients of four slices each, with masks."""
    folder = tmp_path_factory.mktemp("phantoms")
    synthetic.write_studies(str(folder), patients=3, slices=4, size=32, seed=5)
    return folder


def config_of(source: Path, output: Path, layout: Layout = PHANTOM, **values: float) -> CatalogConfig:
    return CatalogConfig(source=str(source), output=str(output / "manifest.parquet"), layout=layout, **values)


def rows_of(manifest: str) -> bytes:
    """The bytes of its Parquet file."""
    return storage.read(snapshots.current(manifest))


def test_rows_say_what_the_headers_say(phantoms: Path, tmp_path: Path) -> None:
    result = catalog(config_of(phantoms, tmp_path))
    table = snapshots.read_table(result.manifest)
    assert table.schema == MANIFEST
    rows = {row["uri"]: row for row in table.to_pylist()}
    paths = sorted((phantoms / "images").rglob("*.dcm"))
    assert set(rows) == {str(path) for path in paths}
    pseudonyms = from_environment()
    for path in paths:
        # pydicom reads the same headers independently
        dataset, row = pydicom.dcmread(path), rows[str(path)]
        assert row["verdict"] == "ok"
        assert row["kind"] == "dicom"
        assert row["bytes"] == path.stat().st_size
        mask = Path(str(path).replace("/images/", "/masks/")).with_suffix(".png")
        told = {"bytes": mask.stat().st_size, "etag": f"{mask.stat().st_mtime_ns:x}"}
        assert row["masks"] == [{"uri": str(mask), "label": None, **told}]
        assert row["patient_key"] == pseudonyms.key("patient", dataset.PatientID)
        assert row["series_key"] == pseudonyms.key("series", dataset.SeriesInstanceUID)
        assert (row["rows"], row["columns"]) == (32, 32)
        assert row["modality"] == "CT"
        assert row["pixel_spacing_mm"] == [float(value) for value in dataset.PixelSpacing]
        assert row["image_position_mm"] == [float(value) for value in dataset.ImagePositionPatient]
        assert row["transfer_syntax_uid"] == dataset.file_meta.TransferSyntaxUID
    assert (result.objects, result.accepted, result.rejected) == (12, 12, 0)
    assert (result.patients, result.series) == (3, 3)


def test_a_series_stands_together_in_the_order_of_its_slices(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "shuffled"
    for number, path in enumerate(sorted((phantoms / "images").rglob("*.dcm"))):
        # Names without any relation to the order, patients interleaved
        storage.write(str(source / f"{(number * 7) % 12:02d}.dcm"), path.read_bytes())
    rows = snapshots.read_table(catalog(config_of(source, tmp_path, Layout())).manifest).to_pylist()
    keys = [row["series_key"] for row in rows]
    assert [keys[start] for start in (0, 4, 8)] == list(dict.fromkeys(keys))
    assert keys == [key for key in dict.fromkeys(keys) for _ in range(4)]
    for start in (0, 4, 8):
        heights_mm = [row["image_position_mm"][2] for row in rows[start : start + 4]]
        assert heights_mm == sorted(heights_mm)
        assert {row["series_verdict"] for row in rows[start : start + 4]} == {"ok"}


def test_whatever_an_object_is_it_is_a_row(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    good = sorted((phantoms / "images").rglob("*.dcm"))[:2]
    whole = good[0].read_bytes()
    objects = {
        "a.dcm": whole,
        "b/copy.dcm": whole,
        "b/good.dcm": good[1].read_bytes(),
        "cut.dcm": whole[: len(whole) - 700],
        "empty.dcm": b"",
        "LICENSE.txt": b"some text " * 50,
        "noise.png": b"\x89PNG\r\n\x1a\n" + b"noise",
    }
    for name, data in objects.items():
        storage.write(str(source / name), data)
    result = catalog(config_of(source, tmp_path, Layout(), max_reject_fraction=1.0))
    rows = snapshots.read_table(result.manifest).to_pylist()
    reasons = {row["uri"].removeprefix(f"{source}/"): row["reason"] for row in rows}
    assert reasons == {
        "a.dcm": None,
        "b/copy.dcm": "series_duplicates",
        "b/good.dcm": None,
        "cut.dcm": "truncated",
        "empty.dcm": "empty_object",
        "LICENSE.txt": "not_dicom",
        "noise.png": "not_an_image",
    }
    assert result.accepted == 2
    assert result.reasons == dict(sorted(Counter(filter(None, reasons.values())).items()))


def test_an_object_that_vanishes_is_a_row(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms / "images", source)
    victim = next(iter(sorted(source.rglob("*.dcm"))))
    planned = module._plan

    def vanishing(*arguments: object) -> object:
        plan = planned(*arguments)
        victim.unlink()
        return plan

    monkeypatch.setattr(module, "_plan", vanishing)
    rows = snapshots.read_table(catalog(config_of(source, tmp_path, Layout())).manifest).to_pylist()
    (row,) = [row for row in rows if row["verdict"] == "rejected"]
    assert (row["uri"], row["reason"], row["patient_key"]) == (str(victim), "not_found", None)
    assert len(rows) == 12


def changed(path: Path, data: bytes, seconds: float) -> None:
    """Other content, with the time of change moved."""
    at_ns = path.stat().st_mtime_ns + int(seconds * 1e9)
    path.write_bytes(data)
    os.utime(path, ns=(at_ns, at_ns))


def test_unchanged_objects_are_not_read_again(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms / "images", source)
    good = sorted(source.rglob("*.dcm"))
    (source / "copy.dcm").write_bytes(good[0].read_bytes())  # rejected by the verdict on its series
    (source / "note.txt").write_bytes(b"a note")
    config = config_of(source, tmp_path, Layout(), max_reject_fraction=1.0)
    assert catalog(config).unchanged == 0
    first = rows_of(config.output)
    again = catalog(config)
    assert (again.objects, again.unchanged, again.rejected) == (14, 14, 2)
    assert rows_of(config.output) == first

    whole = {path: path.read_bytes() for path in good}
    for path in good[1:]:  # of the same size and time: whoever read them would find nothing in them
        changed(path, bytes(len(whole[path])), 0)
    assert catalog(config).unchanged == 14
    assert rows_of(config.output) == first

    for path in good[1:]:
        changed(path, whole[path], 0)
    changed(good[4], whole[good[4]][:-300], 0)  # another size
    changed(good[5], whole[good[6]], 60)  # another time
    good[7].unlink()
    (source / "new.dcm").write_bytes(whole[good[7]])
    third = catalog(config)
    assert (third.objects, third.unchanged) == (14, 11)
    assert third.reasons == {"not_dicom": 1, "series_duplicates": 2, "truncated": 1}
    fresh = catalog(dataclasses.replace(config, output=str(tmp_path / "fresh.parquet")))
    assert fresh.unchanged == 0
    assert rows_of(fresh.manifest) == rows_of(third.manifest)


def test_what_a_killed_catalog_has_read_is_not_read_again(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    images = [path.read_bytes() for path in sorted((phantoms / "images").rglob("*.dcm"))]
    for number in range(3_000):
        (source / f"{number:04d}.dcm").write_bytes(images[number % 12])
    config = config_of(source, tmp_path, Layout(), max_reject_fraction=1.0, concurrency=1)
    undisturbed = catalog(dataclasses.replace(config, output=str(tmp_path / "undisturbed.parquet")))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"catalog": configuration.plain(config)}))
    kill_when("catalog", recipe, tmp_path, "manifest.parquet.parts/*.parquet")
    assert not Path(config.output).exists()
    parts = pa.concat_tables(pq.read_table(part) for part in Path(f"{config.output}.parts").iterdir())
    read = sorted(set(parts["uri"].to_pylist()))
    assert 256 <= len(read) < 3_000
    for uri in read:  # whoever read them again would find nothing in them
        changed(Path(uri), bytes(Path(uri).stat().st_size), 0)
    result = catalog(config)
    assert (result.objects, result.unchanged) == (3_000, len(read))
    assert rows_of(config.output) == rows_of(undisturbed.manifest)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("source", "recipe.yaml", "manifest.parquet", "undisturbed.parquet")
    }


def test_rows_of_an_object_are_never_taken_over_in_part_or_twice(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever Ray cuts its blocks into; and parts that outlive their manifest, of a catalog killed at its very end."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        volume = nibabel.Nifti1Image(np.full((2, 2, 40), number, np.uint8), np.eye(4))
        (source / f"{number}.nii").write_bytes(volume.to_bytes())
    config = config_of(source, tmp_path, Layout(images="{patient}.nii"))
    monkeypatch.setattr(standing, "_FIRST_S", 0.0)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 1_000)
    with monkeypatch.context() as dying:
        dying.setattr(standing.Parts, "remove", lambda parts: None)
        first = catalog(config)
    assert first.accepted == 120
    whole = rows_of(config.output)
    rows = [len(pq.read_table(part)) for part in Path(f"{config.output}.parts").iterdir()]
    assert sum(rows) == 120
    assert not any(number % 40 for number in rows)
    assert (catalog(config).unchanged, rows_of(config.output)) == (3, whole)


def test_what_a_catalog_keeps_beside_its_manifest_is_no_object_of_its_source(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms / "images", source)
    monkeypatch.setattr(standing, "_FIRST_S", 0.0)
    monkeypatch.setattr(standing.Parts, "remove", lambda parts: None)
    assert catalog(config_of(source, source, Layout())).objects == 12
    assert catalog(config_of(source, source, Layout())).objects == 12
    shutil.rmtree(source / "manifest.parquet")
    assert next((source / "manifest.parquet.parts").iterdir())
    result = catalog(config_of(source, source, Layout()))
    assert (result.objects, result.unchanged) == (12, 12)


@pytest.mark.parametrize("change", ["key", "layout", "foreign"])
def test_rows_made_otherwise_are_not_taken_over(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    config = config_of(phantoms / "images", tmp_path, Layout())
    catalog(config)
    if change == "key":
        monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "another key")
    elif change == "layout":
        config = dataclasses.replace(config, layout=Layout(missing_mask="empty"))
    else:  # a manifest that something else wrote
        table = snapshots.read_table(config.output).replace_schema_metadata()
        shutil.rmtree(config.output)
        storage.write_table(config.output, table)
    result = catalog(config)
    assert (result.objects, result.unchanged) == (12, 0)


def test_stacks_of_a_series_are_chosen_without_reading_again(tmp_path: Path) -> None:
    """A series of two echoes, files interleaved, and one of one; what is not wanted is no failure."""
    source = tmp_path / "source"
    for number in range(8):
        data = image(5.0 * (number // 2), EchoTime=(90, 11)[number % 2])
        storage.write(str(source / f"{number}.dcm"), data)
    for number in range(3):
        storage.write(str(source / f"other{number}.dcm"), image(5.0 * number, SeriesInstanceUID="1.2.840.1.7"))
    config = config_of(source, tmp_path, Layout())
    both = catalog(config)
    assert (both.accepted, both.series, both.unchanged) == (11, 3, 0)
    rows = snapshots.read_table(both.manifest).to_pylist()
    assert [row["stack"] for row in rows] == ["EchoTime 11 ms"] * 4 + ["EchoTime 90 ms"] * 4 + [None] * 3
    assert [row["image_position_mm"][2] for row in rows] == [0, 5, 10, 15] * 2 + [0, 5, 10]
    one = catalog(dataclasses.replace(config, stacks="EchoTime 9*"))
    assert (one.accepted, one.series, one.unchanged) == (7, 2, 11)
    assert one.reasons == {"stack_not_wanted": 4}
    taken = [row["series_key"] for row in snapshots.read_table(one.manifest).to_pylist() if row["verdict"] == "ok"]
    assert taken == [row["series_key"] for row in rows[4:]]
    chosen = rows_of(one.manifest)
    again = catalog(config)
    assert again.unchanged == 11
    assert snapshots.read_table(again.manifest).to_pylist() == rows
    assert rows_of(catalog(dataclasses.replace(config, stacks=("echo 1", "*9?*"))).manifest) == chosen
    for none in ((), "", ("b=0", "")):
        with pytest.raises(ValueError, match=r"catalog\.stacks"):
            dataclasses.replace(config, stacks=none)


def test_a_failed_read_is_tried_again(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms / "images", source)
    config = config_of(source, tmp_path, Layout())
    catalog(config)
    table = snapshots.read_table(config.output)
    rows = table.to_pylist()
    rows[3] |= {"verdict": "rejected", "reason": "read_failed", "detail": "object: OSError"}
    snapshots.write_table(config.output, pa.Table.from_pylist(rows, schema=table.schema))
    result = catalog(config)
    assert (result.objects, result.unchanged, result.accepted) == (12, 11, 12)


def test_a_manifest_of_before_is_taken_over_whatever_dies(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, as manifests were before they were tables."""
    config = config_of(phantoms / "images", tmp_path, Layout())
    catalog(config)
    whole = rows_of(config.output)
    shutil.rmtree(config.output)
    Path(config.output).write_bytes(whole)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(snapshots.Writer, "_commit", die)
        with pytest.raises(KeyboardInterrupt):
            catalog(config)
    result = catalog(config)
    assert (result.objects, result.unchanged) == (12, 12)
    assert rows_of(config.output) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.parquet"]


def test_the_history_tells_of_each_manifest(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms / "images", source)
    config = config_of(source, tmp_path, Layout())
    catalog(config)
    (source / "note.txt").write_bytes(b"a note")
    catalog(config)
    told = [json.loads(one["userMetadata"]) for one in DeltaTable(config.output).history()]
    counts = {"objects": 13, "accepted": 12, "patients": 3, "series": 3, "rejected": {"not_dicom": 1}}
    assert told == [counts, counts | {"objects": 12, "rejected": {}}]


def test_too_many_rejects_fail_after_the_manifest_is_written(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms / "images", source)
    for number in range(5):
        storage.write(str(source / f"{number}.txt"), b"text")
    with pytest.raises(ValueError, match=r"5 of 17 objects rejected, over max_reject_fraction 0.2: not_dicom 5"):
        catalog(config_of(source, tmp_path, Layout()))
    assert len(snapshots.read_table(str(tmp_path / "manifest.parquet"))) == 17


def test_the_same_source_gives_the_same_bytes_however_it_is_cut_into_tasks(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalog(config_of(phantoms, tmp_path / "one"))
    monkeypatch.setattr(module, "_ROWS_PER_TASK", 3)
    second = catalog(config_of(phantoms, tmp_path / "two", concurrency=2))
    assert rows_of(first.manifest) == rows_of(second.manifest)


def test_a_header_longer_than_the_first_read_is_read_whole(phantoms: Path, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(next((phantoms / "images").rglob("*.dcm")))
    dataset.add_new(0x00091001, "OB", bytes(2 * module.HEADER_BYTES))  # before Rows and the position
    dataset.add_new(0x00090010, "LO", "A MAKER")
    source = tmp_path / "source"
    source.mkdir()
    dataset.save_as(source / "long.dcm")
    (row,) = snapshots.read_table(catalog(config_of(source, tmp_path, Layout())).manifest).to_pylist()
    assert (row["verdict"], row["rows"]) == ("ok", 32)


def png(path: Path, value: int, shape: tuple[int, int] = (8, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def test_images_take_patient_and_series_from_the_csv(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(4):
        png(source / f"images/{number}.png", number)
        png(source / f"masks/{number}.png", number)
    (source / "groups.csv").write_text("file,group\n0.png,g1\n1.png,g2\n2.png,g1\n")
    layout = Layout(images="images", masks="masks", groups="groups.csv")
    rows = snapshots.read_table(
        catalog(config_of(source, tmp_path, layout, max_reject_fraction=0.5)).manifest
    ).to_pylist()
    pseudonyms = from_environment()
    assert [row["patient_key"] for row in rows[:3]] == [
        pseudonyms.key("patient", group) for group in ("g1", "g2", "g1")
    ]
    assert [row["series_key"] for row in rows[:3]] == [pseudonyms.key("series", group) for group in ("g1", "g2", "g1")]
    assert {(row["kind"], row["rows"], row["columns"]) for row in rows} == {("image", 8, 10)}
    assert rows[3]["reason"] == "missing_attribute"
    assert "CSV" in rows[3]["detail"]


def test_images_without_a_csv_take_the_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in ("p1/brain/1.png", "p1/bone/1.png", "p2/brain/1.png"):
        png(source / path, 3)
    rows = snapshots.read_table(catalog(config_of(source, tmp_path, Layout())).manifest).to_pylist()
    by_path = {row["uri"].removeprefix(f"{source}/"): row for row in rows}
    assert by_path["p1/brain/1.png"]["patient_key"] == by_path["p1/bone/1.png"]["patient_key"]
    assert by_path["p1/brain/1.png"]["series_key"] != by_path["p1/bone/1.png"]["series_key"]
    assert by_path["p1/brain/1.png"]["patient_key"] != by_path["p2/brain/1.png"]["patient_key"]
    assert all(row["masks"] == [] for row in rows)


@pytest.mark.parametrize(("missing_mask", "reason"), [("reject", "no_mask"), ("empty", None)])
def test_an_image_without_a_mask(tmp_path: Path, missing_mask: str, reason: str | None) -> None:
    source = tmp_path / "source"
    for number in range(2):
        png(source / f"{number}.png", number)
    png(source / "masks" / "0.png", 1)  # the masks lie within the folder of the images, and are none of those
    layout = Layout(masks="masks", missing_mask=missing_mask)
    rows = snapshots.read_table(
        catalog(config_of(source, tmp_path, layout, max_reject_fraction=0.5)).manifest
    ).to_pylist()
    assert [row["reason"] for row in rows] == [None, reason]
    assert [row["masks"] == [] for row in rows] == [False, True]


def test_masks_without_an_image_are_listed(tmp_path: Path) -> None:
    for name in ("images/1.png", "masks/1.png", "masks/2.png", "masks/deep/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    result = catalog(config_of(tmp_path, tmp_path, Layout("images", "masks")))
    assert (result.accepted, result.rejected, result.masks_without_image) == (1, 0, 2)
    table = snapshots.read_table(str(tmp_path / "manifest.masks-without-image.parquet"))
    assert table.schema.equals(REJECTS)
    assert {(row["uri"], row["stage"], row["reason"]) for row in table.to_pylist()} == {
        (str(tmp_path / name), "catalog", "no_image") for name in ("masks/2.png", "masks/deep/3.png")
    }
    shutil.rmtree(tmp_path / "masks" / "deep")
    (tmp_path / "masks" / "2.png").unlink()
    assert catalog(config_of(tmp_path, tmp_path, Layout("images", "masks"))).masks_without_image == 0
    assert len(pq.read_table(tmp_path / "manifest.masks-without-image.parquet")) == 0


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(images="pictures"), "lacks what the layout names"),
        (Layout(groups="absent.csv"), "lacks what the layout names"),
        (Layout(images="images", masks="images/0"), "0 of 2 images pair"),
    ],
)
def test_a_layout_that_does_not_fit_is_an_error(tmp_path: Path, layout: Layout, message: str) -> None:
    source = tmp_path / "source"
    png(source / "images/1.png", 1)
    png(source / "images/2.png", 1)
    png(source / "images/0/other.png", 1)
    with pytest.raises(ValueError, match=message):
        catalog(config_of(source, tmp_path, layout))


def test_a_real_archive(shared_data: Path, tmp_path: Path) -> None:
    result = catalog(config_of(shared_data / "mr-archive", tmp_path, Layout()))
    assert (result.objects, result.accepted, result.series, result.patients) == (92, 92, 4, 2)
