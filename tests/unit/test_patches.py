"""Patches of volumes: which, where, and the same global batches for any number of ranks and threads."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayseg import storage
from rayseg.data import chunks
from rayseg.data.augment import generator
from rayseg.data.batches import Batch
from rayseg.data.feed import batches
from rayseg.data.labels import Labels
from rayseg.data.patches import Patch, Patches, count, drawn, placed, windows
from rayseg.data.places import Places
from rayseg.data.prepared import PreparedSet
from rayseg.data.preprocess import Preprocess
from rayseg.data.volume import VolumePreprocess
from rayseg.data.volume_augment import VolumeAugment
from rayseg.data.windows import steps
from rayseg.records import PREPARED_VOLUMES

PATCH = (6, 10, 8)
SHAPES = [(6, 10, 8), (9, 31, 17), (14, 20, 24), (4, 8, 5), (12, 10, 33)]


def mask_of(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Class 1 in the first corner, class 2 in the last one; volume 3 has class 2 only, volume 4 nothing."""
    mask = np.zeros(shape, np.uint8)
    if number != 4:
        mask[-2:, -2:, -2:] = 2
        if number != 3:
            mask[:2, :2, :2] = 1
    return mask


def image_of(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Values that tell the volume, in a way the voxel too."""
    return (np.random.default_rng(number).integers(1, 99, shape) + 100 * (number + 1)).astype(np.float16)


def prepared_set(root: str, shapes: list[tuple[int, int, int]] = SHAPES) -> PreparedSet:
    """A split `train` of volumes as prepare writes them."""
    rows = []
    for number, shape in enumerate(shapes):
        image, mask = image_of(number, shape), mask_of(number, shape)
        places = Places(2)
        path = Path(root.removeprefix("s3:")) / f"v{number}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        with chunks.Writer(path, shape, (4, 8, 16)) as writer:
            for depth, planes in enumerate(zip(image, mask, strict=True)):
                writer.add(*planes)
                places.add(depth, planes[1])
            told = {"row_id": f"row{number}", "spacing_mm": [1.0, 1.0, 1.0]}
            voxels = places.voxels()
            writer.finish(told | {"class_places": [len(one) for one in voxels]}, np.concatenate(voxels))
        rows.append({"row_id": f"row{number}", "shape": shape, "path": path.name, "split": "train"})
    storage.write_table(storage.join(root, "t.parquet"), pa.Table.from_pylist(rows, schema=PREPARED_VOLUMES))
    return PreparedSet(
        uri=root,
        shape=(*PATCH, 1),
        preprocess=Preprocess(),
        labels=Labels(names=("one", "two")),
        rows={"train": len(shapes), "val": 0},
        digest="d",
        shards={"train": ("t.parquet",), "val": ()},
        shard_rows={"train": (len(shapes),), "val": ()},
        row_group_rows=16,
        volume=VolumePreprocess((1, 1, 1), PATCH),
        volumes={"train": tuple(f"v{number}.arrow" for number in range(len(shapes))), "val": ()},
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return prepared_set(str(tmp_path_factory.mktemp("set")))


def epoch(prepared: PreparedSet, global_batch: int, ranks: int = 1, **options: Any) -> list[list[Batch]]:
    """Batches of one epoch, by rank."""
    given: dict[str, Any] = {"seed": 1, "epoch": 0, "patches": Patches(3)} | options
    return [
        list(batches(prepared, "train", global_batch=global_batch, rank=rank, world_size=ranks, **given))
        for rank in range(ranks)
    ]


def rows_of(by_rank: list[list[Batch]]) -> list[list[tuple[bytes, bytes]]]:
    """The bytes of image and mask of all rows by global batch, without padding."""
    return [
        [
            (image.tobytes(), mask.tobytes())
            for batch in of_step
            for image, mask, weight in zip(*batch, strict=True)
            if weight
        ]
        for of_step in zip(*by_rank, strict=True)
    ]


def test_global_batches_are_the_same_for_1_2_and_3_ranks(prepared: PreparedSet) -> None:
    patches = Patches(3, augment=VolumeAugment())
    alone = rows_of(epoch(prepared, 6, patches=patches))
    assert len(alone) == steps(15, 6) == 3
    assert [len(rows) for rows in alone] == [6, 6, 3]
    for ranks in (2, 3, 4):  # four do not divide six
        assert rows_of(epoch(prepared, 6, ranks, patches=patches)) == alone


def test_all_ranks_make_equal_shapes_and_padding_has_no_weight(prepared: PreparedSet) -> None:
    for ranks in (1, 2, 4):
        by_rank = epoch(prepared, 6, ranks, parts=2)
        shapes = {batch.image.shape for of_rank in by_rank for batch in of_rank}
        assert len(shapes) == 1
        (shape,) = shapes
        assert shape[1:] == (*PATCH, 1)
        assert shape[0] % 2 == 0
        assert sum(float(batch.weight.sum()) for of_rank in by_rank for batch in of_rank) == 15
        for of_rank in by_rank:
            for batch in of_rank:
                assert (batch.image.dtype, batch.mask.dtype) == (np.float16, np.uint8)
                assert all(row.any() for row in batch.image), "padding repeats a patch"


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(prepared: PreparedSet, threads: int) -> None:
    patches = Patches(3, augment=VolumeAugment())
    assert rows_of(epoch(prepared, 4, patches=patches, threads=threads)) == rows_of(epoch(prepared, 4, patches=patches))


def test_what_is_left_of_an_epoch_is_as_it_would_have_been(prepared: PreparedSet) -> None:
    patches = Patches(3, augment=VolumeAugment())
    whole = rows_of(epoch(prepared, 4, patches=patches))
    for first in range(len(whole) + 1):
        assert rows_of(epoch(prepared, 4, 2, patches=patches, first=first)) == whole[first:]


def test_epochs_and_seeds_differ_and_nothing_else_does(prepared: PreparedSet) -> None:
    first = rows_of(epoch(prepared, 4))
    assert rows_of(epoch(prepared, 4)) == first
    assert rows_of(epoch(prepared, 4, epoch=1)) != first
    assert rows_of(epoch(prepared, 4, seed=2)) != first


def test_every_volume_comes_equally_often(prepared: PreparedSet) -> None:
    for number in range(4):
        images = [image for batch in epoch(prepared, 4, epoch=number)[0] for image in batch.image[batch.weight > 0]]
        assert Counter(int(image.max()) // 100 - 1 for image in images) == dict.fromkeys(range(5), 3)


@pytest.mark.parametrize("share", [0, 0.25, 1 / 3, 0.5, 1])
@pytest.mark.parametrize("per_volume", [1, 2, 5])
def test_the_share_of_foreground_is_exact_over_epochs_and_over_volumes(share: float, per_volume: int) -> None:
    patches, volumes, epochs = Patches(per_volume, share), 60, 60 // per_volume
    turns = [[patches.turn(volume, number) for number in range(epochs * per_volume)] for volume in range(volumes)]
    for of_volume in turns:
        assert sum(turn is not None for turn in of_volume) == pytest.approx(share * len(of_volume), abs=1)
        counted = [turn for turn in of_volume if turn is not None]
        assert counted == list(range(counted[0], counted[0] + len(counted))) if counted else share == 0
    for number in range(epochs):
        of_epoch = [turn for one in turns for turn in one[number * per_volume : (number + 1) * per_volume]]
        assert sum(turn is not None for turn in of_epoch) == pytest.approx(share * volumes * per_volume, abs=per_volume)


def test_a_patch_around_foreground_has_the_class_whose_turn_it_is(prepared: PreparedSet) -> None:
    for number, classes in ((1, (1, 2)), (2, (1, 2)), (3, (2,))):
        uri = storage.join(prepared.uri, prepared.volumes["train"][number])
        index = chunks.index(uri)
        for turn in range(8):
            first = placed(index, PATCH, turn, generator(1, 0, f"{number}/{turn}"))
            _, mask = index.read(uri, first, PATCH)
            assert classes[turn % len(classes)] in mask
    index = chunks.index(storage.join(prepared.uri, prepared.volumes["train"][4]))
    assert placed(index, PATCH, 0, generator(1, 0, "x")) == placed(index, PATCH, None, generator(1, 0, "x"))


def test_foreground_is_met_more_often_than_by_chance(prepared: PreparedSet) -> None:
    def met(share: float) -> float:
        patches = [
            mask.any()
            for number in range(12)
            for batch in epoch(prepared, 5, patches=Patches(5, share), epoch=number)[0]
            for image, mask in zip(batch.image, batch.mask, strict=True)
            if image.max() // 100 - 1 == 1
        ]
        return float(np.mean(patches))

    assert met(1) == 1
    assert met(0) < 0.5
    assert met(0) < met(1 / 3) < met(1)


def test_patches_lie_anywhere_within_the_volume(prepared: PreparedSet) -> None:
    index = chunks.index(storage.join(prepared.uri, prepared.volumes["train"][1]))  # 9 x 31 x 17
    firsts = np.array([placed(index, PATCH, None, generator(1, 0, str(number))) for number in range(2000)])
    assert firsts.min(axis=0).tolist() == [0, 0, 0]
    assert firsts.max(axis=0).tolist() == [3, 21, 9]
    counts = np.bincount(firsts[:, 0])
    assert counts.min() > 400  # of 500 each


def test_a_volume_smaller_than_a_patch_stands_in_its_middle(prepared: PreparedSet) -> None:
    shape = SHAPES[3]  # 4 x 8 x 5 in 6 x 10 x 8
    images = [image for batch in epoch(prepared, 5)[0] for image in batch.image if image.max() // 100 == 4]
    assert images
    for image in images:
        assert np.array_equal(image[1:5, 1:9, 1:6, 0], image_of(3, shape))
        assert np.count_nonzero(image) == np.prod(shape)


def test_windows_cover_every_voxel_once_in_order(prepared: PreparedSet) -> None:
    of_train = list(windows(prepared, "train"))
    assert [patch.volume for patch in of_train] == sorted(patch.volume for patch in of_train)
    assert count(prepared, "train", None) == len(of_train)
    for number, shape in enumerate(SHAPES):
        seen = np.zeros(shape, int)
        for patch in of_train:
            if patch.volume == number and patch.first is not None:
                box = [slice(max(0, low), max(0, low + edge)) for low, edge in zip(patch.first, PATCH, strict=True)]
                seen[tuple(box)] += 1
        assert (seen == 1).all()
    fed = epoch(prepared, 4, 2, patches=None)
    voxels = Counter[int]()
    for of_step in itertools.chain.from_iterable(zip(*fed, strict=True)):
        for image, mask, weight in zip(*of_step, strict=True):
            if weight:
                voxels[int(image.max()) // 100 - 1] += np.count_nonzero(image)
                assert mask.shape == PATCH
    assert voxels == {number: np.prod(shape) for number, shape in enumerate(SHAPES)}


def test_an_empty_split_has_no_windows(prepared: PreparedSet) -> None:
    assert count(prepared, "val", None) == 0


def test_closing_ends_the_threads(prepared: PreparedSet) -> None:
    feed = batches(prepared, "train", global_batch=2, rank=0, world_size=1, seed=1, epoch=0, patches=Patches(50))
    next(feed)
    assert feed.waited_s > 0
    feed.close()
    with pytest.raises(StopIteration):
        next(feed)


def test_a_set_that_was_replaced_meanwhile_is_told(tmp_path: Path) -> None:
    prepared = prepared_set(str(tmp_path))
    (tmp_path / "v2.arrow").unlink()
    with pytest.raises(ValueError, match="another set was prepared"):
        epoch(prepared, 4)


def test_order_is_of_all_patches() -> None:
    prepared = PreparedSet("", (*PATCH, 1), Preprocess(), Labels(), {"train": 7}, "", {}, {}, 1)
    of_epoch = drawn(prepared, "train", Patches(4), 1, 3)
    assert Counter(patch.volume for patch in of_epoch) == dict.fromkeys(range(7), 4)
    assert {patch.number for patch in of_epoch} == {12, 13, 14, 15}
    assert of_epoch != sorted(of_epoch, key=lambda patch: (patch.volume, patch.number or 0))
    assert isinstance(of_epoch[0], Patch)


def test_places_are_a_sample_of_each_class() -> None:
    mask = np.zeros((40, 60, 60), np.uint8)
    mask[5:35, 10:50, 10:50], mask[0, 0, :7] = 1, 3
    places = Places(3)
    for depth, plane in enumerate(mask):
        places.add(depth, plane)
    one, two, three = places.voxels()
    assert places.counts[1:].tolist() == [(mask == value).sum() for value in (1, 2, 3)]
    assert (len(one), len(two), len(three)) == (1024, 0, 7)
    assert (mask.ravel()[one] == 1).all()
    assert len(set(one.tolist())) == 1024
    where = np.stack(np.unravel_index(one, mask.shape), axis=1)
    # As evenly as a random sample of 1024 from 5..34 and 10..49: means within four standard errors.
    np.testing.assert_allclose(where.mean(axis=0), [19.5, 29.5, 29.5], atol=4 * 11.6 / 32)
    np.testing.assert_allclose(where.std(axis=0), [30 / 12**0.5, 40 / 12**0.5, 40 / 12**0.5], rtol=0.08)


@pytest.mark.parametrize(("values", "key"), [({"per_volume": 0}, "per_volume"), ({"foreground": 1.2}, "foreground")])
def test_what_cannot_be_is_refused_by_name(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"train.patches.{key}"):
        Patches(**values)
