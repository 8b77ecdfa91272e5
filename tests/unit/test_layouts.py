"""Images pair with masks by patterns of paths, and what does not pair is told with counts and examples."""

import logging
from collections.abc import Sequence

import pytest

from rayseg import config
from rayseg.data.layouts import Layout, Mask, Planned, plan, read_groups

FOLDERS = Layout(images="images", masks="masks")


def planned(layout: Layout, paths: Sequence[str], groups: dict[str, str] | None = None) -> list[Planned[int]]:
    return list(plan(layout, [(path, 1) for path in paths], groups or {}))


def pairs(layout: Layout, paths: Sequence[str]) -> dict[str, list[str]]:
    return {image.path: [mask.path for mask in image.masks] for image in planned(layout, paths)}


def test_in_folders_pairs_are_paths_equal_but_for_the_suffix() -> None:
    images = ["p1/IM_0001.dcm", "p1/IM_0002.dcm", "p2/IM_0001.dcm", "p.3/noSuffix", "1.2.3.dcm", "1.2.4.dcm"]
    masks = ["1.2.4.png", "p1/IM_0002.png", "p2/IM_0001.png", "p1/IM_0001.png", "p.3/noSuffix.png", "1.2.3.png"]
    assert pairs(FOLDERS, [f"images/{path}" for path in images] + [f"masks/{path}" for path in masks]) == {
        "images/p1/IM_0001.dcm": ["masks/p1/IM_0001.png"],
        "images/p1/IM_0002.dcm": ["masks/p1/IM_0002.png"],
        "images/p2/IM_0001.dcm": ["masks/p2/IM_0001.png"],
        "images/p.3/noSuffix": ["masks/p.3/noSuffix.png"],
        "images/1.2.3.dcm": ["masks/1.2.3.png"],
        "images/1.2.4.dcm": ["masks/1.2.4.png"],
    }
    assert FOLDERS.folders() == ["images", "masks"]


def test_masks_may_lie_within_the_folder_of_the_images() -> None:
    layout = Layout(masks="masks")
    assert layout.folders() == [""]
    assert pairs(layout, ["1.png", "a/2.png", "masks/1.png", "masks/a/2.jpg"]) == {
        "1.png": ["masks/1.png"],
        "a/2.png": ["masks/a/2.jpg"],
    }


def test_a_pair_of_folders_a_class() -> None:
    layout = Layout(images="{label}/DICOM/{slice}.dcm", masks="{label}/PNG/{slice}.png")
    paths = ["bleed/DICOM/1.dcm", "bleed/PNG/1.png", "infarct/DICOM/1.dcm", "infarct/PNG/1.png"]
    found = {image.path: image.masks for image in planned(layout, paths)}
    assert found == {
        "bleed/DICOM/1.dcm": (Mask(1, "bleed/PNG/1.png", "bleed"),),
        "infarct/DICOM/1.dcm": (Mask(1, "infarct/PNG/1.png", "infarct"),),
    }


def test_several_masks_an_image_by_label_or_by_pattern() -> None:
    one = Layout(images="im/{slice}.png", masks="{label}/{slice}_mask.png")
    two = Layout(images="im/{slice}.png", masks=("{label}/{slice}_mask.png", "{label}/of_{slice}.tif"))
    paths = ["im/1.png", "im/2.png", "a/1_mask.png", "b/1_mask.png", "b/2_mask.png", "c/of_2.tif"]
    assert pairs(one, paths) == {"im/1.png": ["a/1_mask.png", "b/1_mask.png"], "im/2.png": ["b/2_mask.png"]}
    assert pairs(two, paths)["im/2.png"] == ["b/2_mask.png", "c/of_2.tif"]


def test_a_mask_beside_its_image_is_no_image_and_other_folders_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout("{patient}/brain/{slice}.jpg", "{patient}/brain/{slice}_HGE_Seg.jpg", missing_mask="empty")
    paths = ["049/brain/1.jpg", "049/brain/2.jpg", "049/brain/2_HGE_Seg.jpg", "049/bone/1.jpg", "050/brain/1.jpg"]
    with caplog.at_level(logging.INFO):
        found = planned(layout, [*paths, "list.csv"])
    assert [(image.path, len(image.masks), image.group) for image in found] == [
        ("049/brain/1.jpg", 0, "049"),
        ("049/brain/2.jpg", 1, "049"),
        ("050/brain/1.jpg", 0, "050"),
    ]
    # Nothing is wrong with that: it is told, and not as a warning.
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert "2 images without a mask, as 000/brain/0.jpg, 000/brain/0.jpg" in caplog.text
    assert "2 objects that are neither, as 000/xxxx/0.jpg, xxxx.csv" in caplog.text


