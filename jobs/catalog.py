"""Catalog: object storage to manifest, one row per DICOM instance or image."""

from rayseg import job
from rayseg.data.catalog import CatalogConfig, catalog


def main() -> None:
    """Runs the job of the command line."""
    job.run("catalog", CatalogConfig, catalog)


if __name__ == "__main__":
    main()
