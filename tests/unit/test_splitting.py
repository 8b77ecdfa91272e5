"""A series of several volumes: into which stacks it is split, by what, and under which names."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from rayseg import storage
from rayseg.data import manifest
from rayseg.dicom import traits
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import read_slice
from rayseg.dicom.series import verdict
from rayseg.dicom.splitting import split
from rayseg.inference import plan
from rayseg.records import MANIFEST, Reason
from serving.upload import Limits, arrange
from tests.unit.conftest import item
from tests.unit.mr_images import GE, PHILIPS, SIEMENS, UIH, headers, image
from tests.unit.unread_archives import task

HEIGHTS_MM = [-12.0, -7.0, -2.0, 3.0, 8.0]
AXES = {"axial": ([1, 0, 0, 0, 1, 0], 2), "sagittal": ([0, 1, 0, 0, 0, -1], 0), "coronal": ([1, 0, 0, 0, 0, -1], 1)}


def volumes(*of_each: dict[str, Any], by_slice: bool = False, **shared: Any) -> list[bytes]:
    """Images of one volume after the other, or of one position after the other; the volume's number is their value."""
    pairs = [(z_mm, number) for number in range(len(of_each)) for z_mm in HEIGHTS_MM]
    pairs = sorted(pairs) if by_slice else pairs
    return [image(z_mm, value=100 + number, **{**shared, **of_each[number]}) for z_mm, number in pairs]


def names(files: Sequence[bytes]) -> list[str | None]:
    """The stacks' names; every stack is one volume of all positions, taken as it is."""
    read = headers(files)
    parts = split(read).parts
    for part in parts:
        assert verdict([read[index] for index in part.indices]).verdict == "ok"
        assert {read[index].geometry.image_position_mm[2] for index in part.indices} == set(HEIGHTS_MM)
        assert len({int(read_slice(files[index]).stored[0, 0]) for index in part.indices}) == 1
    assert sorted(index for part in parts for index in part.indices) == list(range(len(files)))
    return [part.name for part in parts]


def ct(kernel: str | list[str]) -> dict[str, Any]:
    values = {"SOPClassUID": uid.CTImageStorage, "Modality": "CT", "RescaleIntercept": 0, "RescaleSlope": 1}
    return {**values, "ConvolutionKernel": kernel, "Manufacturer": "A MAKER"}


def private(block: tuple[int, str], element: int, vr: str, *values: Any) -> list[dict[str, Any]]:
    return [{"private": [(block, element, vr, value)]} for value in values]


