"""The Arrow schemas that cross a border between stages, and the reasons an input can be rejected for.

Keys named `*_key` are pseudonyms (keyed HMAC, see `dicom.pseudonyms`): no identity stands in any of these tables.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import pyarrow as pa


class Reason(StrEnum):
    """Why an input was rejected. The value is the code in ledgers; docs/reference/reasons.md shows the table."""

    NOT_FOUND = "not_found"  # the object vanished between listing and reading
    READ_FAILED = "read_failed"  # the store kept failing after all retries
    EMPTY_OBJECT = "empty_object"  # zero bytes
    NOT_DICOM = "not_dicom"  # no DICOM data set, or an image file or volume where DICOM is needed
    TRUNCATED = "truncated"  # fewer bytes than the header or the pixel data's length announces
    CORRUPT = "corrupt"  # a data set that pydicom cannot parse
    NO_PIXELS = "no_pixels"  # a DICOM object without pixel data (RTSTRUCT, SR, presentation state, ...)
    UNSUPPORTED_SOP_CLASS = "unsupported_sop_class"  # pixels of no slice (SEG, dose, parametric map, whole slide tiles)
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"  # no maintained decoder
    UNSUPPORTED_PIXELS = "unsupported_pixels"  # float, or a layout that is not read; detail names the attribute
    UNSUPPORTED_MULTIFRAME = "unsupported_multiframe"  # several frames or volumes where one is expected (TIFF, NIfTI)
    MOSAIC = "mosaic"  # the slices of a volume as tiles of one image (Siemens MOSAIC, UIH VFRAME)
    DECODE_FAILED = "decode_failed"  # the decoder refused the pixel data
    MISSING_ATTRIBUTE = "missing_attribute"  # an attribute that is needed is absent or unusable; detail names it
    TOO_LARGE = "too_large"  # over a limit of pixels, frames, inflated bytes, scans or tiles; detail names it
    NOT_AN_IMAGE = "not_an_image"  # an image file (PNG, JPEG, TIFF) that cannot be decoded
    NO_MASK = "no_mask"  # no mask pairs with this image, or the masks that do are of other images
    NO_IMAGE = "no_image"  # a mask that no image pairs with
    MASK_MISMATCH = "mask_mismatch"  # the mask has another size or other pixels or planes than its image
    MASK_VALUES = "mask_values"  # the mask holds a value, colour or segment that no class is named for
    LOCALIZER = "localizer"  # a scout view, no part of a stack
    SERIES_MIXED = "series_mixed"  # a series with several sizes or orientations
    SERIES_DUPLICATES = "series_duplicates"  # a copy, or several different slices at one position
    STACK_NOT_WANTED = "stack_not_wanted"  # of a stack that `catalog.stacks` leaves out
    UNEVEN_SLICES = "uneven_slices"  # slices at uneven distances, which the format of the output cannot say (NIfTI)
    NEEDS_NEIGHBOURS = "needs_neighbours"  # a slice or image file alone, for a model that looks at those beside it too
    WRITE_FAILED = "write_failed"  # the result could not be made or stored
    INTERNAL = "internal"  # anything unforeseen: the detail names the exception's type only


@dataclass(frozen=True)
class Reject:
    """An input that was refused. `detail` says what exactly, without any value read from the input's identity."""

    reason: Reason
    detail: str = ""


class QualityFlag(StrEnum):
    """What makes a segmented series worth a look. docs/reference/flags.md shows the table."""

    MODALITY = "modality"  # another modality than the training set's
    BODY_PART = "body_part"  # another body part (BodyPartExamined) than the training set's
    SPACING = "spacing"  # pixels, as the network sees them, larger or smaller than the training set's
    INTENSITY = "intensity"  # grey values unlike the training set's: a missing rescale, another window, another scan
    AREA = "area"  # a slice with far more foreground than any of the training set
    VOLUME = "volume"  # a series with far more foreground than any of the training set
    FRAGMENTS = "fragments"  # a slice whose foreground lies in far more pieces than any of validation
    ENTROPY = "entropy"  # the model is less sure of what it found than with any patient of validation
    PAIRWISE_DICE = "pairwise_dice"  # several models, or mirror images, agree less than with any patient of validation


# The masks of an image, none or several; `label` is what the `{label}` of the layout's pattern has in its path. A
# manifest has the size and the ETag of the listing, too.
MASKS = pa.list_(pa.struct([("uri", pa.string()), ("label", pa.string())]))
MASK_FILES = pa.list_(pa.struct([*MASKS.value_type, ("bytes", pa.int64()), ("etag", pa.string())]))

