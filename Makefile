PYTHON ?= python3.11
VENV := .venv
FULLSIZE ?= artifacts/fullsize
BENCH ?= artifacts/bench
READY := $(VENV)/.ready
HOST := $(shell uname -m)
ARCH ?= $(HOST)

.PHONY: run test test-extra lint setup clean fullsize bench runner build-runner runner-check

run: $(READY) ## build and validate the int4 program of the bundled checkpoint
	$(VENV)/bin/python -m pipeline run recipe=int4_xnnpack overwrite=true

test: $(READY) ## all tests but the longest of a kind, which test-extra has
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

test-extra: $(READY) ## what takes more packages or minutes than CI has: lm-evaluation-harness, launchers, a bucket
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,lm-eval,joblib,slurm,ray,search,s3,s3-server]"
	$(VENV)/bin/pip install --quiet --no-deps hydra-ray-launcher==1.2.2
	$(VENV)/bin/python -m pytest -o addopts= tests/extra
	$(VENV)/bin/python -m pytest -o addopts= -m extra tests --ignore=tests/extra

lint: $(READY) ## style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	clang-format --dry-run --Werror $(wildcard runner/*.cpp runner/*.h runner/*/*.cpp)
	mkdir -p build
	cmake -S runner -B build/runner-lint -G Ninja > build/runner-lint.log
	find build/runner-lint -name 'unity_*.cxx' | xargs -P 2 -n 1 clang-tidy --quiet --config-file=runner/.clang-tidy --header-filter=$(CURDIR)/runner/ -p build/runner-lint 2> build/clang-tidy.log

fullsize: $(READY) ## measure all that is claimed for Dream-7B's shape: 60 GB of disk in FULLSIZE
	CMAKE_ARGS=-DCMAKE_CXX_FLAGS=-fno-dse $(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,llama]"
	$(VENV)/bin/python -m scripts.fullsize $(FULLSIZE) docs/fullsize.json

bench: $(READY) ## every ratio of docs/performance.md against what this kind of machine gave: 15 GB of disk in BENCH
	CMAKE_ARGS=-DCMAKE_CXX_FLAGS=-fno-dse $(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,llama]"
	$(VENV)/bin/python -m scripts.bench $(BENCH)

# Of another processor than this one: its wheel, unpacked, and a cross compiler.
WHEEL := $(shell sed -n 's/.*"executorch==\(.*\)".*/\1/p' pyproject.toml)
FOREIGN := build/executorch-$(WHEEL)-$(ARCH)

# One for another processor is kept by what it is made of, outside of the tree: clones build it once.
KEPT := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dreamedge/runner-$(ARCH)-$(shell { cat runner/CMakeLists.txt runner/*.cmake \
	runner/*.h runner/*.cpp runner/kernels/*.cpp; $(ARCH)-linux-gnu-g++ --version; echo $(WHEEL); } 2>/dev/null | sha256sum | cut -c1-16)

ifneq ($(ARCH),$(HOST))
ifneq ($(wildcard $(KEPT)),)
runner: $(FOREIGN)
	mkdir -p build/runner-$(ARCH)
	cmp -s $(KEPT) build/runner-$(ARCH)/dreamedge-run || cp $(KEPT) build/runner-$(ARCH)/dreamedge-run
else
runner: build-runner
	mkdir -p $(dir $(KEPT))
	cp build/runner-$(ARCH)/dreamedge-run $(KEPT).$$$$ && mv $(KEPT).$$$$ $(KEPT)
endif
else
runner: build-runner ## the native runner, build/runner-ARCH/dreamedge-run; ARCH=aarch64 for Arm
endif

build-runner: $(if $(filter $(ARCH),$(HOST)),$(READY),$(FOREIGN))
	mkdir -p build
	cmake -S runner -B build/runner-$(ARCH) -G Ninja $(if $(filter $(ARCH),$(HOST)),,\
		-DCMAKE_TOOLCHAIN_FILE=$(ARCH).cmake -DEXECUTORCH_DIR=$(CURDIR)/$(FOREIGN)/executorch) > build/runner-$(ARCH).log
	cmake --build build/runner-$(ARCH) $(if $(JOBS),--parallel $(JOBS))

# The parts that read foreign bytes, for the tests, under sanitizers.
runner-check:
	mkdir -p build
	cmake -S runner -B build/runner-check -G Ninja -DCHECK=ON > build/runner-check.log
	cmake --build build/runner-check $(if $(JOBS),--parallel $(JOBS))

$(FOREIGN):
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest $@.wheel --python-version 3.11 \
		--platform manylinux_2_28_$(ARCH) executorch==$(WHEEL)
	$(PYTHON) -m zipfile -e $@.wheel/*.whl $@.partial
	rm -rf $@.wheel
	mv $@.partial $@

setup: $(READY) ## the virtual environment, from the pins

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV), which takes a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

clean: ## remove the environment and what was built
	rm -rf $(VENV) artifacts build