CASES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "b-values": ([{"DiffusionBValue": float(b)} for b in (800, 0, 50)], ["b=0", "b=50", "b=800"]),
    "b-values of Siemens": (private(SIEMENS, 0x0C, "IS", 1000, 0), ["b=0", "b=1000"]),
    "b-values of GE": (private(GE, 0x39, "IS", [1000000700, 8, 0, 0], [0, 8, 0, 0]), ["b=0", "b=700"]),
    "b-values of Philips": (private(PHILIPS, 0x03, "FL", 0.0, 600.0), ["b=0", "b=600"]),
    "b-values of UIH": (private(UIH, 0x09, "FD", 0.0, 600.0), ["b=0", "b=600"]),
    "directions": (
        [{"DiffusionBValue": 0.0}]
        + [
            {"DiffusionBValue": b, "DiffusionGradientOrientation": direction}
            for b in (1e3, 3e3)
            for direction in ([0.6, 0, 0.8], [-1, 0, 0])
        ],
        ["b=0", *(f"b={b}, direction {d}" for b in (1000, 3000) for d in ("-1 0 0", "0.6 0 0.8"))],
    ),
    "averages of one b-value": (
        [{"DiffusionBValue": b, "AcquisitionNumber": n} for n, b in enumerate((0.0, 1e3, 1e3), 1)],
        ["b=0, acquisition 1", "b=1000, acquisition 2", "b=1000, acquisition 3"],
    ),
    "b-values and a map of them": (
        [
            {"DiffusionBValue": 1e3, "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"]},
            {"DiffusionBValue": 0.0, "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"]},
            {"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]},
        ],
        ["ADC", "b=0", "b=1000"],
    ),
    "echoes": (
        [{"EchoNumbers": n, "EchoTime": te} for n, te in ((1, 11), (2, 78.5))],
        ["echo 1, EchoTime 11 ms", "echo 2, EchoTime 78.5 ms"],
    ),
    "echo times": ([{"EchoTime": te} for te in (4.92, 2.46)], ["EchoTime 2.46 ms", "EchoTime 4.92 ms"]),
    "inversion times": (
        [{"InversionTime": ti} for ti in (1500, 100)],
        ["InversionTime 100 ms", "InversionTime 1500 ms"],
    ),
    "flip angles": ([{"FlipAngle": angle} for angle in (2, 15)], ["FlipAngle 2", "FlipAngle 15"]),
    "magnitude and phase": (
        [{"ImageType": ["ORIGINAL", "PRIMARY", part, "ND"]} for part in "PM"],
        ["magnitude", "phase"],
    ),
    "magnitude and phase of Philips": (
        [{"ImageType": ["ORIGINAL", "PRIMARY", *part, "SE"]} for part in (["PHASE MAP", "P"], ["M_SE", "M"])],
        ["magnitude", "phase"],
    ),
    "parts of GE": (private(GE, 0x2F, "SS", 2, 3), ["imaginary", "real"]),
    "magnitude and phase of echoes": (
        [{"EchoTime": te, "ImageType": ["ORIGINAL", "PRIMARY", part]} for te in (5, 9) for part in "MP"],
        [f"EchoTime {te} ms, {part}" for te in (5, 9) for part in ("magnitude", "phase")],
    ),
    "water and fat": (
        [{"ImageType": ["DERIVED", "PRIMARY", "DIXON", part, "NORM"]} for part in ("WATER", "FAT")],
        ["FAT", "WATER"],
    ),
    "kernels": ([ct("B30f"), ct("B70h")], ["kernel B30f", "kernel B70h"]),
    "kernels of two values": ([ct(["I70f", "3"]), ct(["I31f", "3"])], ["kernel I31f 3", "kernel I70f 3"]),
    "kernels on other pixels": (
        [ct("STANDARD") | {"PixelSpacing": [0.8, 0.8]}, ct("BONE") | {"PixelSpacing": [0.5, 0.5]}],
        ["kernel BONE", "kernel STANDARD"],
    ),
    "energies": ([ct("A") | {"KVP": kv} for kv in (140, 80)], ["KVP 80", "KVP 140"]),
    "temporal positions": (
        [{"TemporalPositionIdentifier": n} for n in (10, 9, 11)],
        ["temporal position 9", "temporal position 10", "temporal position 11"],
    ),
    "acquisitions": ([{"AcquisitionNumber": n} for n in (2, 1)], ["acquisition 1", "acquisition 2"]),
    "frames of PET": (
        [{"FrameReferenceTime": t} for t in (45000.5, 15000)],
        ["FrameReferenceTime 15000 ms", "FrameReferenceTime 45000.5 ms"],
    ),
    "pixel spacings": ([{"PixelSpacing": [s, s]} for s in (1, 0.5)], ["spacing 0.5x0.5 mm", "spacing 1x1 mm"]),
}  # fmt: skip


@pytest.mark.parametrize("by_slice", [False, True], ids=["volume by volume", "interleaved"])
@pytest.mark.parametrize("case", CASES)
def test_stacks_by_what_tells_them_apart(case: str, by_slice: bool) -> None:
    of_each, expected = CASES[case]
    assert names(volumes(*of_each, by_slice=by_slice)) == expected


@pytest.mark.parametrize("case", CASES)
def test_one_volume_of_each_is_not_split(case: str) -> None:
    for of_one in CASES[case][0]:
        assert names(volumes(of_one)) == [None]


def test_numbers_that_differ_from_slice_to_slice_split_nothing() -> None:
    """Neither a stack, nor two echoes into as many stacks as there are slices."""
    files = [image(z_mm, AcquisitionNumber=n, TriggerTime=7 * n) for n, z_mm in enumerate(HEIGHTS_MM)]
    assert names(files) == [None]
    pairs = [(z_mm, te) for z_mm in HEIGHTS_MM for te in (5, 10)]
    files = [image(z_mm, AcquisitionNumber=n, EchoTime=te, value=te) for n, (z_mm, te) in enumerate(pairs)]
    assert names(files) == ["EchoTime 5 ms", "EchoTime 10 ms"]