# What an image without a mask is, and a slice that the mask of its series has no plane of: refused, or all background.
MissingMask = Literal["reject", "empty"]

# In the metadata of a manifest: `missing_mask` of the layout, which prepare needs too. Older manifests lack it: reject.
MISSING_MASK = b"rayseg.missing_mask"

# The slices beside a slice in its series, as many on each side, in order along the normal; null beyond the series.
NEIGHBOURS = pa.list_(pa.struct([("uri", pa.string()), ("frame", pa.int32())]))

# Lists have no fixed size in the type: Parquet readers disagree about fixed-size lists with nulls between.
# One row per slice of the source: a DICOM instance, a frame of one, or an image file.
MANIFEST = pa.schema(
    [
        ("uri", pa.string()),  # where the object lies
        ("frame", pa.int32()),  # number of the frame or slice in the object, from 0; null where the object is one image
        ("bytes", pa.int64()),  # size of the object
        ("etag", pa.string()),  # ETag of the object: another one means another content
        ("verdict", pa.string()),  # "ok" or "rejected"
        ("reason", pa.string()),  # the code of the reject; null where ok
        ("detail", pa.string()),  # what exactly is wrong; null where ok
        ("kind", pa.string()),  # "dicom" or "image"; null where rejected before that was known
        ("masks", MASK_FILES),  # the masks of the image; empty: none, or no foreground where the layout says so
        ("patient_key", pa.string()),  # pseudonym of the patient
        ("study_key", pa.string()),  # pseudonym of the study
        ("series_key", pa.string()),  # pseudonym of the series, or of the stack
        ("instance_key", pa.string()),  # pseudonym of the instance
        ("frame_of_reference_key", pa.string()),  # pseudonym of the frame of reference
        ("modality", pa.string()),  # Modality
        ("transfer_syntax_uid", pa.string()),  # TransferSyntaxUID
        ("rows", pa.int32()),  # Rows
        ("columns", pa.int32()),  # Columns
        ("instance_number", pa.int32()),  # InstanceNumber
        ("pixel_spacing_mm", pa.list_(pa.float64())),  # 2: between rows, between columns
        ("slice_thickness_mm", pa.float64()),  # SliceThickness
        ("image_position_mm", pa.list_(pa.float64())),  # ImagePositionPatient: 3 numbers
        (
            "image_orientation",
            pa.list_(pa.float64()),
        ),  # ImageOrientationPatient: 6 numbers, along a row, along a column
        ("localizer", pa.bool_()),  # a scout view
        ("traits", pa.string()),  # what may tell volumes of one series apart
        ("stack", pa.string()),  # the name of one of several stacks of its series; null where that is one
        ("series_verdict", pa.string()),  # "ok", "salvaged" or "rejected"
        ("series_detail", pa.string()),  # what was done to the series, or why it is rejected
    ]
)

# One row per training sample. Image and mask are raw C-ordered bytes; the set's `_prepared.json` tells their shapes.
PREPARED = pa.schema(
    [
        ("row_id", pa.string()),  # sha256 of the uri, or of uri#frame: names the sample in errors and tables
        ("patient_key", pa.string()),  # pseudonym of the patient
        ("study_key", pa.string()),  # pseudonym of the study; null for image files
        ("series_key", pa.string()),  # pseudonym of the series
        ("uri", pa.string()),  # where the image lies
        ("frame", pa.int32()),  # number of the frame or slice in the object, from 0
        ("masks", MASKS),  # the masks of the image
        ("neighbours", NEIGHBOURS),  # the slices whose channels `image` has too
        ("split", pa.string()),  # "train", "val" or "test"
        ("fingerprint", pa.binary()),  # of `image`, to find near-duplicates; null where there is nothing to tell
        ("modality", pa.string()),  # Modality; null for image files, as are the next three where the object lacks them
        ("body_part", pa.string()),  # BodyPartExamined
        ("pixel_spacing_mm", pa.list_(pa.float64())),  # 2, of `image`: between rows, between columns
        (
            "foreground_mm3",
            pa.float64(),
        ),  # on the slice's own grid, by the positions of its series; null: unknown
        ("intensity_mean", pa.float64()),  # of `image` without its neighbours' channels
        ("intensity_sd", pa.float64()),  # standard deviation of the same
        ("foreground_pixels", pa.int64()),  # pixels of `mask` that are no background
        ("image", pa.binary()),  # uint8, (height, width, channels)
        ("mask", pa.binary()),  # uint8 class indices, (height, width)
    ]
)

