"""Facts: what a folder holds, what is doubtful about it, and which choices follow; `recipe` writes them down."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayseg import storage
from rayseg.data.layouts import Layout, Planned, plan, read_groups, shape
from rayseg.starter import classes as class_facts
from rayseg.starter import files as file_facts
from rayseg.starter import pairing
from rayseg.starter import patients as patient_facts
from rayseg.starter.classes import Classes
from rayseg.starter.files import File, Kind, spread
from rayseg.starter.looks import Look, look
from rayseg.starter.naming import Group
from rayseg.starter.pairing import Candidate
from rayseg.starter.patients import Patients

_LOOKED = 30  # images, and masks
_HALF = 0.5
_ROWS_OF_CPU, _ROWS_OF_GPU = 12_000, 100_000  # rows that are trained on, over all epochs: minutes on two cores
_EPOCHS = (5, 60)
_SIZES = (128, 256, 512)
_SMALLER_IS_FINE = 1.25  # an image so many times the size still fits it
_FEW_PATIENTS = 4
_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Facts:
    """All that a recipe is written from.

    files: that were listed.
    layout: None for an archive without masks.
    images, pairs, patients: by the layout's plan; patients are None where nothing tells them, and of DICOM headers
        those that were seen.
    rows: slices, about.
    beside: shapes of other groups of images whose files have the same names.
    """

    kinds: Counter[Kind]
    layout: Layout | None
    images: int
    pairs: int
    masks: int
    patients: int | None
    told_by: Patients | None
    classes: Classes | None
    rows: int
    median_px: int
    color: bool
    modality: str
    body_part: str
    size: int
    epochs: int
    batch_size: int
    gpu: bool
    doubts: tuple[str, ...]


def of_folder(folder: str) -> Facts:
    """Looks at the folder.

    Raises:
        ValueError: there is nothing in it that any job reads.
    """
    files, more = file_facts.listed(folder)
    kinds = Counter(file.kind for file in files)
    candidate = pairing.best(files)
    if candidate is None:
        raise ValueError(
            f"init: none of the {len(files)} files below {folder} is an image that the jobs read "
            "(DICOM, PNG, JPEG, TIFF, NIfTI, NRRD, MetaImage)"
        )
    doubts = [f"there are more than {file_facts.MOST} files; the recipe is made of the first ones"] if more else []
    if candidate.masks is None:
        return _unlabelled(kinds, candidate, doubts)
    return _labelled(kinds, files, candidate, candidate.masks.says_mask, doubts)


def _unlabelled(kinds: Counter[Kind], candidate: Candidate, doubts: list[str]) -> Facts:
    looks = _seen([member.file for member in candidate.images.members])
    count = len(candidate.images.members)
    base = _base(kinds, looks, count, doubts)
    return dataclasses.replace(base, images=count)


def _labelled(kinds: Counter[Kind], files: list[File], candidate: Candidate, named: bool, doubts: list[str]) -> Facts:
    who = patient_facts.find(candidate, files)
    layout = _layout(candidate, who)
    planned = list(plan(layout, [(file.path, file) for file in files], {}))
    paired = [image for image in planned if image.masks]
    masks = {mask.path: mask.file for image in paired for mask in image.masks}
    missing = len(planned) - len(paired)
    of_images, of_masks = _seen([one.file for one in paired]), _seen(list(masks.values()))
    classes = class_facts.find(of_masks, who.classes)
    empty = any(one.distinct == 1 and 0 in one.counts for one in of_masks)
    # Where masks without foreground are kept as files, an image without one was not looked at by anybody.
    of_series = candidate.images.kind == "dicom" and pairing.holds_places(_masks(candidate))
    if of_series or (missing and not empty):
        layout = dataclasses.replace(layout, missing_mask="empty")
    if missing:
        means = "has nothing to find" if layout.missing_mask == "empty" else "is left out (missing_mask)"
        doubts.append(f"{missing} of {len(planned)} images have no mask; the recipe says that such an image {means}")
    doubts += who.doubts
    if who.source == "table":
        planned = _with_table(layout, files, planned)
    base = _base(kinds, of_images, len(planned), doubts)
    if who.source == "header":
        patients: int | None = len({one.header.patient_id for one in of_images if one.header is not None})
    else:
        groups = {image.group for image in planned if image.group}
        patients = len(groups) if who.source != "unknown" else None
    doubts = [*doubts, *_doubts(candidate, layout, paired, classes, of_images, of_masks)]
    if named is False and candidate.images.says_mask:
        doubts.insert(0, "the files that are named as masks look like images, and those named as images like masks: "
                         "are they swapped? The recipe goes by what they look like")  # fmt: skip
    if who.guessed and patients is not None:
        doubts.append(f"the first digits of names are taken for the patient ({patients} of them): is that so?")
    if patients is not None and 1 < patients < _FEW_PATIENTS:
        doubts.append(f"{patients} patients are too few to trust a score")
    if patients == 1 and who.source != "header":
        patients = None
    return dataclasses.replace(
        base,
        layout=layout,
        images=len(planned),
        pairs=len(paired),
        masks=len(masks),
        patients=patients,
        told_by=who,
        classes=classes,
        doubts=tuple(doubts),
    )


def _layout(candidate: Candidate, who: Patients) -> Layout:
    """Plain folders where these are enough, patterns else."""
    layout = pairing.layout_of(candidate, who.parts, who.name)
    images, masks = candidate.images, _masks(candidate)
    plain = all(not one.varying and not one.head + one.tail and one.named and one.levels for one in (images, masks))
    if plain and who.name == pairing.NAME and who.source in ("table", "unknown", "header"):
        folders = ["/".join(name for name in one.levels if name) for one in (images, masks)]
        layout = Layout(folders[0], folders[1])
    return dataclasses.replace(layout, groups=who.table or ("groups.csv" if who.source == "unknown" else None))


def _with_table(layout: Layout, files: Sequence[File], planned: list[Planned[File]]) -> list[Planned[File]]:
    (table,) = [file for file in files if file.path == layout.groups]
    return list(plan(layout, [(file.path, file) for file in files], read_groups(storage.read(table.uri)))) or planned


def _masks(candidate: Candidate) -> Group:
    assert candidate.masks is not None
    return candidate.masks


def _seen(files: Sequence[File]) -> list[Look]:
    return [one for file in spread(files, _LOOKED) if (one := look(file)) is not None]


def _base(kinds: Counter[Kind], looks: Sequence[Look], images: int, doubts: list[str]) -> Facts:
    """What images alone say."""
    headers = [one.header for one in looks if one.header is not None]
    pixels = [one for one in looks if one.holds == "pixels"]
    median = round(statistics.median(max(one.shape) for one in pixels)) if pixels else 0
    rows = round(images * statistics.mean(one.slices for one in pixels)) if pixels else images
    gpu = _DRIVER.exists()
    fits = [size for size in _SIZES if median <= size * _SMALLER_IS_FINE]
    size = min(fits[0] if fits else _SIZES[-1], _SIZES[-1] if gpu else _SIZES[1])
    epochs = (_ROWS_OF_GPU if gpu else _ROWS_OF_CPU) // max(1, rows)
    if not looks:
        doubts.append("none of the images that were looked at can be read")
    return Facts(
        kinds=kinds,
        layout=None,
        images=images,
        pairs=0,
        masks=0,
        patients=None,
        told_by=None,
        classes=None,
        rows=rows,
        median_px=median,
        color=any(one.colour for one in pixels) and not headers,
        modality=_most(header.modality for header in headers),
        body_part=_most(header.body_part for header in headers),
        size=size,
        epochs=min(max(epochs, _EPOCHS[0]), _EPOCHS[1]),
        batch_size=8 if rows >= 64 else 4 if rows >= 16 else 2,
        gpu=gpu,
        doubts=tuple(doubts),
    )


def _most(words: Iterable[str]) -> str:
    counts = Counter(word for word in words if word)
    return counts.most_common(1)[0][0] if counts else ""


def _doubts(
    candidate: Candidate,
    layout: Layout,
    paired: Sequence[Planned[File]],
    classes: Classes,
    of_images: Sequence[Look],
    of_masks: Sequence[Look],
) -> list[str]:
    doubts = list(classes.doubts)
    if classes.rule == "values":
        doubts.append(f"masks hold {len(classes.names)} values beside 0: each is a class; give them names, see labels")
    if classes.foreground is not None and classes.foreground > _HALF:
        doubts.append(f"{classes.foreground:.0%} of the pixels of masks are foreground: are masks inverted?")
    if pairing.looks_like_masks(_masks(candidate)) is False:
        doubts.append("what is taken for masks looks like images: are images and masks swapped?")
    if pairing.looks_like_masks(candidate.images) is True:
        doubts.append("what is taken for images looks like masks, with few values: are they swapped?")
    if any(one.lossy for one in of_masks) and classes.threshold:
        doubts.append(
            f"masks are JPEG, whose noise is no foreground: above {classes.threshold} is foreground (labels.threshold)"
        )
    other = []
    for image in spread(paired, _LOOKED):
        of_image, of_mask = look(image.file), look(image.masks[0].file)
        flat = of_image is not None and of_mask is not None and of_mask.holds == "pixels" and not of_mask.volume
        if flat and of_image is not None and of_mask is not None and of_image.shape != of_mask.shape:
            other.append((image.path, of_image.shape, of_mask.shape))
    if other:
        path, expected, given = other[0]
        doubts.append(
            f"{len(other)} of {min(len(paired), _LOOKED)} masks have another size than their image, as "
            f"{shape(layout, path)} of {expected[0]}x{expected[1]} with a mask of {given[0]}x{given[1]}: "
            "prepare rejects these"
        )
    return doubts