def test_phases_of_the_heart_by_the_order_of_their_times() -> None:
    """Each position has heart beats of its own, so no trigger time is of a whole stack."""
    files = [
        image(z_mm, value=phase, TriggerTime=30.5 * phase + n * phase)
        for n, z_mm in enumerate(HEIGHTS_MM)
        for phase in (2, 0, 1)
    ]
    assert names(files) == ["phase 1", "phase 2", "phase 3"]
    one_position = [image(3.0, TriggerTime=30 * phase) for phase in range(4)]
    parts = split(headers(one_position)).parts
    assert [(part.name, part.indices) for part in parts] == [(f"TriggerTime {30 * n} ms", [n]) for n in range(4)]


def test_what_nothing_tells_apart_stays_whole_and_is_rejected() -> None:
    for files in (volumes({}, {}, {}), [*volumes({}), image(HEIGHTS_MM[1])]):
        read = headers(files)
        assert [part.name for part in split(read).parts] == [None]
        assert verdict(read).reason == Reason.SERIES_DUPLICATES


def test_a_slice_that_was_repeated_is_left_out() -> None:
    files = [*volumes({"AcquisitionNumber": 1}), image(HEIGHTS_MM[2], AcquisitionNumber=2)]
    result = split(headers(files))
    assert [(part.name, part.indices) for part in result.parts] == [(None, [0, 1, 2, 3, 4])]
    assert result.rest == {5: Reason.SERIES_DUPLICATES}


def test_a_last_volume_that_was_broken_off_is_a_stack() -> None:
    files = [*volumes({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}), *volumes({"AcquisitionNumber": 3})[:2]]
    found = {part.name: len(part.indices) for part in split(headers(files)).parts}
    assert found == {"acquisition 1": 5, "acquisition 2": 5, "acquisition 3": 2}


def test_slabs_that_overlap() -> None:
    files = [image(5.0 * (4 * slab + n), AcquisitionNumber=slab) for slab in (1, 2, 3) for n in range(5)]
    assert [(part.name, part.indices) for part in split(headers(files)).parts] == [
        (f"acquisition {slab}", list(range(5 * slab - 5, 5 * slab))) for slab in (1, 2, 3)
    ]


def test_planes_of_which_none_is_most() -> None:
    def stack(plane: str, count: int) -> list[bytes]:
        orientation, axis = AXES[plane]
        places = [[4.0 * n if one == axis else 0.0 for one in range(3)] for n in range(count)]
        return [image(ImagePositionPatient=place, ImageOrientationPatient=orientation) for place in places]

    three = headers([*stack("axial", 4), *stack("sagittal", 3), *stack("coronal", 3), image(Rows=16)])
    result = split(three)
    assert [(part.name, len(part.indices)) for part in result.parts] == [("axial", 4), ("coronal", 3), ("sagittal", 3)]
    assert result.rest == {10: Reason.SERIES_MIXED}
    for files in ([*stack("axial", 5), *stack("coronal", 4)], [*stack("axial", 1), *stack("coronal", 1)]):
        assert [part.name for part in split(headers(files)).parts] == [None]  # most are kept, or there is no stack
    tilted = [1, 0, 0, 0, 0.96, 0.28]
    turned = [image(ImagePositionPatient=[0, 0, 4 * n], ImageOrientationPatient=tilted) for n in range(4)]
    named = [part.name for part in split(headers([*stack("axial", 4), *turned])).parts]
    assert named == ["normal 0 -0.28 0.96", "normal 0 0 1"]


def test_copies_and_localizers() -> None:
    files = volumes({"EchoTime": 5}, {"EchoTime": 9})
    scout = image(HEIGHTS_MM[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    result = split(headers([*files, files[7], scout]))
    assert [part.indices for part in result.parts] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    assert result.rest == {11: Reason.LOCALIZER}


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(15)), st.lists(st.floats(0.1, 5000), min_size=3, max_size=3, unique=True))
def test_the_order_of_the_slices_changes_nothing(order: list[int], times_ms: list[float]) -> None:
    times_ms = [float(f"{time:.5g}") for time in times_ms]
    if len(set(times_ms)) < 3:
        return
    files = [image(z_mm, EchoTime=te) for te in times_ms for z_mm in HEIGHTS_MM]
    parts = split(headers([files[index] for index in order])).parts
    assert [sorted(order[index] for index in part.indices) for part in parts] == [
        list(range(5 * n, 5 * n + 5)) for n in np.argsort(times_ms)
    ]


