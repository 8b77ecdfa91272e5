"""Benchmark: measures a suite on this machine; a table on standard error, the figures as JSON."""

from rayseg import job
from rayseg.benchmark.suite import BenchmarkConfig, benchmark


def main() -> None:
    """Runs the job of the command line."""
    job.run("benchmark", BenchmarkConfig, benchmark)


if __name__ == "__main__":
    main()