# The slices of a series, in order along the normal, with the masks of each.
SLICES = pa.list_(pa.struct([("uri", pa.string()), ("frame", pa.int32()), ("masks", MASKS)]))

# One row per volume of a set that was prepared with `prepare.volume`. Image and mask lie in a file of their own.
PREPARED_VOLUMES = pa.schema(
    [
        ("row_id", pa.string()),  # sha256 of the uri of the first slice, or of uri#frame: names the volume
        ("patient_key", pa.string()),  # pseudonym of the patient
        ("study_key", pa.string()),  # pseudonym of the study; null for volumes that are no DICOM
        ("series_key", pa.string()),  # pseudonym of the series
        ("slices", SLICES),  # what the volume was made of
        ("split", pa.string()),  # "train", "val" or "test"
        ("path", pa.string()),  # of its file, below the set
        ("shape", pa.list_(pa.int32())),  # 3, of image and mask: depth, height, width
        ("spacing_mm", pa.list_(pa.float64())),  # 3, likewise
        ("fingerprint", pa.binary()),  # of the image, to find near-duplicates; null where there is nothing to tell
        ("modality", pa.string()),  # Modality; null for volumes that are no DICOM, as is the next one
        ("body_part", pa.string()),  # BodyPartExamined
        ("foreground_mm3", pa.float64()),  # on the slices' own grid, by the positions of the series; null: unknown
        ("class_voxels", pa.list_(pa.int64())),  # voxels of the mask, of each class in the order of labels.names
        ("foreground_voxels", pa.int64()),  # of all classes together
        ("foreground_share", pa.float64()),  # the greatest share of a plane's area
        ("intensity_mean", pa.float64()),  # of the image, as the network sees it
        ("intensity_sd", pa.float64()),  # standard deviation of the same
    ]
)

# One row per rejected slice of a stage.
REJECTS = pa.schema(
    [
        ("uri", pa.string()),  # where the object lies
        ("frame", pa.int32()),  # number of the frame or slice in the object, from 0
        ("stage", pa.string()),  # the job that rejected it
        ("reason", pa.string()),  # the code of the reject
        ("detail", pa.string()),  # what exactly is wrong
        ("patient_key", pa.string()),  # pseudonym of the patient
        ("series_key", pa.string()),  # pseudonym of the series
    ]
)

# The files of a series; `profile` is one of `inference.outputs.Profile`.
OUTPUTS = pa.list_(
    pa.struct(
        [
            ("profile", pa.string()),  # what the file is
            ("uri", pa.string()),  # where it lies
            ("sha256", pa.string()),  # of its bytes
            ("bytes", pa.int64()),  # its size
            ("pacs", pa.string()),  # URL of the instance in a PACS; null where it is in none
        ]
    )
)

# The profiles that could not be made of a series, though others were.
NOT_MADE = pa.list_(
    pa.struct(
        [
            ("profile", pa.string()),  # what could not be made
            ("reason", pa.string()),  # the code of the reject
            ("detail", pa.string()),  # what exactly is wrong
        ]
    )
)

# The volumes of a series by class, with their 95 % intervals; null as in the columns of the same names.
CLASS_VOLUMES = pa.list_(
    pa.struct(
        [
            ("label", pa.string()),  # name of the class
            ("volume_ml", pa.float64()),  # its volume
            ("volume_low_ml", pa.float64()),  # lower end of the 95 % interval
            ("volume_high_ml", pa.float64()),  # upper end
        ]
    )
)

# The masks of a series that a run keeps, see `inference.kept`; `digest` is of what decides about them beside the input.
KEPT_FILE = pa.struct([("digest", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64())])

