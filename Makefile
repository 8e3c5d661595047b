# The two set-up commands are `make demo` and `make test`. Everything runs in .venv, with the pins of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test faults check format reference models clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	ln -sfn .. .venv/trainmaster
	touch .venv/.ready

demo: setup
	$(BIN)/python examples/arithmetic/demo.py

test: setup
	$(BIN)/python -m pytest

faults: setup
	$(BIN)/python -m pytest -m "fault or not fault" -s tests/fault tests/deploy

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv $(BIN)/mypy --strict -p trainmaster.api -p trainmaster.system -m trainmaster.__main__
	MYPYPATH=.venv $(BIN)/mypy -p trainmaster.workers
	$(BIN)/lint-imports

reference: setup
	$(BIN)/python docs/make_reference.py

models: setup
	$(BIN)/python docs/make_models.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
