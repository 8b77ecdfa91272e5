"""The Ray cluster that a job runs on: the one it was submitted to, or a private one on this machine."""

import logging
import os

import ray
import ray.data

logger = logging.getLogger(__name__)

# A laptop's object store: stages stream blocks of a few MiB, so a share of memory (Ray's default 30 %) is not needed.
LOCAL_OBJECT_STORE_BYTES = 512 * 1024 * 1024


def connect() -> None:
    """Joins the cluster named by RAY_ADDRESS (`ray job submit` sets it), else starts one on loopback for this process.

    The private cluster asks for a token that only this process and its children know (made when `rayseg` is imported),
    runs no dashboard and ends with the process. It has at least two logical CPUs, so that two training workers fit on
    any machine.
    """
    quiet()
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    # Nobody takes this machine away with a notice, and the process that would wait for one costs seconds to start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 2),
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": f"{__name__}.{hush.__name__}"},
    )
    logger.info("started a Ray cluster on this machine with %s CPUs", ray.cluster_resources().get("CPU"))


def quiet() -> None:
    """In this process Ray Data does not tell how far its operators are: stages show their own progress, in rows."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def hush() -> None:
    """Set-up hook of the private cluster's workers: Ray Train warns each second that there is no dashboard."""
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)
