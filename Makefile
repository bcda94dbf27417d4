# make train   install, get ML-100K, train the recommender, print the paper's table 2 beside ours
# make test    install with the test extras, run the test suite
# make help    everything else

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/ml-100k
BIN    := $(VENV)/bin

# On Linux the name torch==2.13.0 means the CUDA build (gigabytes) on the public package index. Without an
# NVIDIA driver PyTorch's own CPU index is tried first; if it does not answer, the configured index decides.
TORCH     := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-oldest docs fuzz scale lint format bench bench-all bench-compare bench-density kernels-report ptx-check gpu-check clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

train: $(VENV)/.train  ## train recipe best on ML-100K into runs/ml-100k (OUT=...; DATA_DIR=... for a local copy)
	$(BIN)/lunet-fast train --dataset ml-100k --recipe best --seed 0 --out $(OUT) --overwrite \
		$(if $(DATA_DIR),--data-dir $(DATA_DIR))

# Two processes, each with its share of the files.
test: $(VENV)/.dev  ## the test suite, about 10 minutes on 2 cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.dev  ## the long tests, thirty kills among them; about 40 minutes
	$(BIN)/python -m pytest -q -m slow
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/kernels/interpreted

docs: $(VENV)/.dev  ## the documentation into site/, warnings as errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

test-oldest: build/oldest/.installed  ## the layers on the oldest PyTorch, Triton and NumPy promised; 15 minutes
	PYTHONPATH=. build/oldest/bin/python benchmarks/oldest.py

fuzz: $(VENV)/.dev  ## 150,000 broken files; atheris guides those of ratings where `pip install '.[fuzz]'` has it
	$(BIN)/python tests/fuzz/ratings.py --inputs 120000 --archives 5000 --models 5000 --seed 0
	$(BIN)/python tests/fuzz/files.py --inputs 20000 --seed 0

scale: $(VENV)/.dev  ## cost and memory of streamed training up to 32 million ratings; 12 minutes
	$(BIN)/python benchmarks/scale.py

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## 5 minutes of timings beside what else there is, and beside the committed ones
	$(BIN)/lunet-fast bench layers cached claims stacks training --baseline benchmarks/results

bench-all: $(VENV)/.dev  ## every size, into benchmarks/results: about an hour
	$(BIN)/python benchmarks/machine.py
	$(BIN)/lunet-fast bench layers cached claims stacks training --scale all --out benchmarks/results
	$(BIN)/python benchmarks/time_to_quality.py $(if $(DATA_DIR),--data-dir $(DATA_DIR))
	$(BIN)/python benchmarks/readme.py

bench-compare: $(VENV)/.dev  ## is this tree slower than BASE (default main)?
	$(BIN)/python benchmarks/compare.py $(or $(BASE),main)

bench-density: $(VENV)/.dev  ## flows beside zuko's and nflows' on digits and 2-D toy densities, ablation: 7 hours of 1 core
	for part in digits plane ablation speed pictures report; do $(BIN)/python benchmarks/density.py $$part || exit 1; done
	$(BIN)/python benchmarks/readme.py

ptx-check: $(VENV)/.dev  ## the kernels' compiled code executed on the CPU: every test of them, sm_80 and sm_90
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "ptx or not ptx" tests/ptx
	for arch in 80 90; do PTX_ARCHITECTURE=$$arch OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q tests/kernels/interpreted || exit 1; done

kernels-report: $(VENV)/.dev  ## registers, spills, shared memory of every kernel (TRITON=... for another Triton)
	$(BIN)/python -m benchmarks.gpu.kernel_resources --check $(if $(TRITON),--triton $(TRITON))

gpu-check: $(VENV)/.dev  ## the kernels on this GPU: right, and how fast; 8 minutes
	$(BIN)/python -m benchmarks.gpu.check

clean:  ## remove the virtual environment and the caches
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache build *.egg-info

# --- installation ----------------------------------------------------------------------------------------

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@if [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] \
	   && $(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; then \
		$(BIN)/python -m pip install --no-deps --timeout 15 --retries 1 --index-url $(CPU_INDEX) $(TORCH) \
		|| $(BIN)/python -m pip install --constraint constraints.txt $(TORCH); \
	else \
		$(BIN)/python -m pip install --constraint constraints.txt $(TORCH); \
	fi
	@touch $@

# pyproject.toml's lower bounds; NumPy is the newest that this Triton's interpreter works with.
OLDEST := torch==2.11.0 triton==3.6.0 'numpy<2.4'

build/oldest/.installed: Makefile
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet $(OLDEST) pandas pydantic safetensors filelock pytest hypothesis mpmath
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.train