def diffusion(b_value: float, direction: Sequence[float] | None = None) -> dict[str, Any]:
    directionality = "DIRECTIONAL" if direction else "NONE"
    values: dict[str, Any] = {"DiffusionBValue": b_value, "DiffusionDirectionality": directionality}
    if direction:
        values["DiffusionGradientDirectionSequence"] = item(DiffusionGradientOrientation=list(direction))
    return {"MRDiffusionSequence": item(**values)}


ENHANCED: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "b-values": ([diffusion(1000), diffusion(0)], ["b=0", "b=1000"]),
    "directions": (
        [diffusion(0), diffusion(1000, [1, 0, 0]), diffusion(1000, [0, 0, 1]), diffusion(2000, [0, 0, 1])],
        ["b=0", "b=1000, direction 0 0 1", "b=1000, direction 1 0 0", "b=2000, direction 0 0 1"],
    ),
    "echoes": (
        [{"MREchoSequence": item(EffectiveEchoTime=te)} for te in (9.5, 4.25)],
        ["EchoTime 4.25 ms", "EchoTime 9.5 ms"],
    ),
    "parts": (
        [{"MRImageFrameTypeSequence": item(ComplexImageComponent=part)} for part in ("PHASE", "MAGNITUDE")],
        ["magnitude", "phase"],
    ),
    "frame types": (
        [{"MRImageFrameTypeSequence": item(FrameType=["DERIVED", "PRIMARY", "NONE", t])} for t in ("WATER", "FAT")],
        ["FAT", "WATER"],
    ),
    "kernels": (
        [{"CTReconstructionSequence": item(ConvolutionKernel=kernel)} for kernel in ("B60", "B20")],
        ["kernel B20", "kernel B60"],
    ),
    "temporal positions": (
        [{"FrameContentSequence": item(TemporalPositionIndex=n, StackID="1")} for n in (2, 1)],
        ["temporal position 1", "temporal position 2"],
    ),
    "cardiac phases": (
        [{"CardiacSynchronizationSequence": item(NominalPercentageOfCardiacPhase=p)} for p in (75.0, 40.0)],
        ["40 % of the cycle", "75 % of the cycle"],
    ),
    "trigger delays": (
        [{"CardiacSynchronizationSequence": item(NominalCardiacTriggerDelayTime=t)} for t in (0.0, 33.5)],
        ["TriggerTime 0 ms", "TriggerTime 33.5 ms"],
    ),
    "stacks": ([{"FrameContentSequence": item(StackID=name)} for name in "21"], ["stack 1", "stack 2"]),
    "acquisitions": (
        [{"FrameContentSequence": item(FrameAcquisitionNumber=n)} for n in (2, 1)],
        ["acquisition 1 of frames", "acquisition 2 of frames"],
    ),
    "dimensions": (
        [{"FrameContentSequence": item(DimensionIndexValues=[1, n])} for n in (1, 2)],
        ["index 1 of dimension 2", "index 2 of dimension 2"],
    ),
    "converted attributes": (
        [{"UnassignedPerFrameConvertedAttributesSequence": item(EchoTime=te)} for te in (5, 10)],
        ["EchoTime 5 ms", "EchoTime 10 ms"],
    ),
}


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
@pytest.mark.parametrize("case", ENHANCED)
def test_frames_of_an_enhanced_object(
    enhanced: Callable[..., Dataset], as_file: Callable[..., bytes], case: str, syntax: str
) -> None:
    of_each, expected = ENHANCED[case]
    groups = [group for _ in HEIGHTS_MM for group in of_each]
    positions_mm = [(0, 0, z_mm) for z_mm in HEIGHTS_MM for _ in of_each]
    dataset = enhanced(np.zeros((len(groups), 6, 8), np.uint16), positions_mm, Modality="MR")
    for of_frame, values in zip(dataset.PerFrameFunctionalGroupsSequence, groups, strict=True):
        for keyword, value in values.items():
            setattr(of_frame, keyword, value)
    read = headers([as_file(dataset, syntax)])
    parts = split(read).parts
    assert [part.name for part in parts] == expected
    count = len(of_each)
    of_volume = {tuple(range(number, len(read), count)) for number in range(count)}
    assert {tuple(part.indices) for part in parts} == of_volume


