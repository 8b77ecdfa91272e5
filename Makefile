# Two commands matter: `make demo` and `make test`. Everything happens in .venv and demo/ of this folder.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Real data for the demo: a folder with images/, masks/ and perhaps groups.csv, and a folder of DICOM files to segment.
DATA ?=
ARCHIVE ?=
RECIPE ?= $(if $(DATA),configs/demo-mri.yaml,configs/demo.yaml)
SET ?=
SUITE ?= data
export MLFLOW_DISABLE_TELEMETRY = true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION = false
export DO_NOT_TRACK = true
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: setup demo test lint bench mlflow serve lock clean

setup: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Python 3.11 is needed; say which with make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python -m jobs.demo --config $(RECIPE) \
		$(if $(DATA),--set demo.data=$(DATA)) $(if $(ARCHIVE),--set demo.archive=$(ARCHIVE)) $(foreach s,$(SET),--set $(s))

test: setup lint
	$(BIN)/python -m pytest tests/unit --numprocesses 2
	$(BIN)/python -m pytest tests/ray tests/e2e

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m jobs.benchmark --set suite=$(SUITE) $(foreach s,$(SET),--set $(s))

mlflow: setup
	$(BIN)/mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///demo/mlflow.db --workers 1

serve: setup
	$(BIN)/python -m jobs.serve --config $(RECIPE)

lock: setup
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra demo --extra postgresql --extra dev --generate-hashes --python-version 3.11 \
		--no-header --no-annotate --quiet --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra gpu --generate-hashes --python-version 3.11 \
		--no-header --no-annotate --quiet --output-file requirements-gpu.lock

clean:
	rm -rf demo build dist
