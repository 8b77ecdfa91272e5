"""Models with cases and without weights, in a real MLflow store: what comparing and promoting look at."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from rayseg.evaluation import cases
from rayseg.evaluation.publish import set_tag
from rayseg.evaluation.scores import Counts
from rayseg.tracking import runs

_SCORES = ("dice", "iou", "precision", "recall", "accuracy")


def table(by_class: Mapping[str, Sequence[Counts]], **more: Sequence[Any]) -> pa.Table:
    """A table of cases: of each class the counts of patients 0, 1, ...; `more` are columns by patient."""
    rows = [
        {
            "patient_key": f"patient-{patient:03d}",
            "class": name,
            **vars(found),
            **{score: getattr(found, score) for score in _SCORES},
            "slices": 1,
            "brier": 0.0,
            **{f"lesions_{kind}": 0 for kind in ("true", "found", "predicted", "false")},
            **{column: values[patient] for column, values in more.items()},
        }
        for name, counted in by_class.items()
        for patient, found in enumerate(counted)
    ]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: (row["patient_key"], row["class"])), schema=cases.CASES)


def found_of(hits: Sequence[int]) -> list[Counts]:
    """A case a number: so many of 100 pixels found, as many more found wrongly as were missed; Dice is hits / 100."""
    return [Counts(tp=hit, fp=100 - hit, fn=100 - hit, tn=1000) for hit in hits]


def register(
    tracking: str,
    name: str,
    found: pa.Table | None,
    *,
    rows: str = "set a",
    train: Sequence[str] = ("someone",),
    val: Sequence[str] = (),
    test: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """A version of `name`, evaluated where `found` is given, trained on `train`, validated on `val`; returns its URI.

    `test` are the patients that its split held out; by default those that it was evaluated on.
    """
    client = runs.client(tracking)
    run_id = runs.start(tracking, "models", f"{name} run", tags=tags)
    if found is not None:
        runs.log_bytes(tracking, run_id, f"test/{cases.PARQUET}", cases.to_parquet(found))
        client.set_tag(run_id, set_tag("test"), rows)
        test = sorted(set(found["patient_key"].to_pylist())) if test is None else test
    lines = [
        f"{patient},{split},{split},1,1"
        for split, of in (("train", train), ("val", val), ("test", test or ()))
        for patient in of
    ]
    runs.log_bytes(tracking, run_id, "split.csv", "\n".join(["patient_key,part,split,rows,positive", *lines]).encode())
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = client.create_model_version(name, source=f"runs:/{run_id}/model", run_id=run_id)
    return f"models:/{name}/{made.version}"
