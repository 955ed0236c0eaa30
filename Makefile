# Each target sets up what it needs, from a bare clone: an environment in $(VENV) with the versions of
# constraints.txt, and the package in it.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

INSTALLED = $(VENV)/installed-
SETTINGS = pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test witnesses docs lint clean

demo: $(INSTALLED)generate
	$(VENV)/bin/atedm demo $(ARGS)

test: $(INSTALLED)test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n $(JOBS) $(ARGS)

# diffusers' own tests, with and without atedm in force; SOURCE is a checkout of diffusers.
witnesses: $(INSTALLED)test
	JOBS=$(JOBS) $(VENV)/bin/python tests/witnesses/run.py $(SOURCE) $(ARGS)

docs: $(INSTALLED)docs
	$(VENV)/bin/python -m pdoc --docformat google --output-directory outputs/docs atedm atedm_kernels

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
