# Each target creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA ?=
# The tests on two processes: one begins with clusters, one with the others (conftest.py).
# A test that fails runs up to twice more: clusters of real processes share the machine with the others.
PYTEST := -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --reruns 2 --reruns-delay 5
KERNELS := $(addprefix cache_builder/tokenizers/kernels/,build.py dispatch.cpp nearest.cpp nearest.h)

.PHONY: demo test integration fuzz soak images-check gpu-check gpu-bench check bench docs clean

demo: $(INSTALLED)  ## the whole route on real images: make demo, or make demo DATA=/path/to/folder
	$(BIN)/python -m cache_builder.demo --out demo $(if $(DATA),--data "$(DATA)")

test: $(INSTALLED)  ## the tests
	$(BIN)/python $(PYTEST)

integration: $(INSTALLED)  ## what needs root, a machine of its own or minutes: clusters of several hosts first of all
	$(BIN)/python -m pytest -m hosts

fuzz: $(INSTALLED)  ## a hundred thousand damaged files of every format, and what their readers make of them
	$(BIN)/python -m tests.fuzz --inputs 100000

soak: $(INSTALLED)  ## build, serve and train at once for half an hour while things go wrong: root
	$(BIN)/python -m tests.integration.soak --minutes 30

images-check: $(INSTALLED)  ## what is in the images, run as containers run it: root, minutes, 15 GB
	$(BIN)/python -m tests.integration.check_images

# These two take the PYTHON at hand, with its torch, torchvision, timm, numpy and safetensors.
gpu-check:  ## the tests of every device on a GPU; without one each is skipped, and says so
	$(PYTHON) -m tests.devices

gpu-bench:  ## the benchmarks of a GPU; without one small on the CPU, and says so
	$(PYTHON) -m tests.devices.bench

check: $(INSTALLED)  ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)  ## every benchmark, each prints its table
	for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

docs: $(INSTALLED)  ## the documents as a site in .site/
	$(BIN)/zensical build --clean --strict --config-file .zensical.toml

$(VENV): $(INSTALLED)  ## only the environment

$(INSTALLED): pyproject.toml deploy/constraints.txt deploy/build_hook.py $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "patchcache needs Python 3.11 or newer; pass one: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint deploy/constraints.txt --editable '.[dev]'
	touch $@

clean:  ## what the targets made
	rm -rf $(VENV) demo soak .site .mypy_cache .ruff_cache .pytest_cache
