"""The registered model over HTTP, on Ray Serve."""

import os

# Before Serve is imported, which reads them then, and for the replicas of a private cluster, which get this process's
# environment. Nothing of ours computes in an event loop, so it need not be kept apart from Serve's own: to go from one
# to the other and back costs a request milliseconds.
os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
