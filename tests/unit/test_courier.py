"""The courier, with an MLflow that answers late, never, or refuses, and one that accepts connections in silence."""

import socket
import threading
from pathlib import Path

import pytest

from rayseg.inference import progress
from rayseg.tracking import courier, runs
from rayseg.tracking.courier import Courier

PATIENCE_S = 30.0


class Mlflow:
    """Answers each call when the test says so, in the way that it says."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Semaphore(0), threading.Semaphore(0)
        self.calls: list[str] = []
        self.answers: list[bool | Exception] = []

    def tell(self, news: str) -> bool:
        self.calls.append(news)
        self.asked.release()
        assert self.answer.acquire(timeout=PATIENCE_S)
        given = self.answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    def await_call(self) -> None:
        assert self.asked.acquire(timeout=PATIENCE_S), "not called"

    def give(self, *answers: bool | Exception) -> None:
        self.answers += answers
        self.answer.release(len(answers))


@pytest.fixture
def mlflow() -> Mlflow:
    return Mlflow()


def test_nobody_waits_and_the_newest_is_brought(mlflow: Mlflow) -> None:
    with Courier(mlflow.tell) as boy:
        boy.hand_over("1")
        mlflow.await_call()
        for news in ("1 2", "1 2 3"):
            boy.hand_over(news)
        assert mlflow.calls == ["1"], "still on its way"
        mlflow.give(True, True)
        mlflow.await_call()
    assert mlflow.calls == ["1", "1 2 3"]


def test_what_is_not_taken_comes_again_with_the_next_or_at_the_end(mlflow: Mlflow) -> None:
    with Courier(mlflow.tell) as boy:
        boy.hand_over("1")
        mlflow.await_call()
        mlflow.give(False)
        boy.hand_over("1 2")
        mlflow.await_call()
        mlflow.give(False, True)
    assert mlflow.calls == ["1", "1 2", "1 2"]


def test_what_is_not_taken_comes_again_after_a_while(mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "AGAIN_S", 0.01)
    with Courier(mlflow.tell) as boy:
        boy.hand_over("1")
        mlflow.give(False, False, True)
        for _ in range(3):
            mlflow.await_call()
    assert mlflow.calls == ["1", "1", "1"], "and no more once it is taken"


def test_nothing_is_called_where_there_is_no_news(mlflow: Mlflow) -> None:
    with Courier(mlflow.tell):
        pass
    assert mlflow.calls == []


def test_an_mlflow_that_stays_silent_is_left(
    mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(courier, "LEAVE_S", 0.1)
    with Courier(mlflow.tell) as boy:
        boy.hand_over("1")
        mlflow.await_call()
    assert "does not answer" in caplog.text
    mlflow.give(True)


def refused(mlflow: Mlflow, later: list[str], error: Exception | None = None) -> None:
    with Courier(mlflow.tell) as boy:
        boy.hand_over("1")
        mlflow.give(ValueError("the run is gone"))
        boy._thread.join(PATIENCE_S)
        for news in later:
            boy.hand_over(news)
        if error is not None:
            raise error


def test_an_error_is_that_of_whoever_comes_next_or_of_the_end_and_hides_no_other(mlflow: Mlflow) -> None:
    with pytest.raises(ValueError, match="the run is gone"):
        refused(mlflow, ["1 2", "1 2 3"])
    with pytest.raises(ValueError, match="the run is gone"):
        refused(mlflow, [])
    with pytest.raises(KeyError):
        refused(mlflow, [], KeyError("the block's own"))
    assert mlflow.calls == ["1", "1", "1"]


def test_an_archive_run_does_not_wait_to_tell_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, told = threading.Event(), []

    def log_metrics(tracking_uri: str, run_id: str, values: dict[str, float], step: int) -> None:
        assert answer.wait(PATIENCE_S)
        told.append(values["segment/slices"])

    monkeypatch.setattr(runs, "log_metrics", log_metrics)
    monkeypatch.setattr(progress, "_TELL_EVERY_S", 0.0)
    row = {"verdict": "segmented", "slices": 2, "rejected_slices": 0, "rejects": []}
    row |= {f"{step}_s": 0.5 for step in progress.STEPS}
    with progress.Progress(3, 6, str(tmp_path), "http://silent", "run") as far:
        for _ in range(3):
            far.update([row])
        assert told == []
        answer.set()
    assert told[-1] == 6


def test_the_use_of_the_machine_is_logged_beside_a_run_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LEAVE_S", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        runs.system_metrics(f"http://127.0.0.1:{silent.getsockname()[1]}", "0" * 32),
    ):
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(4) == b"GET "
            while True:
                connection.setblocking(False)
                try:
                    assert connection.recv(4096), "the client has given up, so the block began late"
                except BlockingIOError:
                    break  # all is read, and the client waits
