# samq's front door: `make help` lists the targets.
#
# Everything is installed into .venv with the versions of constraints.txt, and only when .venv is missing or
# pyproject.toml or constraints.txt has changed (the files .venv/.samq-* remember that).
#
#   PYTHON     the interpreter that makes .venv: 3.10, 3.11 or 3.12     make demo PYTHON=python3.12
#   PIP_FLAGS  added to every pip install. On Linux pip takes torch's CUDA build, which is several gigabytes;
#              the CPU build is enough for `make demo` and `make test`:
#                  make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS       added to the target's main command     make demo ARGS=--help     make test ARGS="-k grids -x"

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

# Triton for the tests: pytriton's binaries, with the numpy that they are built for, apart from all other packages.
# They run on Linux x86_64 with glibc 2.35 or newer.
TRITON_SERVER = nvidia-pytriton==0.7.0 numpy==1.26.4

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint constraints clean

help:
	@echo "make demo         install samq, then quantize the demo model (int4_svdquant) into out/demo"
	@echo "make test         install samq and its tools, then lint, type check and run the tests"
	@echo "make lint         the quick half of make test: ruff and mypy"
	@echo "make constraints  renew constraints.txt (needs uv)"
	@echo "make clean        remove .venv, out, build leftovers and caches"
	@echo "Variables PYTHON, PIP_FLAGS and ARGS: see the head of the Makefile."

demo: .venv/.samq-base
	$(BIN)/samq-export demo --output-dir out/demo $(ARGS)

# Quick failures first. pytest stays last: CI reads its closing line.
test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# mypy is judged with the stubs of the newest numpy and transformers, which Python 3.10 cannot have.
lint: .venv/.samq-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then echo $(BIN)/mypy && $(BIN)/mypy; \
	  else echo "mypy: not run on Python 3.10, types are checked on 3.11 and 3.12"; fi

# A .venv that still runs is kept (its packages are brought to the pins), a broken one is replaced.
.venv/.samq-venv:
	@command -v "$(PYTHON)" >/dev/null \
	  || { echo "samq: no '$(PYTHON)' here: name a Python 3.10, 3.11 or 3.12, as in 'make PYTHON=python3.12 ...'"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
	  || { echo "samq: needs Python 3.10, 3.11 or 3.12, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1): name another, as in 'make PYTHON=python3.12 ...'"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "samq: '$(PYTHON)' has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@touch $@

# setuptools comes first, pinned, and builds samq in .venv itself: a build environment of pip's own would
# take the newest setuptools of the day.
.venv/.samq-base: .venv/.samq-venv pyproject.toml constraints.txt
	@echo "samq: installing into .venv (a few minutes the first time)"
	@$(INSTALL) pip setuptools
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

.venv/.samq-dev: .venv/.samq-base
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) --only-binary :all: --no-deps --upgrade \
	  --target .venv/triton $(TRITON_SERVER) || echo "samq: no Triton server for this machine; its tests are skipped"
	@touch $@

# The optional extras but `bench`, whose peers want an environment of their own, are resolved with the rest, so that
# each of them fits the pins, then left out. Pins that still fit are kept: ARGS=--upgrade renews them all,
# ARGS="--upgrade-package NAME" one.
RESOLVED = gpu tensorrt modelopt triton dev
UV_COMPILE = uv pip compile pyproject.toml --universal --python-version 3.10 \
	--upgrade-package torch==2.13.0 --no-annotate --no-header -q
constraints:
	@mkdir -p out
	cp constraints.txt out/constraints.new
	$(UV_COMPILE) $(RESOLVED:%=--extra %) $(ARGS) -o out/constraints.new >/dev/null
	$(UV_COMPILE) --extra dev -o out/constraints.new >/dev/null
	sed '/^[^#]/,$$d' constraints.txt | cat - out/constraints.new > out/constraints.txt
	mv out/constraints.txt constraints.txt && rm out/constraints.new

clean:
	rm -rf .venv out build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src calib quant export engines tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
