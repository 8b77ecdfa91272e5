"""Serve: the registered model over HTTP on Ray Serve."""

from rayseg import job
from serving.app import ServeConfig, run


def main() -> None:
    """Runs the job of the command line."""
    job.run("serve", ServeConfig, run)


if __name__ == "__main__":
    main()
