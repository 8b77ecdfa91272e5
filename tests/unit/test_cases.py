"""A case's row of the table: volumes and planes made by hand, and what is undefined."""

import csv
import io

import numpy as np
import pyarrow as pa
import pytest

from rayseg.evaluation import cases
from rayseg.evaluation.calibration import Probabilities
from rayseg.evaluation.cases import CASES, Case, Tolerance, images
from rayseg.geometry.grid import Geometry

SIDE = 6
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def at(z_mm: float | None, spacing: tuple[float, float] | None = (2.0, 0.5), thickness: float | None = 4.0) -> Geometry:
    position = None if z_mm is None else (10.0, -20.0, z_mm)
    return Geometry(SIDE, SIDE, spacing, thickness, position, None if z_mm is None else AXIAL)


def mask(*pixels: tuple[int, int], label: int = 1) -> np.ndarray:
    made = np.zeros((SIDE, SIDE), np.uint8)
    for place in pixels:
        made[place] = label
    return made


def row_of(
    predictions: list[np.ndarray], truths: list[np.ndarray], places: list[Geometry | None], index: int = 1
) -> dict:
    case = Case(Tolerance(mm=3.0, px=2.0))
    case.add_series(images(predictions, truths, places), index)
    return case.row()


def test_slices_with_positions_are_one_volume_in_order_with_its_own_distances() -> None:
    # Truth in the lowest slice, prediction in the highest, 3 mm and then 9 mm further up, one row (2 mm) down.
    predictions, truths = [mask((2, 1)), mask(), mask()], [mask(), mask(), mask((1, 1))]
    found = row_of(predictions, truths, [at(12), at(3), at(0)])
    assert (found["hd95_mm"], found["hd95_px"]) == (pytest.approx(np.hypot(12, 2)), None)
    assert (found["tp"], found["fp"], found["fn"], found["tn"]) == (0, 1, 1, 3 * SIDE * SIDE - 2)
    assert found["nsd_mm"] == 0.0
    assert (found["lesions_true"], found["lesions_found"], found["lesions_false"]) == (1, 0, 1)
    # Each slice is as wide as half of the way to its neighbours: 3 mm, 6 mm and 9 mm of 1 mm^2 a pixel.
    assert (found["truth_ml"], found["predicted_ml"]) == (pytest.approx(0.003), pytest.approx(0.009))


def test_dice_of_images_is_a_mean_over_those_with_any_mask() -> None:
    # Dice 1, 2/3 (one of two found) and 0; the last one has nothing in it.
    truths = [mask((1, 1)), mask((1, 1), (2, 2)), mask((3, 3)), mask()]
    predictions = [mask((1, 1)), mask((1, 1)), mask(), mask()]
    planes = row_of(predictions, truths, [None] * 4)
    assert (planes["dice_per_image"], planes["images_scored"]) == (pytest.approx((1 + 2 / 3 + 0) / 3), 3)
    volume = row_of(predictions, truths, [at(0), at(5), at(10), at(15)])
    assert (volume["dice_per_image"], volume["images_scored"]) == (volume["dice"], 1)
    nothing = row_of([mask()], [mask()], [None])
    assert (nothing["dice_per_image"], nothing["images_scored"]) == (None, 0)


def test_a_lesion_goes_on_from_slice_to_slice_of_a_volume_only() -> None:
    masks = [mask((1, 1)), mask((2, 2))]
    assert row_of(masks, masks, [at(0), at(5)])["lesions_true"] == 1
    assert row_of(masks, masks, [at(None), at(None)])["lesions_true"] == 2
    assert row_of(masks, masks, [None, None])["lesions_true"] == 2
    apart = [masks[0], mask(), masks[1]]  # in the order of their places the empty one is the last
    assert row_of(apart, apart, [at(0), at(10), at(5)])["lesions_true"] == 1


