# Every target works from a path with spaces, as any user, and offline once .venv is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: style check test

$(VENV)/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[train,test]"
	touch $@

style: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(VENV)/installed
	$(BIN)/python -m pytest
