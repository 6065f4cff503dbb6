# make quickstart   the main job on a small model: split, train, merge, compare
# make test         everything that can be tested on this machine
# make test-compat  what depends on megatron-core, with the oldest release that is supported
# make check        format, lint, types
# make browser      Chromium, without which the tests of the board's page are skipped
# PIP_ARGS is passed to pip, for example to name an index that has CPU builds of torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

export TOKENIZERS_PARALLELISM := false

# pytest-xdist's processes; each also starts up to four ranks, which wait for each other a lot.
TEST_PROCESSES ?= 2
PYTEST_ARGS := -n $(TEST_PROCESSES) --dist loadgroup --durations 30

# torch_npu must be of torch's own release. It gets a folder of its own: without CANN, torch and
# transformers fail where they find it among the packages.
TORCH_NPU ?= torch_npu==2.13.0

# The oldest megatron-core that is supported, in an environment that takes all else from $(VENV).
# Without what 0.12 requires besides torch (Flask, wandb, nltk and more, 430 MB): it never imports it.
COMPAT := .venv-compat
SITE := import sysconfig; site = sysconfig.get_path("purelib")
# What does not depend on megatron-core's release; whatever is not listed runs with both.
WITHOUT_MEGATRON := tests/npusim tests/npu tests/ops tests/real tests/pasted tests/migration \
  tests/checkpoint/test_*.py tests/checkpoint/formats/test_[!t]*.py \
  tests/checkpoint/formats/test_torch_pt.py \
  tests/data/test_preprocess.py tests/data/test_inputs.py tests/data/test_tokenization.py \
  tests/data/test_chat_formats.py tests/data/test_chat_rendering.py tests/test_*.py \
  tests/finetuning/test_deepspeed.py \
  tests/alignment/test_compare.py tests/alignment/test_dumps.py tests/alignment/test_statistics.py \
  tests/distributed/test_harness.py tests/distributed/test_train_job.py \
  tests/distributed/test_failures.py tests/distributed/test_pairs.py tests/training/test_killed_runs.py \
  tests/benchmark/test_attention.py tests/benchmark/test_checkpoint.py \
  tests/benchmark/test_energy.py tests/planning/test_planning.py \
  tests/runtime/test_power*.py tests/telemetry/test_energy.py

.PHONY: venv npu-site compat-venv browser quickstart test test-compat test-real test-npu check format clean

venv: $(VENV)/.dev $(VENV)/npu-site

npu-site: $(VENV)/npu-site

$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10; say make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.base pyproject.toml constraints.txt
	$(INSTALL) -e '.[board,data,report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.run

$(VENV)/npu-site: $(VENV)/.base constraints.txt
	rm -rf $@ $@.new
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps \
	  --target $@.new '$(TORCH_NPU)'
	mv $@.new $@

compat-venv: $(COMPAT)/.dev

$(COMPAT)/.dev: $(VENV)/.dev constraints-compat.txt
	rm -rf $(COMPAT)
	$(BIN)/python -m venv --without-pip $(COMPAT)
	$(BIN)/python -c '$(SITE); print(f"import site; site.addsitedir({site!r})")' \
	  > "$$($(COMPAT)/bin/python -c '$(SITE); print(site)')/venv.pth"
	$(BIN)/python -m pip --python $(COMPAT)/bin/python install -q --disable-pip-version-check \
	  $(PIP_ARGS) --no-deps -r constraints-compat.txt
	@touch $@

# Debian's Chromium, for tests/board/test_browser.py, which Playwright drives; needs root where it is
# not there yet.
browser:
	@command -v chromium > /dev/null || { apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends chromium fonts-noto-cjk; }

quickstart: $(VENV)/.run
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev $(VENV)/npu-site
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-compat: $(COMPAT)/.dev
	$(COMPAT)/bin/python -m pytest $(PYTEST_ARGS) -o cache_dir=$(COMPAT)/.pytest_cache \
	  $(foreach path,$(WITHOUT_MEGATRON),'--ignore-glob=$(path)')

test-real: $(VENV)/.dev
	$(BIN)/python -m pytest -m real

# On a machine with Ascend NPUs, by the Python that torch_npu is installed for; see docs/npu.md.
NPU_PYTHON ?= python3

test-npu:
	$(NPU_PYTHON) -m pytest tests/npu

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) $(COMPAT) quickstart .pytest_cache .ruff_cache .hypothesis
