# Each target sets up what it needs, from a bare clone: an environment in $(VENV) with the versions of
# constraints.txt, and the package in it.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

INSTALLED = $(VENV)/installed-
SETTINGS = pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test lint clean

demo: $(INSTALLED)generate
	$(VENV)/bin/atedm demo $(ARGS)

test: $(INSTALLED)test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n $(JOBS) $(ARGS)

lint: $(INSTALLED)test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Build isolation fetches setuptools alone: torch is not needed to build.
$(INSTALLED)%: $(SETTINGS) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build outputs *.egg-info
