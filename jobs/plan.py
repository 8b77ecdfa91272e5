"""Plan: manifest to recipe, what to prepare and how to train, in volumes of millimetres."""

from rayseg import job
from rayseg.planning.plan import PlanConfig, plan


def main() -> None:
    """Runs the job of the command line."""
    job.run("plan", PlanConfig, plan)


if __name__ == "__main__":
    main()
