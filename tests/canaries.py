"""Canaries: values that stand for identities, put into studies, and looked for in all that was written."""

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset

# What PS3.15 Table E.1-1 (Basic Application Level Confidentiality Profile) removes or replaces, as far as an image has
# it. Numbers that are pixels' business (spacing, positions, rows) are not in that table.
KEYWORDS = """
AccessionNumber AcquisitionComments AcquisitionDate AcquisitionDateTime AcquisitionTime AdditionalPatientHistory
AdmissionID AdmittingDate AdmittingDiagnosesDescription AdmittingTime Allergies ClinicalTrialSubjectID
ClinicalTrialSponsorName CommentsOnThePerformedProcedureStep ContentCreatorName ContentDate ContentTime
ContrastBolusAgent CurrentPatientLocation DerivationDescription DetectorID DeviceSerialNumber EthnicGroup
ImageComments InstanceCreationDate InstanceCreationTime InstitutionAddress InstitutionName
InstitutionalDepartmentName IssuerOfPatientID MedicalAlerts MilitaryRank NameOfPhysiciansReadingStudy Occupation
OperatorsName OtherPatientNames PatientAddress PatientBirthDate PatientBirthName PatientBirthTime PatientComments
PatientID PatientMotherBirthName PatientName PatientReligiousPreference PatientTelephoneNumbers
PerformedProcedureStepDescription PerformedProcedureStepID PerformedProcedureStepStartDate
PerformedProcedureStepStartTime PerformedStationAETitle PerformedStationName PerformingPhysicianName
PhysiciansOfRecord ProtocolName ReferringPhysicianAddress ReferringPhysicianName ReferringPhysicianTelephoneNumbers
RegionOfResidence RequestedProcedureDescription RequestingPhysician ResponsiblePerson SeriesDate SeriesDescription
SeriesTime SpecialNeeds StationName StudyComments StudyDate StudyDescription StudyID StudyTime VisitComments
""".split()  # noqa: SIM905 (readable)
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
PLACES = "place"  # the kind of what stands in names of files and folders


# What a canary looks like: texts, UIDs, dates that are no part of a digest, times with or without a date.
_SHAPES = rb"zqxkv\d{3,}[a-z]|2\.25\.\d{20,40}|(?<![0-9a-f.])17\d{6}(?![0-9a-f.])|(?:16\d{6})?\d{6}\.9\d{5}"
_WIDE = rb"(?:z\0q\0x\0k\0v\0(?:\d\0){3,}[a-z]\0|2\0\.\0002\0005\0\.\0(?:\d\0){20,40})"


@dataclass
class Canaries:
    """Text to look for, by what it stands for."""

    told: dict[str, str] = field(default_factory=dict)  # text: kind
    _of: dict[tuple[str, str], str] = field(default_factory=dict)

    def new(self, kind: str, vr: str = "LO") -> str:
        """A value of a kind that nothing else is like, for an attribute of a VR."""
        number = len(self.told)
        text = {
            "DA": f"17{number % 90 + 10}{number // 90 % 12 + 1:02d}19",
            "TM": f"{number % 24:02d}{number % 60:02d}59.9{number:05d}",
            "DT": f"16{number % 90 + 10}0713{number % 24:02d}1959.9{number:05d}",
            "PN": f"Zqxkv{number:03d}f^Zqxkv{number:03d}g",
        }.get(vr, f"Zqxkv{number:03d}x")
        return self.add(text, kind)

    def add(self, text: str, kind: str) -> str:
        """Takes a value that is there already."""
        for part in text.split("^"):
            assert re.fullmatch(_SHAPES, part.lower().encode()), f"{kind}: not to be found: {part}"
            self.told[part.lower()] = kind
        return text

    def fill(self, dataset: Dataset, patient: str) -> None:
        """Puts the patient's canaries into `KEYWORDS`, private and nested attributes; takes the UIDs as they are."""

        def value(kind: str, vr: str = "LO") -> str:
            if (patient, kind) not in self._of:
                self._of[patient, kind] = self.new(kind, vr)
            return self._of[patient, kind]

        for keyword in KEYWORDS:
            setattr(dataset, keyword, value(keyword, dictionary_VR(keyword)))
        other = Dataset()
        other.PatientID, other.TypeOfPatientID = value("OtherPatientIDs"), "TEXT"
        dataset.OtherPatientIDsSequence = [other]
        block = dataset.private_block(0x0019, value("private creator"), create=True)
        block.add_new(0x01, "LO", value("private attribute"))
        block.add_new(0x02, "UN", value("private bytes").encode())
        dataset.file_meta.SourceApplicationEntityTitle = value("SourceApplicationEntityTitle")
        for keyword in UIDS:
            self.add(str(dataset[keyword].value), keyword)


