# Everything lives in .venv. uv builds it where uv is installed, else venv and pip do; both honour
# their usual settings (UV_DEFAULT_INDEX, PIP_INDEX_URL, ...). make PYTHON=/path/to/python picks
# another interpreter for it. Written for GNU make 3.81, which macOS ships.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
LOCK := requirements-dev.lock
# Asks for numpy below 2 and runs with numpy 2, so no resolver can have it beside the rest.
WITHOUT_DEPENDENCIES := pyctcdecode==0.5.0

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-all lint docs lock cuda clean

help:
	@echo "make demo      set up, then generate text from the embedded model"
	@echo "make test      set up, then lint, type-check and test, as continuous integration does"
	@echo "make check     the same in a minute: no sweeps, no processes, no real model"
	@echo "make test-all  the same with the tests that take long, or that only mlx-lm or chance breaks"
	@echo "make setup     set up .venv alone"
	@echo "make lint      set up, then lint and type-check"
	@echo "make docs      draw the map of docs/architecture.md, compare every architecture with mlx-lm,"
	@echo "               run the notebooks"
	@echo "make lock      resolve $(LOCK) again (needs uv)"
	@echo "make cuda      replace mlx's CPU backend in .venv by the one for CUDA 12"
	@echo "make clean     remove .venv and caches; fetched models stay"

setup: $(STAMP)
	@:

# Its own target, so that commands on .venv run only after it is complete.
$(STAMP): pyproject.toml $(LOCK)
	@rm -f $@
	@set -e; \
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      python="$$candidate"; break; \
	    fi; \
	  done; \
	fi; \
	if command -v uv >/dev/null 2>&1; then \
	  [ -x $(BIN)/python ] || uv venv --quiet --clear --python "$${python:-3.12}" $(VENV); \
	  uv pip install --python $(BIN)/python --requirement $(LOCK); \
	  uv pip install --python $(BIN)/python --quiet --no-deps --editable . $(WITHOUT_DEPENDENCIES); \
	else \
	  if [ -z "$$python" ]; then \
	    echo "make: no Python >= 3.11 found (tried python3, python3.11 to python3.14);" \
	      "install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; \
	  fi; \
	  if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    "$$python" -m venv --clear $(VENV) || { \
	      echo "make: $$python cannot make virtual environments; install its venv module" \
	        "(Debian: apt install python3-venv), or uv" >&2; exit 1; }; \
	  fi; \
	  echo "Installing into $(VENV) (a minute or two) ..."; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts \
	    --requirement $(LOCK); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . \
	    $(WITHOUT_DEPENDENCIES); \
	fi
	@touch $@

demo: setup
	$(BIN)/tempo-mlx generate "Once upon a time, there was a" --threshold 1.0 --max-tokens 12
	$(BIN)/tempo-mlx generate "Once upon a time, there was a" --threshold 0.1 --max-tokens 12

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A group of tests is what one architecture is tested for; its tiny model is made once.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

check: lint
	$(PYTEST) -m "not slow and not thorough" tests/unit

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

docs: setup
	$(BIN)/python -m tests.rooms
	$(BIN)/python -m tests.architectures
	$(BIN)/python -m tests.notebooks

lock:
	@command -v uv >/dev/null 2>&1 || { echo "make: lock needs uv (pip install uv)" >&2; exit 1; }
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --upgrade \
	  --custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links \
	  --output-file $(LOCK) pyproject.toml

# Both backends install mlx/lib/libmlx.so, so the CPU's must go before CUDA's comes. To be done again
# after a set-up that brought the CPU's back.
CUDA := $(BIN)/python -c "from importlib.metadata import version; print('mlx[cuda12]==' + version('mlx'))"
cuda: setup
	@set -e; backend="$$($(CUDA))"; \
	if command -v uv >/dev/null 2>&1; then \
	  uv pip uninstall --python $(BIN)/python mlx-cpu; \
	  uv pip install --python $(BIN)/python "$$backend"; \
	else \
	  $(BIN)/python -m pip uninstall --yes mlx-cpu; $(BIN)/python -m pip install "$$backend"; \
	fi

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
