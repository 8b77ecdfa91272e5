"""The feed deals every row once an epoch, alike for any number of ranks."""

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseg import storage
from rayseg.data import feed
from rayseg.data.augment import Augment, generator
from rayseg.data.feed import Batch, batches
from rayseg.data.labels import Labels
from rayseg.data.prepared import PreparedSet
from rayseg.data.preprocess import Preprocess
from rayseg.data.windows import Piece, steps
from rayseg.records import PREPARED

SHAPE = (2, 3, 1)


def image(number: int) -> np.ndarray:
    """Six pixels that tell the row's number."""
    return np.frombuffer(number.to_bytes(6, "big"), np.uint8).reshape(SHAPE)


def number(image_HWC: np.ndarray) -> int:
    return int.from_bytes(image_HWC.tobytes(), "big")


def prepared_set(root: Path, shards: list[int], row_group_rows: int) -> PreparedSet:
    """A split `train` with so many rows a shard, numbered from 1; a mask is the image's first row, plus one."""
    paths, first = [], 1
    for part, rows in enumerate(shards):
        path = f"split=train/part-{part:05d}.parquet"
        table = pa.Table.from_pylist(
            [
                {"row_id": f"row{n}", "image": image(n).tobytes(), "mask": (image(n)[..., 0] + 1).tobytes()}
                for n in range(first, first + rows)
            ],
            schema=PREPARED,
        )
        storage.write_table(storage.join(str(root), path), table, row_group_rows)
        paths.append(path)
        first += rows
    return PreparedSet(
        uri=str(root),
        shape=SHAPE,
        preprocess=Preprocess(size=SHAPE[:2]),
        labels=Labels(),
        rows={"train": sum(shards)},
        digest=str(root),
        shards={"train": tuple(paths)},
        shard_rows={"train": tuple(shards)},
        row_group_rows=row_group_rows,
    )


def epoch(prepared: PreparedSet, global_batch: int, ranks: int = 1, **options: Any) -> list[list[Batch]]:
    """Batches of one epoch, by rank."""
    given_options: dict[str, Any] = {"seed": 1, "epoch": 0} | options
    return [
        list(batches(prepared, "train", global_batch=global_batch, rank=rank, world_size=ranks, **given_options))
        for rank in range(ranks)
    ]