# One row per slice of a series whose masks are kept: where it lies, and what `inference.quality` keeps of it.
KEPT = pa.schema(
    [
        ("number", pa.int32()),  # of the slice among those of its series that the manifest accepts, from 0
        ("frame", pa.int32()),  # as in the manifest
        ("reason", pa.string()),  # a Reason value, of a slice without a mask; all that follows is null then
        ("detail", pa.string()),
        ("mask", pa.binary()),  # uint8 label map (rows, columns), C order, zlib
        ("rows", pa.int32()),
        ("columns", pa.int32()),
        ("pixel_spacing_mm", pa.list_(pa.float64())),  # this and the next as in the manifest
        ("slice_thickness_mm", pa.float64()),
        ("image_position_mm", pa.list_(pa.float64())),
        ("image_orientation", pa.list_(pa.float64())),
        ("modality", pa.string()),  # this and what follows as in `inference.quality.Look`
        ("body_part", pa.string()),
        ("spacing_mm", pa.list_(pa.float64())),
        ("intensity_mean", pa.float64()),
        ("intensity_sd", pa.float64()),
        ("entropy_bits", pa.float64()),
        ("entropy_pixels", pa.int64()),
        ("pixel_share", pa.float64()),
        ("share", pa.float64()),
        ("pieces", pa.int32()),
        (
            "agreement",
            pa.struct([("sizes", pa.list_(pa.list_(pa.int64()))), ("shared", pa.list_(pa.list_(pa.int64())))]),
        ),
        ("head_bytes", pa.int64()),  # of the object, before its pixels; null of image files
        ("head_sha256", pa.string()),
    ]
)

# One row per series of an archive run; an image file (PNG, JPEG, TIFF) is one by itself, under its `instance_key`.
LEDGER = pa.schema(
    [
        ("series_key", pa.string()),  # pseudonym of the series, or of the stack
        ("patient_key", pa.string()),  # pseudonym of the patient
        ("verdict", pa.string()),  # "segmented" or "rejected"
        ("reason", pa.string()),  # the code of the reject; null where segmented
        ("detail", pa.string()),  # warnings, or what exactly is wrong
        ("model_name", pa.string()),  # name of the registered model
        ("model_version", pa.string()),  # its version
        ("model_digest", pa.string()),  # digest of its bundle
        ("config_digest", pa.string()),  # digest of the settings that change the result
        ("slices", pa.int32()),  # slices that were segmented
        ("rejected_slices", pa.int32()),  # slices that were rejected
        ("foreground_pixels", pa.int64()),  # pixels that are no background, of all slices
        ("volume_ml", pa.float64()),  # volume of the foreground; null where positions do not give a slice distance
        # The 95 % interval of it, see `data.conformal`; null where there is none.
        ("volume_low_ml", pa.float64()),
        ("volume_high_ml", pa.float64()),  # its other end
        ("class_volumes", CLASS_VOLUMES),  # empty where the series is rejected; null in ledgers of earlier versions
        ("entropy_bits", pa.float64()),  # the mean over the pixels found; null where there are none
        ("pairwise_dice", pa.float64()),  # of an ensemble's members, or of mirror images; null of a model alone
        ("flags", pa.list_(pa.string())),  # `QualityFlag` values, sorted; null where the series is rejected
        ("flags_detail", pa.string()),  # the values behind the flags; null where there are none
        ("input_digest", pa.string()),  # of the objects that were to be segmented, by URI, frame and ETag
        ("outputs", OUTPUTS),  # empty: rejected, or nothing found where such series get no files
        ("not_made", NOT_MADE),  # empty: all profiles could be made; null in ledgers of earlier versions
        ("masks", KEPT_FILE),  # that are kept; null where none are, and in ledgers of earlier versions
        ("engine", pa.string()),  # with its version and precision; null where nothing ran
        ("read_s", pa.float64()),  # waiting for bytes
        ("decode_s", pa.float64()),  # from bytes to pixels
        ("forward_s", pa.float64()),  # the network, and scaling to and from its grid; 0 where masks were kept
        ("encode_s", pa.float64()),  # postprocessing, and making files
        ("write_s", pa.float64()),  # storing files
        ("seconds", pa.float64()),  # of the clock, in all
    ]
)

# What rows of an archive's two tables say of where they come from.
_WRITTEN = (
    pa.field("run_id", pa.string()),  # of MLflow; null of what the plan decided, before there was a run
    pa.field("rejects_digest", pa.string()),  # of the rejects that a row of the ledger counts; they have it, too
    pa.field("sequence", pa.int64()),  # of two rows of one object the later one is that of the greater number
)

# The ledger as it is stored: all rows that were ever written. `LEDGER` has the latest of each series, model and
# configuration.
LEDGER_TABLE = pa.schema([*LEDGER, *_WRITTEN])

# The rejects of an archive run as they are stored. Those with a `rejects_digest` are of the row of the ledger that has
# it, too, and hold as long as that is the latest of its series. The others are of no model: the latest of an object and
# a stage holds; one without a reason says that the object is refused no more.
ARCHIVE_REJECTS = pa.schema(
    [
        *REJECTS,
        pa.field("model_digest", pa.string()),
        pa.field("config_digest", pa.string()),
        *_WRITTEN,
    ]
)
