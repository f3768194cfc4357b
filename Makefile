# Everything a newcomer runs. `make demo` and `make test` each set up .venv first, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
OLDEST := .venv-oldest/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: venv demo test faults oldest results lint bench clean

venv: .venv/installed

# A new pip, whose resolver is done in seconds where that of Python 3.11's own first releases tries for minutes. Then
# torch, pinned: an open range would take gigabytes of CUDA wheels on a machine without a GPU.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "limbeck needs Python 3.11 or later; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	mkdir -p .venv/sources/limbeck
	ln -sfn $(foreach part,diffusion pipeline storage_schemas trainer,../../../$(part)) .venv/sources/limbeck/
	touch $@

# The main job, as the README shows it: Ray with 2 workers solves 16,384 trajectories of the built-in teacher, the
# trainer fits a 1-step student by knowledge distillation and an 8, 4, 2, 1-step one by progressive distillation, and
# both are held against the teacher's own solvers. Everything lands in runs/demo/; a second call finds it done.
demo: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" ./tests/end_to_end/demo.sh runs/demo

# On two cores at once, a file of tests after the other on each.
test: lint $(BIN)/kubectl
	$(BIN)/python -m pytest -m "not faults and not gpu" --numprocesses 2 --dist loadfile

# Renders the overlays of deploy/ in its tests.
$(BIN)/kubectl: .venv/installed
	$(BIN)/python -m tests.deploy.kubectl

faults: venv
	$(BIN)/python -m pytest -m "faults" --timeout 900 --numprocesses 2 --dist loadfile --durations 25

# The quick tests of the programs with the oldest versions that pyproject.toml allows, but for torch, which is the pinned
# one: an older one comes with gigabytes of CUDA. Then those of S3, with s3 or bucket in their names, since s3fs takes a
# newer fsspec. Not in .ci/run, whose hour is full: it takes 2 GB and a quarter of an hour.
oldest: .venv-oldest/installed
	$(OLDEST)/python -m pip uninstall --quiet --yes s3fs
	$(OLDEST)/python -m pip install --quiet --constraint tests/oldest.txt fsspec
	$(OLDEST)/python -m pytest -m "not faults and not gpu" -k "not s3 and not bucket" \
	    tests/storage_schemas tests/diffusion tests/trainer tests/pipeline
	$(OLDEST)/python -m pip install --quiet "$$(grep ^s3fs tests/oldest.txt)"
	$(OLDEST)/python -m pytest -m "not faults and not gpu" -k "s3 or bucket" tests/storage_schemas tests/trainer

.venv-oldest/installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --upgrade pip
	$(OLDEST)/python -m pip install --quiet --constraint tests/oldest.txt --editable ".[pipeline,trainer,diffusers]" \
	    lightning "moto[server]" pytest pytest-timeout hypothesis scipy
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

results: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" ./tests/end_to_end/results.sh runs/results

bench: venv
	-$(BIN)/python -m tests.benchmarks.peers
	$(BIN)/python -m tests.benchmarks.stream
	$(BIN)/python -m tests.benchmarks.waiting
	$(BIN)/python -m tests.benchmarks.generation
	$(BIN)/python -m tests.benchmarks.planning

clean:
	rm -rf .venv .venv-oldest .venv-peers runs build *.egg-info
