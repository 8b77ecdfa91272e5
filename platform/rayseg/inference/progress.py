"""How far an archive run is: in the terminal, as metrics of Ray and of its MLflow run, and in a file of its output."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from tqdm import tqdm

from rayseg import meters, storage
from rayseg.inference import ledger
from rayseg.inference.plan import objects
from rayseg.inference.series import STAGE
from rayseg.inference.watch import STEPS
from rayseg.tracking import runs
from rayseg.tracking.courier import Courier

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 10.0


class Progress:
    """Slices done with rate and time left, series, rejects, and what binds: the step that most of the time goes into.

    Use as a context manager; call `update` with the ledger rows of series that have ended. An MLflow that does not
    answer stops no run, nor does the run wait for it.
    """

    def __init__(self, series: int, slices: int, output: str, tracking_uri: str, run_id: str) -> None:
        self._file, self._tracking_uri, self._run_id = storage.join(output, ledger.PROGRESS), tracking_uri, run_id
        self._series, self._slices = series, slices
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._seconds = dict.fromkeys(STEPS, 0.0)
        self._began = self._told = time.monotonic()
        self._bar: tqdm[Any] | None = None
        self._stack = ExitStack()
        self._courier = Courier(self._tell_mlflow)

    def __enter__(self) -> "Progress":
        self._tell_file()
        self._stack.enter_context(self._courier)
        self._bar = self._stack.enter_context(tqdm(total=self._slices, desc="segment", unit=" slices", disable=None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell()
        self._stack.close()

    def update(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Counts series that have ended: rows of the ledger with their `rejects` beside."""
        for row in rows:
            self._counts.update({row["verdict"]: 1, "slices": row["slices"], "rejected_slices": row["rejected_slices"]})
            reasons = Counter(reject["reason"] for reject in row["rejects"])
            self._reasons += reasons
            meters.add("rayseg_series_total", verdict=row["verdict"])
            meters.slices(STAGE, row["slices"], reasons)
            for step in STEPS:
                self._seconds[step] += row[f"{step}_s"]
                meters.add("rayseg_seconds_total", row[f"{step}_s"], stage=STAGE, step=step)
        assert self._bar is not None
        self._bar.set_postfix_str(self._line(), refresh=False)
        self._bar.update(sum(map(objects, rows)))
        meters.show("rayseg_waiting", self._slices - self._bar.n, stage=STAGE)
        if time.monotonic() - self._told >= _TELL_EVERY_S:
            self._tell()

    def _line(self) -> str:
        done = self._counts["segmented"] + self._counts["rejected"]
        binds = max(self._seconds, key=self._seconds.__getitem__)
        share = self._seconds[binds] / (sum(self._seconds.values()) or 1.0)
        rejected = f", {self._counts['rejected_slices']} slices rejected" if self._counts["rejected_slices"] else ""
        return f"{done}/{self._series} series{rejected}, {binds} takes {share:.0%}"

    def _tell(self) -> None:
        self._told = time.monotonic()
        seconds = self._told - self._began
        done = self._counts["slices"] + self._counts["rejected_slices"]
        logger.info("segment: %d of %d slices, %s", done, self._slices, self._line())
        self._tell_file()
        values = {
            "segment/series": self._counts["segmented"],
            "segment/series_rejected": self._counts["rejected"],
            "segment/slices": self._counts["slices"],
            "segment/slices_rejected": self._counts["rejected_slices"],
            "segment/slices_per_second": done / seconds,
            **{f"segment/{step}_seconds": value for step, value in self._seconds.items()},
        }
        self._courier.hand_over((int(seconds), values))

    def _tell_mlflow(self, news: tuple[int, dict[str, float]]) -> bool:
        step, values = news
        try:
            runs.log_metrics(self._tracking_uri, self._run_id, values, step=step)
        except runs.UnreachableError as error:
            logger.warning("MLflow was not told how far the run is: %s", error)
            return False
        return True

    def _tell_file(self) -> None:
        done = self._counts["slices"] + self._counts["rejected_slices"]
        rate = done / (time.monotonic() - self._began) if done else 0.0
        figures = {
            "series": self._counts["segmented"] + self._counts["rejected"],
            "series_total": self._series,
            "slices": done,
            "slices_total": self._slices,
            "slices_per_second": rate,
            "eta_s": (self._slices - done) / rate if rate else None,
            "reasons": dict(sorted(self._reasons.items())),
            "run_id": self._run_id,
        }
        try:
            storage.write_json(self._file, figures)
        except OSError as error:
            logger.warning("the output was not told how far the run is: %s", type(error).__name__)
