"""Mosaics: the slices of a volume as tiles of one image, as Siemens and UIH store EPI and diffusion."""

from collections.abc import Mapping, Sequence

from pydicom.dataelem import RawDataElement

from rayseg.records import Reason, Reject

_WORDS = {"MOSAIC", "VFRAME"}  # Siemens, UIH; among the values of ImageType from the third, which are the maker's
_CREATOR, NUMBER = 0x00190010, 0x0019100A  # NumberOfImagesInMosaic, US, of "SIEMENS MR HEADER"
TAGS = frozenset({_CREATOR, NUMBER})


def refusal(
    image_types: Sequence[str], private: Mapping[int, RawDataElement], slices_are_frames: bool
) -> Reject | None:
    """MOSAIC where an object is one, by ImageType or by the number of its tiles.

    ImagePositionPatient is of the mosaic's corner and tiles are no frames, so no SEG could be of them.

    Args:
        image_types: ImageType and FrameType as they are stored, values separated by backslashes.
        private: the elements of TAGS that the object has.
        slices_are_frames: it is an enhanced object of several frames, which may keep the word (Siemens from XA30)
            though no frame is a mosaic. One that was converted from single images (legacy) is as these were.
    """
    if slices_are_frames:
        return None
    words = {value.strip().upper() for image_type in image_types for value in image_type.split("\\")[2:]}
    if not words & _WORDS and _tiles(private) < 2:
        return None
    return Reject(Reason.MOSAIC, "ImageType: slices as tiles of one image; take them apart with dcm2niix")


def _tiles(private: Mapping[int, RawDataElement]) -> int:
    creator, number = (private.get(tag) for tag in (_CREATOR, NUMBER))
    if creator is None or number is None or not (creator.value or b"").startswith(b"SIEMENS MR HEADER"):
        return 0
    value = number.value or b""
    return int.from_bytes(value, "little" if number.is_little_endian else "big") if len(value) == 2 else 0
