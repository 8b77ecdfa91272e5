"""Promote: give a model version the alias, when its scores allow it."""

from rayseg import job
from rayseg.evaluation.promote import PromoteConfig, promote


def main() -> None:
    """Runs the job of the command line."""
    job.run("promote", PromoteConfig, promote)


if __name__ == "__main__":
    main()
