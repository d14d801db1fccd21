# make demo | test | test-unit | proofs | chaos | check | refresh | bench | gpu | env        ComfyUI: COMFYUI_PATH, else the one this pack lies in, else ~/comfy/ComfyUI
PYTHON ?= python3
PY := .venv/bin/python
# Models this small are many times slower on threads that wait for each other.
export OMP_NUM_THREADS ?= 1
export PYTHONDONTWRITEBYTECODE ?= 1
# Processes that run tests, each with its own ComfyUI and server (about 4 GB). One of them mostly waits for the browser.
JOBS ?= 3

.PHONY: demo test test-unit proofs chaos check refresh bench gpu env

demo: env  ## train a LoRA on drawn shapes and leave the file, the loss plot and a before/after sheet
	@$(PY) tools/demo.py

test: env  ## everything that can run here, in three processes; a loud line per group that cannot (JOBS=0: one process)
	@.venv/bin/pytest -n $(JOBS) --durations=10 $(ARGS)

test-unit: env  ## the craft without ComfyUI: seconds
	@.venv/bin/pytest -n $(JOBS) tests/unit $(ARGS)

proofs: env  ## trainings long enough to measure what they teach (tests/proofs/proofs.toml): minutes
	@$(PY) tests/proofs/run.py $(ARGS)

chaos: env  ## kills, interrupts, flipped bits, cuts, hostile files and names on a real server: minutes (ARGS="--seed 2 --rounds 10")
	@$(PY) tests/chaos/run.py $(ARGS)

check: env  ## format, lint, types, and the direction of imports
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@.venv/bin/basedpyright --pythonpath $(PY) --level error
	@.venv/bin/pytest -q tests/unit/test_house.py

refresh: env  ## everything derived from nodes and workflow sources, made again: snapshot, English texts, README rows, API twins, cards
	@$(PY) tools/refresh.py $(ARGS)

bench: env  ## FLOPs, bytes and seconds a step against ComfyUI's own Train LoRA
	@$(PY) benchmarks/train_lora.py $(ARGS)

gpu: env  ## what a step costs on this machine's graphics card, as a page to share: ten minutes, two with ARGS=--quick
	@env -u OMP_NUM_THREADS $(PY) benchmarks/gpu.py $(ARGS)

env:  ## .venv, layered over ComfyUI's packages and never changing them
	@$(PYTHON) tools/env.py
