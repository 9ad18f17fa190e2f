# `make train` trains the bundled example at 4 bits; `make test` runs the tests. Both set up .venv
# first and do nothing again that is done already.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
# Where the CPU build of torch is looked for when pip, as configured here, does not find it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# A build with GPU support is gigabytes larger; only Linux wheels come in two kinds.
TORCH := torch==$(TORCH_VERSION)$(if $(filter Linux,$(shell uname -s)),+cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := kernels/CMakeLists.txt $(wildcard kernels/native/*.* kernels/native/*/* comm/native/*)
# Headers of the oneCCL that pyproject.toml pins. Alone they are small and leave the environment be;
# as a build requirement they would bring the library along a second time.
ONECCL := oneccl-cpu-devel==2021.16.2
HEADERS := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),build/oneccl/.ready)

.PHONY: train test lint sanitize format clean

train: $(VENV)/.ready
	$(BIN)/dqrm train --config census $(ARGS)

test: $(VENV)/.ready
	DQRM_REQUIRE_KERNELS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/typing && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) dqrm

# The compiled loops under the address and undefined behaviour sanitizers: three minutes to build on
# two cores, once, and two to run.
sanitize: $(VENV)/.ready
	$(BIN)/python .ci/sanitize.py $(ARGS)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dqrm needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch $(TORCH_VERSION), the CPU build (about half a minute)'
	@$(PIP) '$(TORCH)' || $(PIP) '$(TORCH)' --extra-index-url $(TORCH_INDEX)
	@touch $@

build/oneccl/.ready: | $(VENV)/.torch
	@$(PIP) --no-deps --upgrade --target build/oneccl $(ONECCL) || \
	  { mkdir -p build/oneccl; echo 'no $(ONECCL): dqrm is built without oneCCL, Gloo serves'; }
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml $(NATIVE) $(HEADERS)
	@echo 'building dqrm and installing what it needs (about a minute)'
	@DQRM_ONECCL_HEADERS=$(abspath build/oneccl/include) $(PIP) --editable '.[dev]'
	@touch $@
