# make demo | test | lint | bench | coverage: each sets up its own environment first, and again only after a change to
# its pins.
# PYTHON=… chooses the interpreter that the environment is made with.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# A worker holds its own torch and transformers; beyond eight the start costs more than it brings.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))
PYTEST_ARGS ?=

python := $(VENV)/bin/python
pytest := OMP_NUM_THREADS=1 $(python) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test lint bench coverage environment
.DELETE_ON_ERROR:

demo: environment
	$(python) -m hf_paged_flash.eval.demo

test: environment
	$(pytest) $(PYTEST_ARGS)

lint: environment
	$(python) -m ruff check .

bench: environment
	for bench in flash_attention paged_decode linear generate training attention_memory; do \
		$(python) -m hf_paged_flash.eval.bench.$$bench; \
	done

coverage: environment
	OMP_NUM_THREADS=1 $(python) -m hf_paged_flash.eval.coverage

environment: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS)
	.ci/make-venv $(VENV)
	@echo "Installing into $(VENV): some minutes the first time, torch is large"
	$(python) -m pip install --quiet --disable-pip-version-check -e '.[eval,test]' -c $(CONSTRAINTS)
	touch $@
