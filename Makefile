# `make help` lists what there is.  PYTHON is the interpreter that everything runs under.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
CMAKE ?= $(shell $(PYTHON) -c 'import pathlib, sys; p = pathlib.Path(sys.executable).parent / "cmake"; print(p if p.exists() else "cmake")')
CXX ?= g++
JOBS ?= $(shell nproc)
MAKEFLAGS += --no-print-directory
export PYTHONPATH := .

.DEFAULT_GOAL := help

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: dev
dev: ## Build the host engine and the cubins into this tree (then PYTHONPATH=. works)
	$(CMAKE) -S . -B build/dev -DPython_EXECUTABLE=$(shell command -v $(PYTHON)) -DCMAKE_BUILD_TYPE=Release
	$(CMAKE) --build build/dev --parallel $(JOBS)
	$(CMAKE) --install build/dev --prefix .
