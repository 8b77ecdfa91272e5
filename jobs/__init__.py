"""One thin entry point a stage: `python -m jobs.NAME --config RECIPE.yaml [--set key=value]`."""
