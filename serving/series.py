"""A series through the model: decoded in threads while earlier slices are in the model, some slices at a time."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from rayseg.data.preprocess import Preprocess
from rayseg.data.stacks import along
from rayseg.data.volume import VolumePreprocess
from rayseg.dicom.reading import Slice
from rayseg.records import Reject
from serving.messages import Ask, Masked, Refusal, Segmenter, Stacked
from serving.refusals import RefusalError, accepted
from serving.upload import Series

# A group is a message to the model. Few are on the way, so that other requests' slices come in between, and memory is
# bounded whatever the series' length.
GROUP, GROUP_BYTES = 8, 8 * 2**20
GROUPS = 4
BUSY_S = 0.2


@dataclass(frozen=True)
class _Group:
    """Consecutive slices: `window` has the neighbours of the first and last of them, too."""

    first: int
    window: list[Slice | None]
    refused: dict[int, Reject]  # by number in the series


async def segment(
    model: Segmenter, series: Series, ask: Ask, preprocess: Preprocess | VolumePreprocess
) -> list[Masked | Reject]:
    """One mask a slice, or why it has none.

    `ask` names a version, whose `preprocess` is given: all slices are of that one, whatever is promoted meanwhile.
    Raises RefusalError.
    """
    if isinstance(preprocess, VolumePreprocess):
        return await _whole(model, series, ask)
    groups = _groups(series, preprocess.neighbours, preprocess.color)
    masks: list[Masked | Reject | None] = [None] * len(series.places)
    places = asyncio.Semaphore(GROUPS)

    async def one(group: _Group) -> None:
        try:
            answer = await model.segment_stacks(group.window, ask)
            # What has begun waits for a place, until its deadline: all that was done would be lost.
            while isinstance(answer, Refusal) and answer.reason == "busy" and group.first > 0:
                await asyncio.sleep(BUSY_S)
                answer = await model.segment_stacks(group.window, ask)
            stacked: Stacked = accepted(answer)
        finally:
            places.release()
        for number, mask in enumerate(stacked.masks, start=group.first):
            masks[number] = group.refused.get(number, mask)

    try:
        async with asyncio.TaskGroup() as tasks:
            while True:
                await places.acquire()
                group = await asyncio.to_thread(next, groups, None)
                if group is None:
                    break
                tasks.create_task(one(group))
    except BaseExceptionGroup as errors:
        refused = errors.subgroup(RefusalError)
        raise (refused or errors).exceptions[0] from None
    usable = [mask for mask in masks if mask is not None]
    assert len(usable) == len(masks), "every slice has an outcome"
    return usable


async def _whole(model: Segmenter, series: Series, ask: Ask) -> list[Masked | Reject]:
    """Of a model of volumes, which gets all slices at once: Ray hands them over in shared memory."""
    slices = await asyncio.to_thread(lambda: list(series.slices(color=False)))
    answer: Stacked = accepted(await model.segment_series(slices, ask))
    return answer.masks


def _groups(series: Series, neighbours: int, color: bool) -> Iterator[_Group]:
    group: _Group | None = None
    size = 0
    for number, stack in enumerate(along(series.slices(color), neighbours)):
        if group is None:
            group, size = _Group(number, [_usable(one) for one in stack[:-1]], {}), 0
        centre, last = stack[neighbours], _usable(stack[-1])
        if isinstance(centre, Reject):
            group.refused[number] = centre
        group.window.append(last)
        size += 0 if last is None else last.stored.nbytes
        if number - group.first + 1 == GROUP or size >= GROUP_BYTES:
            yield group
            group = None
    if group is not None:
        yield group


def _usable(slice: Slice | Reject | None) -> Slice | None:
    """As `stacks.usable` has it: what cannot be used is missing."""
    return None if isinstance(slice, Reject) else slice
