"""The deployment that holds the model: slices of concurrent requests share its forward batches."""

import asyncio
import logging
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Geometry
from rayseg.records import Reject

logger = logging.getLogger(__name__)

# Ray's access log writes the request id, which a client may choose: it could be a name.
LOGGING = LoggingConfig(enable_access_log=False)


@dataclass(frozen=True)
class ModelInfo:
    """What answers say about the model that made them."""

    name: str
    version: str
    alias: str | None  # the one that was asked for, where the model was asked for by alias
    digest: str
    run_id: str
    labels: tuple[str, ...]  # foreground classes; value `i + 1` of a mask is `labels[i]`
    preprocess: Preprocess
    threshold: float


@dataclass(frozen=True)
class Segmented:
    """A slice's mask: uint8 class indices (rows, columns) on the source grid."""

    mask: np.ndarray
    geometry: Geometry | None  # None for an image file
    model: ModelInfo
    batch_size: int  # slices that shared the forward pass
    forward_ms: float  # of the whole batch


@dataclass(frozen=True)
class Health:
    """Outcome of running the bundle's example: `matches` says whether its mask is the recorded one."""

    model: ModelInfo
    matches: bool
    seconds: float


class ModelReplica:
    """Loads one registered version and segments batches in a thread of its own, off the event loop."""

    def __init__(
        self, *, tracking_uri: str, model_uri: str, alias: str | None, max_batch_size: int, batch_wait_ms: float
    ) -> None:
        # Here and not above: the ingress imports this module too, and needs neither TensorFlow nor MLflow.
        from rayseg.inference.predictor import Predictor, limit_threads
        from rayseg.tracking import bundle, registry

        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        limit_threads(max(1, int(cpus)))
        with tempfile.TemporaryDirectory() as cache:
            bundle_dir, version = registry.fetch(tracking_uri, model_uri, cache)
            loaded = bundle.load(bundle_dir)
            self._example_sha256 = bundle.describe(bundle_dir)["example_mask_sha256"]
        self._mask_sha256 = bundle.mask_sha256
        self._predictor = Predictor(loaded)
        self._info = ModelInfo(
            name=version.name,
            version=version.version,
            alias=alias,
            digest=loaded.digest,
            run_id=version.run_id,
            labels=loaded.labels.names,
            preprocess=loaded.preprocess,
            threshold=loaded.threshold,
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.segment.set_max_batch_size(max_batch_size)
        self.segment.set_batch_wait_timeout_s(batch_wait_ms / 1000)
        logger.info("model %s version %s is ready", version.name, version.version)

    @serve.batch
    async def segment(self, bodies: Sequence[bytes | None]) -> list[Segmented | Reject]:
        """One request's bytes to its mask or the reason there is none; called singly, run in batches.

        None stands for the bundle's example, which is segmented whatever the model looks at beside a slice.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, bodies)

    async def describe(self) -> ModelInfo:
        """The model in use."""
        return self._info

    async def check(self) -> Health:
        """Runs the bundle's example the way that requests go, queue and batch included."""
        started = time.perf_counter()
        result = await self.segment(None)
        matches = isinstance(result, Segmented) and self._mask_sha256(result.mask) == self._example_sha256
        return Health(model=self._info, matches=matches, seconds=time.perf_counter() - started)

    def _forward(self, bodies: Sequence[bytes | None]) -> list[Segmented | Reject]:
        started = time.perf_counter()
        results = [
            self._predictor.segment_example() if body is None else self._predictor.segment([body])[0] for body in bodies
        ]
        forward_ms = 1000 * (time.perf_counter() - started)
        return [
            result
            if isinstance(result, Reject)
            else Segmented(
                mask=result.mask,
                geometry=result.slice.header.geometry if result.slice.header else None,
                model=self._info,
                batch_size=len(bodies),
                forward_ms=forward_ms,
            )
            for result in results
        ]


Model = serve.deployment(name="model", logging_config=LOGGING)(ModelReplica)
