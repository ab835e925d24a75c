# `make train` and `make test` work on a fresh clone: they make their own environment in .venv first.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
# Bytecode is made at the end, by all cores: pip takes one, for half of the time of an installation.
PIP_ALL = --no-compile $(PIP_ARGS) -c constraints.txt
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
OPTIM ?= adamw
RUN := runs/llama_tiny_$(OPTIM)_0

# matplotlib would write into the home folder.
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test lint mutants bench loc clean

help:
	@echo 'make train   learn English on this CPU in minutes, then print text from the model'
	@echo 'make test    run all tests that need no GPU'
	@echo 'make lint    ruff and mypy'
	@echo 'make mutants break the source line by line: does each test notice? (minutes)'
	@echo 'make bench   speed and memory beside transformers; needs an NVIDIA GPU'
	@echo 'make setup   only make the environment in $(VENV) (the others do it by themselves)'
	@echo 'make loc     lines of code by folder'
	@echo 'make clean   remove caches and build leftovers; keeps $(VENV) and runs'
	@echo
	@echo 'OPTIM=...    the method that make train uses: galore_8bit, ...    (now $(OPTIM))'
	@echo 'ARGS=...     more arguments for train, test and bench: make train ARGS="steps=100"'
	@echo 'PYTHON=...   the Python >= 3.11 that makes $(VENV)                (now $(PYTHON))'
	@echo 'PIP_ARGS=... more arguments for pip; a machine without a GPU downloads less with'
	@echo '             PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'

setup: $(READY)

# The stamp is written last and removed first: an environment that was interrupted half-way is made anew, and one that
# is only older than the two files is brought up to date in place.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no $(PYTHON) here; install Python 3.11 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $$($(PYTHON) --version) is too old; name Python 3.11 or later: make PYTHON=python3.11" >&2; exit 2; }
	@if [ -e $@ ]; then rm $@; else \
	  echo "[1/3] making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "make: $(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }; fi
	@echo "[2/3] installing torch: a download of 200 MB (CPU) to 3 GB (CUDA), some minutes"
	@command -v nvidia-smi >/dev/null || echo "      (no NVIDIA GPU here: see PIP_ARGS in 'make help' for the smaller download)"
	@$(PY) -m pip install $(PIP_ALL) torch
	@echo "[3/3] installing the other packages: about 500 MB, a few minutes"
	@$(PY) -m pip install --quiet $(PIP_ALL) -e '.[test]'
	@$(PY) -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # some files are templates
	@$(PY) -c 'import torch; print("ready: torch", torch.__version__, "on a GPU" if torch.cuda.is_available() else "on the CPU")'
	@touch $@

train: $(READY)
	$(PY) train.py experiment=quickstart optim=$(OPTIM) $(ARGS)
	$(PY) -m llama.generate $(RUN) "The Congress should"

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

mutants: $(READY)
	$(PY) tests/mutants.py $(ARGS)

bench: $(READY)
	@echo 'The benchmark needs one NVIDIA GPU and compares with transformers on the same card.'
	$(PY) bench.py $(ARGS)

loc:
	@for d in train.py configs data kernels llama optim tests; do \
	  if [ -e $$d ]; then printf '%6d  %s\n' $$(find $$d -name '*.py' -exec cat {} + | wc -l) $$d; fi; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