def test_planes_are_measured_one_by_one_and_averaged_in_the_unit_that_is_known() -> None:
    predictions = [mask((0, 0)), mask((0, 0)), mask((5, 5)), mask(), mask()]
    truths = [mask((0, 4)), mask((0, 1)), mask(), mask((2, 2)), mask()]
    found = row_of(predictions, truths, [None] * 5)
    assert found["hd95_px"] == found["assd_px"] == (4 + 1) / 2  # of the two planes that have both
    assert found["nsd_px"] == (0 + 1 + 0 + 0) / 4  # of the four that have any
    assert found["hd95_mm"] is found["truth_ml"] is found["predicted_ml"] is None
    # With a spacing (columns 0.5 mm apart), but no positions: millimetres, and still planes without a volume.
    found = row_of(predictions, truths, [at(None)] * 5)
    assert (found["hd95_mm"], found["hd95_px"]) == ((2.0 + 0.5) / 2, None)
    assert found["truth_ml"] is None
    # One slice alone is as thick as its SliceThickness: 1 mm^2 times 4 mm.
    assert row_of([mask()], [mask((1, 1))], [at(0)])["truth_ml"] == pytest.approx(0.004)
    assert row_of([mask()], [mask((1, 1))], [at(0, thickness=None)])["truth_ml"] is None


@pytest.mark.parametrize(
    "places",
    [
        [at(0), at(0)],
        [at(0), at(5, spacing=(2.0, 0.6))],
        [at(0), at(5, spacing=None)],
        [at(0), None],
    ],
)
def test_what_is_no_volume_is_planes(places: list[Geometry | None]) -> None:
    made = images([mask(), mask()], [mask(), mask()], places)
    assert [len(image.truth) for image in made] == [1, 1]


def test_degenerate_cases() -> None:
    nothing, one = [mask()], [mask((0, 0))]
    both_empty = row_of(nothing, nothing, [None])
    for name in ("dice", "iou", "precision", "recall", "hd95_px", "assd_px", "nsd_px", "lesion_f1"):
        assert both_empty[name] is None
    assert both_empty["accuracy"] == 1.0
    missed, false_alarm = row_of(nothing, one, [None]), row_of(one, nothing, [None])
    for found in (missed, false_alarm):
        assert (found["dice"], found["iou"], found["nsd_px"], found["lesion_f1"]) == (0, 0, 0, 0)
        assert found["hd95_px"] is found["assd_px"] is None
    assert (missed["precision"], missed["recall"]) == (None, 0.0)
    assert (false_alarm["precision"], false_alarm["recall"]) == (0.0, None)
    one_pixel = row_of(one, one, [None])  # at the corner of the image
    assert (one_pixel["dice"], one_pixel["hd95_px"], one_pixel["assd_px"], one_pixel["nsd_px"]) == (1, 0, 0, 1)


def test_series_of_a_patient_add_up_and_classes_are_apart() -> None:
    case = Case(Tolerance())
    case.add_series(images([mask((0, 0), label=2)], [mask((0, 0), label=2)], [at(0)]), 2)
    case.add_series(images([mask((0, 0), label=1)], [mask((0, 3), label=2)], [at(0)]), 2)
    case.probabilities += Probabilities.of(np.full((2, 2), 0.5, np.float32), np.eye(2, dtype=bool))
    found = case.row()
    assert (found["tp"], found["fp"], found["fn"]) == (1, 0, 1)
    assert found["dice"] == pytest.approx(2 / 3)
    assert (found["truth_ml"], found["predicted_ml"]) == (pytest.approx(0.008), pytest.approx(0.004))
    assert found["nsd_mm"] == 0.5
    assert (found["brier"], found["ece"]) == (0.25, 0.0)


def test_the_table_survives_parquet_and_is_worst_first_for_people() -> None:
    rows = [
        {"patient_key": key, "class": "a", "slices": 1, "images": 1, "tp": 1, "dice": dice}
        for key, dice in (("fair", 0.5), ("none", None), ("poor", 1 / 3))
    ]
    table = pa.Table.from_pylist(rows, schema=CASES)
    assert cases.read(cases.to_parquet(table)).equals(table)
    told = list(csv.DictReader(io.StringIO(cases.to_csv(table).decode())))
    assert [(line["patient_key"], line["dice"]) for line in told] == [
        ("poor", "0.333333"),
        ("fair", "0.5"),
        ("none", ""),
    ]
    assert list(told[0]) == CASES.names
