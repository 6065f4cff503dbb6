# make quickstart   the main job on a small model: split, train, merge, compare
# make test         what every commit runs: of each file so many tests that they take 4 seconds
# make test-all     everything that can be tested on this machine
# make test-compat  what depends on megatron-core, with the oldest and the newest release
# make test-torch   what depends on torch and torch_npu, with newer releases of both
# make test-pythons what needs no torch, with each Python
# make check        format, lint, types
# make browser      Chromium, without which the tests of the board's page are skipped
# PIP_ARGS is passed to pip, for example to name an index that has CPU builds of torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

export TOKENIZERS_PARALLELISM := false
export OMP_NUM_THREADS := 1

# pytest-xdist's processes; each also starts up to four ranks, which wait for each other a lot.
TEST_PROCESSES ?= 2
TEST_ARGS ?=
PYTEST_ARGS := -n $(TEST_PROCESSES) --dist loadgroup --durations 30

# torch_npu must be of torch's own release. It gets a folder of its own: without CANN, torch and
# transformers fail where they find it among the packages.
TORCH_NPU ?= torch_npu==2.13.0

# The oldest and the newest megatron-core that are supported; constraints.txt has the one between.
# Each has an environment of its own, which takes all else from $(VENV).
MEGATRON_CORE ?= 0.12.1 0.19.2
SITE := import sysconfig; site = sysconfig.get_path("purelib")
# What depends on megatron-core's release: of each file so many tests that they take 6 seconds; all of
# them with COMPAT_ARGS=--all.
WITH_MEGATRON := tests/distributed/test_releases.py tests/distributed/test_train.py \
  tests/distributed/test_parity.py tests/runtime/test_megatron_compat.py \
  tests/runtime/test_absent_triton.py tests/checkpoint/formats/test_torch_dist.py \
  tests/data/test_pretraining.py tests/data/test_helpers_cpp.py tests/training/test_schedule.py \
  tests/finetuning/test_lora.py tests/model/test_model.py \
  $(patsubst %,'tests/distributed/test_context_parallel.py::test_context_parallel[%]', \
  cp2-megatron-packed cp2-ulysses-documents cp2-kvallgather-dpo tp2-cp2 pp2-cp2-packed vpp2-cp2)
# Each layout is compared with transformers already.
WITH_MEGATRON += --deselect tests/distributed/test_train.py::test_losses_are_those_of_one_process
COMPAT_ARGS ?= --seconds 6

# A newer torch and the torch_npu of that release, in an environment of their own as above. On x86-64
# the package index has torch with CUDA only: 6 GB. CI leaves it out.
TORCH ?= 2.14.0
WITH_TORCH := tests/npusim tests/ops tests/model tests/runtime tests/checkpoint/formats

.PHONY: venv npu-site browser quickstart test test-all test-compat test-torch test-pythons test-real \
  test-npu test-cuda check format clean

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

# An environment that takes from $(VENV) what it does not have itself.
define BESIDE_VENV
rm -rf $(@D)
$(BIN)/python -m venv --without-pip $(@D)
$(BIN)/python -c '$(SITE); print(f"import site; site.addsitedir({site!r})")' \
  > "$$($(@D)/bin/python -c '$(SITE); print(site)')/venv.pth"
endef

# Releases from 0.17 on say that they need Python 3.12, and work with less. Without what a release
# requires besides torch (Flask, wandb, nltk and more, 430 MB): the project never imports it.
.PRECIOUS: .venv-compat-%/.dev .venv-torch-%/.dev
.venv-compat-%/.dev: $(VENV)/.dev
	$(BESIDE_VENV)
	$(BIN)/python -m pip --python $(@D)/bin/python install -q --disable-pip-version-check \
	  $(PIP_ARGS) --no-deps --ignore-requires-python 'megatron-core==$*'
	@touch $@

.venv-torch-%/.dev: $(VENV)/.dev
	$(BESIDE_VENV)
	$(BIN)/python -m pip --python $(@D)/bin/python install -q --disable-pip-version-check \
	  $(PIP_ARGS) 'torch==$*'
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps \
	  --target $(@D)/npu-site 'torch_npu==$*'
	@touch $@

# Debian's Chromium, for tests/board/test_browser.py, which Playwright drives; needs root where it is
# not there yet.
browser:
	@command -v chromium > /dev/null || { apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends chromium fonts-noto-cjk; }

quickstart: $(VENV)/.run
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev $(VENV)/npu-site
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TEST_ARGS)

test-all: $(VENV)/.dev $(VENV)/npu-site
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TEST_ARGS) --all

test-compat: $(addprefix test-compat-,$(MEGATRON_CORE))

test-compat-%: .venv-compat-%/.dev
	.venv-compat-$*/bin/python -m pytest $(PYTEST_ARGS) -o cache_dir=.venv-compat-$*/.pytest_cache \
	  $(COMPAT_ARGS) $(WITH_MEGATRON)

test-torch: test-torch-$(TORCH)

test-torch-%: .venv-torch-%/.dev
	.venv-torch-$*/bin/python -m pytest $(PYTEST_ARGS) -o cache_dir=.venv-torch-$*/.pytest_cache \
	  $(WITH_TORCH)

# What needs no torch, with each Python that is supported and found here.
test-pythons: $(VENV)/.base
	$(BIN)/python tests/pythons.py $(PIP_ARGS)

test-real: $(VENV)/.dev
	$(BIN)/python -m pytest -m real --all

# On a machine with Ascend NPUs, by the Python that torch_npu is installed for; see docs/npu.md.
NPU_PYTHON ?= python3

test-npu:
	$(NPU_PYTHON) -m pytest tests/npu

# The same on a machine with CUDA devices; nobody has run it yet.
CUDA_PYTHON ?= python3

test-cuda:
	HARDWARE=cuda $(CUDA_PYTHON) -m pytest tests/npu

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .venv-compat* .venv-torch-* .venv-python-* quickstart .pytest_cache .ruff_cache .hypothesis
