"""What tells the volumes of one series apart, as far as an object says it: b-values, echoes, phases, kernels, times.

Standard attributes, those of functional groups among them, and the b-values and directions of makers in their private
ones (as dcm2niix reads them). Numbers and code strings only, never times of the day: nothing here may identify.
"""

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from pydicom.dataelem import RawDataElement

BETWEEN = "|"  # values; no value has it


@dataclass(frozen=True)
class _Source:
    """Where a trait stands: in the first values of some elements, one after the other."""

    tags: tuple[int, ...]
    values: Callable[[RawDataElement], tuple[str, ...]]
    maker: tuple[int, bytes] | None = None  # element with the private creator, and what it begins with


@dataclass(frozen=True)
class Trait:
    """One that stacks are told apart by; in the order of `TRAITS` they are tried."""

    name: str
    label: str  # `{}` is the value
    main: bool = False  # part of a stack's name wherever it goes with the stack
    kind: str = ""
    sources: tuple[_Source, ...] = ()


def read(elements: Mapping[int, RawDataElement]) -> str:
    """The traits as `NAME=VALUE`, BETWEEN them `|`; several values of one are separated by backslashes.

    Args:
        elements: of the data set or, of an enhanced object, those that stand for one frame.
    """
    traits = []
    for tag in elements:
        for name, source in _BY_TAG.get(tag, ()):
            if source.maker is None or _is_of(elements, *source.maker):
                parts = [source.values(elements[each]) for each in source.tags if each in elements]
                if len(parts) == len(source.tags) and all(parts):
                    traits.append((_RANKS[name, source], name, "\\".join(value for part in parts for value in part)))
    first: dict[str, str] = {}
    for _, name, value in sorted(traits):
        first.setdefault(name, value)
    return BETWEEN.join(f"{name}={value}" for name, value in first.items())


def parsed(traits: str) -> dict[str, str]:
    """The values of `read` by name; with `Component` where only ImageType tells magnitude from phase."""
    values = dict(one.split("=", 1) for one in traits.split(BETWEEN) if one)
    if "Component" not in values:
        parts = [part for part in values.get("ImageType", "").split("\\")[2:] if part in _COMPONENTS]
        if len(set(parts)) == 1:
            values["Component"] = _COMPONENTS[parts[0]]
    return values


def _is_of(elements: Mapping[int, RawDataElement], tag: int, creator: bytes) -> bool:
    return tag in elements and (elements[tag].value or b"").strip(b" \0").upper().startswith(creator)


_COMPONENTS = {"M": "MAGNITUDE", "P": "PHASE", "R": "REAL", "I": "IMAGINARY"}


def _number(value: float, digits: int = 7) -> str:
    return f"{value:.{digits}g}" if value else "0"


def _decimals(element: RawDataElement, count: int = 1) -> tuple[str, ...]:
    """Decimal and integer strings (DS, IS)."""
    try:
        numbers = [float(part) for part in (element.value or b"").strip(b" \0").split(b"\\")[:count]]
    except ValueError:
        return ()
    return tuple(map(_number, numbers)) if len(numbers) == count and all(map(math.isfinite, numbers)) else ()


def _binary(element: RawDataElement, code: str, count: int = 1) -> tuple[str, ...]:
    """Binary numbers (FD `d`, FL `f`, US `H`, SS `h`, UL `L`)."""
    order, value = "<" if element.is_little_endian else ">", element.value or b""
    try:
        numbers = struct.unpack_from(f"{order}{count}{code}", value)
    except struct.error:
        return ()
    return tuple(map(_number, numbers)) if all(map(math.isfinite, numbers)) else ()


def _index(element: RawDataElement, number: int) -> tuple[str, ...]:
    """One of DimensionIndexValues, counted from 1."""
    return _binary(element, "L", number)[-1:]


def _direction(element: RawDataElement) -> tuple[str, ...]:
    """The three doubles of a direction, to three decimals."""
    return tuple(f"{round(float(value), 3) + 0.0:g}" for value in _binary(element, "d", 3))