def test_parts_of_fixed_width_and_parts_named_twice() -> None:
    fixed = Layout("images/{patient:3}{slice}.png", "masks/{patient:3}{slice}.png")
    (image,) = planned(fixed, ["images/120018.png", "masks/120018.png"])
    assert (image.group, len(image.masks)) == ("120", 1)
    twice = Layout("{patient}/{patient}_{slice}.tif", "{patient}/{patient}_{slice}_mask.tif", missing_mask="empty")
    found = pairs(twice, ["TCGA_A_1/TCGA_A_1_2.tif", "TCGA_A_1/TCGA_A_1_2_mask.tif", "TCGA_A_1/TCGA_B_1_2.tif"])
    assert found == {"TCGA_A_1/TCGA_A_1_2.tif": ["TCGA_A_1/TCGA_A_1_2_mask.tif"]}


def test_a_part_with_slashes() -> None:
    layout = Layout("{path**}/ct.nii.gz", "{path**}/label*.nii.gz")
    assert pairs(layout, ["a/b/ct.nii.gz", "a/b/label_1.nii.gz", "c/ct.nii.gz", "c/label.nii.gz"]) == {
        "a/b/ct.nii.gz": ["a/b/label_1.nii.gz"],
        "c/ct.nii.gz": ["c/label.nii.gz"],
    }


def test_one_segmentation_is_the_mask_of_all_slices_of_a_patient() -> None:
    layout = Layout("{patient}/ct/{slice}.dcm", "{patient}/seg*.dcm")
    paths = ["a/ct/1.dcm", "a/ct/2.dcm", "a/seg.dcm", "b/ct/1.dcm", "b/seg2.dcm"]
    assert pairs(layout, paths) == {
        "a/ct/1.dcm": ["a/seg.dcm"],
        "a/ct/2.dcm": ["a/seg.dcm"],
        "b/ct/1.dcm": ["b/seg2.dcm"],
    }


def test_one_mask_image_for_several_images_is_refused() -> None:
    layout = Layout("{patient}/ct/{slice}.dcm", "{patient}/mask*.png")
    with pytest.raises(ValueError, match=r"x/mask\.png would be the mask of several images"):
        planned(layout, ["a/ct/1.dcm", "a/ct/2.dcm", "a/mask.png"])


def test_images_of_two_patterns_may_have_one_mask() -> None:
    layout = Layout(("{patient}/brain/{slice}.jpg", "{patient}/bone/{slice}.jpg"), "{patient}/{slice}_seg.png")
    found = planned(layout, ["a/brain/1.jpg", "a/bone/1.jpg", "a/1_seg.png"])
    assert [(image.path, image.name, len(image.masks)) for image in found] == [
        ("a/brain/1.jpg", "a/brain/1.jpg", 1),
        ("a/bone/1.jpg", "a/bone/1.jpg", 1),
    ]


def test_all_paired_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        planned(FOLDERS, ["images/1.png", "masks/1.png"])
        planned(Layout(), ["1.dcm"])
    assert not caplog.records


def test_part_paired_warns_with_counts_and_three_examples(caplog: pytest.LogCaptureFixture) -> None:
    images = [f"images/{number}.png" for number in range(6)]
    with caplog.at_level(logging.WARNING):
        found = pairs(FOLDERS, [*images, "masks/0.png", "masks/stray.png"])
    assert {image for image, masks in found.items() if masks} == {"images/0.png"}
    message = caplog.text
    assert "1 of 6 images pair with one of 2 masks" in message
    assert "5 images without a mask, as images/0.png, images/0.png, images/0.png;" in message
    assert "1 masks without an image, as masks/xxxxx.png" in message
    assert "4.png" not in message


@pytest.mark.parametrize("mask", ["a.nii.gz", "a.nii", "a.nrrd", "a.seg.nrrd", "a.mha"])
def test_suffixes_of_volumes_pair_with_each_other(mask: str) -> None:
    assert pairs(FOLDERS, ["images/a.nii.gz", f"masks/{mask}"]) == {"images/a.nii.gz": [f"masks/{mask}"]}


