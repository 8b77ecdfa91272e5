"""A suite of benchmarks as a job: runs it, prints a table on standard error, returns the figures."""

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rayseg.benchmark import archive, data, gpu, plan, serve, train, volume


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    rows: the size of the larger sets of `data`, and the objects of the archive of `plan`; a tenth of the default gives
        a first idea.
    bentoml: the python of an environment with BentoML, OpenVINO, pydicom and Pillow, for `serve`.
    """

    suite: Literal["data", "train", "archive", "plan", "serve", "gpu", "volume"] = "data"  # what is measured
    repeats: int = 5  # how often each figure is measured
    rows: int = 100_000
    bentoml: str | None = None

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise ValueError(f"benchmark.repeats: 2 or more expected, to tell the spread, got {self.repeats}")
        if self.rows < 2_000:
            raise ValueError(f"benchmark.rows: 2000 or more expected, got {self.rows}")


@dataclass(frozen=True)
class BenchmarkResult:
    """Figures by name: a value with its spread (least and greatest of the repeats), or why it was not measured."""

    suite: str
    machine: dict[str, Any]
    repeats: int
    figures: dict[str, Any]
    seconds: float


def benchmark(config: BenchmarkConfig) -> BenchmarkResult:
    """Measures the suite on this machine, which should do nothing else meanwhile."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="rayseg-benchmark-") as folder:
        if config.suite == "data":
            figures = data.measure(Path(folder), config.repeats, config.rows)
        elif config.suite == "archive":
            figures = archive.measure(Path(folder), config.repeats)
        elif config.suite == "plan":
            figures = plan.measure(Path(folder), config.repeats, config.rows)
        elif config.suite == "serve":
            figures = serve.measure(Path(folder), config.repeats, config.bentoml)
        elif config.suite == "gpu":
            figures = gpu.measure(Path(folder), config.repeats)
        elif config.suite == "volume":
            figures = volume.measure(Path(folder), config.repeats)
        else:
            figures = train.measure(Path(folder), config.repeats)
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "load_before": round(os.getloadavg()[2], 2)}
    print(_table(machine, figures), file=sys.stderr)
    return BenchmarkResult(config.suite, machine, config.repeats, figures, time.monotonic() - began)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _table(machine: dict[str, Any], figures: dict[str, Any]) -> str:
    lines = [f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']}"]
    for name, figure in figures.items():
        if "reason" in figure:
            lines.append(f"{name:44} not measured: {figure['reason']}")
        else:
            lines.append(f"{name:44} {figure['value']:10.3f}   {figure['least']:.3f} to {figure['greatest']:.3f}")
    return "\n".join(lines)
