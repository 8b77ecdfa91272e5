"""RT structure sets for tests, as treatment planning systems write them."""

from io import BytesIO

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage

Contour = tuple[str, np.ndarray, str | None]  # type, float64 (points, 3), the instance that it names


def structure_set(
    sources: list[Dataset], rois: dict[str, list[Contour]], space: str = "1.2.3.9", lists: bool = True
) -> bytes:
    """An RTSTRUCT of the sources' series with ROIs numbered from 1; `lists`: it names the series and its instances."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = "1.2.3.7.1"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.Modality = "1.2.3", "1.2.3.7", "RTSTRUCT"
    made.PatientID, made.PatientName, made.StructureSetLabel = "x", "", "a"
    reference = Dataset()
    reference.FrameOfReferenceUID = space
    if lists:
        series = Dataset()
        series.SeriesInstanceUID = sources[0].SeriesInstanceUID
        series.ContourImageSequence = [_image(source.SOPInstanceUID) for source in sources]
        study = Dataset()
        study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", "1.2.3"
        study.RTReferencedSeriesSequence = [series]
        reference.RTReferencedStudySequence = [study]
    made.ReferencedFrameOfReferenceSequence = [reference]
    made.StructureSetROISequence, made.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi = Dataset()
        roi.ROINumber, roi.ReferencedFrameOfReferenceUID, roi.ROIName = number, space, name
        roi.ROIGenerationAlgorithm = "MANUAL"
        made.StructureSetROISequence.append(roi)
        drawn = Dataset()
        drawn.ReferencedROINumber, drawn.ContourSequence = number, [_contour(*contour) for contour in contours]
        made.ROIContourSequence.append(drawn)
    stream = BytesIO()
    made.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _contour(kind: str, points_mm: np.ndarray, instance: str | None) -> Dataset:
    contour = Dataset()
    contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points_mm)
    contour.ContourData = [f"{value:.6f}".rstrip("0").rstrip(".") for value in points_mm.ravel()]
    if instance is not None:
        contour.ContourImageSequence = [_image(instance)]
    return contour


def _image(instance: str) -> Dataset:
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = CTImageStorage, instance
    return image
