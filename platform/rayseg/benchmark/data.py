"""The data plane: decoding by stage, preparing against a bare loop, spill, the feed's start and memory, S3 reads."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import boto3
import numpy as np
import pyarrow as pa
import ray
from botocore.config import Config
from ray._private import internal_api  # what the object store has spilled is told nowhere else

from rayseg import storage
from rayseg.benchmark import inputs
from rayseg.benchmark.delay import delayed
from rayseg.data import accepted, manifest
from rayseg.data.labels import Labels
from rayseg.data.masks import Mask, truth
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.preprocess import Preprocess
from rayseg.data.samples import Making, write_shards
from rayseg.data.shards import planned
from rayseg.data.split import Split
from rayseg.demo.store import object_store
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Slice, Source, read_slice
from rayseg.records import MANIFEST, Reject

OBJECT_STORE_BYTES = 80 * 2**20  # Ray wants at least 75 MiB
_WINDOW = Preprocess(size=(inputs.SIZE, inputs.SIZE), window="brain", percentiles=None)
_SCALED = Preprocess(size=(256, 256), window="brain", percentiles=None)
_FILES = 64  # of which the source of the preparing is made, by links
_PREPARED_ROWS = 4096
_VOLUMES, _SLICES = 16, 64
_OBJECTS = 128  # on S3
_FAR_S = 0.02  # to a store far away, and back
_FEED = """
import json, sys, time
from rayseg.data.feed import batches
from rayseg.data.prepared import describe
began = time.perf_counter()
feed = batches(describe(sys.argv[1]), "train", global_batch=8, rank=0, world_size=1, seed=1, epoch=0)
next(feed)
first = time.perf_counter() - began
for _ in range(100):
    next(feed)
feed.close()
# Not `ru_maxrss`, which starts with that of the process that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([first, int(peak.split()[1])]))
"""


def measure(folder: Path, repeats: int, rows: int) -> dict[str, Any]:
    """All figures of the suite; `folder` is for its files."""
    return _by_stage(repeats) | _preparing(folder, repeats) | _feeding(folder, repeats, rows) | _s3(folder, repeats)


def figure(values: list[float]) -> dict[str, float]:
    """The median of repeated measurements, with the least and the greatest."""
    return {"value": median(values), "least": min(values), "greatest": max(values)}


def _by_stage(repeats: int) -> dict[str, Any]:
    """CPU milliseconds a slice, from bytes in memory: reading, the window, and the window with scaling."""
    figures: dict[str, Any] = {}
    for syntax in inputs.SYNTAXES:
        data = inputs.ct_slice(syntax)
        slice = read_slice(data)
        assert isinstance(slice, Slice), slice
        stages = {
            "read": lambda data=data: read_slice(data),
            "window": lambda slice=slice: _WINDOW.apply(slice),
            "window_and_scale_to_256": lambda slice=slice: _SCALED.apply(slice),
            "read_and_window": lambda data=data: _WINDOW.apply(read_slice(data)),  # type: ignore[arg-type]
        }
        for stage, call in stages.items():
            figures[f"ms_per_slice.{syntax}.{stage}"] = figure(
                [1000 * _seconds(call, 20, time.process_time) for _ in range(repeats)]
            )
    return figures


def _seconds(call: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    for _ in range(times):
        call()
    return (clock() - began) / times


def _preparing(folder: Path, repeats: int) -> dict[str, Any]:
    """Slices a second and core of the prepare job over those of a bare loop in memory; what Ray spilled meanwhile."""
    source = _manifest(folder / "source")
    image, mask = inputs.ct_slice("uncompressed"), inputs.ct_mask()

    def bare() -> None:
        slice = read_slice(image)
        assert isinstance(slice, Slice)
        _both(slice, Mask(mask))

    cores = os.cpu_count() or 1
    ray.init(address="local", num_cpus=cores, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
    ratios, rates = [], []
    try:
        for repeat in range(-1, repeats):
            loop = _seconds(bare, 200)
            # All in training: the same picture in two splits would be a leak.
            config = PrepareConfig(source, str(folder / f"set{repeat}"), _SCALED, split=Split(0.0, 0.0))
            seconds = prepare(config).seconds
            loop = (loop + _seconds(bare, 200)) / 2
            if repeat >= 0:  # the first one starts the workers
                rates.append(_PREPARED_ROWS / seconds / cores)
                ratios.append(rates[-1] * loop)
        volumes = _preparing_volumes(folder / "volumes", repeats, cores)
        state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
        stats = internal_api.get_memory_info_reply(state).store_stats
    finally:
        ray.shutdown()
    source_bytes = (repeats + 1) * _PREPARED_ROWS * (len(image) + len(mask))
    return {
        "prepare_vs_bare_loop": figure(ratios),
        "prepare.slices_per_second_and_core": figure(rates),
        "prepare.source_over_object_store": figure([source_bytes / (repeats + 1) / OBJECT_STORE_BYTES]),
        "prepare.spilled_bytes": figure([float(stats.spilled_bytes_total)]),
        "prepare.object_store_bytes_in_use": figure([float(stats.object_store_bytes_used)]),
        **volumes,
    }


def _both(slice: Slice, mask: Mask) -> None:
    """Makes a sample's picture and its mask."""
    classes = truth([(mask, None)], slice.shape, Labels(), slice.header, geometry=slice.geometry)
    assert not isinstance(classes, Reject)
    _SCALED.apply(slice)
    _SCALED.apply_mask(classes)


