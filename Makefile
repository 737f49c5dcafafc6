# Shortcuts for people who have make; the README's commands need only Python.
PYTHON ?= .venv/bin/python

.PHONY: demo test lint types bench

demo:
	$(PYTHON) -m pagedattn.engine.cli demo

test:
	$(PYTHON) -m tests

lint:
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

types:
	$(PYTHON) -m mypy

bench:
	$(PYTHON) -m benchmarks.engine --device cpu