def test_all_masks_without_an_image_are_listed() -> None:
    without_image: list[str] = []
    masks = [f"masks/{number}.png" for number in range(9)]
    objects = [(path, None) for path in ("images/4.png", *masks)]
    assert len(list(plan(FOLDERS, objects, {}, without_image))) == 1
    assert sorted(without_image) == [path for path in masks if path != "masks/4.png"]


def test_a_lonely_mask_is_a_warning_even_where_masks_may_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout("images", "masks", missing_mask="empty")
    planned(layout, ["images/1.png", "images/2.png", "masks/1.png", "masks/3.png"])
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.parametrize("missing_mask", ["reject", "empty"])
def test_nothing_paired_is_an_error_that_says_what_was_there(missing_mask: str) -> None:
    layout = Layout("images", "masks", missing_mask=missing_mask)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"0 of 2 images .* as images/x\.png, images/x\.png.* as masks/x_x\.png.*suffix"
    ):
        planned(layout, ["images/a.png", "images/b.png", "masks/m_a.png"])
    with pytest.raises(ValueError, match="0 of 1 images pair with one of 0 masks"):
        planned(layout, ["images/a.png"])


def test_nothing_matched_is_an_error_that_says_what_was_there() -> None:
    layout = Layout("{patient}/brain/{slice}.jpg", "{patient}/brain/{slice}_seg.jpg")
    with pytest.raises(
        ValueError, match=r"layout\.images: nothing matches .*; 4 objects .* as x/0\.jpg, x/0\.jpg, x/0\.jpg$"
    ):
        planned(layout, [f"{patient}/1.jpg" for patient in "abcd"])


def test_two_masks_for_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two masks for one image, as masks/x\.png and masks/x\.jpg"):
        planned(FOLDERS, ["images/a.dcm", "masks/a.png", "masks/a.jpg"])


@pytest.mark.parametrize("mask", ["label.nii.gz", "label.nrrd", "label.mha", "rtstruct.dcm"])
def test_what_says_where_it_lies_is_the_mask_of_a_whole_series_but_not_of_image_files(mask: str) -> None:
    layout = Layout("{patient}/ct/{slice}.dcm", f"{{patient}}/{mask}")
    found = planned(layout, ["a/ct/1.dcm", "a/ct/2.dcm", f"a/{mask}", "b/ct/1.dcm", f"b/{mask}"])
    assert [[one.path for one in image.masks] for image in found] == [[f"{one}/{mask}"] for one in "aab"]
    files = Layout("{patient}/ct/{slice}.png", f"{{patient}}/{mask}")
    with pytest.raises(ValueError, match="would be the mask of several images"):
        planned(files, ["a/ct/1.png", "a/ct/2.png", f"a/{mask}"])


def test_without_masks_images_come_as_the_listing_does() -> None:
    def listing() -> object:
        yield "1.dcm", 5
        raise AssertionError("read ahead of the listing")

    first = next(plan(Layout(), listing(), {}))  # type: ignore[arg-type]
    assert (first.path, first.file, first.group, first.masks) == ("1.dcm", 5, None, ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": "a/{Slice}.png"}, r"layout\.images: .*a part is lower-case letters"),
        ({"images": "a/{slice.png"}, r"layout\.images"),
        ({"images": "{a}", "masks": "m/{b}"}, r"layout\.masks: 'm/\{b\}' names no part"),
        ({"images": "images", "masks": "masks/{slice}.png"}, "names no part"),
    ],
)
def test_a_malformed_layout_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(Layout, values)


def test_groups_are_read() -> None:
    assert read_groups(b"\xef\xbb\xbffile,group\r\n0.png,b1\r\np/1.png,b2\r\n") == {"0.png": "b1", "p/1.png": "b2"}


def test_the_groups_are_the_patients_by_the_path_in_the_images_folder_or_below_the_source() -> None:
    layout = Layout("images", "masks", groups="groups.csv")
    paths = ["groups.csv", "images/0.png", "images/1.png", "images/2.png", "masks/0.png"]
    found = planned(layout, paths, {"0.png": "b1", "images/1.png": "b2"})
    assert [image.group for image in found] == ["b1", "b2", None]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"file,group\n", "has no rows"),
        (b"name,patient\na,b\n", "line 2 lacks a value for file or group"),
        (b"file,group\na.png,\n", "line 2 lacks"),
        (b"file,group\na.png,1\na.png,2\n", "line 3 puts a file into a second group"),
        (b"\xff\xfe\x00", "not a CSV file in UTF-8"),
    ],
)
def test_a_malformed_csv_of_groups_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_groups(data)
