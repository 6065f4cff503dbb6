# make quickstart   the main job on a small model: split, train, merge, compare
# make test         everything that can be tested on this machine
# make check        format, lint, types
# PIP_ARGS is passed to pip, for example to name an index that has CPU builds of torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

export TOKENIZERS_PARALLELISM := false

# torch_npu must be of torch's own release. It gets a folder of its own: without CANN, torch and
# transformers fail where they find it among the packages.
TORCH_NPU ?= torch_npu==2.13.0

.PHONY: venv npu-site quickstart test test-real check format clean

venv: $(VENV)/.dev $(VENV)/npu-site

npu-site: $(VENV)/npu-site

$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10; say make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.base pyproject.toml constraints.txt
	$(INSTALL) -e '.[data,report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.run

$(VENV)/npu-site: $(VENV)/.base constraints.txt
	rm -rf $@ $@.new
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps \
	  --target $@.new '$(TORCH_NPU)'
	mv $@.new $@

quickstart: $(VENV)/.run
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev $(VENV)/npu-site
	$(BIN)/python -m pytest

test-real: $(VENV)/.dev
	$(BIN)/python -m pytest -m real

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) quickstart .pytest_cache .ruff_cache .hypothesis
