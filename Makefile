# Works from any current directory (make -C, make -f) and in a path with spaces: every recipe starts with a quoted cd,
# and no target is a file. `make help` lists the targets.

FIRST_MAKEFILE := $(MAKEFILE_LIST)
quoted = '$(subst ','\'',$(1))'
hash := \#
ROOT := $(shell file=$(call quoted,$(FIRST_MAKEFILE)); dirname -- "$${file$(hash) }")
HERE := cd -- $(call quoted,$(ROOT)) &&
PYTHON ?= python3
ENVIRONMENT := PYTHON=$(call quoted,$(PYTHON)) sh scripts/environment.sh
VENV := .venv/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check lint types layers importtime bench docs format clean

help: ## list the targets
	@$(HERE) sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20
	@echo 'Options: ARGS="..." goes to the program that the target runs, PYTHON=python3.12 makes .venv with that Python.'

demo: ## attack real digits, defend them, write aidefend-demo/report.html
	@$(HERE) $(ENVIRONMENT) demo
	@$(HERE) exec $(VENV) -m aidefend demo $(ARGS)

test: ## run the tests on two processes and print the coverage (ARGS="-k name", ARGS="-m slow")
	@$(HERE) $(ENVIRONMENT) dev
	@$(HERE) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} exec $(VENV) -m pytest -n 2 --cov --cov-report=term $(ARGS)

check: lint types layers importtime test ## everything that must hold before a change lands

lint: ## ruff: rules and format
	@$(HERE) $(ENVIRONMENT) dev
	@$(HERE) $(VENV) -m ruff check .
	@$(HERE) $(VENV) -m ruff format --check .

types: ## mypy --strict
	@$(HERE) $(ENVIRONMENT) dev
	@$(HERE) $(VENV) -m mypy

layers: ## import-linter: which room may import which
	@$(HERE) $(ENVIRONMENT) dev
	@$(HERE) $(VENV) -c 'from importlinter.cli import lint_imports_command as check; check()' --no-logo

importtime: ## import aidefend must load neither torch nor a subpackage
	@$(HERE) $(ENVIRONMENT) dev
	@$(HERE) $(VENV) -m pytest -q tests/test_import_cost.py

bench: ## run a benchmark beside its peers: make bench NAME=demo_figures ARGS=--quick
	@$(HERE) name=$(call quoted,$(NAME)); if ! grep -qs __main__ "benchmarks/$$name.py"; then \
	    echo "Expected the name of a benchmark, got NAME=\"$$name\". Use make bench NAME=... with one of:"; \
	    grep -l __main__ benchmarks/*.py | sed 's/^benchmarks.\(.*\).py$$/  \1/'; exit 2; fi
	@$(HERE) $(ENVIRONMENT) bench
	@$(HERE) exec $(VENV) -m benchmarks.$(NAME) $(ARGS)

docs: ## build the site into site/
	@$(HERE) $(ENVIRONMENT) dev-docs
	@$(HERE) NO_MKDOCS_2_WARNING=1 $(VENV) -m mkdocs build --strict $(ARGS)

format: ## let ruff format and fix what it safely can
	@$(HERE) $(ENVIRONMENT) dev
	@$(HERE) $(VENV) -m ruff check --fix-only --quiet .
	@$(HERE) $(VENV) -m ruff format .

clean: ## remove caches and what builds and the demo wrote (.venv stays; rm -r .venv removes it)
	@$(HERE) rm -rf .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache \
	    aidefend-demo build dist htmlcov site
	@$(HERE) find aidefend benchmarks docs scripts tests -name __pycache__ -prune -exec rm -rf {} +
