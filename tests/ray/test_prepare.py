"""Preparing on a Ray cluster: samples as computed by hand, splits by patient, equal bytes, rejects as rows."""

import csv
import dataclasses
import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import ray
import yaml
from PIL import Image

from rayseg import config as configuration
from rayseg import snapshots, storage
from rayseg.data import feed, prepared, synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.labels import Labels
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.preprocess import Preprocess, Window
from rayseg.data.split import Split, check_leak
from rayseg.records import MANIFEST, PREPARED, REJECTS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

WHOLE = Preprocess(size=(8, 8), percentiles=(0, 100))


def patient(number: int) -> str:
    return f"{number:020x}"


def manifest_of(folder: Path, patients: int = 12, slices: int = 5) -> Path:
    """Images of 8 x 8 with a manifest: the first two slices of each patient have one, then two, pixels of lesion."""
    rng = np.random.default_rng(11)
    rows = []
    for number in range(patients):
        for index in range(slices):
            image_path, mask_path = folder / f"images/{number}/{index}.png", folder / f"masks/{number}/{index}.png"
            mask = np.zeros((8, 8), np.uint8)
            mask[2, : min(index + 1, 2) if index < 2 else 0] = 255
            for path, pixels in ((image_path, rng.integers(0, 256, (8, 8), np.uint8)), (mask_path, mask)):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            rows.append(
                {
                    "uri": str(image_path),
                    "masks": [{"uri": str(mask_path), "label": None}],
                    "verdict": "ok",
                    "kind": "image",
                    "patient_key": patient(number),
                    "series_key": f"series{number}",
                }
            )
    storage.write_table(str(folder / "manifest.parquet"), pa.Table.from_pylist(rows, schema=MANIFEST))
    return folder / "manifest.parquet"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest_of(tmp_path_factory.mktemp("images"))


def config_of(manifest: Path, output: Path, **values: object) -> PrepareConfig:
    defaults = {"preprocess": WHOLE, "split": Split(val=0.25, test=0.25, seed="1")}
    return PrepareConfig(manifest=str(manifest), output=str(output), **(defaults | values))


def everything(uri: str) -> pa.Table:
    found = prepared.describe(uri)
    return pa.concat_tables([found.read_rows(split) for split in ("train", "val", "test")])