def _preparing_volumes(folder: Path, repeats: int, cores: int) -> dict[str, Any]:
    """The same of gzipped NIfTI volumes with label volumes; and how often the tasks read each file."""
    folder.mkdir()
    image, mask = inputs.ct_volume(_SLICES)
    rows = []
    for number in range(_VOLUMES):
        at = {name: str(folder / f"{number}-{name}.nii.gz") for name in ("image", "mask")}
        for name, data in (("image", image), ("mask", mask)):
            # Of another time (RFC 1952): bytes that no cache has seen.
            Path(at[name]).write_bytes(data[:4] + number.to_bytes(4, "little") + data[8:])
        masks = [{"uri": at["mask"], "label": None}]
        item = manifest.Item(at["image"], f"{number}", len(image), masks, str(number))
        rows += manifest.rows(item, image, Pseudonyms(b"benchmark"))
    uri = str(folder / "manifest.parquet")
    storage.write_table(uri, pa.Table.from_pylist(rows, schema=MANIFEST))

    def bare() -> None:
        source, opened = Source(image), Mask(mask)
        for frame in range(_SLICES):
            slice = source.slice(frame)
            assert isinstance(slice, Slice)
            _both(slice, opened)

    ratios, rates = [], []
    for repeat in range(repeats):
        loop = _seconds(bare, 2)
        config = PrepareConfig(uri, str(folder / f"set{repeat}"), _SCALED, split=Split(0.0, 0.0))
        seconds = prepare(config).seconds
        rates.append(_VOLUMES * _SLICES / seconds / cores)
        ratios.append(rates[-1] * (loop + _seconds(bare, 2)) / 2 / _SLICES)
    reads = _reads(folder, uri)
    return {
        "prepare_volumes_vs_bare_loop": figure(ratios),
        "prepare_volumes.slices_per_second_and_core": figure(rates),
        "prepare_volumes.reads_of_each_file": figure([reads[at] for at in sorted(reads)]),
    }


