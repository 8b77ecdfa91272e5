"""The slices of a series, read in order, and what its files take of the objects that they are in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import pydicom

from rayseg.data import objects
from rayseg.data.objects import Place
from rayseg.dicom import nifti
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.inference import volume
from rayseg.inference.outputs import Kind, without_pixels
from rayseg.inference.watch import Watch
from rayseg.records import Reason, Reject


@dataclass
class Sources:
    """The objects of a series. What files take of them is there for those that a slice was read of."""

    kind: Kind
    color: bool  # whether the network sees the colours of image files
    watch: Watch
    datasets: dict[str, pydicom.Dataset | Reject] = field(default_factory=dict)  # of DICOM, without pixels, by URI
    volume: bytes | None = None  # `volume.header` of a NIfTI volume

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
        if self.kind == "dicom" and uri not in self.datasets:
            with self.watch.step("decode"):
                self.datasets[uri] = without_pixels(data)
        elif self.kind == "volume" and self.volume is None and nifti.is_nifti(data):
            self.volume = volume.header(data)
        return True


def geometry(slice: Slice) -> Geometry:
    """Where the slice lies; of an image file, its size."""
    known = slice.header.geometry if slice.header else slice.geometry
    return known or Geometry(*slice.shape)
