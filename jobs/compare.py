"""Compare: registered models on the same cases, each with the first one."""

from rayseg import job
from rayseg.evaluation.compare import CompareConfig, compare


def main() -> None:
    """Runs the job of the command line."""
    job.run("compare", CompareConfig, compare)


if __name__ == "__main__":
    main()
