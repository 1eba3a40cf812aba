# `make help` lists what there is.  PYTHON is the interpreter that everything runs under.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
PYTHON_PATH = $(shell command -v $(PYTHON))
BIN = $(dir $(PYTHON_PATH))
CMAKE ?= $(firstword $(wildcard $(BIN)cmake) cmake)
CXX ?= g++
JOBS ?= $(shell nproc)
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: dev
dev: ## Build the host engine and the cubins into this tree (then PYTHONPATH=$(CURDIR) works)
	$(CMAKE) -S . -B build/dev -DPython_EXECUTABLE=$(PYTHON_PATH) -DFLASHMOE_LINEINFO=ON
	$(CMAKE) --build build/dev --parallel $(JOBS)
	$(CMAKE) --install build/dev --prefix .

.PHONY: stub
stub: ## Write flashmoe/_host.pyi anew from the built extension (after `make dev`)
	PYTHONPATH=$(CURDIR) $(PYTHON) -m nanobind.stubgen -q -m flashmoe._host -o flashmoe/_host.pyi

.PHONY: test
test: ## Run the tests on this tree (after `make dev`); ARGS="-k name" chooses
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest $(ARGS)

.PHONY: gpu-test
gpu-test: ## Run the tests that need a GPU; fails where there is none
	PYTHONPATH=$(CURDIR) FLASHMOE_REQUIRE_GPU=1 $(PYTHON) -m pytest tests/gpu $(ARGS)

CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'cmake/*.cu' 'benchmarks/*.cu')

.PHONY: lint
lint: ## Check style, types, C++ format and spelling
	$(BIN)ruff check
	$(BIN)ruff format --check
	$(BIN)mypy
	$(BIN)clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)typos

.PHONY: format
format: ## Rewrite Python and C++ into the one format
	$(BIN)ruff check --fix
	$(BIN)ruff format
	$(BIN)clang-format -i $(CXX_FILES)

# The engine's own C++ driver, since a sanitizer under an unsanitized Python misleads.  QUICK=1 runs
# its short form.  setarch -R: ThreadSanitizer cannot map its shadow under some kernels' randomisation.
SANITIZERS = thread address undefined
HOST_SOURCES = $(wildcard csrc/host/*.cpp)
NO_ASLR = $(shell setarch $$(uname -m) -R true 2>/dev/null && echo setarch $$(uname -m) -R)

.PHONY: sanitize $(SANITIZERS:%=sanitize-%)
sanitize: $(SANITIZERS:%=sanitize-%) ## Run the host engine under thread, address and undefined sanitizers

$(SANITIZERS:%=sanitize-%): sanitize-%: build/sanitize/%
	@echo "== driver under the $* sanitizer"
	TSAN_OPTIONS=halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(NO_ASLR) $< $(if $(QUICK),--quick)

build/sanitize/%: $(HOST_SOURCES) $(wildcard csrc/host/*.h csrc/core/*.h)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -g -Wall -Wextra -fno-omit-frame-pointer -fsanitize=$* \
	  -fno-sanitize-recover=all -ffp-contract=off -pthread -Icsrc $(HOST_SOURCES) -o $@

.PHONY: fault-runs
fault-runs: ## Two hundred runs of processes with random faults, on this tree (after `make dev`); RUNS= and SEED= change them
	PYTHONPATH=$(CURDIR) $(PYTHON) tests/procs/random_faults.py --runs $(or $(RUNS),200) --seed $(or $(SEED),0)

.PHONY: sdist-check
sdist-check: ## Build sdist -> wheel -> a fresh environment, and check what arrives
	.ci/sdist-check $(PYTHON_PATH)

.PHONY: ci
ci: ## Everything that CI runs; FULL=1 the slow tests too
	bash .ci/run $(if $(FULL),--full)

.PHONY: clean
clean: ## Remove what builds left in this tree
	rm -rf build dist flashmoe/_host*.so flashmoe/kernels/cubin flashmoe/_build_info.json
