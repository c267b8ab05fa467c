# `make serve` and `make test` work on a fresh clone: each installs what it needs first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ds-cp-installed
NATIVE := ds_cp/native/build.py $(wildcard ds_cp/native/src/*.cpp ds_cp/native/src/*.h)
MODEL_DIR := .cache/smollm2-135m-instruct
CONFIG ?= configs/quickstart.json
RANKS ?= 4
PROMPT ?= Gravity is
MAX_TOKENS ?= 64
PEERS ?=
BROWSER ?=
CONFORMANCE ?=
FAULTS ?=
CLUSTERS ?=
TORCH ?= auto
LOCK ?=
TOOLS_VENV := .cache/tools
TOOLS := $(TOOLS_VENV)/.installed
# deepspeed starts the "python" it was installed for, and mpirun the one on the PATH
WITH_VENV := PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)"

.PHONY: help install model serve generate test unit checks format bench bench-peers agents clients fuzz attacks \
	browser conformance faults clusters lock audit clean

help:
	@echo "make serve      four ranks serve a small model at http://127.0.0.1:8000"
	@echo "make test       all tests"
	@echo "make unit       the tests that start no ranks, about two minutes"
	@echo "make generate   one completion over four ranks; PROMPT='...' MAX_TOKENS=64"
	@echo "make bench-peers  ds_cp beside its peers, under 40 minutes on an idle machine; PEERS='--quick'"
	@echo "make clients    clients of OpenAI's protocol against the server; installs each by itself"
	@echo "make fuzz       20,000 generated requests; make attacks: attacks beside honest streams"
	@echo "make faults     requests in flight while workers are killed; FAULTS='--ranks 4 --faults 20'"
	@echo "make clusters   two hosts: Slurm, ssh hostfiles, pods, lost hosts, a cut network; as root, under ten"
	@echo "                minutes; what a machine lacks is skipped with its reason; CLUSTERS='-k slurm'"
	@echo "make agents     Claude Code, Codex, opencode and others, unmodified, against four ranks"
	@echo "make browser    the page in a real Chromium"
	@echo "make conformance  what is checked with software of others and is longer, under 25 minutes;"
	@echo "                CONFORMANCE='--only clients fuzz' or '--skip browser'"
	@echo "make lock       versions and hashes of all packages anew; LOCK=--upgrade for the newest that fit"
	@echo "make audit      known vulnerabilities of the packages, doubtful constructs of the code"
	@echo "make install | model | checks | format | bench | clean"

install: $(STAMP)

$(STAMP): setup.py constraints.txt $(wildcard locks/*.txt) locks/install.py $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ds_cp needs Python 3.11 or newer; try make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python locks/install.py --torch $(TORCH)
	@# pip compiles on one core; some packages ship files that are no Python of this version
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib ds_cp || true
	@touch $@

$(TOOLS): locks/tools.txt
	@test -x $(TOOLS_VENV)/bin/python || $(PYTHON) -m venv $(TOOLS_VENV)
	$(TOOLS_VENV)/bin/python locks/install.py --only tools
	@touch $@

lock: $(TOOLS)
	$(TOOLS_VENV)/bin/python locks/make.py $(LOCK)

audit: $(TOOLS)
	$(TOOLS_VENV)/bin/python locks/audit.py

model: $(MODEL_DIR)/config.json

$(MODEL_DIR)/config.json: | $(STAMP)
	$(BIN)/python -m ds_cp.model.smollm2 $(MODEL_DIR)

serve: install model
	@$(WITH_VENV) exec $(BIN)/deepspeed --num_gpus $(RANKS) launch/serve.py --config $(CONFIG)

generate: export DS_CP_PROMPT := $(PROMPT)
generate: install model
	@$(WITH_VENV) exec $(BIN)/deepspeed --num_gpus $(RANKS) launch/generate.py --config $(CONFIG) \
		--prompt "$$DS_CP_PROMPT" --max-tokens $(MAX_TOKENS)

test: unit model
	@$(WITH_VENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not quiet" \
		tests/launch tests/dist tests/attack tests/server
	@$(WITH_VENV) $(BIN)/python -m pytest -q -m quiet tests/attack

unit: install model
	@$(WITH_VENV) $(BIN)/python -m pytest -q -n 2 tests/unit

checks: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ds_cp
	$(BIN)/python -m pytest -q tests/unit/test_layering.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install model
	$(WITH_VENV) $(BIN)/torchrun --nproc-per-node 2 -m benchmarks.speed
	$(WITH_VENV) $(BIN)/python -m benchmarks.attention_error

bench-peers: install model
	$(WITH_VENV) $(BIN)/python -m benchmarks.peers $(PEERS)

clients: install model
	$(WITH_VENV) $(BIN)/python -m benchmarks.clients

agents: install model
	$(WITH_VENV) $(BIN)/python -m benchmarks.agents

fuzz: install model
	$(WITH_VENV) $(BIN)/python -m benchmarks.fuzz

attacks: install model
	$(WITH_VENV) $(BIN)/python -m benchmarks.attacks

faults: install
	$(WITH_VENV) $(BIN)/python -m benchmarks.faults $(FAULTS)

clusters: install
	$(WITH_VENV) $(BIN)/python -m pytest -q -rs tests/clusters $(CLUSTERS)

browser: install
	$(WITH_VENV) $(BIN)/python -m tests.browser $(BROWSER)

conformance: install model
	@$(WITH_VENV) $(BIN)/python -m benchmarks.conformance $(CONFORMANCE)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
