"""Values, colours and sources of masks become class indices; what no class is named for is an error of the mask."""

import io

import numpy as np
import pytest
from PIL import Image

from rayseg import config
from rayseg.data.labels import Labels
from rayseg.data.masks import truth
from rayseg.records import Reason, Reject

VALUES = np.array([[0, 1, 2], [127, 128, 255]], np.uint8)
BLEEDS = Labels(
    names=("EDH", "IPH", "IVH", "SAH", "SDH"),
    colors={"#ff0000": "EDH", "#0000ff": "IPH", "#ffff00": "IVH", "#00ffff": "SAH", "#00ff00": "SDH"},
)


def applied(labels: Labels, mask: np.ndarray, **options: object) -> list[list[int]]:
    classes = labels.apply(mask, **options)  # type: ignore[arg-type]
    assert not isinstance(classes, Reject), classes
    assert classes.dtype == np.uint8
    return classes.tolist()


def refused(labels: Labels, mask: np.ndarray, **options: object) -> str:
    reject = labels.apply(mask, **options)  # type: ignore[arg-type]
    assert isinstance(reject, Reject)
    assert reject.reason == Reason.MASK_VALUES
    return reject.detail


def test_a_threshold_is_the_last_value_of_the_background() -> None:
    assert applied(Labels(), VALUES) == [[0, 1, 1], [1, 1, 1]]
    assert applied(Labels(threshold=127), VALUES) == [[0, 0, 0], [0, 1, 1]]


def test_signed_and_deep_masks_are_binary_by_the_threshold() -> None:
    assert applied(Labels(), np.array([[-32768, 32767, 0]], np.int16)) == [[0, 1, 0]]
    assert applied(Labels(threshold=127), np.array([[0, 255, 256, 65535]], np.uint16)) == [[0, 1, 1, 1]]


def test_one_name_takes_all_colours_and_all_sources() -> None:
    colours = np.array([[[0, 0, 0], [0, 255, 0], [255, 0, 0]]], np.uint8)
    assert applied(Labels(("stroke",)), colours, source="hemorrhagic") == [[0, 1, 1]]


def test_several_names_are_the_values_1_2_and_so_on() -> None:
    labels = Labels(names=("hemorrhage", "infarct"))
    assert applied(labels, np.array([[0, 1, 2]], np.uint8)) == [[0, 1, 2]]
    assert "value 3" in refused(labels, np.array([[0, 1, 3]], np.uint8))
    assert "labels.colors" in refused(labels, np.array([[[255, 0, 0]]], np.uint8))


def test_values_map_to_classes_several_to_one_and_to_the_background() -> None:
    labels = Labels(("edema", "core"), values={1: "core", 1000: "core", 2: "edema", 255: "background"})
    assert applied(labels, np.array([[0, 1, 1000, 2, 255]], np.uint16)) == [[0, 2, 2, 1, 0]]
    grey = np.repeat(np.array([[0, 2, 1]], np.uint8)[..., np.newaxis], 3, axis=2)
    assert applied(labels, grey) == [[0, 1, 2]]


def test_values_of_a_lossy_mask_are_the_nearest() -> None:
    labels = Labels(("a", "b"), values={127: "a", 255: "b"})
    noisy = np.array([[3, 120, 140, 249]], np.uint8)
    assert applied(labels, noisy, lossy=True) == [[0, 1, 1, 2]]
    assert "value 3" in refused(labels, noisy)


def test_colours_map_to_classes_and_may_be_merged() -> None:
    colours = np.array([[[0, 0, 0], [255, 0, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0]]], np.uint8)
    assert applied(BLEEDS, colours) == [[0, 1, 2, 3, 4, 5]]
    merged = Labels(("outside", "inside"), colors=dict.fromkeys(("#ff0000", "#00ffff", "#00ff00"), "outside") | {
        "#0000ff": "inside", "#ffff00": "background"})  # fmt: skip
    assert applied(merged, colours) == [[0, 1, 2, 0, 1, 1]]
    assert applied(Labels(("any",), colors=dict.fromkeys(BLEEDS.colors or {}, "any")), colours) == [[0, 1, 1, 1, 1, 1]]


