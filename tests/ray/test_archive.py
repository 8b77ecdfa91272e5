"""Bulk segmentation on a Ray cluster: a SEG and a ledger row for each series, nothing lost, nothing twice."""

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import highdicom
import keras
import nibabel as nib
import numpy as np
import psutil
import pyarrow.dataset as ds
import pydicom
import pytest
import ray
import trimesh
from PIL import Image

from rayseg import storage, work
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.labels import Labels
from rayseg.data.layouts import Layout
from rayseg.data.preprocess import Preprocess, Window
from rayseg.data.range import Range
from rayseg.dicom import segmentation
from rayseg.evaluation.diff import DiffConfig, diff
from rayseg.inference import ledger, report, stream
from rayseg.inference.archive import SegmentConfig, SegmentResult, _config_digest, _settings, segment
from rayseg.inference.plan import Estimate
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.inference.series import STEPS
from rayseg.tracking import registry, runs
from serving.jobs import JobAnswer, JobRequest, Jobs, JobsConfig, ServedModel
from serving.refusals import RefusalError
from serving.submissions import RayJobs
from tests.drivers import dying_at_the_first_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PATIENTS, SLICES = 6, 4


@dataclass(frozen=True)
class Models:
    """A registry with two versions of `brain`; the champion is the first."""

    tracking_uri: str

    def predictor(self, version: int) -> Predictor:
        return Predictor.load(registry.fetch(self.tracking_uri, f"models:/brain/{version}")[0])


@dataclass(frozen=True)
class Done:
    """A run that nothing disturbed."""

    config: SegmentConfig
    result: SegmentResult


