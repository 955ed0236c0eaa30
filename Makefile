# Each target sets up what it needs, from a bare clone: an environment in $(VENV) with the versions of
# constraints.txt, and the package in it.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

INSTALLED = $(VENV)/installed-
BASE = $(VENV)/base
PIP = -m pip --quiet --disable-pip-version-check
# What is imported is compiled then, and kept, whatever the environment says: every process that a test starts imports
# it again. To compile all that torch brings would take half of an installation's time.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(PIP) install --no-compile
INTO_BASE = $(VENV)/bin/python $(PIP) --python $(BASE)/bin/python install --no-compile
OLD_TRITON = $(if $(filter Linux,$(shell uname -s)),$(VENV)/triton-3.6)
# What is set up is set up side by side.
MAKEFLAGS += --jobs=$(JOBS)
PACKAGE = pyproject.toml setup.py README.md LICENSE atedm_kernels bench csrc python
SETTINGS = pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test suite base-install witnesses docs lint clean

demo: $(INSTALLED)generate
	$(VENV)/bin/atedm demo $(ARGS)

# Side by side, as a suite waits for no wheel; the wheel takes the library that the suite's environment has compiled.
test: suite base-install

# File by file: the tests of a file share what is slow to make. In their order: the longest files are not the last.
suite: $(INSTALLED)test $(OLD_TRITON)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# An older Triton, to compile with: users of older torch releases have it. There are wheels for Linux alone.
$(VENV)/triton-3.6: | $(VENV)/bin/python
	rm -rf $@.part
	$(VENV)/bin/python $(INSTALL) --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

# The wheel alone, with what it requires, in an environment of its own: every op runs there. Built from a copy, which
# leaves nothing in the checkout.
base-install: $(BASE)/required $(INSTALLED)test
	rm -rf $(BASE)/source $(BASE)/wheel
	mkdir $(BASE)/source
	tar --exclude '*.egg-info' -cf - $(PACKAGE) | tar -xf - -C $(BASE)/source
	$(VENV)/bin/python $(PIP) wheel --no-deps --wheel-dir $(BASE)/wheel $(BASE)/source
	$(INTO_BASE) --constraint constraints.txt --find-links $(BASE)/wheel $(BASE)/wheel/*.whl
	$(INTO_BASE) --no-deps --force-reinstall $(BASE)/wheel/*.whl
	$(BASE)/bin/python tests/helpers/base_install.py

$(BASE)/required: constraints.txt | $(BASE)/bin/python
	$(INTO_BASE) --constraint constraints.txt torch triton numpy
	touch $@

# diffusers' own tests, with and without atedm in force; SOURCE is a checkout of diffusers.
witnesses: $(INSTALLED)test
	JOBS=$(JOBS) $(VENV)/bin/python tests/witnesses/run.py $(SOURCE) $(ARGS)

# One site of the README, the pages and the API; links that lead nowhere are warnings, and those are errors.
docs: $(INSTALLED)docs
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html -c docs . outputs/docs
	@echo outputs/docs/docs/index.html

lint: $(INSTALLED)test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Build isolation fetches setuptools alone: torch is not needed to build.
$(INSTALLED)%: $(SETTINGS) | $(VENV)/bin/python
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The other environment's pip installs here.
$(BASE)/bin/python: | $(VENV)/bin/python
	$(PYTHON) -m venv --without-pip $(BASE)

clean:
	rm -rf $(VENV) build outputs *.egg-info
