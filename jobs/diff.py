"""Diff: what changed between two runs of an archive, series by series."""

from rayseg import job
from rayseg.evaluation.diff import DiffConfig, diff


def main() -> None:
    """Runs the job of the command line."""
    job.run("diff", DiffConfig, diff)


if __name__ == "__main__":
    main()
