"""A prepared set of small volumes: balls of two halves on noise."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.config import plain
from rayseg.data import chunks
from rayseg.data.labels import Labels
from rayseg.data.places import Places
from rayseg.data.prepared import DESCRIPTION, PATIENTS, VERSION
from rayseg.data.volume import VolumePreprocess
from rayseg.records import PREPARED_VOLUMES

PATCH = (8, 16, 16)
VOLUMES = {"train": 7, "val": 3, "test": 1}


def volume(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """float16 image and uint8 mask (D, H, W): of a ball class 1 in front and class 2, brighter, behind."""
    shape = random.integers((6, 14, 14), (14, 26, 26))
    centre, radius = shape / 2 + random.uniform(-1.5, 1.5, 3), random.uniform(4, 6)
    place = np.moveaxis(np.indices(shape), 0, -1) - centre
    ball = (place**2).sum(axis=-1) < radius**2
    mask = np.where(ball, 1 + (place[..., 1] > 0), 0).astype(np.uint8)
    return (random.normal(0, 0.4, mask.shape) + 1.5 * mask).astype(np.float16), mask


def prepare(folder: Path) -> str:
    """Writes the set, a patient a volume; returns its URI."""
    random, root = np.random.default_rng(5), str(folder)
    volumes = {}
    for split, number in VOLUMES.items():
        rows = []
        for place in range(number):
            (image, mask), places = volume(random), Places(2)
            name = f"{split}{place}.arrow"
            with chunks.Writer(folder / name, mask.shape, (4, 8, 8)) as writer:
                for depth, planes in enumerate(zip(image, mask, strict=True)):
                    writer.add(*planes)
                    places.add(depth, planes[1])
                voxels = places.voxels()
                told = {"row_id": f"{split}{place}", "spacing_mm": [1.0, 1.0, 1.0]}
                told["class_places"] = [len(one) for one in voxels]
                writer.finish(told, np.concatenate(voxels))
            row = {"row_id": f"{split}{place}", "patient_key": f"{split}{place}", "split": split}
            rows.append(row | {"shape": list(mask.shape), "path": name})
        path = storage.join(root, f"split={split}/part-00000.parquet")
        storage.write_table(path, pa.Table.from_pylist(rows, schema=PREPARED_VOLUMES))
        volumes[split] = [row["path"] for row in rows]
    description = {
        "version": VERSION,
        "digest": "1" * 64,
        "volume": plain(VolumePreprocess((1, 1, 1), PATCH)),
        "labels": plain(Labels(names=("front", "back"))),
        "shape": [*PATCH, 1],
        "rows": VOLUMES,
        "shards": {split: [f"split={split}/part-00000.parquet"] for split in VOLUMES},
        "shard_rows": {split: [rows] for split, rows in VOLUMES.items()},
        "row_group_rows": 16,
        "volumes": volumes,
    }
    storage.write_json(storage.join(root, DESCRIPTION), description)
    storage.write(storage.join(root, PATIENTS), b"patient_key,part,split,rows,positive\ntrain0,train,train,1,1\n")
    return root
