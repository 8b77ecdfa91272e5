"""Segment: a model over a whole archive, one DICOM SEG per series and a ledger."""

from rayseg import job
from rayseg.inference.archive import SegmentConfig, segment


def main() -> None:
    """Runs the job of the command line."""
    job.run("segment", SegmentConfig, segment)


if __name__ == "__main__":
    main()
