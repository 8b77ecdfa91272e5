"""The benchmark of the accelerator, on what this machine has: a small network at a small size."""

from pathlib import Path

import pytest

from rayseg.benchmark import gpu, inputs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_suite_measures_what_there_is(tmp_path: Path) -> None:
    prepared = inputs.prepared_set(tmp_path / "set", 8, 32)
    name, rates = gpu._run(gpu._MEASURE, prepared, "unet-small", 4, 2)
    assert name
    ways = {f"{way}.{policy}" for way in ("train", "infer") for policy in ("float32", "mixed_bfloat16")}
    assert rates.keys() == ways
    assert min(rates.values()) > 0
    limits = gpu._run(gpu._ROOFLINE, "unet-small", 32, 4)
    assert {limit.rpartition(".")[0] for limit in limits} == ways
    assert limits["train.float32.H100 SXM"] < limits["train.mixed_bfloat16.H100 SXM"]
    assert limits["infer.float32.H100 SXM"] < limits["infer.float32.H200 SXM"]
