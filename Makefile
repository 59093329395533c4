# make demo: train and evaluate the demo.  make demo-multiturn: the same for a game of several turns.
# make test: the whole test suite.  make docs: the documentation in site/.
# make fault-matrix: known faults and healthy runs under the doctor; goes on where it was stopped.
# All set up .venv first.
PYTHON ?= python3
SEED ?= 1
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Models are local; nothing may wait for a hub.
export HF_HUB_OFFLINE := 1

.PHONY: demo demo-multiturn test lint docs fault-matrix doctor-overhead setup clean
demo: CONFIG := configs/demo_cpu.yaml
demo-multiturn: CONFIG := configs/demo_multiturn.yaml
demo demo-multiturn: setup
	$(BIN)/grpo-lightning fit -c $(CONFIG) --seed_everything $(SEED) \
		--model.model "$$($(BIN)/python -m grpo_lightning.demo)"

test: lint
	$(BIN)/python -m grpo_lightning.demo
	@# Small models gain nothing from a second thread, but the suite from a second process; an engine needs all cores.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not vllm" -n logical --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest -m vllm

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fault-matrix: setup
	@# A miss stops nothing here: the last command writes all down, then fails.
	-$(BIN)/python -m benchmarks.faults matrix
	$(BIN)/python -m benchmarks.faults healthy
	$(BIN)/python -m benchmarks.faults write

doctor-overhead: setup
	$(BIN)/python -m benchmarks.faults overhead

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

setup: $(READY)

$(READY): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer as $(PYTHON); set one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# Without dependency resolution: vLLM's CPU build lists a torchvision whose only release on PyPI needs CUDA.
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -r requirements/cpu.txt || \
		{ echo "If torch+cpu was not found: it is in PyTorch's own package index for CPU builds."; \
		  echo "Name that index in PIP_EXTRA_INDEX_URL and run make again."; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $(READY)

clean:
	rm -rf $(VENV) build dist site *.egg-info