_MOST_VALUES = 16  # of ImageType, that are looked at
_CODE, _TEXT = re.compile(r"[A-Z0-9 _]{1,16}"), re.compile(r"[A-Za-z0-9 _.+/-]{1,16}")


def _codes(element: RawDataElement, allowed: re.Pattern[str] = _CODE) -> tuple[str, ...]:
    """Those values that are code strings; of a value that is none its place remains."""
    values = (element.value or b"").decode("ascii", "replace").split("\\")[:_MOST_VALUES]
    kept = tuple(value if allowed.fullmatch(value) else "" for value in (one.strip(" \0") for one in values))
    return kept if any(kept) else ()


def _ge_b_value(element: RawDataElement) -> tuple[str, ...]:
    """The first value, without the billion that is added where the scanner scales the gradients."""
    value = (element.value or b"").split(b"\\")[0].strip(b" \0")
    return (_number(int(value) % 100_000),) if value.isdigit() and len(value) <= 12 else ()  # as an IS has


def _ge_component(element: RawDataElement) -> tuple[str, ...]:
    names = dict(zip("0123", _COMPONENTS.values(), strict=True))
    return tuple(names[value] for value in _binary(element, "h") if value in names)


_short = partial(_codes, allowed=_TEXT)  # SH
_double, _single, _word, _long = (partial(_binary, code=code) for code in "dfHL")
_SIEMENS, _GE = (0x00190010, b"SIEMENS MR HEADER"), (0x00430010, b"GEMS_PARM_01")
_PHILIPS, _PHILIPS_MR = (0x20010010, b"PHILIPS IMAGING DD 001"), (0x20050010, b"PHILIPS MR IMAGING DD 001")
_GE_ACQUISITION, _UIH = (0x00190010, b"GEMS_ACQU_01"), (0x00650010, b"")

TRAITS = (
    Trait("DiffusionBValue", "b={}", True, "diffusion", (
        _Source((0x00189087,), _double),
        _Source((0x0019100C,), _decimals, _SIEMENS),
        _Source((0x20011003,), _single, _PHILIPS),
        _Source((0x00431039,), _ge_b_value, _GE),
        _Source((0x00651009,), _double, _UIH),
    )),
    Trait("DiffusionDirectionality", "{}", kind="diffusion", sources=(_Source((0x00189075,), _codes),)),
    Trait("DiffusionGradientOrientation", "direction {}", kind="diffusion", sources=(
        _Source((0x00189089,), _direction),
        _Source((0x0019100E,), _direction, _SIEMENS),
        _Source((0x200510B0, 0x200510B1, 0x200510B2), _single, _PHILIPS_MR),
        _Source((0x001910BB, 0x001910BC, 0x001910BD), _decimals, _GE_ACQUISITION),
    )),
    Trait("EchoNumbers", "echo {}", True, "echo", (_Source((0x00180086,), _decimals),)),
    Trait("EchoTime", "EchoTime {} ms", True, "echo", (
        _Source((0x00189082,), _double), _Source((0x00180081,), _decimals),
    )),
    Trait("Component", "{}", True, sources=(
        _Source((0x00089208,), _codes), _Source((0x0043102F,), _ge_component, _GE),
    )),
    Trait("InversionTime", "InversionTime {} ms", sources=(
        _Source((0x00189079,), _double), _Source((0x00180082,), _decimals),
    )),
    Trait("FlipAngle", "FlipAngle {}", sources=(_Source((0x00181314,), _decimals),)),
    Trait("RepetitionTime", "RepetitionTime {} ms", sources=(_Source((0x00180080,), _decimals),)),
    Trait("ConvolutionKernel", "kernel {}", True, sources=(_Source((0x00181210,), _short),)),
    Trait("KVP", "KVP {}", sources=(_Source((0x00180060,), _decimals),)),
    Trait("ImageType", "{}", sources=(_Source((0x00089007,), _codes), _Source((0x00080008,), _codes))),
    # Of the geometry: see `splitting`.
    Trait("SliceThickness", "SliceThickness {} mm"),
    Trait("Plane", "{}"),
    Trait("Normal", "normal {}"),
    Trait("Size", "{} pixels"),
    Trait("Spacing", "spacing {} mm"),
    Trait("StackID", "stack {}", sources=(_Source((0x00209056,), _short),)),
    Trait("TemporalPosition", "temporal position {}", sources=(
        _Source((0x00209128,), _long), _Source((0x00200100,), _decimals),
    )),
    Trait("TemporalPositionTimeOffset", "time {} s", sources=(_Source((0x0020930D,), _double),)),
    Trait("NominalPercentageOfCardiacPhase", "{} % of the cycle", sources=(_Source((0x00209241,), _single),)),
    Trait("TriggerTime", "TriggerTime {} ms", sources=(
        _Source((0x00209153,), _double), _Source((0x00181060,), _decimals),
    )),
    Trait("Phase", "phase {}"),  # of the heart: the order of TriggerTime at each position
    Trait("FrameReferenceTime", "FrameReferenceTime {} ms", sources=(_Source((0x00541300,), _decimals),)),
    Trait("AcquisitionNumber", "acquisition {}", sources=(_Source((0x00200012,), _decimals),)),
    Trait("FrameAcquisitionNumber", "acquisition {} of frames", sources=(_Source((0x00209156,), _word),)),
    Trait("InstanceNumber", "instance {}"),  # of objects of several frames, which belong together: see `splitting`
    *(
        Trait(f"DimensionIndexValue{number}", f"index {{}} of dimension {number}", sources=(
            _Source((0x00209157,), partial(_index, number=number)),
        ))
        for number in range(1, 7)
    ),
)  # fmt: skip

