"""Which engine runs where: `auto` follows what TensorFlow sees, and what Ray gave."""

import re
from pathlib import Path

import pytest
import tensorflow as tf

from rayseg.models import engine
from rayseg.models.engine import Engine, has_gpu, require_gpu


@pytest.mark.parametrize(
    ("visible", "driver", "listed", "expected"),
    [
        (None, False, 1, False),  # nothing hints at one, and TensorFlow is not asked
        (None, True, 0, False),  # a driver, and TensorFlow's build for CPUs
        (None, True, 1, True),
        ("", True, 1, False),  # hidden
        ("-1", True, 1, False),
        ("0", False, 1, True),  # given, in a container without that device file
        ("0", True, 0, False),
    ],
)
def test_auto_takes_a_gpu_that_is_not_hidden_and_that_tensorflow_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, driver: bool, listed: int, expected: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(engine, "_DRIVER", tmp_path if driver else tmp_path / "absent")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one"] * listed if kind == "GPU" else ["cpu"])
    assert has_gpu() is expected


def test_a_gpu_that_was_given_and_is_not_seen_is_refused_by_the_key_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as Ray does
    for name in ("auto", "tensorflow"):
        with pytest.raises(ValueError, match=re.escape("segment.gpus_per_actor: Ray gave a GPU, and TensorFlow sees")):
            require_gpu(Engine(name), "segment.gpus_per_actor")
    require_gpu(Engine("openvino"), "segment.gpus_per_actor")  # wants none
