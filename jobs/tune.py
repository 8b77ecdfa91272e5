"""Tune: a sweep over training runs, to the best one as a recipe and a registered model."""

from rayseg import job
from rayseg.training.tune import TuneConfig, tune


def main() -> None:
    """Runs the job of the command line; it reads the sections `train` and `tune`."""
    job.run("tune", TuneConfig, tune, whole_recipe=True)


if __name__ == "__main__":
    main()
