# Checks and tests; `bash tests/run.sh` makes the environment first and runs everything.
# The tools come from .venv where it is there, else from the current python3.

PYTHON := $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
SOURCES := megabts tools examples tests setup.py

.PHONY: checks lint house-rules format test

checks: lint house-rules

lint:
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m mypy megabts tools

house-rules:
	$(PYTHON) -m pytest -q -ra tests/test_house_rules.py

format:
	$(PYTHON) -m ruff format $(SOURCES)
	$(PYTHON) -m ruff check --fix $(SOURCES)

test:
	$(PYTHON) -m pytest -ra
