# Every target first makes .venv, if it is not there. EXTRA=cuda on a machine with GPUs.
EXTRA ?= cpu
SEED ?= 7
SEEDS ?= 1
BIN := .venv/bin

.PHONY: help setup demo test test-long unit check format sim bench-handoff bench-streamed bench-fabric bench-cma bench-controller bench-prefix fuzz storm clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup:  ## make .venv with everything the other targets need
	@scripts/setup.sh $(EXTRA)

demo: setup  ## two vLLM instances, one service: ask it, see KV move, compare with one instance
	@$(BIN)/python examples/demo.py

test: setup  ## every test that this machine can run
	@$(BIN)/pytest tests

test-long: setup  ## the tests that `make test` leaves out because they take ten minutes and more
	@$(BIN)/pytest tests -m long

unit: setup  ## the tests that start no vLLM, in under 30 seconds
	@$(BIN)/pytest tests/unit tests/rules

check: setup  ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup  ## let ruff put things in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

sim: setup  ## the deterministic simulations: make sim SEED=7, make sim SEED=1 SEEDS=10000
	@$(BIN)/python -m tests.sim --seed $(SEED) --seeds $(SEEDS)

bench-handoff: setup  ## how long a handoff takes, beside vLLM's NixlConnector
	@$(BIN)/python -m benchmarks.handoff $(ARGS)

bench-streamed: setup  ## time to first token through a fleet, beside one plain instance
	@$(BIN)/python -m benchmarks.streamed $(ARGS)

bench-fabric: setup  ## ways to move blocks between two processes, side by side
	@$(BIN)/vllm-fleet bench fabric $(ARGS)

bench-cma: setup  ## process_vm_readv against shared memory, for blocks of KV
	@$(BIN)/python -m benchmarks.cma $(ARGS)

bench-controller: setup  ## what a controller costs with a thousand instances
	@$(BIN)/python -m benchmarks.controller $(ARGS)

bench-prefix: setup  ## cache hits of routers on conversations that share prefixes, and what a choice costs
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet vllm-router==0.1.17 orjson
	@$(BIN)/python -m benchmarks.prefix_trace $(ARGS)
	@$(BIN)/python -m benchmarks.policies

fuzz: setup  ## a million damaged inputs at everything that reads bytes from others
	@$(BIN)/python -m benchmarks.fuzz $(ARGS)

storm: setup  ## thousands of requests while every instance is killed, stopped and started again
	@$(BIN)/python -m benchmarks.storm $(ARGS)

clean:  ## remove .venv and what tools left
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
