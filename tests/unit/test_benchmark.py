"""The benchmark's inputs are what their names say, and its figures what was measured."""

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest

from rayseg.benchmark import data, inputs, suite
from rayseg.data.feed import batches
from rayseg.data.prepared import describe
from rayseg.dicom.reading import Slice, read_slice


def test_every_syntax_holds_the_same_slice() -> None:
    plain = pydicom.dcmread(io.BytesIO(inputs.ct_slice("uncompressed"))).pixel_array
    assert plain.shape == (512, 512)
    for name, syntax in inputs.SYNTAXES.items():
        encoded = inputs.ct_slice(name)
        assert pydicom.dcmread(io.BytesIO(encoded)).file_meta.TransferSyntaxUID == syntax
        slice = read_slice(encoded)
        assert isinstance(slice, Slice)
        assert np.array_equal(slice.stored, plain)


@pytest.mark.parametrize("rows", [3, 8, 21])
def test_a_made_set_has_as_many_rows_as_asked(tmp_path: Path, rows: int) -> None:
    prepared = describe(inputs.prepared_set(tmp_path, rows, size=4, rows_per_shard=8))
    assert len(prepared.read_rows("train")) == prepared.rows["train"] == rows
    feed = batches(prepared, "train", global_batch=1, rank=0, world_size=1, seed=1, epoch=0)
    assert sum(batch.weight.sum() for batch in feed) == rows


def test_a_figure_is_the_median_with_its_spread() -> None:
    assert data.figure([3.0, 1.0, 9.0]) == {"value": 3.0, "least": 1.0, "greatest": 9.0}
    table = suite._table(
        {"cpu": "a", "cores": 2, "load_before": 0.1}, {"x": data.figure([2.0]), "y": {"reason": "absent"}}
    )
    assert "2.000" in table
    assert "not measured: absent" in table


@pytest.mark.parametrize(("values", "key"), [({"repeats": 1}, "repeats"), ({"rows": 9}, "rows")])
def test_a_benchmark_without_spread_or_contrast_is_refused(values: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"benchmark.{key}"):
        suite.BenchmarkConfig(**values)
