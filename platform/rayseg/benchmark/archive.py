"""Bulk segmentation: against the bare network on arrays in memory, and against what one writes with Ray at first."""

import dataclasses
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from rayseg import cluster, snapshots, storage
from rayseg.benchmark.data import figure
from rayseg.benchmark.watch import greatest
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice, read_slice
from rayseg.inference import ledger
from rayseg.inference.archive import SegmentConfig, segment
from rayseg.inference.outputs import Profile
from rayseg.models.engine import Engine, compile_openvino
from rayseg.tracking import registry, runs

_PATIENTS, _SLICES, _SIZE = 12, 32, 512  # the archive: 12 series
_TIMES = 8  # each series stands in the manifest so many times, so that starting counts little
_HEAVY_TIMES = 2
_OTHER: tuple[Profile, ...] = ("seg", "nifti")  # made of kept masks
_NETWORK = 256
_LIGHT, _HEAVY = "unet-small", "unet-residual"  # presets: where all else weighs most, and the one for accuracy
_ROWS_OF_GROWTH = (1_000, 20_000)  # slices
# Saves a network with weights that were never trained and find next to nothing, as most slices of an archive have none.
_SAVE = """
import sys
from rayseg.data import synthetic
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.models.network import build_network, portable
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import registry
folder, preset, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
preprocess = Preprocess((size, size), window="brain", percentiles=None)
model = portable(build_network(NetworkConfig(preset=preset), (size, size, 1)))
last = [layer for layer in model.layers if layer.weights][-1]
kernel, bias = last.get_weights()
last.set_weights([0.01 * kernel, bias - 8.0])
registry.save(folder, model, preprocess, Labels(), 0.5, synthetic.slice_bytes(0, 64))
"""
# The way of Ray's documentation: binary files, a function that decodes, a class that holds the model, a writer.
_RECIPE = """
import io, os, sys, time
import cv2, numpy as np, pydicom, ray
# Twice the cores: with no more CPUs than actors, these take all of them and reading waits for ever.
ray.init(address="local", num_cpus=2 * int(sys.argv[4]), include_dashboard=False, log_to_driver=False)
source, model_file, output, cores, size = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
def decode(row):
    slice = pydicom.dcmread(io.BytesIO(row["bytes"]))
    values = slice.pixel_array * float(slice.RescaleSlope) + float(slice.RescaleIntercept)
    grey = np.clip((values - 0) / 80, 0, 1) * 255
    image = cv2.resize(grey.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return {"path": row["path"], "shape": np.array(values.shape), "image": image.astype(np.uint8)[..., None]}
class Model:
    def __init__(self):
        import keras
        self.model = keras.models.load_model(model_file, compile=False)
    def __call__(self, batch):
        probabilities = self.model.predict(batch["image"], verbose=0)[..., 0]
        return {"path": batch["path"], "shape": batch["shape"], "probability": probabilities}
def write(row):
    rows, columns = (int(value) for value in row["shape"])
    mask = cv2.resize(row["probability"], (columns, rows)) >= 0.5
    name = row["path"].strip("/").replace("/", "-")
    np.save(os.path.join(output, name + ".npy"), mask)
    return {"pixels": int(mask.sum())}
os.makedirs(output)
data = ray.data.read_binary_files(source, include_paths=True)
began = time.perf_counter()
done = data.map(decode).map_batches(Model, batch_size=8, concurrency=cores, num_cpus=1).map(write).count()
print(done, time.perf_counter() - began)
"""


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """All figures of the suite; `folder` is for its files.

    Slices a second are of the whole run of the job, its actors' start included, but not Ray's.
    """
    cores = os.cpu_count() or 2
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    os.environ.setdefault("RAYSEG_PSEUDONYM_KEY", "benchmark")
    source = folder / "archive"
    synthetic.write_studies(str(source), patients=_PATIENTS, slices=_SLICES, size=_SIZE, masks=False)
    bundle = registered(folder / "bundle", tracking_uri, _LIGHT, _NETWORK)
    heavy = registered(folder / "heavy", tracking_uri, _HEAVY, _NETWORK, "heavy")
    cluster.connect()
    once, manifest, more = (str(folder / f"{name}.parquet") for name in ("once", "manifest", "more"))
    catalog(CatalogConfig(str(source), once, Layout()))
    storage.write_table(manifest, _repeated(snapshots.read_table(once), _TIMES))
    storage.write_table(more, _repeated(snapshots.read_table(once), _HEAVY_TIMES))
    config = SegmentConfig(
        "models:/bench/1",
        tracking_uri,
        "",
        manifest,
        concurrency=cores,
        profiles=("seg-labelmap",),
        experiment="benchmark",
    )
    # One process: with one a core it was slower, in trials by 6 %.
    heavy_config = dataclasses.replace(
        config, model_uri="models:/heavy/1", manifest=more, concurrency=1, cpus_per_actor=cores
    )
    names = (
        "bare_forward",
        "bulk",
        "kept",
        "ray_recipe",
        "bare_float32",
        "bare_forward.heavy",
        "bulk.heavy",
        "kept.heavy",
    )
    speeds: dict[str, list[float]] = {name: [] for name in names}
    shares: dict[str, list[float]] = {}
    first_output_s: list[float] = []
    images_NHWC = images(source)
    for repeat in range(repeats):
        speeds["bare_forward"].append(bare(bundle, images_NHWC, Engine().precision, cores))
        speeds["bare_float32"].append(bare(bundle, images_NHWC, "float32", cores))
        output = folder / f"bulk-{repeat}"
        with greatest(partial(_first_file, output)) as first:
            began = time.perf_counter()
            speeds["bulk"].append(_bulk(config, output))
        first_output_s.append(-first[0] - began)
        for step, share in _shares(str(output)).items():
            shares.setdefault(f"share.{step}", []).append(share)
        speeds["kept"].append(_bulk(dataclasses.replace(config, profiles=_OTHER), output))
        speeds["ray_recipe"].append(_recipe(source, bundle, folder / f"recipe-{repeat}", cores))
        speeds["bare_forward.heavy"].append(bare(heavy, images_NHWC[: 32 * cores], Engine().precision, cores))
        speeds["bulk.heavy"].append(_bulk(heavy_config, folder / f"heavy-{repeat}"))
        speeds["kept.heavy"].append(
            _bulk(dataclasses.replace(heavy_config, profiles=_OTHER), folder / f"heavy-{repeat}")
        )
    ratios = {
        f"bulk_vs_{name}": figure([a / b for a, b in zip(speeds[bulk], speeds[name], strict=True)])
        for bulk, name in (
            *(("bulk", name) for name in ("bare_forward", "bare_float32", "ray_recipe")),
            ("bulk.heavy", "bare_forward.heavy"),
        )
    } | {
        f"{kept}_vs_first_run": figure([a / b for a, b in zip(speeds[kept], speeds[bulk], strict=True)])
        for kept, bulk in (("kept", "bulk"), ("kept.heavy", "bulk.heavy"))
    }
    return {
        **ratios,
        **{f"slices_per_second.{name}": figure(values) for name, values in speeds.items()},
        **{name: figure(values) for name, values in shares.items()},
        "first_output_s": figure(first_output_s),
        "rss_growth_1000_to_20000": figure([_growth(folder, tracking_uri)]),
    }


