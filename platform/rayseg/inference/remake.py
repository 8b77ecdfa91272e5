"""A series' files from its kept masks: no network runs, and of the objects only what files take of them is read."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayseg.data.conformal import VolumeErrors
from rayseg.data.grey import sees_color
from rayseg.data.objects import Place
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import Known, of_several
from rayseg.data.volume import VolumePreprocess
from rayseg.inference import kept
from rayseg.inference.forward import picture
from rayseg.inference.kept import Kept
from rayseg.inference.outputs import DICOM, Kind, Segmented
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.series import Task, ended_row, finish
from rayseg.inference.sources import Sources
from rayseg.inference.watch import Watch
from rayseg.records import Reject
from rayseg.retry import CredentialsError
from rayseg.tracking import bundle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """What files need of a model beside its masks: no network."""

    known: Known
    preprocess: Preprocess | VolumePreprocess

    @classmethod
    def read(cls, bundle_dir: Path, several: bool, known: Known | None) -> "Model":
        """Of the first model's bundle.

        Args:
            bundle_dir: its folder, of which one small file is read.
            several: whether probabilities were averaged, over models or mirror images.
            known: what several are judged by, where that was measured.
        """
        description = bundle.describe(bundle_dir)
        own = bundle.known_of(description)
        return cls(of_several(own.range, known) if several else own, bundle.preprocess_of(description))


def is_enough(task: Task, profiles: Sequence[str]) -> bool:
    """Whether these profiles can be made of masks: not probabilities, nor pictures of masks before postprocessing."""
    return "seg-fractional" not in profiles and ("overlays" not in profiles or task.postprocess == Postprocess())


def remake_series(
    model: Model,
    task: Task,
    *,
    series_key: str,
    patient_key: str,
    uris: Sequence[str],
    frames: Sequence[int | None],
    input_digest: str,
    kind: Kind,
    not_made: Sequence[dict[str, str]],
    masks: Mapping[str, Any],
) -> dict[str, Any] | None:
    """As `segment_series` with the kept masks of the same input, to the same bytes; it raises CredentialsError alone.

    Args:
        model, task: what all series have in common; `is_enough` says that it can be done.
        series_key, patient_key, uris, frames, input_digest, kind, not_made: the series.
        masks: `records.KEPT_FILE`, of its row in the ledger.

    Returns:
        The row; None, with nothing done, where the masks are gone or others, or an object is gone or another one.
    """
    assert task.keep is not None
    watch = Watch()
    wanted = list(zip(uris, frames, strict=True))
    known = {one["profile"] for one in not_made}
    profiles = [profile for profile in task.profiles if profile not in known]
    try:
        with watch.step("read"):
            there = kept.read(task.keep.uri(series_key), series_key, masks["sha256"])
        if there is None:
            return None
        series = _with_sources(there, kind, _to_read(task, there, profiles), wanted, model.preprocess, watch)
        if series is None:
            return None
        # The errors are those of the model's own masks.
        errors = model.known.volumes if task.postprocess == Postprocess() else VolumeErrors()
        series = dataclasses.replace(series, errors=errors)
        ended = finish(task, series, model.known.range, there.labels, there.engine, profiles, watch)
    except CredentialsError:
        raise
    except Exception as error:  # a defect of ours, which may be of this way alone
        logger.warning("series %s cannot be made from kept masks: %s", series_key, type(error).__name__)
        return None
    return ended_row(
        task,
        series_key,
        patient_key,
        ended,
        wanted=wanted,
        refused=there.refused,
        input_digest=input_digest,
        not_made=not_made,
        masks=masks,
        engine=there.engine,
        watch=watch,
    )


def _to_read(task: Task, there: Kept, profiles: Sequence[str]) -> Sequence[str]:
    """The profiles for which objects are read: none where there will be no file."""
    return profiles if task.write_empty or any(look.share for look in there.series.looks) else ()


def _with_sources(
    there: Kept,
    kind: Kind,
    profiles: Sequence[str],
    wanted: Sequence[Place],
    preprocess: Preprocess | VolumePreprocess,
    watch: Watch,
) -> Segmented | None:
    """The series with what its files take of the objects; None where these are not what the masks are of."""
    series = there.series
    sources = Sources(kind, sees_color(preprocess), watch)
    places = [wanted[number] for number in series.numbers]
    known = {uri: head for (uri, _), head in zip(places, there.heads, strict=True) if head is not None}
    of_headers = (kind == "dicom" and not {*DICOM}.isdisjoint(profiles)) or (kind == "volume" and "nifti" in profiles)
    pictures: list[tuple[int, bytes]] = []
    if "overlays" in profiles:
        shown = [place for place, look in enumerate(series.looks) if look.share]
        for place, slice in zip(shown, sources.read([places[place] for place in shown]), strict=True):
            mask = series.masks[place]
            if isinstance(slice, Reject) or slice.shape != mask.shape:
                return None
            with watch.step("encode"):
                pictures.append((series.numbers[place], picture(preprocess, slice, mask)))
        if any(head != known[uri] for uri, head in sources.heads.items()):
            return None
    if of_headers and not sources.read_heads({uri: head for uri, head in known.items() if uri not in sources.heads}):
        return None
    datasets = [sources.datasets[uri] for uri, _ in places] if of_headers and kind == "dicom" else []
    return dataclasses.replace(series, sources=datasets, volume=sources.volume, pictures=pictures)
