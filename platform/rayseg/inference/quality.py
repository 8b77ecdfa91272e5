"""Quality of a segmented series: whether its input is of the model's range, and whether its prediction is plausible.

`look` keeps a few numbers of each slice where it is segmented, `judge` makes flags of those of a series in the end, so
no pixel is looked at twice. A slice alone is a series of one: HTTP and the bulk job judge alike. A flag stops nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayseg.data.agreement import Agreement
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import Range, entropy_bits, facts, facts_of_volume, pieces
from rayseg.data.volume import VolumePreprocess
from rayseg.inference.judgement import Judgement
from rayseg.records import QualityFlag

# Augmentation scales by up to 14 % either way, so a little more than that is still what the network has learned from.
_SPACING_FACTOR = 1.25
# Of the spread in training, to both sides, as a handful of patients does not show all there is; and grey values (of
# 255) where training has next to no spread.
_INTENSITY_MARGIN, _LEAST_INTENSITY_MARGIN = 0.25, 5.0
# The greatest of N training series is exceeded by about one in N + 1 others, by twice as much by few.
_AREA_FACTOR = _VOLUME_FACTOR = 2.0
# A prediction has crumbs that are no cause for alarm: fewer pieces than that are never flagged.
_PIECES_FACTOR, _LEAST_PIECES = 2, 20
# The mean over the foreground. With a model trained to a pooled Dice of 0.6 on T1-weighted MR the greatest patient of
# its own kind had 0.21 bits, two series of the same kind from elsewhere 0.23 and 0.38, two of FLAIR 0.38 and 0.53.
_ENTROPY_FACTOR = 1.5
_MOST_ENTROPY_BITS = 0.81  # where validation is not known: odds of three to one, on average, are no finding
_DISAGREEMENT_FACTOR = 1.5  # of what the least agreement of validation lacks to 1
_LEAST_PAIRWISE_DICE = 0.5  # where validation is not known


@dataclass(frozen=True)
class Look:
    """What is kept of a slice."""

    modality: str | None
    body_part: str | None
    spacing_mm: tuple[float, ...] | None  # between pixels as the network sees them
    intensity_mean: float | None  # of 0..255, see `range.facts`; None where a network sees volumes
    intensity_sd: float | None
    entropy_bits: float  # summed over `entropy_pixels`, the foreground that the model found
    entropy_pixels: int
    pixel_share: float  # a pixel's share of the network's picture
    share: float = 0.0  # the mask's
    pieces: int = 0  # of the mask
    agreement: Agreement | None = None  # of the masks of an ensemble's members, or of mirror images

    def of(self, mask: np.ndarray) -> "Look":
        """The same slice with the mask, uint8 (rows, columns), that postprocessing has made of the model's."""
        return dataclasses.replace(self, share=self.pixel_share * np.count_nonzero(mask), pieces=pieces(mask))


def look(preprocess: Preprocess | VolumePreprocess, judged: Judgement) -> Look:
    """What to keep of a segmented slice; `preprocess` is of the model's bundle."""
    if isinstance(preprocess, Preprocess):
        assert judged.image_HWC is not None
        known_facts = facts(judged.slice, judged.image_HWC, preprocess)
        pixel_share = float(np.prod(preprocess.scale(*judged.slice.shape)) / np.prod(preprocess.size))
    else:
        known_facts, pixel_share = facts_of_volume(judged.slice), 1 / judged.mask.size
    spacing_mm = known_facts["pixel_spacing_mm"]
    bits, pixels = entropy_bits(judged.probabilities_KHW, judged.mask) if judged.mask.any() else (0.0, 0)
    return Look(
        modality=known_facts["modality"],
        body_part=known_facts["body_part"],
        spacing_mm=spacing_mm and tuple(spacing_mm),
        intensity_mean=known_facts["intensity_mean"],
        intensity_sd=known_facts["intensity_sd"],
        entropy_bits=bits,
        entropy_pixels=pixels,
        pixel_share=pixel_share,
        agreement=Agreement.of(judged.members, judged.classes) if judged.members else None,
    ).of(judged.mask)


