# Two commands matter: `make demo` and `make test`. Everything happens in .venv and demo/ of this folder.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Real data for the demo: a folder with images/, masks/ and perhaps groups.csv, and a folder of DICOM files to segment.
DATA ?=
ARCHIVE ?=
RECIPE ?= $(if $(DATA),configs/demo-mri.yaml,configs/demo.yaml)
SET ?=
SUITE ?= data
# Where the zip of a release will lie, for its serve.yaml.
RELEASES ?= s3://YOUR-BUCKET/releases
export MLFLOW_DISABLE_TELEMETRY = true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION = false
export DO_NOT_TRACK = true
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: setup demo test test-slow lint docs bench mlflow serve release audit lock clean

setup: .venv/.installed

.venv/.installed: requirements.lock requirements-viewer.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Python 3.11 is needed; say which with make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	# The lock has all there is, but for what `tool.uv` in pyproject.toml leaves out.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements.lock
	# The page's viewer, out of a Jupyter widget: without Jupyter, which the rest of that package is for.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-viewer.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python -m jobs.demo --config $(RECIPE) \
		$(if $(DATA),--set demo.data=$(DATA)) $(if $(ARCHIVE),--set demo.archive=$(ARCHIVE)) $(foreach s,$(SET),--set $(s))

test: setup lint
	$(BIN)/python -m pytest tests/unit --numprocesses 2
	$(BIN)/python -m pytest tests/ray tests/e2e -m "not slow"

# What takes more than half a minute each: whole ways, hosts and workers that are killed. CI runs it, too.
test-slow: setup
	$(BIN)/python -m pytest tests/ray tests/e2e -m slow

lint: setup docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site, in build/docs: without a network, and a warning (a link that leads nowhere) fails.
docs: setup
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --nitpicky --quiet docs build/docs

bench: setup
	$(BIN)/python -m jobs.benchmark --set suite=$(SUITE) $(foreach s,$(SET),--set $(s))

mlflow: setup
	$(BIN)/mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///demo/mlflow.db --workers 1

serve: setup
	$(BIN)/python -m jobs.serve --config $(RECIPE)

release: setup
	$(BIN)/python -m rayseg.release --output dist --releases $(RELEASES)

# Asks PyPI for known vulnerabilities of what the locks pin; what it cannot be asked about fails, too.
audit: setup
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements-gpu.lock

lock: setup
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra demo --extra postgresql --extra dev --generate-hashes --python-version 3.11 \
		--no-header --no-annotate --quiet --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra gpu --generate-hashes --python-version 3.11 \
		--no-header --no-annotate --quiet --output-file requirements-gpu.lock
	echo ipyniivue==2.4.4 | $(BIN)/uv pip compile - --no-deps --generate-hashes --python-version 3.11 \
		--no-header --no-annotate --quiet --output-file requirements-viewer.lock

clean:
	rm -rf demo build dist
