"""Train: prepared set to a registered model, data-parallel on Ray Train workers."""

from rayseg import job
from rayseg.training.trainer import TrainConfig, fit


def main() -> None:
    """Runs the job of the command line."""
    job.run("train", TrainConfig, fit)


if __name__ == "__main__":
    main()
