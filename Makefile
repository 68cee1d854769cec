# Every target installs what it needs. PYTHON selects the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
FLEET_VENV := .venv-fleet
LOCK_VENV := .venv-lock
BIN := $(VENV)/bin
EXTRAS := cpu,export,openvino,parquet,quantize,report,rtx,serve,structured,video
comma := ,
JOBS ?= 2
BENCH ?= work/bench-peers
# ONNX Runtime and torch would each use all cores. One thread each lets JOBS tests run in parallel.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test slow fleet fuzz gpu-acceptance bench-peers lint format wheel lock clean help

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(DEMO_VENV)/ready ## Export the demo model and ask it about images (no torch)
	@$(DEMO_VENV)/bin/internvl-edge demo

test: $(VENV)/ready ## Run the fast tests
	$(BIN)/pytest -n $(JOBS) -m "not slow"

slow: $(VENV)/ready ## Run the slow tests, which need minutes
	$(BIN)/pytest -n $(JOBS) -m slow

fleet: $(FLEET_VENV)/ready ## Run the tests of batches on a Ray cluster, which no other target installs (about 5 minutes)
	$(FLEET_VENV)/bin/pytest tests/batch/test_fleet.py tests/batch/test_fleet_run.py

fuzz: $(VENV)/ready ## Give every reader mutants, a million in all (about 10 minutes); repeat it to continue
	$(BIN)/python tests/fuzz.py work/fuzz

gpu-acceptance: $(VENV)/ready ## Build engines on this NVIDIA GPU, compare and time them (within 8 minutes; ARGS="--stage cuda")
	$(BIN)/python benchmarks/gpu_acceptance.py $(ARGS)

bench-peers: $(VENV)/ready ## Compare with llama.cpp, OpenVINO GenAI and others on this CPU, from nothing (BENCH=DIR, ARGS="--prepare")
	$(BIN)/python benchmarks/bench_peers.py $(BENCH) $(ARGS)

lint: $(VENV)/ready ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy internvl_edge
	$(BIN)/mypy --python-version 3.10 --no-warn-return-any internvl_edge

format: $(VENV)/ready ## Apply the code style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/ready ## Build the wheel, and check all four ways to install the package
	.ci/check_install $(BIN)/python

# Newest versions that pyproject.toml allows, for every Python and system. `make test` then uses and thereby tests them.
lock: ## Write constraints.txt, the versions that the checks use
	$(PYTHON) -m venv $(LOCK_VENV) && $(LOCK_VENV)/bin/pip install --quiet --upgrade "pip>=25.1" && $(LOCK_VENV)/bin/pip install --quiet --group lock && $(LOCK_VENV)/bin/uv pip compile pyproject.toml --universal --upgrade --python-version 3.11 --group dev $(patsubst %,--extra %,$(subst $(comma), ,$(EXTRAS))) --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --quiet --output-file constraints.txt

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev --editable ".[$(EXTRAS)]"
	touch $@

$(FLEET_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FLEET_VENV)
	$(FLEET_VENV)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(FLEET_VENV)/bin/pip install --quiet --constraint constraints.txt --group dev --editable ".[cpu,export,fleet,quantize]"
	touch $@

$(DEMO_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[cpu,export]"
	touch $@

clean: ## Remove environments and build outputs
	rm -rf $(VENV) $(DEMO_VENV) $(FLEET_VENV) $(LOCK_VENV) build dist work *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
