"""Evaluate: a registered model on one split, on the native grid."""

from rayseg import job
from rayseg.evaluation.evaluate import EvaluateConfig, evaluate


def main() -> None:
    """Runs the job of the command line."""
    job.run("evaluate", EvaluateConfig, evaluate)


if __name__ == "__main__":
    main()
