"""The slices of a series, read in order, and what its files take of the objects that they are in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import pydicom

from rayseg import storage
from rayseg.data import objects
from rayseg.data.objects import Place
from rayseg.dicom import nifti
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.inference import volume
from rayseg.inference.kept import Head
from rayseg.inference.outputs import Kind, read_head
from rayseg.inference.watch import Watch
from rayseg.records import Reason, Reject

_VOLUME_BYTES = 4096  # of a volume's file, compressed or not: more than its header


@dataclass
class Sources:
    """The objects of a series. What files take of them is there for those that a slice was read of."""

    kind: Kind
    color: bool  # whether the network sees the colours of image files
    watch: Watch
    datasets: dict[str, pydicom.Dataset | Reject] = field(default_factory=dict)  # of DICOM, without pixels, by URI
    volume: bytes | None = None  # `volume.header` of a NIfTI volume
    heads: dict[str, Head] = field(default_factory=dict)  # of DICOM and volumes, by URI

    def read(self, wanted: Sequence[Place]) -> Iterator[Slice | Reject]:
        """Each slice in order, some read ahead.

        Each object is read and parsed once.
        """
        runs = [(uri, [frame for _, frame in places]) for uri, places in groupby(wanted, key=lambda place: place[0])]
        reading = self.watch.each("read", objects.read([[uri] for uri, _ in runs], self.color))
        for (uri, frames), needed in zip(runs, reading, strict=True):
            object = needed[uri]
            for slice in self.watch.each("decode", map(object.slice, frames)):
                if isinstance(slice, Reject) or self._keep(uri, object.data, slice):
                    yield slice
                elif self.kind == "dicom":
                    yield Reject(Reason.NOT_DICOM, "an image file, where the manifest has a DICOM instance")
                else:
                    yield Reject(Reason.NOT_AN_IMAGE, "a DICOM instance, where the manifest has an image file")

    def _keep(self, uri: str, data: bytes | OSError, slice: Slice) -> bool:
        """Keeps what files take of the slice's object; False where that is of another kind than the manifest says."""
        assert isinstance(data, bytes)
        if (slice.header is not None) != (self.kind == "dicom"):
            return False
        if self.kind != "image" and uri not in self.heads:
            with self.watch.step("decode"):
                self._take(uri, data)
        return True

    def read_heads(self, known: Mapping[str, Head]) -> bool:
        """Takes of each object what files take, without its pixels; False where one is not the `known` one any more."""
        reading = storage.read_each(known, max((head.length for head in known.values()), default=0))
        for (uri, head), data in zip(known.items(), self.watch.each("read", reading), strict=True):
            if isinstance(data, OSError):
                return False
            with self.watch.step("decode"):
                self._take(uri, data[: head.length])
            if self.heads[uri] != head:
                return False
        return True

    def _take(self, uri: str, data: bytes) -> None:
        if self.kind == "dicom":
            self.datasets[uri], length = read_head(data)
        else:
            length = min(len(data), _VOLUME_BYTES)
            if self.volume is None and nifti.is_nifti(data):
                self.volume = volume.header(data)
        self.heads[uri] = Head.of(data, length)


def geometry(slice: Slice) -> Geometry:
    """Where the slice lies; of an image file, its size."""
    known = slice.header.geometry if slice.header else slice.geometry
    return known or Geometry(*slice.shape)