def test_an_area_of_a_colour_without_class_is_an_error_an_edge_is_not() -> None:
    colours = np.zeros((20, 20, 3), np.uint8)
    colours[4:12, 4:12] = (255, 0, 0)
    colours[4:12, 12:14] = (255, 0, 255)  # two pixels of something between
    assert np.array_equal(np.array(applied(BLEEDS, colours))[4:12, 4:12], np.ones((8, 8)))
    colours[12:18, 4:12] = (255, 0, 255)
    assert "colour #ff00ff" in refused(BLEEDS, colours)


@pytest.mark.parametrize(("quality", "least"), [(95, 0.99), (75, 0.98), (50, 0.96)])
def test_the_nearest_colour_takes_jpeg_noise_away(quality: int, least: float) -> None:
    rr, cc = np.mgrid[:128, :128]
    colours = np.zeros((128, 128, 3), np.uint8)
    colours[(rr - 40) ** 2 + (cc - 40) ** 2 < 20**2] = (0, 0, 255)
    colours[(rr - 80) ** 2 + (cc - 60) ** 2 < 15**2] = (255, 255, 0)
    colours[(rr - 60) ** 2 + (cc - 100) ** 2 < 9**2] = (255, 0, 0)
    exact = np.array(applied(BLEEDS, colours))
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "JPEG", quality=quality)
    noisy = truth([(buffer.getvalue(), None)], (128, 128), BLEEDS)
    assert isinstance(noisy, np.ndarray)
    assert set(np.unique(noisy)) == {0, 1, 2, 3}  # no class comes from a blend of two others
    for index in (1, 2, 3):
        both = np.count_nonzero((noisy == index) & (exact == index))
        assert 2 * both / (np.count_nonzero(noisy == index) + np.count_nonzero(exact == index)) > least


def test_sources_map_to_classes() -> None:
    labels = Labels(
        ("bleed", "infarct"), 127, sources={"hemorrhagic": "bleed", "ischemic": "infarct", "no": "background"}
    )
    assert applied(labels, VALUES, source="ischemic") == [[0, 0, 0], [0, 2, 2]]
    assert applied(labels, VALUES, source="no") == [[0, 0, 0], [0, 0, 0]]
    assert "labels.sources" in refused(labels, VALUES, source="other")
    assert "labels.sources" in refused(labels, VALUES)


def test_real_colour_masks_hold_their_five_kinds(shared_data) -> None:  # type: ignore[no-untyped-def]
    pixels = np.zeros(6, np.int64)
    for path in sorted((shared_data / "hemorrhage-ct/masks").iterdir()):
        classes = truth([(path.read_bytes(), None)], (512, 512), BLEEDS)
        assert isinstance(classes, np.ndarray)
        pixels += np.bincount(classes.ravel(), minlength=6)
    # Counted by colour with Pillow's getcolors over all 36 files
    assert pixels.tolist() == [9288577, 6456, 62046, 27270, 25036, 27799]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": []}, r"labels\.names"),
        ({"names": [""]}, r"labels\.names"),
        ({"names": ["a", "a"]}, r"labels\.names"),
        ({"names": ["background"]}, r"labels\.names"),
        ({"names": ["core (old)"]}, r"labels\.names: letters"),
        ({"threshold": 255}, r"labels\.threshold: 0\.\.254"),
        ({"names": ["a"], "values": {"1": "b"}}, r"labels\.values: 1 means 'b', which labels\.names lacks"),
        ({"names": ["a", "b"], "values": {"1": "b"}}, r"labels\.values: nothing means a"),
        ({"names": ["a"], "colors": {"red": "a"}}, r"labels\.colors: a colour as '#ff0000'"),
        ({"names": ["a"], "colors": {"#ff0000": "a"}, "sources": {"x": "a"}}, "one of colors and sources"),
    ],
)
def test_labels_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(Labels, values)


@pytest.mark.parametrize("labels", [Labels(), BLEEDS, Labels(("a", "b"), values={1: "a", 7: "b"})])
def test_labels_come_back_from_plain_values(labels: Labels) -> None:
    assert config.build(Labels, config.plain(labels)) == labels
