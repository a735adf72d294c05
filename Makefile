# Every target works from a path with spaces, as any user, and offline once .venv/parts is there (but for `slow`).
PYTHON ?= python3
BIN := .venv/bin
# glibc gives memory back after every training step; keeping it makes CPU steps several times faster on some machines.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

.PHONY: help demo train benchmark style check test slow bench nine-frames scene tables clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

.venv/installed: setup.cfg .ci/requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/requirements.lock ".[test]"
	$(BIN)/pip uninstall --quiet --yes smoldriver-hf  # the checkout runs; tests prove exports where nothing is installed
	rm -rf build *.egg-info
	touch $@

.venv/parts: .venv/installed
	$(BIN)/python -m training.checkpoints.offline_parts --only dinov2_small minilm
	touch $@

demo: .venv/parts  ## ask the default model, teach it fog, export it (five minutes on two cores)
	$(KEEP_MEMORY) $(BIN)/python -m benchmarks.demo

train: .venv/parts  ## the whole road from nothing in quick form: three models, one seed, a table (two cores)
	$(BIN)/python -m benchmarks.toyworld --quick --only smoldriver smolvlm-ft blind --output_dir outputs/train \
		--output outputs/train/results.json

benchmark: .venv/parts  ## models, blind controls, ablations, rigs and a study on the toy world (hours; QUICK=1: half one)
	$(BIN)/python -m benchmarks.toyworld $(if $(QUICK),--quick)
	$(if $(QUICK),,$(BIN)/python -m benchmarks.tables)

style: .venv/installed  ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: .venv/installed  ## format, lint, types, and the README's generated tables
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.tables --check

test: .venv/installed  ## the default tests
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n auto --dist loadfile

slow: .venv/installed  ## the slow tests too; some download from the package index
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m "slow or not slow"

bench: .venv/installed  ## speed against SmolVLM, as ratios in one run (a quiet machine, about half an hour)
	$(KEEP_MEMORY) $(BIN)/python -m benchmarks.speed --output benchmarks/results/speed.json
	$(KEEP_MEMORY) $(BIN)/python -m benchmarks.packing --output benchmarks/results/packing.json
	$(BIN)/python -m benchmarks.tables

nine-frames: .venv/installed  ## over-fit nine real DriveLM frames (needs ../shared) and ask about them
	$(KEEP_MEMORY) OMP_NUM_THREADS=1 $(BIN)/python -m training.overfit --image_root ../shared/drivelm \
		--drivelm_json ../shared/drivelm/drivelm_9frames.json --output_dir outputs/nine-frames

scene: .venv/installed  ## draw the README's picture of the toy world
	$(BIN)/python -m benchmarks.scene

tables: .venv/installed  ## rewrite the README's generated parts from benchmarks/results
	$(BIN)/python -m benchmarks.tables

clean:  ## remove the virtual environment and build leftovers, keep outputs
	rm -rf .venv build dist *.egg-info
