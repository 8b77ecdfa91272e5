"""The objects that slices are made of, one slice after the other: each object is read, parsed and let go once."""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

from rayseg import storage
from rayseg.data.manifest import read_failure
from rayseg.data.masks import Mask
from rayseg.dicom.reading import Slice, Source
from rayseg.records import Reject

Place = tuple[str, int | None]  # URI and frame of a slice


class Object:
    """What was read of an object: its bytes, or why there are none."""

    def __init__(self, data: bytes | OSError, color: bool) -> None:
        self.data, self._color = data, color

    def slice(self, frame: int | None) -> Slice | Reject:
        """One of its slices, see `Source`."""
        return read_failure(self.data) if isinstance(self.data, OSError) else self._source.slice(frame)

    @cached_property
    def mask(self) -> Mask | OSError:
        """The object as a mask."""
        return self.data if isinstance(self.data, OSError) else Mask(self.data)

    @cached_property
    def _source(self) -> Source:
        assert isinstance(self.data, bytes)
        return Source(self.data, self._color)


def read(needs: Sequence[Collection[str]], color: bool) -> Iterator[dict[str, Object]]:
    """The objects that each of some slices needs, by URI.

    Each is read once, some ahead, and is in memory from the first slice that needs it to the last one.

    Args:
        needs: URIs, of each slice in the order in which the slices are wanted.
        color: whether the colours of image files are wanted.
    """
    last = {uri: number for number, uris in enumerate(needs) for uri in uris}  # in the order of the first need
    reading = storage.read_each(last)
    here: dict[str, Object] = {}
    for number, uris in enumerate(needs):
        for uri in uris:
            if uri not in here:
                here[uri] = Object(next(reading), color)
        yield {uri: here[uri] for uri in uris}
        for uri in uris:
            if last[uri] == number:
                here.pop(uri, None)


def read_stacks(
    stacks: Sequence[Sequence[Place | None]], masks: Sequence[Sequence[str]], color: bool
) -> Iterator[tuple[list[Slice | Reject | None], list[Mask | OSError]]]:
    """Slices among their neighbours, with their masks.

    A slice that the next stack has too is decoded once: it is quick where stacks come in the order of a series.

    Args:
        stacks: places of slices, None where there is none.
        masks: URIs of those of each stack's slice.
        color: whether the colours of image files are wanted.
    """
    needs = [
        dict.fromkeys([*(place[0] for place in stack if place is not None), *uris])
        for stack, uris in zip(stacks, masks, strict=True)
    ]
    before: dict[Place, Slice | Reject] = {}
    for stack, uris, objects in zip(stacks, masks, read(needs, color), strict=True):
        slices: dict[Place, Slice | Reject] = {}
        for place in stack:
            if place is not None and place not in slices:
                slices[place] = before[place] if place in before else objects[place[0]].slice(place[1])
        yield [None if place is None else slices[place] for place in stack], [objects[uri].mask for uri in uris]
        before = slices