def _bulk(config: SegmentConfig, output: Path) -> float:
    """Slices a second."""
    began = time.perf_counter()
    done = segment(dataclasses.replace(config, output=str(output)))
    return done.slices / (time.perf_counter() - began)


def registered(folder: Path, tracking_uri: str, preset: str, size: int, name: str = "bench") -> Path:
    """A network that finds next to nothing, as version 1 of a registered model; returns its bundle's folder."""
    subprocess.run([sys.executable, "-c", _SAVE, str(folder), preset, str(size)], check=True, capture_output=True)
    registry.register(tracking_uri, runs.start(tracking_uri, "benchmark", "model"), folder, name)
    return folder


def images(source: Path) -> np.ndarray:
    """The archive as the network sees it."""
    preprocess = Preprocess((_NETWORK, _NETWORK), window="brain", percentiles=None)
    made = []
    for file in sorted(source.rglob("*.dcm")):
        slice = read_slice(file.read_bytes())
        assert isinstance(slice, Slice), slice
        made.append(preprocess.apply(slice))
    return np.stack(made)


def bare(bundle: Path, images_NHWC: np.ndarray, precision: str, cores: int) -> float:
    """Images a second of the network alone, on arrays in memory; nothing found in them, as in the bulk run."""
    network = registry.load(bundle).network
    compiled = compile_openvino(network, precision, cores)
    forward = compiled.screen or compiled.exact
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(forward, images_NHWC[: 2 * cores, np.newaxis]))
        began = time.perf_counter()
        list(pool.map(forward, images_NHWC[:, np.newaxis]))
        return len(images_NHWC) / (time.perf_counter() - began)


def _recipe(source: Path, bundle: Path, output: Path, cores: int) -> float:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _RECIPE,
            str(source),
            str(bundle / "model.keras"),
            str(output),
            str(cores),
            str(_NETWORK),
        ],
        check=True,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    slices, seconds = done.stdout.split()[-2:]
    return int(slices) / float(seconds)


def _shares(output: str) -> dict[str, float]:
    """Which part of the actors' time each step took."""
    table = ledger.read(output)
    seconds = {
        name.removesuffix("_s"): sum(table[name].to_pylist()) for name in table.column_names if name.endswith("_s")
    }
    return {step: value / sum(seconds.values()) for step, value in seconds.items()}


def _first_file(output: Path) -> float:
    """The time, negative so that the first is the greatest, where a file of a series is there."""
    return -time.perf_counter() if any(output.rglob("*.dcm")) else -math.inf


def _growth(folder: Path, tracking_uri: str) -> float:
    """How much more memory the larger archive takes at most, as a fraction: driver and actors, what is theirs alone."""
    small = folder / "small"
    synthetic.write_studies(str(small), patients=1, slices=40, size=64, masks=False)
    registered(folder / "tiny", tracking_uri, _LIGHT, 32, "tiny")
    catalog(CatalogConfig(str(small), str(folder / "one.parquet"), Layout()))
    one = snapshots.read_table(str(folder / "one.parquet"))
    peaks = []
    for slices in _ROWS_OF_GROWTH:
        manifest = str(folder / f"{slices}.parquet")
        storage.write_table(manifest, _repeated(one, slices // one.num_rows))
        output = str(folder / f"growth-{slices}")
        config = SegmentConfig("models:/tiny/1", tracking_uri, output, manifest, experiment="benchmark")
        with greatest(_memory) as peak:
            segment(config)
        peaks.append(peak[0])
    return peaks[1] / peaks[0] - 1


def _repeated(manifest: pa.Table, times: int) -> pa.Table:
    """Every series of the manifest under so many keys."""
    rows = manifest.to_pylist()
    return pa.Table.from_pylist(
        [{**row, "series_key": f"{row['series_key']}-{number}"} for number in range(times) for row in rows],
        schema=manifest.schema,
    )


def _memory() -> float:
    """KiB that belong to this process and to Ray's workers that segment, to each alone."""
    total = 0.0
    for process in [psutil.Process(), *_workers()]:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(float(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total


def _workers() -> list[psutil.Process]:
    """Those that segment."""
    return [one for one in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(one.info["cmdline"] or [])]
