# make demo: see it work.  make test: the tests.  The rest is for those who change it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
# a file stays in one process, so that its fixtures are made once; a process has one thread;
# where one dies, the run ends at once and says so, in place of hanging
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -X faulthandler -m pytest -n $(JOBS) --dist loadfile \
	--max-worker-restart 0

demo: $(VENV)/.installed  ## the main job on the bundled digits, under 3 minutes
	$(BIN)/impatient demo runs/demo

test: $(VENV)/.installed-dev  ## all tests; JOBS=1 one after the other
	$(PYTEST)

test-fast: $(VENV)/.installed-dev  ## under a minute: no engine, no paper, no docs, nothing slow
	$(PYTEST) -m "not (slow or engine or papers or docs)"

test-room: $(VENV)/.installed-dev  ## the tests of one room: make test-room ROOM=networks
	$(PYTEST) tests/$(ROOM)

check: $(VENV)/.installed-dev  ## style, types, import contract, doctests, README
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --doctest-modules src -p no:cacheprovider
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python docs/generate_tree.py --check

docs: $(VENV)/.installed-dev  ## the documentation as a site, in site/
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_tree.py
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# the tested versions; the package's own lower bounds are wider
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,vision,text,hub,onnx,openvino]'
	touch $@ $(VENV)/.installed

clean:  ## everything that was made
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: demo test test-fast test-room check docs clean