def network(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((32, 32, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.GroupNormalization(4),
            layers.Conv2D(1, 1, activation="sigmoid"),
        ]
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    for seed in (1, 2):
        preprocess = Preprocess((32, 32), Window(40, 200), None)
        example, known = synthetic.slice_bytes(0, 64), Range(modalities=("MR",))  # which no study here is
        registry.save(folder / str(seed), network(seed), preprocess, Labels(), 0.5, example, known=known)
        registry.register(tracking_uri, runs.start(tracking_uri, "archive", "train"), folder / str(seed), "brain")
    registry.set_alias(tracking_uri, "brain", "champion", "1")
    return Models(tracking_uri)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of one series each."""
    folder = tmp_path_factory.mktemp("studies")
    synthetic.write_studies(str(folder), patients=PATIENTS, slices=SLICES, size=48, seed=3, masks=False)
    return folder


@pytest.fixture(scope="module")
def done(studies: Path, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The studies, cataloged and segmented: not to be spoiled."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(studies, folder / "archive")
    config = cataloged(models, folder)
    return Done(config, segment(config))


@pytest.fixture
def archive(done: Done, tmp_path: Path) -> SegmentConfig:
    """The same, not segmented yet."""
    return replace(done.config, output=str(tmp_path / "segmented"))


@pytest.fixture
def spoilable(studies: Path, models: Models, tmp_path: Path) -> SegmentConfig:
    """A copy of the studies that the test may spoil, with its manifest."""
    shutil.copytree(studies, tmp_path / "archive")
    return cataloged(models, tmp_path)


def cataloged(models: Models, folder: Path, **values: Any) -> SegmentConfig:
    manifest = str(folder / "manifest.parquet")
    catalog(CatalogConfig(str(folder / "archive"), manifest, Layout(), max_reject_fraction=1.0))
    output = str(folder / "segmented")
    return SegmentConfig("models:/brain@champion", models.tracking_uri, output, manifest, **values)


def sources(config: SegmentConfig) -> dict[str, Path]:
    """SOPInstanceUID -> file, by pydicom."""
    files = sorted(Path(config.manifest).parent.glob("archive/**/*.dcm"))
    return {pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID: file for file in files}


def contents(config: SegmentConfig) -> dict[str, str]:
    """SHA-256 of every SEG by its path below the output."""
    output = Path(config.output)
    return {
        str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in output.rglob("*.dcm")
    }


def masks_of(paths: list[str]) -> dict[str, np.ndarray]:
    return {uid: mask for path in paths for uid, mask in segmentation.decode(Path(path).read_bytes()).items()}


def rejects_of(config: SegmentConfig) -> list[dict[str, Any]]:
    return ledger.rejects(config.output).to_pylist()


def fail(*arguments: object, **options: object) -> None:
    raise AssertionError("nothing was to be done")


def test_the_archive_holds_the_masks_of_the_predictor(done: Done, models: Models) -> None:
    archive, result = done.config, done.result
    assert (result.series, result.segmented, result.rejected, result.skipped) == (PATIENTS, PATIENTS, 0, 0)
    assert (result.slices, result.rejected_slices, result.reasons) == (PATIENTS * SLICES, 0, {})
    assert result.model_uri == "models:/brain/1"
    told = {(*row["flags"], row["flags_detail"]) for row in ledger.read(archive.output).to_pylist()}
    assert (result.flags, told) == ({"modality": PATIENTS}, {("modality", "modality: CT, not MR")})

    found = masks_of(result.seg_paths)
    predictor = models.predictor(1)
    files = sources(archive)
    assert found.keys() == files.keys()
    for uid, file in files.items():
        (expected,) = predictor.segment([file.read_bytes()])
        assert isinstance(expected, Prediction)
        assert 0 < expected.mask.sum() < expected.mask.size
        assert found[uid].tobytes() == expected.mask.tobytes()

    rows = ledger.read(archive.output).to_pylist()
    assert len(rows) == PATIENTS
    for row in rows:
        [file] = row["outputs"]
        data = Path(file["uri"]).read_bytes()
        masks = list(segmentation.decode(data).values())
        first = pydicom.dcmread(files[next(iter(segmentation.decode(data)))], stop_before_pixels=True)
        assert file == {
            "profile": "seg",
            "uri": f"{archive.output}/brain-v1-{row['config_digest'][:8]}/{row['series_key']}.dcm",
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "pacs": None,
        }
        assert (row["verdict"], row["slices"], row["rejected_slices"]) == ("segmented", SLICES, 0)
        assert row["foreground_pixels"] == sum(int(mask.sum()) for mask in masks)
        # The phantom's slices are evenly spaced, so the volume is voxels times their size.
        positions = sorted(
            float(pydicom.dcmread(files[uid], stop_before_pixels=True).ImagePositionPatient[2])
            for uid in segmentation.decode(data)
        )
        normal = np.cross(first.ImageOrientationPatient[:3], first.ImageOrientationPatient[3:])
        distance_mm = (positions[1] - positions[0]) * abs(normal[2])
        voxel_mm3 = float(first.PixelSpacing[0]) * float(first.PixelSpacing[1]) * distance_mm
        assert row["volume_ml"] == pytest.approx(row["foreground_pixels"] * voxel_mm3 / 1000, rel=1e-3)
        assert (row["model_name"], row["model_version"]) == ("brain", "1")


def test_a_multi_frame_object_gets_the_masks_of_the_slices_it_was_made_of(
    spoilable: SegmentConfig, models: Models, tmp_path: Path
) -> None:
    folder = Path(spoilable.manifest).parent
    paths = sorted(next(iter(sorted((folder / "archive" / "images").iterdir()))).iterdir())
    classic = [pydicom.dcmread(path) for path in paths]
    masks = {
        tuple(dataset.ImagePositionPatient): result.mask
        for dataset, result in zip(
            classic, models.predictor(1).segment([path.read_bytes() for path in paths]), strict=True
        )
        if isinstance(result, Prediction)
    }
    joined = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        legacy_datasets=classic,
        series_instance_uid="1.2.3",
        series_number=1,
        sop_instance_uid="1.2.3.4",
        instance_number=1,
    )
    shutil.rmtree(folder / "archive" / "images")
    joined.save_as(folder / "archive" / "joined.dcm", enforce_file_format=True)
    result = segment(cataloged(models, folder))
    assert (result.series, result.segmented, result.slices, result.rejected_slices) == (1, 1, SLICES, 0)
    found = masks_of(result.seg_paths)
    assert len(found) == len(masks) == SLICES
    for number, groups in enumerate(joined.PerFrameFunctionalGroupsSequence):
        place = tuple(groups.PlanePositionSequence[0].ImagePositionPatient)
        assert found[f"1.2.3.4#{number}"].tobytes() == masks[place].tobytes()
    (row,) = ledger.read(spoilable.output).to_pylist()
    assert row["volume_ml"] is not None
    assert segment(cataloged(models, folder)).skipped == 1


def test_every_seg_passes_dciodvfy(archive: SegmentConfig) -> None:
    segment(replace(archive, profiles=("seg", "seg-labelmap", "seg-fractional", "report")))
    made = sorted(Path(archive.output).rglob("*.dcm"))
    assert len(made) == 4 * PATIENTS
    validator = Path(sys.executable).with_name("dciodvfy")
    for path in made[:8]:
        done = subprocess.run([validator, path], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "Error" not in done.stderr


def test_a_second_run_reads_and_writes_nothing(spoilable: SegmentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = segment(spoilable)
    before = {path: path.stat().st_mtime_ns for path in Path(spoilable.output).rglob("*") if path.is_file()}
    shutil.rmtree(Path(spoilable.manifest).parent / "archive")
    monkeypatch.setattr(ray.data, "from_arrow", fail)
    second = segment(spoilable)
    assert (second.segmented, second.skipped, second.rejected, second.slices) == (0, PATIENTS, 0, 0)
    assert second.seg_paths == first.seg_paths
    assert {path: path.stat().st_mtime_ns for path in Path(spoilable.output).rglob("*") if path.is_file()} == before


def test_another_version_or_setting_is_done_anew_and_leaves_the_old(archive: SegmentConfig, models: Models) -> None:
    first = segment(archive)
    before = contents(archive)
    second = segment(replace(archive, model_uri="models:/brain/2"))
    assert (second.segmented, second.skipped) == (PATIENTS, 0)
    after = contents(archive)
    assert {path: after[path] for path in before} == before
    assert {path.split("/")[0][:8] for path in after} == {"brain-v1", "brain-v2"}
    assert not set(before.values()) & {digest for path, digest in after.items() if path.startswith("brain-v2")}
    assert ledger.read(archive.output).num_rows == 2 * PATIENTS
    between = {"baseline_model": "brain/1", "challenger_model": "brain/2", "output": f"{archive.output}-diff"}
    told = diff(DiffConfig(archive.output, archive.output, archive.manifest, worst=1, **between))
    assert (told.compared, told.not_compared) == (PATIENTS, {})
    one, other = (masks_of(result.seg_paths) for result in (first, second))
    both, whole = (sum(int(join(one[uid], other[uid]).sum()) for uid in one) for join in (np.minimum, np.add))
    assert told.summary["dice_pooled"] == pytest.approx(2 * both / whole)
    assert "cannot be read" not in Path(told.report).read_text()
    third = segment(replace(archive, ensemble=("models:/brain/2",), mirror="columns"))
    assert (third.segmented, third.skipped, third.model_uri) == (PATIENTS, 0, "models:/brain/1 + models:/brain/2")
    assert len(runs.client(models.tracking_uri).get_run(str(third.run_id)).inputs.model_inputs) == 2
    assert {path: contents(archive)[path] for path in after} == after
    folders = [registry.fetch(models.tracking_uri, f"models:/brain/{version}")[0] for version in (1, 2)]
    together = Predictor.load(*folders, mirror="columns")
    files = sources(archive)
    for uid, mask in masks_of(third.seg_paths).items():
        (expected,) = together.segment([files[uid].read_bytes()])
        assert isinstance(expected, Prediction)
        assert np.array_equal(mask, expected.mask)
    assert pydicom.dcmread(third.seg_paths[0]).SoftwareVersions == "1+2"


def test_a_series_that_has_got_a_slice_is_done_again(spoilable: SegmentConfig, models: Models) -> None:
    folder = Path(spoilable.manifest).parent
    late = sorted((folder / "archive").rglob("*.dcm"))[0]
    late.rename(folder / "late")
    cataloged(models, folder)
    assert segment(spoilable).slices == PATIENTS * SLICES - 1
    (folder / "late").rename(late)
    cataloged(models, folder)
    result = segment(spoilable)
    assert (result.segmented, result.skipped, result.slices) == (1, PATIENTS - 1, SLICES)
    rows = ledger.read(spoilable.output).to_pylist()
    assert [row["slices"] for row in rows] == [SLICES] * PATIENTS
    assert len(masks_of(result.seg_paths)) == PATIENTS * SLICES


def test_a_killed_run_is_taken_up_by_one_that_waited_and_ends_as_an_undisturbed_one(
    archive: SegmentConfig, done: Done, caplog: pytest.LogCaptureFixture
) -> None:
    script = dying_at_the_first_rows(replace(archive, unrecorded=2))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stderr=subprocess.PIPE,
        text=True,
    ) as killed:
        while not Path(archive.output, "_segment.lease").exists():
            assert killed.poll() is None, killed.stderr.read()
        with caplog.at_level("INFO", "rayseg.lease"):
            result = segment(archive)
        assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    assert f"segment: waits for the segment job on {os.uname().nodename}, process {killed.pid}, since" in caplog.text
    assert 1 <= result.skipped < PATIENTS
    assert (result.segmented, result.rejected) == (PATIENTS - result.skipped, 0)
    assert contents(archive) == contents(done.config)
    assert len(result.seg_paths) == PATIENTS
    assert same_rows(archive, done.config)
    lost, cut = sorted(Path(archive.output).rglob("*.dcm"))[:2]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    assert segment(archive).skipped == PATIENTS, "it goes by the ledger"
    verified = segment(replace(archive, verify=True))
    assert (verified.segmented, verified.skipped) == (2, PATIENTS - 2)
    assert contents(archive) == contents(done.config)


def test_few_slices_are_segmented_without_ray_and_have_the_same_bytes(
    archive: SegmentConfig, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "in_cluster", lambda *_: False)
    monkeypatch.setattr(ray.data.Dataset, "map_batches", None)
    result = segment(archive)
    assert (result.segmented, result.rejected) == (PATIENTS, 0)
    assert contents(archive) == contents(done.config)
    assert same_rows(archive, done.config)
    other = segment(replace(archive, profiles=("nifti", *archive.profiles)))
    assert other.from_masks == PATIENTS


def same_rows(one: SegmentConfig, other: SegmentConfig) -> bool:
    """Whether two ledgers are equal but for times and places."""
    varying = {"seconds", "outputs", *(f"{step}_s" for step in STEPS)}
    ledgers = [
        [{name: value for name, value in row.items() if name not in varying} for row in ledger.read(run).to_pylist()]
        for run in (one.output, other.output)
    ]
    return ledgers[0] == ledgers[1]


def test_an_actor_that_dies_loses_and_doubles_no_row(
    archive: SegmentConfig, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, appended = ledger.append, []

    def append_and_kill(output: str, rows: list[dict[str, Any]], rejects: list[dict[str, Any]]) -> None:
        if rows and not appended:
            ours = psutil.Process().children(recursive=True)
            [actor] = [one for one in ours if "_Segmenter" in " ".join(one.cmdline())]
            actor.kill()
        appended.extend(row["series_key"] for row in rows)
        append(output, rows, rejects)

    monkeypatch.setattr(ledger, "append", append_and_kill)
    monkeypatch.setattr(stream, "_TASKS_PER_ACTOR", 1)
    result = segment(replace(archive, unrecorded=1, cpus_per_actor=2))
    assert (result.segmented, len(appended), len(set(appended))) == (PATIENTS, PATIENTS, PATIENTS)
    assert contents(archive) == contents(done.config)
    assert same_rows(archive, done.config)


def test_what_cannot_be_read_costs_its_slice_or_its_series_and_no_other(spoilable: SegmentConfig, done: Done) -> None:
    patients = sorted((Path(spoilable.manifest).parent / "archive" / "images").iterdir())
    slices = [sorted(patient.iterdir()) for patient in patients]
    slices[0][1].unlink()
    slices[1][0].write_bytes(slices[1][0].read_bytes()[:-100])
    lost = {str(slices[0][1]): "not_found", str(slices[1][0]): "truncated"}
    for file in slices[2]:
        file.write_bytes(b"")
        lost[str(file)] = "empty_object"

    result = segment(replace(spoilable, max_reject_fraction=0.5))
    assert (result.segmented, result.rejected) == (PATIENTS - 1, 1)
    assert (result.slices, result.rejected_slices) == (PATIENTS * SLICES - 6, 6)
    assert result.reasons == {"empty_object": 4, "not_found": 1, "truncated": 1}
    assert {row["uri"]: row["reason"] for row in rejects_of(spoilable)} == lost
    rows = ledger.read(spoilable.output).to_pylist()
    (rejected,) = [row for row in rows if row["verdict"] == "rejected"]
    assert (rejected["reason"], rejected["slices"], rejected["rejected_slices"]) == ("empty_object", 0, 4)
    assert rejected["outputs"] == []
    assert sorted(row["rejected_slices"] for row in rows) == [0, 0, 0, 1, 1, 4]
    assert len(masks_of(result.seg_paths)) == PATIENTS * SLICES - 6
    spoiled, whole = contents(spoilable), contents(done.config)
    assert sum(spoiled.get(path) == digest for path, digest in whole.items()) == PATIENTS - 3


def test_too_many_rejects_fail_the_run_after_its_work(spoilable: SegmentConfig) -> None:
    for file in sorted((Path(spoilable.manifest).parent / "archive" / "images").rglob("*.dcm"))[:6]:
        file.unlink()
    with pytest.raises(ValueError, match=r"6 of 24 objects rejected, over max_reject_fraction 0\.2: not_found 6"):
        segment(spoilable)
    rows = ledger.read(spoilable.output).to_pylist()
    assert sorted(row["verdict"] for row in rows) == ["rejected"] + ["segmented"] * (PATIENTS - 1)
    page = Path(spoilable.output, report.NAME).read_text()
    for wanted in (f"{PATIENTS - 1} series segmented", "models:/brain/1 over an archive", "<td>6</td><td>1</td>"):
        assert wanted in page, wanted  # 6 objects and a series were not found
    assert spoilable.tracking_uri not in page
    # A rejected series is tried again, and what the segmented one lacks is counted again.
    with pytest.raises(ValueError, match=r"6 of 24 .*not_found 6"):
        segment(replace(spoilable, max_reject_fraction=0.1))


def test_what_the_catalog_rejected_and_image_files_stand_in_the_ledger_unread(
    models: Models, studies: Path, tmp_path: Path
) -> None:
    shutil.copytree(studies / "images", tmp_path / "archive")
    (tmp_path / "archive" / "notes.dcm").write_bytes(b"some text")
    (tmp_path / "archive" / "pictures").mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "archive" / "pictures" / "a.png")
    result = segment(cataloged(models, tmp_path))
    assert (result.series, result.segmented, result.rejected) == (PATIENTS + 1, PATIENTS, 1)
    assert result.reasons == {"not_dicom": 2}
    config = SegmentConfig("", "", str(tmp_path / "segmented"), "")
    told = {Path(row["uri"]).name: (row["stage"], row["reason"]) for row in rejects_of(config)}
    assert told == {"notes.dcm": ("catalog", "not_dicom"), "a.png": ("segment", "not_dicom")}


def test_a_missing_manifest_or_model_is_named(archive: SegmentConfig) -> None:
    with pytest.raises(ValueError, match=r"segment\.manifest: there is no manifest"):
        segment(replace(archive, manifest="/nowhere/manifest.parquet"))
    with pytest.raises(ValueError, match="models:/brain/9: not registered"):
        segment(replace(archive, model_uri="models:/brain/9"))


def test_a_store_that_refuses_to_write_rejects_the_series(archive: SegmentConfig) -> None:
    Path(archive.output).mkdir()
    digest = _config_digest(archive, _settings(archive, None))
    Path(archive.output, f"brain-v1-{digest[:8]}").write_bytes(b"a file where a folder is needed")
    with pytest.raises(ValueError, match="write_failed 24"):
        segment(archive)
    assert {row["reason"] for row in ledger.read(archive.output).to_pylist()} == {"write_failed"}


def test_two_actors_with_two_threads_on_a_source_do_as_one_on_its_manifest(archive: SegmentConfig, done: Done) -> None:
    source = str(Path(str(archive.manifest)).parent / "archive")
    twice = replace(archive, manifest=None, source=source, concurrency=2, cpus_per_actor=2)
    assert storage.exists(segment(twice).ledger)
    assert contents(twice) == contents(done.config)


def test_every_profile_is_written_and_tells_the_same(archive: SegmentConfig) -> None:
    profiles = ("seg", "seg-labelmap", "seg-fractional", "report", "nifti", "stl", "glb", "overlays")
    result = segment(replace(archive, profiles=profiles))
    assert (result.segmented, result.rejected) == (PATIENTS, 0)
    row = ledger.read(archive.output).to_pylist()[0]
    for file in row["outputs"]:
        data = Path(file["uri"]).read_bytes()
        assert (file["sha256"], file["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    by_profile = {profile: ledger.uris(row, profile) for profile in profiles}
    assert [len(uris) for uris in by_profile.values()] == [1, 1, 1, 1, 1, 1, 1, SLICES]
    masks = segmentation.decode(Path(by_profile["seg"][0]).read_bytes())
    labelmap = segmentation.decode(Path(by_profile["seg-labelmap"][0]).read_bytes())
    assert {name: mask.tobytes() for name, mask in masks.items()} == {n: m.tobytes() for n, m in labelmap.items()}
    fractions = pydicom.dcmread(by_profile["seg-fractional"][0])
    assert (fractions.SegmentationFractionalType, fractions.MaximumFractionalValue) == ("PROBABILITY", 255)
    assert (fractions.pixel_array >= 128).sum() == pytest.approx(row["foreground_pixels"], rel=0.01)
    volume = nib.load(by_profile["nifti"][0])
    voxel_ml = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    assert np.count_nonzero(np.asarray(volume.dataobj)) == row["foreground_pixels"]
    assert row["foreground_pixels"] * voxel_ml == pytest.approx(row["volume_ml"], rel=1e-3)
    measured = highdicom.sr.Comprehensive3DSR.from_dataset(pydicom.dcmread(by_profile["report"][0]))
    group, largest = measured.content.get_volumetric_roi_measurement_groups()
    assert group.referenced_segment.referenced_sop_instance_uid == pydicom.dcmread(by_profile["seg"][0]).SOPInstanceUID
    assert group.get_measurements()[0].value == pytest.approx(1000 * row["volume_ml"], rel=1e-6)
    assert 0 < largest.get_measurements()[0].value <= group.get_measurements()[0].value
    assert trimesh.load(by_profile["stl"][0]).volume == pytest.approx(1000 * row["volume_ml"], rel=0.5)
    assert Image.open(by_profile["overlays"][0]).mode == "RGB"


def test_a_profile_that_cannot_say_it_costs_itself_only(spoilable: SegmentConfig, models: Models) -> None:
    folder = Path(spoilable.manifest).parent
    first = sorted((folder / "archive" / "images").iterdir())[0]
    next(path for path in sorted(first.iterdir())[1:]).unlink()  # a gap
    config = replace(cataloged(models, folder), profiles=("seg", "nifti"))
    assert segment(replace(config, dry_run=True)).not_made == {"nifti": 1}
    result = segment(config)
    assert (result.segmented, result.rejected, result.reasons, result.not_made) == (PATIENTS, 0, {}, {"nifti": 1})
    (row,) = [one for one in ledger.read(config.output).to_pylist() if one["not_made"]]
    assert [one["profile"] for one in row["outputs"]] == ["seg"]
    assert [(one["profile"], one["reason"]) for one in row["not_made"]] == [("nifti", "uneven_slices")]
    assert "uneven_slices" in Path(result.report).read_text()
    again = segment(config)
    assert (again.segmented, again.skipped) == (0, PATIENTS), "it could not be made again"
    alone = segment(replace(config, profiles=("nifti",)))
    assert (alone.segmented, alone.rejected, alone.reasons) == (PATIENTS - 1, 1, {"uneven_slices": SLICES - 1})


def test_volumes_and_image_files_are_segmented_beside_dicom(models: Models, studies: Path, tmp_path: Path) -> None:
    shutil.copytree(studies / "images", tmp_path / "archive")
    (tmp_path / "archive" / "pictures").mkdir()
    values = np.random.default_rng(1).integers(0, 256, (40, 36, 3), np.uint8)
    for number in range(2):
        Image.fromarray(values[..., number]).save(tmp_path / "archive" / "pictures" / f"{number}.png")
    volume = nib.Nifti1Image(values.astype(np.int16), np.diag([1.0, 1.0, 2.0, 1.0]))
    nib.save(volume, tmp_path / "archive" / "a.nii.gz")
    config = replace(cataloged(models, tmp_path), profiles=("seg", "nifti", "png"))
    result = segment(config)
    assert (result.series, result.segmented, result.rejected) == (PATIENTS + 3, PATIENTS + 3, 0)
    assert result.not_made == {"nifti": 2, "seg": 3}
    rows = {row["series_key"]: row for row in ledger.read(config.output).to_pylist()}
    loose = ds.dataset(config.manifest).to_table(filter=(ds.field("kind") == "image")).to_pylist()
    for one in loose:
        row = rows[one["instance_key"] if one["frame"] is None else one["series_key"]]
        assert len(ledger.uris(row, "png")) == (1 if one["frame"] is None else 3)
        assert len(ledger.uris(row, "nifti")) == (one["frame"] is not None)
    (uri,) = [uri for row in rows.values() for uri in ledger.uris(row, "nifti") if row["slices"] == 3]
    assert np.array_equal(nib.load(uri).affine, volume.affine)
    assert nib.load(uri).shape == volume.shape
    assert segment(config).skipped == PATIENTS + 3


def test_a_dry_run_tells_what_there_is_to_do_and_does_nothing(archive: SegmentConfig) -> None:
    nothing = segment(replace(archive, dry_run=True)).estimate
    assert nothing is not None
    assert (nothing.series, nothing.slices, nothing.seconds) == (PATIENTS, PATIENTS * SLICES, None)
    assert not Path(archive.output).exists()
    segment(archive)
    after = segment(replace(archive, model_uri="models:/brain/2", dry_run=True, cost_per_hour=36.0, concurrency=2))
    assert after.estimate is not None
    spent = sum(row["seconds"] for row in ledger.read(archive.output).to_pylist())
    assert after.estimate.seconds == pytest.approx(spent / 2)
    assert after.estimate.cost == pytest.approx(spent / 200)
    left = segment(replace(archive, dry_run=True))
    assert (left.skipped, left.estimate) == (PATIENTS, Estimate(0, 0, 0.0, None))


def test_small_lesions_and_empty_series_leave_no_files(archive: SegmentConfig) -> None:
    everything = replace(archive, postprocess=Postprocess(min_lesion_mm3=1e9), nothing_found="ledger")
    result = segment(everything)
    assert (result.segmented, result.seg_paths) == (PATIENTS, [])
    assert {row["foreground_pixels"] for row in ledger.read(archive.output).to_pylist()} == {0}
    assert not contents(archive)
    assert segment(everything).skipped == PATIENTS
    assert segment(replace(everything, only_changed=False)).segmented == PATIENTS


def test_a_report_needs_a_segmentation_to_be_about() -> None:
    with pytest.raises(ValueError, match=r"segment\.profiles: a report"):
        SegmentConfig("m", "u", "o", "t", profiles=("report", "seg"))


def test_a_job_of_the_service_outlives_it(models: Models, studies: Path, tmp_path: Path):
    """Each request asks a new `Jobs`, as a service that has been started again does."""

    def jobs() -> Jobs:
        places = {"sources": (str(studies),), "destinations": (str(tmp_path / "out"),)}
        config = JobsConfig(**places, settings={"cpus_per_actor": 2})
        return Jobs(config, ServedModel(name="brain", uri="none", tracking_uri=models.tracking_uri), RayJobs())

    def wanted(name: str) -> JobRequest:
        return JobRequest(source=str(studies), destination=str(tmp_path / "out" / name), model="champion")

    async def ended(job_id: str) -> JobAnswer:
        while True:
            job = await jobs().get(job_id, None)
            if job.state not in ("running", "cancelling"):
                return job
            await asyncio.sleep(0.1)

    async def story() -> list[JobAnswer]:
        stopped = await jobs().submit(wanted("stopped"), None)
        for destination, status in (("stopped", 409), ("other", 429)):
            with pytest.raises(RefusalError) as refused:
                await jobs().submit(wanted(destination), None)
            assert refused.value.status == status
        await jobs().cancel(stopped.id, None)
        stopped = await ended(stopped.id)
        done = await ended((await jobs().submit(wanted("done"), None)).id)
        return [stopped, done]

    stopped, done = asyncio.run(story())
    assert stopped.state == "cancelled"
    assert (done.state, done.error) == ("succeeded", None)
    assert done.result
    assert done.result["segmented"] == PATIENTS
    assert done.progress
    assert (done.progress.series, done.progress.series_total) == (PATIENTS, PATIENTS)
    assert (done.progress.slices, done.progress.slices_total) == (PATIENTS * SLICES, PATIENTS * SLICES)
    assert ledger.read(str(tmp_path / "out" / "done")).num_rows == PATIENTS
    listed = asyncio.run(jobs().visible(None, 20, None))
    assert [job.state for job in listed] == ["succeeded", "cancelled"]