def judge(known: Range | None, slices: Sequence[Look], volume_ml: float | None = None) -> dict[QualityFlag, str]:
    """The flags of a series, sorted, with what exactly is told of it: nothing that identifies.

    Args:
        known: of the model's bundle; without it only the prediction is judged, by fixed limits.
        slices: all that were segmented, one or more.
        volume_ml: of the foreground; None where it is not known.
    """
    known = known or Range()
    flags: dict[QualityFlag, str] = {}
    foreign = (
        (QualityFlag.MODALITY, known.modalities, {one.modality for one in slices}),
        (QualityFlag.BODY_PART, known.body_parts, {one.body_part for one in slices}),
    )
    for flag, usual, told in foreign:
        others = sorted(value for value in told if value is not None and value not in usual)
        if usual and others:
            flags[flag] = f"{', '.join(others)}, not {' or '.join(usual)}"
    spacings_mm = [mm for one in slices for mm in one.spacing_mm or ()]
    if known.spacing_mm and spacings_mm:
        low, high = known.spacing_mm[0] / _SPACING_FACTOR, known.spacing_mm[1] * _SPACING_FACTOR
        if min(spacings_mm) < low or max(spacings_mm) > high:
            flags[QualityFlag.SPACING] = (
                f"{min(spacings_mm):.3g} to {max(spacings_mm):.3g} mm, not {low:.3g} to {high:.3g}"
            )
    odd = [
        _outside("mean", [one.intensity_mean for one in slices], known.intensity_mean),
        _outside("spread", [one.intensity_sd for one in slices], known.intensity_sd),
    ]
    if any(odd):
        flags[QualityFlag.INTENSITY] = ", ".join(filter(None, odd))
    share = max(one.share for one in slices)
    if known.foreground_share and share > _AREA_FACTOR * known.foreground_share:
        flags[QualityFlag.AREA] = f"{share:.1%} of a slice, at most {known.foreground_share:.1%} in training"
    if known.volume_ml and volume_ml is not None and volume_ml > _VOLUME_FACTOR * known.volume_ml:
        flags[QualityFlag.VOLUME] = f"{volume_ml:.3g} mL, at most {known.volume_ml:.3g} in training"
    most, allowed = max(one.pieces for one in slices), max(_LEAST_PIECES, _PIECES_FACTOR * (known.pieces or 0))
    if most > allowed:
        flags[QualityFlag.FRAGMENTS] = f"{most} pieces in a slice, over {allowed}"
    limit = _MOST_ENTROPY_BITS if known.entropy_bits is None else _ENTROPY_FACTOR * known.entropy_bits
    if (mean := entropy(slices)) is not None and mean > limit:
        flags[QualityFlag.ENTROPY] = f"{mean:.2f} bits a pixel found, over {limit:.2f}"
    least = known.pairwise_dice
    limit = _LEAST_PAIRWISE_DICE if least is None else 1 - _DISAGREEMENT_FACTOR * (1 - least)
    # Where nothing is found a crumb of one member would be no agreement at all.
    if mean is not None and (dice := pairwise_dice(slices)) is not None and dice < limit:
        flags[QualityFlag.PAIRWISE_DICE] = f"{dice:.2f} between members, below {limit:.2f}"
    return dict(sorted(flags.items()))


def entropy(slices: Sequence[Look]) -> float | None:
    """Bits, the mean over all pixels found in a series; None where there are none."""
    pixels = sum(one.entropy_pixels for one in slices)
    return sum(one.entropy_bits for one in slices) / pixels if pixels else None


def pairwise_dice(slices: Sequence[Look]) -> float | None:
    """How far the members agree on a series, as one volume, see `data.agreement`; None of one model."""
    agreements = [one.agreement for one in slices if one.agreement is not None]
    return sum(agreements[1:], agreements[0]).dice if agreements else None


def suspicion(known: Range | None, slices: Sequence[Look], volume_ml: float | None = None) -> dict[QualityFlag, float]:
    """How far each flag is from being raised or beyond, whatever its limit: more is more suspect. As `judge` has it.

    Only flags with a number, and those for which all that is needed is known. Where nothing is found its entropy is 0.
    """
    known = known or Range()
    numbers: dict[QualityFlag, float | None] = {
        QualityFlag.AREA: max(one.share for one in slices),
        QualityFlag.VOLUME: volume_ml,
        QualityFlag.FRAGMENTS: max(one.pieces for one in slices),
        QualityFlag.ENTROPY: entropy(slices) or 0.0,
    }
    spacings_mm = [mm for one in slices for mm in one.spacing_mm or ()]
    if known.spacing_mm and spacings_mm:
        numbers[QualityFlag.SPACING] = float(
            max(np.log(known.spacing_mm[0] / min(spacings_mm)), np.log(max(spacings_mm) / known.spacing_mm[1]))
        )
    beyond = [
        max(usual[0] - median, median - usual[1]) / _margin(usual)
        for values, usual in (
            ([one.intensity_mean for one in slices], known.intensity_mean),
            ([one.intensity_sd for one in slices], known.intensity_sd),
        )
        if usual is not None and (median := _median(values)) is not None
    ]
    if beyond:
        numbers[QualityFlag.INTENSITY] = max(beyond)
    if (dice := pairwise_dice(slices)) is not None:
        numbers[QualityFlag.PAIRWISE_DICE] = 1 - dice
    # Rounded, so that what only the order of additions tells apart is equally suspect.
    return {flag: round(float(number), 9) for flag, number in sorted(numbers.items()) if number is not None}


def describe(flags: Mapping[QualityFlag, str]) -> str | None:
    """The flags in one line; None where there are none."""
    return "; ".join(f"{flag}: {detail}" for flag, detail in flags.items()) or None


def _outside(name: str, values: Sequence[float | None], usual: tuple[float, float] | None) -> str:
    """How the median of a feature lies outside of what it was in training, if it does.

    The median, as the first and last slices of a sound series are unlike the others, and unlike each other's.
    """
    median = _median(values)
    if usual is None or median is None:
        return ""
    margin = _margin(usual)
    low, high = usual[0] - margin, usual[1] + margin
    return "" if low <= median <= high else f"{name} {median:.0f}, not {low:.0f} to {high:.0f} of 255"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _margin(usual: tuple[float, float]) -> float:
    return max(_INTENSITY_MARGIN * (usual[1] - usual[0]), _LEAST_INTENSITY_MARGIN)
