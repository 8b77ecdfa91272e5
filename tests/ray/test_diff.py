"""The whole job over hand-made ledgers: table, pictures, page, and the run in MLflow."""

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayseg.evaluation import panes
from rayseg.evaluation.changes import DIFF
from rayseg.evaluation.diff import DiffConfig, diff
from rayseg.inference import ledger
from rayseg.tracking import runs
from tests.unit.archive_runs import empty, row, squares, write_archive, write_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_what_changed_between_two_versions_is_told_series_by_series(tmp_path: Path, tracking_uri: str) -> None:
    output, manifest = tmp_path / "segmented", write_archive(tmp_path, series=6)
    moved, still = squares((1, 20, 20)), squares((2, 5, 5))
    write_run(output, {0: moved, 1: still, 2: empty(), 3: squares((0, 0, 0), (2, 30, 30)), 4: still})
    changed = {0: squares((1, 20, 25)), 1: still, 2: squares((3, 10, 10), side=20), 3: squares((0, 0, 0)), 4: still}
    spoiled = write_run(output, changed, "2", "LABELMAP")[4]
    Path(spoiled["outputs"][0]["uri"]).write_bytes(b"spoiled")
    ledger.append(str(output), [row("series-5", "2")], [])
    (tmp_path / "archive" / "3-2.dcm").unlink()  # what the picture of series 3 would show
    config = DiffConfig(
        baseline=str(output), challenger=str(output), manifest=manifest, output=str(tmp_path / "diff"),
        baseline_model="brain/1", challenger_model="brain/2", worst=2, tracking_uri=tracking_uri,
    )  # fmt: skip
    result = diff(config)
    assert (result.series, result.compared, result.identical, result.changed) == (6, 4, 1, 3)
    assert result.not_compared == {"corrupt": 1, "only_in_challenger": 1}
    assert (result.baseline, result.challenger) == ("brain/1/c0ffeec0ffee", "brain/2/c0ffeec0ffee")
    assert (result.summary["appeared"], result.summary["vanished"]) == (1, 1)
    # -1, 0, 0 and 4 mL.
    assert result.summary["change_ml"] == pytest.approx({"series": 4, "low": -0.25, "median": 0.0, "high": 1.0})
    assert result.classes["lesion"] == result.summary

    table = pq.read_table(result.table)
    assert table.schema.equals(DIFF)
    whole = [one for one in table.to_pylist() if one["class"] == ""]
    # 4 mL appeared; of the two with 1 mL the later key comes first.
    assert [one["series_key"] for one in whole] == [f"series-{number}" for number in (2, 3, 0, 1, 4, 5)]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "diff" / "diff.csv").read_text())))
    assert [(line["series_key"], line["class"]) for line in lines] == [
        (one["series_key"], one["class"]) for one in table.to_pylist()
    ]
    assert lines[0]["change_ml"] == "4"

    assert [Path(uri).name for uri in result.pictures] == ["001.png", "002.png"]
    first, second = (np.asarray(Image.open(uri)) for uri in result.pictures)
    assert (first == panes.CHALLENGER).all(axis=-1).any()
    assert (second == panes.BASELINE).all(axis=-1).any()
    panes_of_first, panes_of_second = first[30:350, :320], second[30:350, :320]
    assert panes_of_first.std() > 20, "the ramp is there"
    assert np.unique(panes_of_second.reshape(-1, 3), axis=0).shape[0] == 2, "black, and the outline"
    html = Path(result.report).read_text()
    assert "the slice itself cannot be read" in html
    assert html.count("data:image/png;base64") == 4

    assert result.run_id is not None
    run = runs.client(tracking_uri).get_run(result.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "diff-brain-2-brain-1")
    assert run.data.metrics["diff/changed"] == 3
    assert run.data.metrics["diff/change_ml_high"] == pytest.approx(1.0)
    assert run.data.metrics["diff/not_compared"] == 2
    assert runs.read_bytes(tracking_uri, result.run_id, "diff.html").decode() == html
    with pytest.raises(ValueError, match=r"diff\.challenger: brain/1/c0ffeec0ffee is the baseline, too"):
        diff(DiffConfig(**{**vars(config), "challenger_model": "brain/1"}))