def order(by_rank: list[list[Batch]]) -> list[list[int]]:
    """Row numbers by global batch, 0 for padding, lanes in the order of the ranks."""
    return [
        [
            number(pixels) * int(weight)
            for batch in of_step
            for pixels, weight in zip(batch.image, batch.weight, strict=True)
        ]
        for of_step in zip(*by_rank, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    row_group_rows=st.integers(1, 9),
    per_rank=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_row_once_an_epoch_in_the_same_global_batches_for_1_2_and_4_ranks(
    tmp_path_factory: pytest.TempPathFactory, shards: list[int], row_group_rows: int, per_rank: int, seed: int
) -> None:
    prepared = prepared_set(tmp_path_factory.mktemp("set"), shards, row_group_rows)
    global_batch = 4 * per_rank
    alone = order(epoch(prepared, global_batch, 1, seed=seed))
    assert len(alone) == steps(sum(shards), global_batch)
    rows = [row for batch in alone for row in batch if row]
    assert Counter(rows) == Counter(range(1, sum(shards) + 1))
    assert all(all(batch) for batch in alone[:-1]), "padding before the last batch"
    for ranks in (2, 4):
        assert order(epoch(prepared, global_batch, ranks, seed=seed)) == alone


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [40, 24], 8)
    first = order(epoch(prepared, 4))
    assert order(epoch(prepared, 4)) == first
    assert order(epoch(prepared, 4, epoch=1)) != first
    assert order(epoch(prepared, 4, seed=2)) != first
    assert [row for batch in first for row in batch] != sorted(row for batch in first for row in batch)


def test_a_batch_mixes_rows_from_far_apart(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [512], 8)
    groups = [{(row - 1) // 8 for row in batch} for batch in order(epoch(prepared, 8))]
    assert np.mean([len(of_batch) for of_batch in groups]) > 7  # 8 would be all from different row groups


def test_without_shuffling_the_lanes_keep_the_order_of_the_set(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [5, 2], 2)
    assert order(epoch(prepared, 2, shuffle=False)) == [[1, 5], [2, 6], [3, 7], [4, 0]]


def test_masks_belong_to_their_images_and_padding_has_real_pixels_without_weight(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [10], 3)
    made = [batch for of_rank in epoch(prepared, 4, 2) for batch in of_rank]
    for batch in made:
        assert batch.image.dtype == batch.mask.dtype == np.uint8
        assert batch.weight.dtype == np.float32
        assert (batch.image.shape, batch.mask.shape, batch.weight.shape) == ((2, *SHAPE), (2, 2, 3), (2,))
        assert np.array_equal(batch.mask, batch.image[..., 0] + 1)
    assert sum(batch.weight.sum() for batch in made) == 10
    assert all(batch.image.any() for batch in made)


def test_augmented_batches_are_bit_equal_for_1_2_and_3_ranks(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [31, 9], 4)
    augment = Augment(flip_vertical=0.5, noise=60, brightness=0.3)

    def global_batches(ranks: int, number: int = 0) -> list[tuple[bytes, ...]]:
        by_rank = epoch(prepared, 6, ranks, epoch=number, augment=augment)
        return [
            tuple(b"".join(getattr(batch, name).tobytes() for batch in of_step) for name in Batch._fields)
            for of_step in zip(*by_rank, strict=True)
        ]

    alone = global_batches(1)
    assert global_batches(2) == alone
    assert global_batches(3) == alone
    assert global_batches(1, number=1) != alone


@pytest.mark.parametrize("threads", [2, 8])
def test_several_threads_make_the_batches_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    prepared = prepared_set(tmp_path, [57, 40], 3)
    augment = Augment(flip_vertical=0.5, noise=60, brightness=0.3)
    [alone] = epoch(prepared, 5, augment=augment)
    assert alone[-1].weight.sum() == 2, "the last batch is padded"
    original = feed._read

    def late(piece: Piece) -> pa.Table:
        time.sleep(0.002 * (piece.index % 5))  # threads overtake each other
        return original(piece)

    monkeypatch.setattr(feed, "_read", late)
    [together] = epoch(prepared, 5, augment=augment, threads=threads)
    for ours, theirs in zip(together, alone, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_threads_augment_at_the_same_time(tmp_path: Path) -> None:
    met = threading.Barrier(3, timeout=60)

    class Meeting(Augment):
        def apply(self, image_HWC: np.ndarray, mask_HW: np.ndarray, generator: object) -> tuple[np.ndarray, np.ndarray]:
            met.wait()  # for two others; alone it would wait for ever
            return image_HWC, mask_HW

    prepared = prepared_set(tmp_path, [12], 4)
    [fed] = epoch(prepared, 1, augment=Meeting(), threads=3)
    assert sorted(row for batch in order([fed]) for row in batch) == list(range(1, 13))


def test_a_row_is_augmented_by_seed_epoch_and_its_name_whatever_the_batch(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [17], 4)
    augment = Augment(flip_horizontal=1, noise=60, brightness=0.3)
    expected = Counter()
    for n in range(1, 18):
        made = augment.apply(image(n), image(n)[..., 0] + 1, generator(5, 3, f"row{n}"))
        expected[made[0].tobytes() + made[1].tobytes()] += 1
    for global_batch in (2, 5):
        [fed] = epoch(prepared, global_batch, seed=5, epoch=3, augment=augment)
        found = Counter(
            pixels.tobytes() + mask.tobytes()
            for batch in fed
            for pixels, mask, weight in zip(*batch, strict=True)
            if weight
        )
        assert found == expected


def test_batches_are_not_overwritten_by_later_ones(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [64], 8)
    kept = [batch.image for batch in epoch(prepared, 4)[0]]
    assert len({number(pixels) for images in kept for pixels in images}) == 64


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_reads_its_share_and_little_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    prepared = prepared_set(tmp_path, [512, 512], 8)  # 128 row groups, 8 lanes
    read = []
    original = feed._read
    monkeypatch.setattr(feed, "_read", lambda piece: read.append(piece) or original(piece))
    for rank in range(ranks):
        read.clear()
        list(batches(prepared, "train", global_batch=8, rank=rank, world_size=ranks, seed=1, epoch=0))
        share = 128 / ranks
        # A lane's two ends may each fall inside a row group.
        assert share <= len(read) <= share + 8 / ranks


def test_memory_is_bounded_by_the_window_and_the_batches_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared_set(tmp_path, [512], 8)
    read = []
    original = feed._read
    monkeypatch.setattr(feed, "_read", lambda piece: read.append(8) or original(piece))
    batch_iterator = batches(prepared, "train", global_batch=2, rank=0, world_size=1, seed=1, epoch=0)
    next(batch_iterator)
    batch_iterator.close()
    assert sum(read) <= 2 * 4 * 8  # lanes x row groups of a window x rows


def test_a_batch_with_fewer_rows_than_ranks_is_refused(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [4], 2)
    with pytest.raises(ValueError, match=r"train\.batch_size.*got 2 for 3"):
        batches(prepared, "train", global_batch=2, rank=0, world_size=3, seed=1, epoch=0)


@pytest.mark.parametrize(("global_batch", "ranks", "parts", "rows"), [(7, 3, 1, 3), (8, 5, 1, 2), (9, 2, 4, 8)])
def test_uneven_shares_are_padded_with_real_pixels_without_weight(
    tmp_path: Path, global_batch: int, ranks: int, parts: int, rows: int
) -> None:
    prepared = prepared_set(tmp_path, [31, 9], 4)
    alone, by_rank = order(epoch(prepared, global_batch)), epoch(prepared, global_batch, ranks, parts=parts)
    assert [[row for row in batch if row] for batch in order(by_rank)] == [
        [row for row in batch if row] for batch in alone
    ]
    for batch in (batch for of_rank in by_rank for batch in of_rank):
        assert (batch.image.shape, batch.weight.shape) == ((rows, *SHAPE), (rows,))
        assert all(pixels.any() for pixels in batch.image)
        assert np.array_equal(batch.mask, batch.image[..., 0] + 1)
    shares = [int(of_rank[0].weight.sum()) for of_rank in by_rank]
    assert max(shares) - min(shares) == 1
    assert sum(shares) == global_batch


@settings(max_examples=15, deadline=None)
@given(
    shards=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    global_batch=st.integers(3, 9),
    ranks=st.integers(1, 3),
    data=st.data(),
)
def test_an_epoch_that_is_gone_on_with_by_other_ranks_has_the_batches_that_were_left(
    tmp_path_factory: pytest.TempPathFactory, shards: list[int], global_batch: int, ranks: int, data: st.DataObject
) -> None:
    prepared = prepared_set(tmp_path_factory.mktemp("set"), shards, 3)
    first = data.draw(st.integers(0, steps(sum(shards), global_batch)))
    whole, rest = epoch(prepared, global_batch, ranks), epoch(prepared, global_batch, ranks, first=first)
    for all_of_rank, left in zip(whole, rest, strict=True):
        assert len(left) == len(all_of_rank) - first
        for batch, other in zip(all_of_rank[first:], left, strict=True):
            # Padding as well: it counts in the statistics of batch normalisation.
            assert all(np.array_equal(one, same) for one, same in zip(batch, other, strict=True))


def test_a_row_that_does_not_fit_the_set_stops_the_epoch_and_is_named(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [4], 2)
    rows = [{"row_id": f"r{n}", "image": bytes(6 - (n == 3)), "mask": bytes(6)} for n in range(4)]
    storage.write_table(prepared.files("train")[0], pa.Table.from_pylist(rows, schema=PREPARED), 2)
    with pytest.raises(ValueError, match="row r3 has 5 image"):
        epoch(prepared, 2)


@pytest.mark.parametrize(("rows", "row_group_rows"), [(3, 2), (4, 1), (1, 2)])
def test_a_shard_with_other_row_groups_than_the_set_tells_is_named(
    tmp_path: Path, rows: int, row_group_rows: int
) -> None:
    prepared = prepared_set(tmp_path, [4], 2)
    other = prepared_set(tmp_path / "other", [rows], row_group_rows)
    Path(prepared.files("train")[0]).write_bytes(Path(other.files("train")[0]).read_bytes())
    with pytest.raises(ValueError, match=r"part-00000\.parquet.*prepare again"):
        epoch(prepared, 2)


def test_the_first_batch_reads_footers_of_few_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared_set(tmp_path, [8] * 200, 4)
    opened: set[str] = set()
    original = storage.read_footer
    monkeypatch.setattr(storage, "read_footer", lambda uri: opened.add(uri) or original(uri))
    fed = batches(prepared, "train", global_batch=4, rank=0, world_size=1, seed=1, epoch=0)
    next(fed)
    fed.close()
    assert 0 < len(opened) <= 4 * 2 * 4  # lanes x two windows, as batches are made ahead, x row groups


def test_time_spent_waiting_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared_set(tmp_path, [8], 4)
    fed = batches(prepared, "train", global_batch=2, rank=0, world_size=1, seed=1, epoch=0)
    assert fed.waited_s == 0
    list(fed)
    assert 0 < fed.waited_s < 60


def test_an_abandoned_epoch_ends_its_threads(tmp_path: Path) -> None:
    prepared = prepared_set(tmp_path, [64], 4)
    fed = batches(prepared, "train", global_batch=2, rank=0, world_size=1, seed=1, epoch=0, threads=3)
    next(fed)
    fed.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rayseg-feed")]
    with pytest.raises(StopIteration):
        next(fed)


def test_it_reads_from_s3_too(s3_store: str) -> None:
    # prepared_set writes through storage; a Path would swallow one of the slashes of the scheme.
    table = pa.Table.from_pylist(
        [{"row_id": f"row{n}", "image": image(n).tobytes(), "mask": bytes(6)} for n in range(1, 9)], schema=PREPARED
    )
    storage.write_table(f"{s3_store}/feed/a.parquet", table, 2)
    prepared = PreparedSet(
        uri=f"{s3_store}/feed",
        shape=SHAPE,
        preprocess=Preprocess(size=SHAPE[:2]),
        labels=Labels(),
        rows={"train": 8},
        digest="s3",
        shards={"train": ("a.parquet",)},
        shard_rows={"train": (8,)},
        row_group_rows=2,
    )
    assert sorted(row for batch in order(epoch(prepared, 4, 2)) for row in batch) == list(range(1, 9))
