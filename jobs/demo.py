"""Demo: all jobs one after the other, from an object store of its own to a report."""

from rayseg import job
from rayseg.demo.pipeline import DemoConfig, demo


def main() -> None:
    """Runs the job of the command line."""
    job.run("demo", DemoConfig, demo, whole_recipe=True)


if __name__ == "__main__":
    main()