def test_an_enhanced_object_for_each_volume(enhanced: Callable[..., Dataset], as_file: Callable[..., bytes]) -> None:
    """As Siemens stores functional series; whatever the frames say of themselves, what is in one object is together."""
    positions_mm = [(0, 0, z_mm) for z_mm in HEIGHTS_MM]
    files = []
    for number in (3, 1, 2):
        dataset = enhanced(np.zeros((5, 6, 8), np.uint16), positions_mm, Modality="MR")
        dataset.SOPInstanceUID, dataset.InstanceNumber = f"1.2.3.4.{number}", number
        for place, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            groups.FrameContentSequence = item(FrameAcquisitionNumber=place, TemporalPositionIndex=1)
        files.append(as_file(dataset))
    parts = split(headers(files)).parts
    assert [(part.name, part.indices[0]) for part in parts] == [
        ("instance 1", 5),
        ("instance 2", 10),
        ("instance 3", 0),
    ]
    assert all(len(part.indices) == 5 for part in parts)


def dcm2niix_volumes(files: Sequence[bytes], folder: Path) -> Counter[tuple[int, ...]]:
    """The volumes that dcm2niix makes of the files, each as its values."""
    program = shutil.which("dcm2niix", path=str(Path(sys.executable).parent)) or shutil.which("dcm2niix")
    if program is None:
        pytest.skip("dcm2niix is not installed")
    for number, data in enumerate(files):
        (folder / f"{number}.dcm").write_bytes(data)
    out = folder / "out"
    out.mkdir()
    subprocess.run([program, "-z", "n", "-o", str(out), str(folder)], check=True, capture_output=True, timeout=60)
    found: Counter[tuple[int, ...]] = Counter()
    for path in out.glob("*.nii"):
        volume = np.asarray(nibabel.load(path).dataobj)
        for one in np.moveaxis(volume.reshape(*volume.shape[:3], -1), 3, 0):
            found[tuple(sorted(int(value) for value in one[0, 0]))] += 1
    return found


@pytest.mark.parametrize(
    "case",
    [
        "b-values of Siemens",
        "echoes",
        "magnitude and phase",
        "temporal positions",
        "flip angles",
        "averages of one b-value",
    ],
)
def test_stacks_are_the_volumes_that_dcm2niix_makes(case: str, tmp_path: Path) -> None:
    of_each = CASES[case][0]
    files = [
        image(z_mm, value=100 * (volume + 1) + place, **values)
        for volume, values in enumerate(of_each)
        for place, z_mm in enumerate(HEIGHTS_MM)
    ]
    parts = split(headers(files)).parts
    ours = Counter(tuple(sorted(int(read_slice(files[i]).stored[0, 0]) for i in part.indices)) for part in parts)
    assert ours == dcm2niix_volumes(files, tmp_path)


def rows(files: Sequence[bytes]) -> list[dict[str, Any]]:
    pseudonyms = Pseudonyms(b"key")
    items = [manifest.Item(f"{n}.dcm", f"{n}.dcm", len(data), [], None) for n, data in enumerate(files)]
    none = {"series_verdict": None, "series_detail": None, "reason": None, "detail": None, "stack": None}
    return [
        {**none, **row}
        for one, data in zip(items, files, strict=True)
        for row in manifest.rows(one, data, pseudonyms)
    ]  # fmt: skip


