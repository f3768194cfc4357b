# Everything a newcomer runs. `make demo` and `make test` each set up .venv first, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: venv demo test faults results lint bench clean

venv: .venv/installed

# torch first and pinned: an open range would take gigabytes of CUDA wheels on a machine without a GPU.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "limbeck needs Python 3.11 or later; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	touch $@
