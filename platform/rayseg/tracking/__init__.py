"""MLflow: runs, the model registry with its bundles, and the figures that runs keep."""
