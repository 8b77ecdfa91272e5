"""Grant: the GPU that Ray has given a task or actor, and no other one of its machine."""

import os

import ray


def keep_to_grant() -> bool:
    """Whether Ray has given this task or actor a GPU. Where it has not, it hides the machine's from it.

    To be called before anything looks for one: Ray leaves all of them visible to whoever asks for none.
    """
    granted = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
    if not granted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return granted
