"""Lines of the log: what they are of, as JSON, and what they leave out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray.exceptions

from rayseg import job, logs, storage
from rayseg.data.layouts import Layout, plan
from tests.unit.test_job import Config, Result

NAME = "Zqxkv^Carla"
ROOT = Path(__file__).parents[2]


def test_lines_have_run_stage_and_series(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A series also in the threads that read for it, and nowhere else."""
    program = f"""
import logging, sys
from rayseg import logs, storage
logs.begin("segment")
logs.set_up()
logger = logging.getLogger("x")
def told(uri, length=None):
    logger.warning("read")
    return b""
storage.read = told
with logs.about(series="abc"):
    list(storage.read_each([{str(tmp_path)!r}] * 3))
logger.info("after")
"""
    environment = {"PYTHONPATH": f"{ROOT}/platform", logs.ENCODING: "JSON"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    *within, after = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in within] == ["read"] * 3
    assert all(line["rayseg"]["series"] == "abc" for line in within)
    assert after["rayseg"] == {"run": within[0]["rayseg"]["run"], "stage": "segment"}
    assert (after["message"], after["levelname"]) == ("after", "INFO")


def test_a_worker_takes_over_what_its_driver_tells() -> None:
    program = """
import cloudpickle, sys, logging
from rayseg import logs
logs.begin("catalog")
sys.stdout.buffer.write(cloudpickle.dumps((logs.told(), logs.carried(lambda: logs.told()))))
"""
    environment = {"PYTHONPATH": f"{ROOT}/platform"}
    made = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
    worker = "import cloudpickle, sys; told, task = cloudpickle.load(sys.stdin.buffer); print(told == task(), told)"
    found = subprocess.run([sys.executable, "-c", worker], env=environment, input=made, capture_output=True, check=True)
    assert found.stdout.startswith(b"True {'run': ")


def test_lines_with_a_text_are_dropped_from_the_descriptor_and_no_others() -> None:
    """Written by Python, by C and by another thread; the last has no end of line."""
    program = """
import ctypes, os, sys, threading
from rayseg import quiet
write = ctypes.CDLL(None).dprintf
sys.stderr.write("python before, ")
with quiet.unheard("sheep", "cow"):
    write(2, b"[I] a cow\\n")
    print("python within", file=sys.stderr)
    write(2, b"[E] a sheep from C\\n")
    write(2, b"[E] a goat from C\\n")
    thread = threading.Thread(target=os.write, args=(2, b"\\xff of a thread\\n"))
    thread.start()
    thread.join()
    os.write(2, b"two sheep\\nno end")
write(2, b", after: sheep\\n")
try:
    with quiet.unheard("sheep"):
        write(2, b"kept\\n")
        raise KeyError
except KeyError:
    write(2, b"raised\\n")
os.close(2)
with quiet.unheard("sheep"):
    print(len(os.listdir("/proc/self/fd")))
print(len(os.listdir("/proc/self/fd")))
"""
    environment = {"PYTHONPATH": f"{ROOT}/platform"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert done.stderr.splitlines() == [
        b"python before, python within",
        b"[E] a goat from C",
        b"\xff of a thread",
        b"no end, after: sheep",
        b"kept",
        b"raised",
    ]
    assert len(set(done.stdout.split())) == 1, "no descriptor is left open"


def test_tensorflow_greets_nobody_and_warns_all_the_same() -> None:
    program = """
import rayseg
import tensorflow as tf
tf.get_logger().warning("one warning")
import tensorflow.nn
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "platform", capture_output=True, check=True)
    assert [line for line in done.stderr.splitlines() if line] == [b"WARNING:tensorflow:one warning"]


def fail(config: Config) -> Result:
    """Fails as a store does, with the name of a file in the text, the cause's too."""
    try:
        storage.read(config.output)
    except FileNotFoundError as error:
        raise PermissionError(13, "Permission denied", config.output) from error
    raise AssertionError


def fail_in_a_task(config: Config) -> Result:
    """Fails as a task on a worker does, with the worker's traceback as text."""
    text = f"""ray::read() (pid=1, ip=127.0.0.1)
  File "/x/reading.py", line 3, in read
    raise ValueError(f"no number: {{value}}")
ValueError: no number: {NAME}
of {NAME}"""
    raise ray.exceptions.RayTaskError("read", text, ValueError(NAME)).as_instanceof_cause()


def fail_in_a_library(config: Config) -> Result:
    """Fails with a kind of ValueError whose text is not ours."""
    json.loads(f'"{NAME}')
    raise AssertionError


def fail_ourselves(config: Config) -> Result:
    """Fails with a text that is for the user."""
    with_text = {"__name__": "rayseg.training.trainer"}
    exec("def fail(): raise RuntimeError('train: MLflow does not answer')", with_text)
    with_text["fail"]()
    raise AssertionError


@pytest.mark.parametrize("failing", [fail, fail_in_a_task, fail_in_a_library])
def test_an_unforeseen_error_tells_where_but_no_text(capsys: pytest.CaptureFixture, tmp_path: Path, failing) -> None:
    with pytest.raises(SystemExit) as ended:
        job.run("train", Config, failing, ["--set", f"output={tmp_path}/{NAME}.dcm"])
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Zqxkv" not in told
    assert "Error" in told.splitlines()[-1]
    assert f"line {failing.__code__.co_firstlineno + 1}" in told or f"in {failing.__name__}" in told


def test_a_text_of_ours_is_told(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        job.run("train", Config, fail_ourselves, ["--set", "output=x"])
    assert capsys.readouterr().err.splitlines()[-1] == "RuntimeError: train: MLflow does not answer"


def test_a_layout_that_does_not_fit_shows_shapes_of_paths(caplog: pytest.LogCaptureFixture) -> None:
    class File:
        uri = ""

    paths = [f"images/{NAME}/7.dcm", f"masks/{NAME}/8.png", f"{NAME}.txt"]
    with pytest.raises(ValueError, match=r"as images/xxxxx\^xxxxx/0\.dcm; .* as masks/xxxxx\^xxxxx/0\.png"):
        list(plan(Layout("images", "masks"), ((path, File()) for path in paths), {}))
    assert "Zqxkv" not in caplog.text


def test_a_name_that_is_no_text_is_told_without_it(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    Path(f"{tmp_path}/{NAME}/\udcff.dcm").write_bytes(b"")
    with pytest.raises(ValueError, match="not UTF-8") as refused:
        list(storage.list_files(str(tmp_path)))
    assert "Zqxkv" not in str(refused.value)
