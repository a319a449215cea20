# Every target except newest, oldest and dist uses one virtual environment, .venv. constraints.txt pins the version of torch, since a
# looser install may pull in CUDA packages.
PYTHON ?= python3
BIN := .venv/bin
export MPLBACKEND ?= agg

.PHONY: demo test quick newest oldest lint format docs bench dist clean

demo: .venv/plots  ## train two moons, print the numbers, write the pictures
	$(BIN)/python examples/two_moons.py --out pictures

# Two processes test at once, and more threads than cores wait for each other.
test quick: export OMP_NUM_THREADS := 1

test: .venv/test lint  ## run what CI runs: lint, tests, doctests, and the examples in short mode
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

quick: export HYPOTHESIS_PROFILE = quick
quick: .venv/test  ## run a test of each feature and two fixed instances of each law, in less than a minute
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

newest:  ## run the tests with the newest torch and Pyro that resolve, so that their renames are found early
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install -q --upgrade torch pyro-ppl -e '.[test]'
	.venv-newest/bin/python -m pytest -q -n 2 --dist worksteal

oldest:  ## run the tests with the oldest torch and Pyro that pyproject.toml allows
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install -q 'torch==2.6.*' pyro-ppl==1.9.1 -e '.[test]'
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs  ## build the documentation, with warnings as errors; the start page is docs/_build/html/index.html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: .venv/bench  ## print the tables of quality and speed, compared with Pyro, Zuko, nflows, normflows and FrEIA
	$(BIN)/python -m benchmarks

dist:  ## build the sdist and the wheel in dist/, and check their metadata
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/python -m pip install -q build twine
	rm -rf dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*

# Make installs each extra once, and again whenever the dependencies change.
.venv/%: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt 'torch>=2.6'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-dist build dist *.egg-info docs/_build docs/gallery pictures
