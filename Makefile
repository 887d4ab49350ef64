# make demo   a model that is trained, tracked, exported and answers
# make test   ruff, mypy and every test
# A new machine needs Python 3.11, pip and make; the first target installs the rest into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# What is compiled once stays, whatever the environment says, so that the install compiles only what is used.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check docs clean

demo: .venv/installed
	@$(BIN)/python jobs/demo.py

test: check
	$(BIN)/python -m pytest -n 2

check: .venv/installed
	$(BIN)/ruff check platform jobs tests cluster
	$(BIN)/ruff format --check platform jobs tests cluster
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m burnish.reference > docs/recipe.md

clean:
	rm -rf .venv runs mlflow.db mlartifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv (the first time takes some minutes)"
	$(PYTHON) -m venv .venv
	-@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip # Python 3.11's own resolves slowly
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@DS_ACCELERATOR=cpu $(BIN)/python -W ignore -c "import deepspeed, mlflow, peft, ray.data, ray.train, torch, transformers"
	@touch $@