@dataclass(frozen=True)
class Allowed:
    """What must carry canaries, and why."""

    pattern: str  # of a file's path below the folder that is searched
    why: str
    column: str | None = None  # of a Parquet file: in this one alone
    kinds: tuple[str, ...] = ()  # of these alone; none: of any


@dataclass(frozen=True)
class Leak:
    """Where a canary stands."""

    path: str
    place: str  # column, member of an archive, name
    kind: str
    context: str


class Search:
    """Looks for canaries in files, whatever wraps them."""

    def __init__(self, canaries: Canaries, allowed: Iterable[Allowed] = ()) -> None:
        self._kinds = {text.encode(): kind for text, kind in canaries.told.items()}
        self._allowed = tuple(allowed)
        self._plain, self._wide = (re.compile(shapes, re.IGNORECASE) for shapes in (_SHAPES, _WIDE))
        self.files = self.bytes = 0

    def folder(self, root: Path) -> list[Leak]:
        """All leaks in the files below a folder, and in their names."""
        leaks: list[Leak] = []
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            leaks += self._kept(name, self._in_bytes("name", name.encode(errors="surrogateescape")))
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                self.files, self.bytes = self.files + 1, self.bytes + len(data)
                leaks += self._kept(name, self._in_file("", data))
        return leaks

    def _kept(self, name: str, found: Iterable[tuple[str, str, str]]) -> Iterator[Leak]:
        for place, kind, context in found:
            rules = (rule for rule in self._allowed if fnmatch(name, rule.pattern))
            if not any(rule.column in (None, place) and kind in (rule.kinds or (kind,)) for rule in rules):
                yield Leak(name, place, kind, context)

    def _in_file(self, place: str, data: bytes) -> Iterator[tuple[str, str, str]]:
        if data[:4] == b"PAR1":  # its bytes hold, beside the columns, some of their values once more
            yield from self._in_parquet(data)
            return
        yield from self._in_bytes(place, data)
        if data[:2] == b"\x1f\x8b":
            yield from self._in_file(f"{place}(gzip)", gzip.decompress(data))
        elif data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for member in archive.infolist():
                    yield from self._in_file(f"{place}({member.filename})", archive.read(member))
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            # Texts are in chunks of their own: as they are, or behind a name deflated.
            for packed in re.findall(rb"(?:zTXt|iTXt).*?(\x78[\x01\x5e\x9c\xda].*?)(?=IDAT|IEND)", data, re.DOTALL):
                with_rest = zlib.decompressobj()
                yield from self._in_bytes(f"{place}(text)", with_rest.decompress(packed))

    def _in_parquet(self, data: bytes) -> Iterator[tuple[str, str, str]]:
        table = pq.read_table(pa.BufferReader(data))
        for key, value in (table.schema.metadata or {}).items():
            yield from self._in_bytes(f"metadata {key.decode()}", value)
        for name, column in zip(table.column_names, table.columns, strict=True):
            for place, values in _texts(name, column):
                yield from self._in_file(place, b"\n".join(values))

    def _in_bytes(self, place: str, data: bytes) -> Iterator[tuple[str, str, str]]:
        for pattern, narrow in ((self._plain, lambda found: found), (self._wide, lambda found: found[::2])):
            seen = set()
            for match in pattern.finditer(data):
                kind = self._kinds.get(narrow(match[0]).lower())
                if kind is not None and kind not in seen:
                    seen.add(kind)
                    around = data[max(0, match.start() - 120) : match.end() + 60]
                    yield place, kind, around.decode(errors="replace").replace("\0", "")


def _texts(name: str, column: pa.ChunkedArray | pa.Array) -> Iterator[tuple[str, list[bytes]]]:
    """Of a column and all within it: where it is, and its texts."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield name, [value.encode() for value in column.to_pylist() if value]
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        yield name, [value for value in column.to_pylist() if value]
    elif pa.types.is_dictionary(kind):
        yield from _texts(name, column.cast(kind.value_type))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        for chunk in chunks:
            yield from _texts(name, chunk.flatten())
    elif pa.types.is_struct(kind):
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        for chunk in chunks:
            for index in range(kind.num_fields):
                yield from _texts(f"{name}.{kind.field(index).name}", chunk.field(index))