def _reads(folder: Path, uri: str) -> Counter[str]:
    """How often the tasks of a set read each file, shards being smaller than a volume: all of them in this process."""
    units = accepted.write(Path(uri), folder / "rows")
    tasks = planned(units, np.zeros(len(units.first), np.int8), ["train"], None, _SLICES // 3)
    reads: Counter[str] = Counter()
    read = storage.read

    def counted(uri: str, length: int | None = None) -> bytes:
        reads[uri] += 1
        return read(uri, length)

    with patch.object(storage, "read", counted):
        for task in tasks:
            write_shards(task, str(folder / "rows"), str(folder / "counted"), Making(_SCALED, Labels(), 16))
    assert len(reads) == 2 * _VOLUMES, "every file is read"
    return reads


def _manifest(folder: Path) -> str:
    """A manifest of links to a few slices and masks: reading them is reading real files, from the page cache."""
    folder.mkdir()
    for number in range(_FILES):
        (folder / f"{number}.dcm").write_bytes(inputs.ct_slice("uncompressed"))
        (folder / f"{number}.png").write_bytes(inputs.ct_mask())
    rows = []
    for number in range(_PREPARED_ROWS):
        uris = {}
        for suffix in ("dcm", "png"):
            link = folder / f"link{number}.{suffix}"
            link.symlink_to(folder / f"{number % _FILES}.{suffix}")
            uris[suffix] = str(link)
        masks = [{"uri": uris["png"], "label": None}]
        rows.append(
            {
                "uri": uris["dcm"],
                "masks": masks,
                "verdict": "ok",
                "kind": "dicom",
                "patient_key": f"{number // 64:020x}",
            }
        )
    storage.write_table(str(folder / "manifest.parquet"), pa.Table.from_pylist(rows, schema=MANIFEST))
    return str(folder / "manifest.parquet")


def _feeding(folder: Path, repeats: int, rows: int) -> dict[str, Any]:
    """Seconds to the first batch, and the growth of memory from a set of 1,000 rows to one of `rows`."""
    small, large = (inputs.prepared_set(folder / f"rows{count}", count) for count in (1000, rows))
    firsts: dict[str, list[float]] = {small: [], large: []}
    growths = []
    for _ in range(repeats):
        peaks = {}
        for uri, of_set in firsts.items():
            done = subprocess.run([sys.executable, "-c", _FEED, uri], stdout=subprocess.PIPE, check=True)
            first, peaks[uri] = json.loads(done.stdout)
            of_set.append(first)
        growths.append(peaks[large] / peaks[small] - 1)
    return {
        "first_batch_s.1000_rows": figure(firsts[small]),
        f"first_batch_s.{rows}_rows": figure(firsts[large]),
        f"rss_growth_1000_to_{rows}": figure(growths),
    }


def _s3(folder: Path, repeats: int) -> dict[str, Any]:
    """Objects a second of `storage.read_each` over those of boto3 in as many threads, from a store near and far."""
    data, bucket = inputs.ct_slice("uncompressed"), "benchmark"
    keys = [f"{number}.dcm" for number in range(_OBJECTS)]
    figures: dict[str, Any] = {}
    with object_store(folder / "store", bucket) as environment, patch.dict(os.environ, environment):
        os.environ.pop("AWS_ENDPOINT_URL_S3", None)  # it would come first
        for key in keys:
            storage.write(f"s3://{bucket}/{key}", data)
        port = urlsplit(environment["AWS_ENDPOINT_URL"]).port
        assert port is not None
        figures |= _s3_reads(bucket, keys, len(data), repeats, "s3_read")
        with delayed(port, _FAR_S / 2) as far:
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{far}"
            figures |= _s3_reads(bucket, keys, len(data), repeats, f"s3_read_{1000 * _FAR_S:.0f}ms")
    return figures


def _s3_reads(bucket: str, keys: list[str], length: int, repeats: int, name: str) -> dict[str, Any]:
    client = boto3.client("s3", config=Config(max_pool_connections=storage.THREADS))
    uris = [f"s3://{bucket}/{key}" for key in keys]
    with ThreadPoolExecutor(storage.THREADS) as pool:

        def theirs() -> None:
            for read in pool.map(lambda key: client.get_object(Bucket=bucket, Key=key)["Body"].read(), keys):
                assert len(read) == length

        def ours() -> None:
            for read in storage.read_each(uris):
                assert isinstance(read, bytes)
                assert len(read) == length

        theirs()  # this and the next open the connections
        ours()
        seconds = [(_seconds(theirs, 1), _seconds(ours, 1)) for _ in range(repeats)]
    return {
        f"{name}_vs_boto3": figure([of_theirs / of_ours for of_theirs, of_ours in seconds]),
        f"{name}.objects_per_second": figure([len(keys) / of_ours for _, of_ours in seconds]),
    }
