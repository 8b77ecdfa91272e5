"""Prepare: manifest to prepared set, fixed-size images and masks split by patient."""

from rayseg import job
from rayseg.data.prepare import PrepareConfig, prepare


def main() -> None:
    """Runs the job of the command line."""
    job.run("prepare", PrepareConfig, prepare)


if __name__ == "__main__":
    main()