def files(folder: Path) -> dict[str, bytes]:
    """Without the logs of tables, which tell the time."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "_delta_log" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("split=*/part-*.parquet"))


def test_every_accepted_row_becomes_the_sample_that_its_files_say(manifest: Path, tmp_path: Path) -> None:
    result = prepare(config_of(manifest, tmp_path, rows_per_shard=7))
    rows = {row["uri"]: row for row in everything(result.prepared).to_pylist()}
    assert set(rows) == set(pq.read_table(manifest)["uri"].to_pylist())
    for uri, row in rows.items():
        image = np.asarray(Image.open(uri)).astype(float)
        # Nothing is resampled at 8 x 8: the least value becomes 0, the greatest 255.
        expected = np.rint((image - image.min()) / (image.max() - image.min()) * 255)
        assert np.abs(np.frombuffer(row["image"], np.uint8).reshape(8, 8) - expected).max() <= 1
        mask = np.asarray(Image.open(row["masks"][0]["uri"])) > 0
        assert np.array_equal(np.frombuffer(row["mask"], np.uint8).reshape(8, 8), mask)
        assert row["foreground_pixels"] == mask.sum()
        assert row["row_id"] == hashlib.sha256(uri.encode()).hexdigest()
        assert row["patient_key"] == patient(int(Path(uri).parent.name))
    assert (result.rows, result.positive, result.patients, result.rejected) == (60, 24, 12, 0)
    assert not result.cached


def test_patients_are_where_the_hash_puts_them(manifest: Path, tmp_path: Path) -> None:
    config = config_of(manifest, tmp_path)
    result = prepare(config)
    table = everything(result.prepared)
    for row in table.select(["patient_key", "split"]).to_pylist():
        assert row["split"] == config.split.assign(row["patient_key"])
    assert Counter(table["split"].to_pylist()) == {"train": result.train, "val": result.val, "test": result.test}
    check_leak(table)


def test_shards_have_the_schema_the_names_and_the_row_groups(manifest: Path, tmp_path: Path) -> None:
    result = prepare(config_of(manifest, tmp_path, rows_per_shard=10, row_group_rows=4))
    for split in ("train", "val", "test"):
        found = sorted((tmp_path / f"split={split}").iterdir())
        assert [path.name[:10] for path in found] == [f"part-{number:05d}" for number in range(len(found))]
        assert len({path.name[10:] for path in found}) == len(found)  # by content
        assert prepared.describe(str(tmp_path)).files(split) == [str(path) for path in found]
        for path in found:
            file = pq.ParquetFile(path)
            assert file.schema_arrow == PREPARED
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            assert all(size == 4 for size in sizes[:-1])
        assert sum(pq.ParquetFile(path).metadata.num_rows for path in found) == getattr(result, split)
    assert len(list((tmp_path / "split=train").iterdir())) > 1


def test_training_rows_do_not_stand_by_patient(manifest: Path, tmp_path: Path) -> None:
    result = prepare(config_of(manifest, tmp_path))
    keys = prepared.describe(result.prepared).read_rows("train", ["patient_key"])["patient_key"].to_pylist()
    changes = sum(first != second for first, second in pairwise(keys))
    assert changes > len(keys) / 2
    keys = prepared.describe(result.prepared).read_rows("test", ["patient_key"])["patient_key"].to_pylist()
    assert sum(first != second for first, second in pairwise(keys)) == len(set(keys)) - 1


def test_the_same_input_gives_the_same_bytes(manifest: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(config_of(manifest, tmp_path / name, rows_per_shard=6))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "one")) > 8


def test_few_rows_are_prepared_without_ray_and_have_the_same_bytes(tmp_path: Path) -> None:
    synthetic.write_studies(str(tmp_path), patients=9, slices=3, size=32, seed=3)
    layout = Layout(images="images", masks="masks")
    split = Split(val=0.3, test=0.2, stratify=True)

    def run(place: Path) -> list[object]:
        recipe = {
            "catalog": CatalogConfig(str(tmp_path), str(place / "manifest.parquet"), layout),
            "prepare": PrepareConfig(str(place / "manifest.parquet"), str(place / "set"), WHOLE, split=split),
        }
        sections = {name: configuration.plain(config) for name, config in recipe.items()}
        (place / "recipe.yaml").write_text(yaml.safe_dump(sections))
        return list(recipe.values())

    for name in ("ray", "process"):
        (tmp_path / name).mkdir()
    cataloging, preparing = run(tmp_path / "ray")
    catalog(cataloging)
    prepare(preparing)
    run(tmp_path / "process")
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for job in ("catalog", "prepare"):
        command = [sys.executable, "-m", f"jobs.{job}", "--config", str(tmp_path / "process/recipe.yaml")]
        done = subprocess.run(command, env=alone, check=True, capture_output=True, text=True)
        assert f"{job}: without Ray" in done.stderr
    files = {
        name: {
            str(path.relative_to(tmp_path / name)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name).rglob("*.*")
            if path.is_file() and path.name != "recipe.yaml" and path.parent.name != "_delta_log"  # tells the time
        }
        for name in ("ray", "process")
    }
    assert len(files["ray"]) > 5
    assert files["process"] == files["ray"]


def test_an_equal_set_is_not_made_again(manifest: Path, tmp_path: Path) -> None:
    config = config_of(manifest, tmp_path)
    first = prepare(config)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    second = prepare(config)
    assert second.cached
    assert dataclasses.replace(second, cached=False, seconds=0.0) == dataclasses.replace(first, seconds=0.0)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    # A shard that was lost is noticed, and made again.
    lost = next((tmp_path / "split=train").glob("part-00000-*.parquet"))
    lost.unlink()
    assert not prepare(config).cached
    assert lost.exists()


def test_what_a_killed_run_has_written_is_not_made_again(manifest: Path, tmp_path: Path) -> None:
    whole = config_of(manifest, tmp_path / "whole", rows_per_shard=2)
    prepare(whole)
    output, recipe = tmp_path / "killed", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"prepare": configuration.plain(whole) | {"output": str(output)}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.prepare", "--config", str(recipe)],
        env={
            **os.environ,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        stderr=subprocess.DEVNULL,
    )
    try:
        while not len(found := shards_of(output)) >= 3:
            assert process.poll() is None, "killed before it ended"
    finally:
        process.kill()
        process.wait()
    assert not (output / "_prepared.json").exists()
    times = {path: path.stat().st_mtime_ns for path in found}
    torn = found[0]
    torn.write_bytes(torn.read_bytes()[:-9])
    result = prepare(dataclasses.replace(whole, output=str(output)))
    assert not result.cached
    assert files(output) == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in found[1:]} == {path: times[path] for path in found[1:]}
    assert torn.stat().st_mtime_ns != times[torn]


def test_a_set_that_is_read_keeps_its_shards_until_nobody_reads_it(manifest: Path, tmp_path: Path) -> None:
    first, second = (config_of(manifest, tmp_path / "set", rows_per_shard=rows) for rows in (6, 8))
    prepare(first)
    old = shards_of(tmp_path / "set")
    with prepared.reading(first.output, "train") as described:
        rows = described.read_rows("train").to_pylist()
        prepare(second)
        assert set(old) < set(shards_of(tmp_path / "set"))
        assert described.read_rows("train").to_pylist() == rows
        new = prepared.describe(first.output)
        assert new.digest != described.digest
        assert not set(new.files("train")) & set(described.files("train"))
    assert not prepare(first).cached
    assert shards_of(tmp_path / "set") == old, "what nobody reads is swept"
    (tmp_path / "set/_prepared.json").unlink()  # as between the steps of a prepare
    with pytest.raises(ValueError, match="no finished prepared set"), prepared.reading(first.output, "train"):
        pass
    shutil.rmtree(tmp_path / "set/_readers")
    prepare(first)
    batches = feed.batches(described, "train", global_batch=4, rank=0, world_size=1, seed=1, epoch=0)
    next(batches)
    shutil.rmtree(tmp_path / "set/split=train")
    with pytest.raises(ValueError, match=r"prepared: there is no .* any more: another set was prepared"):
        list(feed.batches(new, "train", global_batch=4, rank=0, world_size=1, seed=1, epoch=0))
    batches.close()


def test_rejects_of_a_kept_shard_are_kept_and_failed_reads_are_tried_again(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    (tmp_path / "images/0/0.png").write_bytes(b"broken")
    config = config_of(manifest, tmp_path / "set", rows_per_shard=60)
    first = prepare(config)
    (tmp_path / "set/_prepared.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in shards_of(tmp_path / "set")}
    second = prepare(config)
    assert (first.rejected, first.reasons) == (second.rejected, second.reasons) == (1, {"not_dicom": 1})
    assert len(pq.read_table(tmp_path / "set/rejects.parquet")) == 1
    assert times == {path: path.stat().st_mtime_ns for path in shards_of(tmp_path / "set")}


def test_a_set_with_reads_that_failed_is_no_equal_of_the_whole_one(tmp_path: Path) -> None:
    manifest, away = manifest_of(tmp_path), tmp_path / "images/0/0.png"
    config = config_of(manifest, tmp_path / "set", rows_per_shard=60)
    image = away.read_bytes()
    away.unlink()
    away.mkdir()  # reading it is an OSError, as where a store does not answer
    lacking = prepare(config)
    assert (lacking.rows, lacking.reasons) == (59, {"read_failed": 1})
    digest = prepared.describe(lacking.prepared).digest
    away.rmdir()
    away.write_bytes(image)
    whole = prepare(config)
    assert (whole.rows, whole.rejected, whole.cached) == (60, 0, False)
    assert prepared.describe(whole.prepared).digest != digest
    assert prepare(config).cached


def test_what_was_replaced_by_as_many_bytes_is_read_again(tmp_path: Path) -> None:
    def write(kind: str, level: int) -> None:
        for name in [f"{patient}/{index}" for patient in range(8) for index in range(2)]:
            path = tmp_path / "source" / kind / f"{name}.tif"  # as many bytes whatever the values
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), level, np.uint8)).save(path)

    def levels(uri: str) -> set[tuple[int, int]]:
        return {(row["image"][0], row["foreground_pixels"]) for row in everything(uri).to_pylist()}

    source = CatalogConfig(
        str(tmp_path / "source"), str(tmp_path / "manifest.parquet"), Layout(images="images", masks="masks")
    )
    config = config_of(tmp_path / "manifest.parquet", tmp_path / "set", preprocess=Preprocess((8, 8), percentiles=None))
    write("images", 10)
    write("masks", 255)
    catalog(source)
    assert levels(prepare(config).prepared) == {(10, 64)}
    write("images", 200)
    assert catalog(source).unchanged == 0
    assert levels(prepare(config).prepared) == {(200, 64)}
    write("masks", 0)
    assert catalog(source).unchanged == 0
    assert levels(prepare(config).prepared) == {(200, 0)}
    assert catalog(source).unchanged == 16
    assert prepare(config).cached


def test_the_split_is_a_table_of_patients(manifest: Path, tmp_path: Path) -> None:
    result = prepare(config_of(manifest, tmp_path))
    rows = list(csv.DictReader(io.StringIO(prepared.describe(result.prepared).read_split().decode())))
    assert [row["patient_key"] for row in rows] == [patient(number) for number in range(12)]
    split = Split(val=0.25, test=0.25, seed="1")
    for row in rows:
        assert row["part"] == row["split"] == split.assign(row["patient_key"])
        assert (row["rows"], row["positive"]) == ("5", "2")


def test_a_stratified_split_is_by_what_the_masks_say_and_keeps_who_stood(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    for number in range(0, 12, 2):  # six patients without foreground
        for index in range(5):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"masks/{number}/{index}.png")
    split = Split(val=0.2, test=0.2, stratify=True)
    rows = pq.read_table(manifest)
    storage.write_table(str(tmp_path / "few.parquet"), rows.slice(0, 40))
    few = prepare(config_of(tmp_path / "few.parquet", tmp_path / "few", split=split))
    standing = dataclasses.replace(split, standing=f"{few.prepared}/split.csv")
    many = prepare(config_of(manifest, tmp_path / "many", split=standing))
    dealt = {}
    for result in (few, many):
        table = list(csv.DictReader(io.StringIO(prepared.describe(result.prepared).read_split().decode())))
        dealt[result.prepared] = {row["patient_key"]: row["split"] for row in table}
        for positive in (True, False):
            places = Counter(row["split"] for row in table if (row["positive"] != "0") == positive)
            assert places["val"] >= 1 <= places["test"]
    assert dealt[few.prepared] == {key: dealt[many.prepared][key] for key in dealt[few.prepared]}
    lost = dataclasses.replace(split, standing=str(tmp_path / "absent.csv"))
    with pytest.raises(ValueError, match=r"split.standing: there is no .*absent.csv"):
        prepare(config_of(manifest, tmp_path / "many", split=lost))


def splits_of(uri: str) -> dict[str, str]:
    table = csv.DictReader(io.StringIO(prepared.describe(uri).read_split().decode()))
    return {row["patient_key"]: row["split"] for row in table}


def test_exact_counts_are_balanced_by_the_size_that_masks_say(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    large = [0, 1, 2, 3]
    for number in large:
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / f"masks/{number}/0.png")
    for seed in range(3):
        split = Split(val=3, test=0.25, seed=seed, exact=True)
        dealt = splits_of(prepare(config_of(manifest, tmp_path / f"set{seed}", split=split)).prepared)
        assert Counter(dealt.values()) == {"train": 6, "val": 3, "test": 3}
        assert {dealt[patient(number)] for number in large} == {"train", "val", "test"}


def test_a_split_of_ones_own_is_followed_and_its_content_is_part_of_the_set(manifest: Path, tmp_path: Path) -> None:
    table = tmp_path / "split.csv"
    wanted = {patient(number): ("train", "train", "val", "test", "none")[number % 5] for number in range(12)}
    table.write_text("patient,split\n" + "".join(f"{key},{split}\n" for key, split in wanted.items()))
    config = config_of(manifest, tmp_path / "set", split=Split(given=str(table)))
    result = prepare(config)
    assert splits_of(result.prepared) == {key: split for key, split in wanted.items() if split != "none"}
    assert prepare(config).cached
    # The same by files, the ends of whose paths are enough; one patient has another place now.
    by_file = {f"{number}/{index}.png": wanted[patient(number)] for number in range(12) for index in range(5)}
    by_file |= {f"0/{index}.png": "val" for index in range(5)}
    table.write_text("file,split\n" + "".join(f"{name},{split}\n" for name, split in by_file.items()))
    again = prepare(config)
    assert not again.cached
    assert splits_of(again.prepared)[patient(0)] == "val"
    with pytest.raises(ValueError, match=r"split\.given: there is no .*absent\.csv"):
        prepare(config_of(manifest, tmp_path / "set", split=Split(given=str(tmp_path / "absent.csv"))))


def test_the_same_picture_of_two_patients_fails(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    split = Split(val=0.25, test=0.25, seed="1")
    by_place = {split.assign(patient(number)): number for number in range(12)}
    train, test = by_place["train"], by_place["test"]
    picture = Image.open(tmp_path / f"images/{train}/3.png")
    picture.save(tmp_path / f"images/{test}/4.png")
    with pytest.raises(ValueError, match="1 pairs of rows in different splits show the same picture") as told:
        prepare(config_of(manifest, tmp_path / "set"))
    for number, index in ((train, 3), (test, 4)):
        row_id = hashlib.sha256(str(tmp_path / f"images/{number}/{index}.png").encode()).hexdigest()
        assert f"row {row_id[:12]} of patient {patient(number)}" in str(told.value)
    with pytest.raises(ValueError, match="no finished prepared set"):
        prepared.describe(str(tmp_path / "set"))


@pytest.mark.parametrize(
    "change",
    [
        {"preprocess": Preprocess(size=(8, 8), percentiles=(1, 99))},
        {"labels": Labels(threshold=127)},
        {"split": Split(val=0.3, test=0.25)},
        {"limit": 48},
        {"row_group_rows": 8},
    ],
)
def test_any_other_setting_makes_another_set(manifest: Path, tmp_path: Path, change: dict) -> None:
    first = prepare(config_of(manifest, tmp_path))
    second = prepare(config_of(manifest, tmp_path, **change))
    assert not second.cached
    assert first.prepared == second.prepared


def test_a_smaller_set_in_the_place_of_a_larger_leaves_no_shard_behind(manifest: Path, tmp_path: Path) -> None:
    prepare(config_of(manifest, tmp_path, rows_per_shard=3))
    foreign = tmp_path / "split=train" / "notes.txt"
    foreign.write_text("not ours")
    prepare(config_of(manifest, tmp_path, rows_per_shard=100))
    names = [path.name for path in sorted((tmp_path / "split=train").iterdir())]
    assert [name[:10] for name in names] == ["notes.txt", "part-00000"]
    assert len(everything(str(tmp_path))) == 60


def test_bad_objects_become_rows(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    (tmp_path / "images/0/0.png").unlink()
    (tmp_path / "images/1/1.png").write_bytes((tmp_path / "images/1/1.png").read_bytes()[:60])
    (tmp_path / "masks/2/2.png").unlink()
    (tmp_path / "masks/3/3.png").write_bytes(b"")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(buffer, "PNG")
    (tmp_path / "masks/4/4.png").write_bytes(buffer.getvalue())
    result = prepare(config_of(manifest, tmp_path / "set"))
    rejects = pq.read_table(tmp_path / "set/rejects.parquet")
    assert rejects.schema == REJECTS
    told = {row["uri"].removeprefix(f"{tmp_path}/images/"): row for row in rejects.to_pylist()}
    assert {name: row["reason"] for name, row in told.items()} == {
        "0/0.png": "not_found",
        "1/1.png": "not_an_image",
        "2/2.png": "not_found",
        "3/3.png": "empty_object",
        "4/4.png": "mask_mismatch",
    }
    assert {row["stage"] for row in told.values()} == {"prepare"}
    assert told["2/2.png"]["patient_key"] == patient(2)
    assert told["4/4.png"]["detail"] == "mask (8, 9), image (8, 8)"
    assert (result.rows, result.rejected, result.patients) == (55, 5, 12)
    assert result.reasons == {"empty_object": 1, "mask_mismatch": 1, "not_an_image": 1, "not_found": 2}
    left = set(everything(result.prepared)["uri"].to_pylist())
    assert len(left) == 55
    assert not left & {row["uri"] for row in told.values()}


def test_too_many_bad_objects_fail_without_a_set(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    for index in range(5):
        (tmp_path / f"images/3/{index}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"5 of 60 rows rejected, over max_reject_fraction 0.05: .*not_dicom"):
        prepare(config_of(manifest, tmp_path / "set", max_reject_fraction=0.05))
    assert len(pq.read_table(tmp_path / "set/rejects.parquet")) == 5
    with pytest.raises(ValueError, match="no finished prepared set"):
        prepared.describe(str(tmp_path / "set"))


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, patients=2, slices=2)
    with pytest.raises(ValueError, match=r"no rows for .*of 2 patients.*split.seed, or catalog more patients"):
        prepare(config_of(manifest, tmp_path / "set"))
    halves = (Split(val=0.0, test=0.5, seed=str(seed)) for seed in range(99))
    apart = next(split for split in halves if split.assign(patient(0)) != split.assign(patient(1)))
    result = prepare(config_of(manifest, tmp_path / "set", split=apart))
    assert (result.train, result.val, result.test) == (2, 0, 2)


def test_a_split_that_loses_all_its_rows_is_refused(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, patients=12, slices=1)
    split = Split(val=0.25, test=0.25)
    for number in range(12):
        if split.assign(patient(number)) == "val":
            (tmp_path / f"images/{number}/0.png").unlink()
    with pytest.raises(ValueError, match="no rows for val: none rows are left there"):
        prepare(config_of(manifest, tmp_path / "set", split=split, max_reject_fraction=1.0))


def test_a_leak_in_what_was_written_fails(manifest: Path, tmp_path: Path) -> None:
    rows = [row | {"study_key": "one"} for row in pq.read_table(manifest).to_pylist()]
    storage.write_table(str(tmp_path / "m.parquet"), pa.Table.from_pylist(rows, schema=MANIFEST))
    with pytest.raises(ValueError, match="1 studies are in more than one split"):
        prepare(config_of(tmp_path / "m.parquet", tmp_path / "set"))
    with pytest.raises(ValueError, match="no finished prepared set"):
        prepared.describe(str(tmp_path / "set"))


@pytest.mark.parametrize("limit", [12, 25, 40, 59])
def test_a_limit_takes_evenly_from_each_patient(manifest: Path, tmp_path: Path, limit: int) -> None:
    result = prepare(config_of(manifest, tmp_path, limit=limit))
    counts = Counter(everything(result.prepared)["patient_key"].to_pylist())
    assert result.rows == limit
    assert len(counts) == 12
    assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_that_were_rejected_are_left_out_and_an_archive_without_masks_is_refused(
    manifest: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(manifest).to_pylist()
    rows[7] |= {"verdict": "rejected", "reason": "no_mask"}
    rows[8] |= {"masks": []}  # an empty mask, as the layout has it
    storage.write_table(str(tmp_path / "m.parquet"), pa.Table.from_pylist(rows, schema=MANIFEST))
    result = prepare(config_of(tmp_path / "m.parquet", tmp_path / "set"))
    table = everything(result.prepared).to_pylist()
    assert rows[7]["uri"] not in {row["uri"] for row in table}
    (empty,) = [row for row in table if row["uri"] == rows[8]["uri"]]
    assert (empty["masks"], empty["foreground_pixels"], empty["mask"]) == ([], 0, bytes(64))
    bare = [row | {"masks": []} for row in rows]
    storage.write_table(str(tmp_path / "bare.parquet"), pa.Table.from_pylist(bare, schema=MANIFEST))
    with pytest.raises(ValueError, match="no accepted row has a mask"):
        prepare(config_of(tmp_path / "bare.parquet", tmp_path / "other"))


def test_a_source_without_a_class_is_told_before_anything_is_read(manifest: Path, tmp_path: Path) -> None:
    rows = pq.read_table(manifest).to_pylist()
    for number, row in enumerate(rows):
        row["masks"][0]["label"] = ("bleed", "infarct", "spare")[number % 3]
    storage.write_table(str(tmp_path / "m.parquet"), pa.Table.from_pylist(rows, schema=MANIFEST))
    labels = Labels(("stroke",), sources={"bleed": "stroke"})
    with pytest.raises(ValueError, match=r"labels\.sources: lacks infarct, spare"):
        prepare(config_of(tmp_path / "m.parquet", tmp_path / "set", labels=labels))


def test_no_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the catalog job"):
        prepare(config_of(tmp_path / "absent.parquet", tmp_path))


@pytest.mark.parametrize("key", ["limit", "rows_per_shard", "row_group_rows"])
def test_counts_are_positive(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"prepare.{key}"):
        config_of(tmp_path, tmp_path, **{key: 0})


def test_phantom_ct_goes_the_whole_way(tmp_path: Path) -> None:
    synthetic.write_studies(str(tmp_path / "in"), patients=8, slices=3, size=48, seed=1)
    layout = Layout(images="images", masks="masks")
    cataloged = catalog(CatalogConfig(str(tmp_path / "in"), str(tmp_path / "manifest.parquet"), layout))
    preprocess = Preprocess(size=(48, 48), window=Window(40, 80), percentiles=None)
    seed = next(s for s in map(str, range(99)) if _all_splits(cataloged.manifest, Split(0.25, 0.25, s)))
    config = PrepareConfig(
        cataloged.manifest, str(tmp_path / "set"), preprocess=preprocess, split=Split(0.25, 0.25, seed)
    )
    result = prepare(config)
    assert (result.rows, result.patients, result.rejected) == (24, 8, 0)
    found = prepared.describe(result.prepared)
    assert found.preprocess == preprocess
    assert found.shape == (48, 48, 1)
    for row in everything(result.prepared).to_pylist():
        dataset = pydicom.dcmread(row["uri"])
        hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        # A window of 40/80 maps 0..79 HU to 0..255.
        expected = np.rint(np.clip((hu - 0.0) / 79, 0, 1) * 255)
        assert np.abs(np.frombuffer(row["image"], np.uint8).reshape(48, 48) - expected).max() <= 1
        truth = np.asarray(Image.open(row["masks"][0]["uri"])) > 0
        assert np.array_equal(np.frombuffer(row["mask"], np.uint8).reshape(48, 48), truth)


def _all_splits(manifest: str, split: Split) -> bool:
    keys = snapshots.read_table(manifest)["patient_key"].to_pylist()
    return len({split.assign(key) for key in keys}) == 3


def test_real_mri_with_groups(shared_data: Path, tmp_path: Path) -> None:
    layout = Layout(images="images", masks="masks", groups="groups.csv")
    source = str(shared_data / "brain-tumor-mri")
    cataloged = catalog(CatalogConfig(source, str(tmp_path / "manifest.parquet"), layout))
    assert (cataloged.objects, cataloged.accepted) == (2032, 2032)
    config = PrepareConfig(cataloged.manifest, str(tmp_path / "set"), Preprocess(size=(64, 64)), limit=80)
    result = prepare(config)
    assert result.rows == 80
    assert result.patients == cataloged.patients
    assert result.positive >= 78  # every slice has a tumour; the smallest may be lost at a quarter of the size
