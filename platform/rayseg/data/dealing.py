"""Exact dealing: patients to parts by numbers, balanced by the classes that they have and how large their lesions are.

Patients are put into an order in which neighbours are alike: by the classes that they have, then by the third of their
size, then by the hash. Along this order each one goes to the part that is furthest behind its number. So every run of
neighbours is spread over the parts by their shares (systematic sampling: Cochran, Sampling Techniques, 3rd ed., ch. 8),
and in the end each part has its number exactly.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

_BANDS = 3  # of sizes, among patients with the same classes


def numbers(held_out: Mapping[str, float], rest: Sequence[str], patients: int) -> dict[str, int]:
    """How many patients each part gets; all of them together.

    Args:
        held_out: shares of all patients, rounded to one at least; from 1 on numbers of patients; 0 for none.
        rest: parts that share the others evenly.
        patients: number of all.

    Raises:
        ValueError: a part of the rest gets nobody.
    """
    wanted = {
        part: round(share) if share >= 1 else max(1, round(share * patients)) if share else 0
        for part, share in held_out.items()
    }
    left = patients - sum(wanted.values())
    if left < len(rest):
        raise ValueError(
            f"prepare.split: {patients} patients are too few for {', '.join([*wanted, *rest])}; lower val or test, "
            "or catalog more patients (image files: layout.groups says which file is of which)"
        )
    return wanted | {part: left // len(rest) + (number < left % len(rest)) for number, part in enumerate(rest)}


def deal(
    patients: Sequence[str],
    foreground: Mapping[str, Sequence[int]],
    wanted: Mapping[str, int],
    kept: Mapping[str, str],
    position: Callable[[str], float],
) -> dict[str, str]:
    """The part of each patient, those of `kept` where they were.

    Args:
        patients: keys.
        foreground: by key, pixels of each class; who is not in it has none.
        wanted: how many each part has in the end, all patients together; where more are kept it has these.
        kept: parts of some.
        position: the hash of a key, in 0..1.
    """
    counts = Counter(kept[key] for key in patients if key in kept)
    dealt = {key: kept[key] for key in patients if key in kept}
    new = [key for key in _ordered(patients, foreground, position) if key not in kept]
    for key in new:
        share = (counts.total() + 1) / len(patients)
        room = [part for part in wanted if counts[part] < wanted[part]]
        dealt[key] = max(room, key=lambda part: wanted[part] * share - counts[part])
        counts[dealt[key]] += 1
    return dealt


def _ordered(
    patients: Sequence[str], foreground: Mapping[str, Sequence[int]], position: Callable[[str], float]
) -> list[str]:
    """Alike patients beside each other."""
    strata: dict[tuple[bool, ...], list[str]] = defaultdict(list)
    for key in patients:
        pixels = foreground.get(key, ())
        strata[tuple(count > 0 for count in pixels) if any(pixels) else ()].append(key)
    ordered: list[str] = []
    for stratum in sorted(strata):
        by_size = sorted(strata[stratum], key=lambda key: (-sum(foreground.get(key, ())), key))
        band = {key: rank * _BANDS // len(by_size) for rank, key in enumerate(by_size)}
        ordered += sorted(by_size, key=lambda key: (band[key], position(key)))
    return ordered
