"""Training on real Ray Train workers: equal work gives equal weights, whatever the workers and whatever happens."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayseg import storage
from rayseg.config import plain
from rayseg.data.labels import Labels
from rayseg.data.prepared import DESCRIPTION, VERSION
from rayseg.data.preprocess import Preprocess
from rayseg.models.unet import UNetConfig
from rayseg.records import PREPARED
from rayseg.tracking import bundle, registry
from rayseg.training.trainer import TrainConfig, TrainResult, fit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SIZE = 32
ROWS = {"train": 22, "val": 7, "test": 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared set of bright discs on noise, a patient a row."""
    root = str(tmp_path_factory.mktemp("prepared"))
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    for split, rows in ROWS.items():
        table = []
        for row in range(rows):
            centre_y, centre_x, radius = [*random.uniform(8, 24, 2).tolist(), random.uniform(3, 8)]
            mask = ((y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2).astype(np.uint8)
            image = np.clip(random.normal(90, 20, mask.shape) + 70 * mask, 0, 255).astype(np.uint8)
            table.append(
                {
                    "row_id": f"{split}{row}",
                    "patient_key": f"{split}{row}",
                    "split": split,
                    "foreground_pixels": int(mask.sum()),
                    "image": image.tobytes(),
                    "mask": mask.tobytes(),
                }
            )
        path = storage.join(root, f"split={split}/part-00000.parquet")
        storage.write_table(path, pa.Table.from_pylist(table, schema=PREPARED), 4)
    description = {
        "version": VERSION,
        "digest": "0" * 64,
        "preprocess": plain(Preprocess(size=(SIZE, SIZE))),
        "labels": plain(Labels()),
        "shape": [SIZE, SIZE, 1],
        "rows": ROWS,
        "shards": {split: [f"split={split}/part-00000.parquet"] for split in ROWS},
    }
    storage.write_json(storage.join(root, DESCRIPTION), description)
    return root


def config(prepared: str, folder: Path, **changes: object) -> TrainConfig:
    values = {
        "prepared": prepared,
        "storage": str(folder / "runs"),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "model": UNetConfig(widths=(4, 8)),
        "batch_size": 4,
        "epochs": 3,
        "learning_rate": 0.01,
        "cpus_per_worker": 1.0,
    }
    return TrainConfig(**(values | changes))  # type: ignore[arg-type]


def weights(config: TrainConfig, result: TrainResult) -> list[np.ndarray]:
    folder, _ = registry.fetch(config.tracking_uri, result.model_uri)
    return bundle.load(folder).model.get_weights()


def test_one(prepared: str, tmp_path: Path) -> None:
    c = config(prepared, tmp_path, max_failures=0)
    result = fit(c)
    print(result)