_SOURCES = [(trait.name, source) for trait in TRAITS for source in trait.sources]
_RANKS = {pair: rank for rank, pair in enumerate(_SOURCES)}
# A trait is read where its first element is met.
_BY_TAG: dict[int, list[tuple[str, _Source]]] = {}
for _name, _source in _SOURCES:
    _BY_TAG.setdefault(_source.tags[0], []).append((_name, _source))

# Elements to keep of a data set, and of the functional groups (PS3.3 C.7.6.16, C.8.13.5, C.8.15.3).
TAGS = frozenset(
    {tag for _, source in _SOURCES for tag in source.tags} | {source.maker[0] for _, source in _SOURCES if source.maker}
)
_CLASSIC = tuple(sorted(TAGS))
GROUPS: dict[int, tuple[int, ...]] = {
    0x00189112: (0x00180080, 0x00181314),  # MRTimingAndRelatedParametersSequence
    0x00189114: (0x00189082,),  # MREchoSequence
    0x00189115: (0x00189079,),  # MRModifierSequence
    0x00189117: (0x00189075, 0x00189087, 0x00189076),  # MRDiffusionSequence
    0x00189076: (0x00189089,),  # DiffusionGradientDirectionSequence, within the one before
    0x00189118: (0x00209153, 0x00209241),  # CardiacSynchronizationSequence
    0x00189226: (0x00089007, 0x00089208),  # MRImageFrameTypeSequence
    0x00189314: (0x00181210,),  # CTReconstructionSequence
    0x00189325: (0x00180060,),  # CTXRayDetailsSequence
    0x00189329: (0x00089007,),  # CTImageFrameTypeSequence
    0x00189751: (0x00089007,),  # PETFrameTypeSequence
    0x00209111: (0x00209056, 0x00209128, 0x00209156, 0x00209157),  # FrameContentSequence
    0x00209310: (0x0020930D,),  # TemporalPositionSequence
    0x00209170: _CLASSIC,  # UnassignedSharedConvertedAttributesSequence
    0x00209171: _CLASSIC,  # UnassignedPerFrameConvertedAttributesSequence
}
