"""Measurements of a segmentation as a DICOM structured report by TID 1500 (PS3.16); equal input gives equal bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pydicom
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from rayseg.dicom import patient
from rayseg.dicom.parsing import silence_libraries
from rayseg.dicom.segmentation import finding, hashed_uid, long_string
from rayseg.records import QualityFlag, Reason, Reject

_DIAMETER = Code("L0JK", "IBSI", "Maximum 3D Diameter of a Mesh")  # PS3.16 CID 7470
_PROCEDURE = Code("363679005", "SCT", "Imaging procedure")
# The standard has the concept of a quality finding (111052, PS3.16 annex D) and no codes for these; a scheme whose name
# begins with 99 is a private one (PS3.3 8.2).
_SCHEME = "99RAYSEG"
_FINDINGS = {
    QualityFlag.MODALITY: Code("modality", _SCHEME, "Modality unlike the training data"),
    QualityFlag.BODY_PART: Code("body_part", _SCHEME, "Body part unlike the training data"),
    QualityFlag.SPACING: Code("spacing", _SCHEME, "Pixel spacing unlike the training data"),
    QualityFlag.INTENSITY: Code("intensity", _SCHEME, "Intensities unlike the training data"),
    QualityFlag.AREA: Code("area", _SCHEME, "Segmented area implausibly large"),
    QualityFlag.VOLUME: Code("volume", _SCHEME, "Segmented volume implausibly large"),
    QualityFlag.FRAGMENTS: Code("fragments", _SCHEME, "Segmentation in implausibly many pieces"),
    QualityFlag.ENTROPY: Code("entropy", _SCHEME, "Segmentation unusually uncertain"),
    QualityFlag.PAIRWISE_DICE: Code("pairwise_dice", _SCHEME, "Models unusually at odds about the segmentation"),
}
# TID 310 has the range of uncertainty to either side (CID 225) and may be extended: how many lie within it has no code.
_WITHIN = Code("volume_coverage", _SCHEME, "Of patients like those of validation the range has the truth of")
_PERCENT = 95


@dataclass(frozen=True)
class Lesion:
    """A connected part of a class."""

    volume_ml: float | None  # None where positions do not give one
    max_diameter_mm: float


@dataclass(frozen=True)
class Measured:
    """What is reported of a class."""

    volume_ml: float | None  # None where positions do not give one
    largest: Lesion | None  # by volume; None where nothing was found
    interval_ml: tuple[float, float] | None = None  # 95 %, around the volume; None where it is not known


def encode(
    segmentation: bytes,
    labels: Sequence[str],
    measured: Sequence[Measured],
    model_name: str,
    model_version: str,
    flags: Sequence[QualityFlag] = (),
) -> bytes | Reject:
    """A Comprehensive 3D SR about the segments of a DICOM Segmentation that `segmentation.encode` made.

    A segment has a measurement group with its volume, which has the distances to the ends of its interval among its
    properties (TID 310), and, where it holds any lesion, a second one with volume and
    diameter of the largest, tracked under a name and UID of its own.

    Args:
        segmentation: the object; patient and study are its.
        labels: of its segments, in order.
        measured: of the same.
        model_name, model_version: the registered model, named as the device that observed.
        flags: quality findings about the series, told of each segment.

    Returns:
        The object's bytes; WRITE_FAILED where it cannot be expressed.
    """
    silence_libraries()
    try:
        return _encoded(pydicom.dcmread(BytesIO(segmentation)), labels, measured, model_name, model_version, flags)
    except Exception as error:  # as of segmentations
        return Reject(Reason.WRITE_FAILED, f"the report cannot be made: {type(error).__name__}")


def _encoded(
    segmentation: Dataset,
    labels: Sequence[str],
    measured: Sequence[Measured],
    model_name: str,
    model_version: str,
    flags: Sequence[QualityFlag],
) -> bytes | Reject:
    identity = [str(segmentation.SOPInstanceUID), "TID 1500"]
    subject = patient.read(segmentation)
    if isinstance(subject, Reject):
        return subject
    for keyword in (*patient.PATIENT, *patient.STUDY):  # highdicom refuses malformed ones
        segmentation.pop(keyword, None)
    for keyword in patient.TYPE_2:
        setattr(segmentation, keyword, "")
    source_series = str(segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID)
    device = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=hashed_uid("device", [model_name, model_version]),
            name=long_string(f"{model_name} v{model_version}"),
            manufacturer_name="rayseg",
            model_name=long_string(model_name),
        ),
    )
    evaluations = [sr.QualitativeEvaluation(codes.DCM.QualityFinding, _FINDINGS[flag]) for flag in flags]
    groups = []
    for number, (label, values) in enumerate(zip(labels, measured, strict=True), start=1):
        segment = sr.ReferencedSegment(
            sop_class_uid=str(segmentation.SOPClassUID),
            sop_instance_uid=str(segmentation.SOPInstanceUID),
            segment_number=number,
            source_series=sr.SourceSeriesForSegmentation(source_series),
        )
        code = finding(label)
        volume = _volume(values.volume_ml, values.interval_ml)
        groups.append(_group(label, code, segment, [*identity, number], volume, evaluations))
        if values.largest is not None:
            diameter_mm = round(values.largest.max_diameter_mm, 3)
            measurements = [
                *_volume(values.largest.volume_ml),
                sr.Measurement(_DIAMETER, diameter_mm, codes.UCUM.Millimeter),
            ]
            name = f"{label}, largest lesion"
            groups.append(_group(name, code, segment, [*identity, number, "largest"], measurements, []))
    report = sr.Comprehensive3DSR(
        evidence=[segmentation],
        content=sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=device),
            procedure_reported=_PROCEDURE,
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )[0],
        series_instance_uid=hashed_uid("report series", identity),
        series_number=9002,
        sop_instance_uid=hashed_uid("report", identity),
        instance_number=1,
        manufacturer="rayseg",
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    report.SeriesDescription = long_string(f"{model_name} v{model_version} measurements, research only")
    for name in ("ContentDate", "ContentTime", "InstanceCreationDate", "InstanceCreationTime"):
        setattr(report, name, segmentation.get(name))
    for item in report.get("ContributingEquipmentSequence", ()):
        item.ContributionDateTime = f"{report.ContentDate}{report.ContentTime}"
    patient.write(subject, report)
    stream = BytesIO()
    report.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _group(
    name: str,
    code: Code,
    segment: sr.ReferencedSegment,
    identity: list[Any],
    measurements: Sequence[sr.Measurement],
    evaluations: Sequence[sr.QualitativeEvaluation],
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=hashed_uid("tracking", identity), identifier=long_string(name)),
        referenced_segment=segment,
        finding_type=code,
        measurements=measurements,
        qualitative_evaluations=evaluations,
    )


def _volume(volume_ml: float | None, interval_ml: tuple[float, float] | None = None) -> list[sr.Measurement]:
    if volume_ml is None:
        return []
    properties = None if interval_ml is None else _uncertainty(volume_ml, *interval_ml)
    volume_mm3 = round(1000 * volume_ml, 3)
    return [sr.Measurement(codes.SCT.Volume, volume_mm3, codes.UCUM.CubicMillimeter, properties=properties)]


def _uncertainty(volume_ml: float, low_ml: float, high_ml: float) -> sr.MeasurementProperties:
    """How far above and below the volume the interval ends. highdicom's own arguments would leave the unit out."""
    properties = sr.MeasurementProperties()
    for name, value, unit in (
        (codes.SCT.RangeOfUpperMeasurementUncertainty, 1000 * (high_ml - volume_ml), codes.UCUM.CubicMillimeter),
        (codes.SCT.RangeOfLowerMeasurementUncertainty, 1000 * (volume_ml - low_ml), codes.UCUM.CubicMillimeter),
        (_WITHIN, _PERCENT, codes.UCUM.Percent),
    ):
        item = sr.NumContentItem(
            name=sr.CodedConcept(*name),
            value=round(value, 3),
            unit=unit,
            relationship_type=sr.RelationshipTypeValues.HAS_PROPERTIES,
        )
        properties.append(item)
    return properties