def test_each_stack_is_a_series_in_the_manifest() -> None:
    echoes = volumes({"EchoTime": 9}, {"EchoTime": 5}, by_slice=True)
    scout = image(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    other = [image(z_mm, SeriesInstanceUID="1.2.840.1.2") for z_mm in HEIGHTS_MM]
    found = rows([*echoes, scout, *other])
    whole = found[0]["series_key"]
    judged = manifest.in_series([dict(row) for row in found])
    assert [row["stack"] for row in judged] == ["EchoTime 5 ms"] * 6 + ["EchoTime 9 ms"] * 5 + [None] * 5
    keys = [row["series_key"] for row in judged]
    assert len(set(keys)) == 3
    assert all(key.startswith(f"{whole}-") for key in keys[:11])
    assert keys[11:] == [row["series_key"] for row in found[11:]]
    assert [row["reason"] for row in judged] == [None] * 5 + ["localizer"] + [None] * 10
    for start in (0, 6, 11):
        assert [row["image_position_mm"][2] for row in judged[start : start + 5]] == HEIGHTS_MM
    again = [manifest.unjudged(dict(row)) for row in judged]
    by_uri = {row["uri"]: row for row in found}
    assert all(row == by_uri[row["uri"]] for row in again)
    assert manifest.in_series(again) == judged


def test_an_archive_run_has_a_series_for_each_stack(tmp_path: Path) -> None:
    scout = image(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    judged = manifest.in_series(rows([scout, *volumes(*CASES["b-values"][0], by_slice=True)]))
    uri = str(tmp_path / "manifest.parquet")
    storage.write_table(uri, pa.Table.from_pylist(judged, schema=MANIFEST))
    kept: list[dict[str, Any]] = []
    of = task(tmp_path, ("seg",))
    planned = plan.make(uri, of, lambda row: False, lambda unusable, rejects: kept.extend([*unusable, *rejects]))
    assert planned.series == list(dict.fromkeys(row["series_key"] for row in judged))
    slices = [len(plan.unpacked_series(cell)["uris"]) for cell in planned.todo]
    assert slices == [5, 5, 5]
    assert [(row["reason"], row["series_key"]) for row in kept] == [("localizer", planned.series[0])]


@pytest.mark.parametrize(
    ("patterns", "taken"),
    [
        (None, ["b=0", "b=50", "b=800"]),
        (["b=800"], ["b=800"]),
        (["b=0", "b=8*"], ["b=0", "b=800"]),
        (["echo 1*"], []),
    ],
)
def test_stacks_that_are_wanted(patterns: list[str] | None, taken: list[str]) -> None:
    files = volumes(*CASES["b-values"][0])
    other = [image(z_mm, SeriesInstanceUID="1.2.840.1.2") for z_mm in HEIGHTS_MM]
    judged = manifest.in_series(rows([*files, *other]), patterns)
    assert list(dict.fromkeys(row["stack"] for row in judged if row["verdict"] == "ok")) == [*taken, None]
    refused = [row for row in judged if row["verdict"] != "ok"]
    assert {row["reason"] for row in refused} <= {"stack_not_wanted"}
    assert len(refused) == 15 - 5 * len(taken)


def test_nothing_that_is_no_code_is_kept() -> None:
    """Neither names in free text, nor times of the day, nor what a private block of another creator holds."""
    told = image(
        ImageType=["ORIGINAL", "PRIMARY", "Meier^Hans"],
        ConvolutionKernel="Meier^Hans",
        AcquisitionTime="101112",
        ContentTime="101113",
        AcquisitionDate="20200102",
        ProtocolName="MEIER",
        EchoTime=5,
        private=[((0x0019, "MEIER"), 0x0C, "LO", "1234")],
    )
    (header,) = headers([told])
    assert header.traits == "EchoTime=5|ImageType=ORIGINAL\\PRIMARY\\"


@given(
    st.dictionaries(
        st.sampled_from(sorted(traits.TAGS)),
        st.binary(max_size=40) | st.text(r"0123456789.\-E").map(str.encode),
    )
)
def test_any_bytes_give_values_that_can_be_read_back(values: dict[int, bytes]) -> None:
    elements = {tag: RawDataElement(BaseTag(tag), None, len(data), data, 0, True, True) for tag, data in values.items()}
    told = traits.read(elements)
    assert re.fullmatch(r"[A-Za-z0-9 _.+/|=\\-]*", told)
    assert len(told) < 1000
    known = {trait.name for trait in traits.TRAITS}
    assert set(traits.parsed(told)) <= known


def test_an_upload_of_several_stacks_is_refused_by_their_names() -> None:
    refused = arrange(volumes(*CASES["b-values"][0]), Limits())
    assert refused.reason == Reason.SERIES_DUPLICATES
    assert "b=0; b=50; b=800" in refused.detail
    sizes = arrange(volumes({"Rows": 8}, {"Rows": 16}), Limits())
    assert (sizes.reason, "16x8 pixels" in sizes.detail) == (Reason.SERIES_MIXED, True)
    taken = arrange([*volumes({"AcquisitionNumber": 1}), image(HEIGHTS_MM[2], AcquisitionNumber=2)], Limits())
    assert (len(taken.places), dict(taken.left_out)) == (5, {"series_duplicates": 1})
