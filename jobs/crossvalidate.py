"""Crossvalidate: every patient held out once; out-of-fold scores, and the folds' models as one."""

from rayseg import job
from rayseg.crossvalidation.crossvalidate import CrossValidateConfig, crossvalidate


def main() -> None:
    """Runs the job of the command line; it reads the sections `prepare`, `train` and `crossvalidate`."""
    job.run("crossvalidate", CrossValidateConfig, crossvalidate, whole_recipe=True)


if __name__ == "__main__":
    main()
