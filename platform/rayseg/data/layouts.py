"""Layouts: where the images of a data set lie, and how masks and patients pair with them."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)

_SHOWN = 3


@dataclass(frozen=True)
class Layout:
    """Where things lie below a source. A mask has its image's path, whatever the suffix: `a/1.dcm` and `a/1.png`."""

    images: str = ""  # folder of the images below the source
    masks: str | None = None  # folder of the masks below the source; null: an archive without masks
    groups: str | None = None  # CSV below the source with the columns file,group: which patient an image is of
    missing_mask: Literal["reject", "empty"] = "reject"  # an image without a mask: refused, or without foreground


def stem(path: str) -> str:
    """What pairs an image with its mask: the path without the last suffix."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def pair(images: Sequence[str], masks: Sequence[str]) -> dict[str, str]:
    """Pairs images with masks by their paths without suffix.

    Args:
        images: paths below the layout's image folder.
        masks: paths below the layout's mask folder.

    Returns:
        Image path to mask path, for the images that have one. What does not pair is logged as a warning.

    Raises:
        ValueError: nothing pairs, or two masks claim one image; with counts and examples.
    """
    by_stem: dict[str, str] = {}
    for mask in masks:
        other = by_stem.setdefault(stem(mask), mask)
        if other != mask:
            raise ValueError(f"layout.masks: two masks for one image, as {other} and {mask}; keep one kind of file")
    pairs = {image: by_stem[stem(image)] for image in images if stem(image) in by_stem}
    lonely_images = [image for image in images if image not in pairs]
    used = set(pairs.values())
    lonely_masks = [mask for mask in masks if mask not in used]
    if lonely_images or lonely_masks:
        message = (
            f"layout: {len(pairs)} of {len(images)} images pair with one of {len(masks)} masks"
            f"{_examples('images without a mask', lonely_images)}{_examples('masks without an image', lonely_masks)}"
        )
        if not pairs:
            raise ValueError(f"{message}; paths below layout.images and layout.masks must be equal but for the suffix")
        logger.warning("%s", message)
    return pairs


def read_groups(data: bytes) -> Mapping[str, str]:
    """The CSV of groups: image path (below the layout's image folder) to group; raises ValueError where malformed."""
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"layout.groups: not a CSV file in UTF-8 ({type(error).__name__})") from None
    groups: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        file, group = row.get("file"), row.get("group")
        if not file or not group:
            raise ValueError(f"layout.groups: line {number} lacks a value for file or group; header: file,group")
        if groups.setdefault(file, group) != group:
            raise ValueError(f"layout.groups: line {number} puts a file into a second group")
    if not groups:
        raise ValueError("layout.groups: the CSV has no rows; header: file,group")
    return groups


def _examples(what: str, paths: Sequence[str]) -> str:
    return f"; {len(paths)} {what}, as {', '.join(paths[:_SHOWN])}" if paths else ""
