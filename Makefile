# Each target works from a bare clone and sets up what it needs: an environment in $(VENV) with the versions in
# constraints.txt, and the package installed in it.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

INSTALLED = $(VENV)/installed-
BASE = $(VENV)/base
PIP = -m pip --quiet --disable-pip-version-check
# pip does not compile modules to bytecode: compiling all of torch would take half of the installation time. Python
# compiles a module when it is first imported and keeps the bytecode, even if the environment forbids that: tests start
# many processes, and each imports the same modules.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(PIP) install --no-compile
INTO_BASE = $(VENV)/bin/python $(PIP) --python $(BASE)/bin/python install --no-compile
OLD_TRITON = $(if $(filter Linux,$(shell uname -s)),$(VENV)/triton-3.6)
# Set up environments in parallel.
MAKEFLAGS += --jobs=$(JOBS)
PACKAGE = pyproject.toml setup.py README.md LICENSE atedm_kernels bench csrc python
SETTINGS = pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test suite base-install witnesses docs lint clean

demo: $(INSTALLED)generate
	$(VENV)/bin/atedm demo $(ARGS)

# The suite does not need the wheel, so the two run in parallel. The wheel takes the native library that was compiled
# for the suite's environment.
test: suite base-install

# A worker runs whole files, because the tests of a file share fixtures that are slow to make. The files keep their
# order, in which the longest ones are not last.
suite: $(INSTALLED)test $(OLD_TRITON)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# An older Triton to compile with, because users of older torch releases have it. Its wheels exist only for Linux.
$(VENV)/triton-3.6: | $(VENV)/bin/python
	rm -rf $@.part
	$(VENV)/bin/python $(INSTALL) --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

# Install only the wheel and its requirements into a separate environment, and run every op there. The wheel is built
# from a copy, so the build leaves no files in the checkout.
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

# Run diffusers' own tests, with and without atedm active; SOURCE is a checkout of diffusers.
witnesses: $(INSTALLED)test
	JOBS=$(JOBS) $(VENV)/bin/python tests/witnesses/run.py $(SOURCE) $(ARGS)

# Build one site from the README, the pages and the API. Broken links are warnings, and -W turns warnings into errors.
docs: $(INSTALLED)docs
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html -c docs . outputs/docs
	@echo outputs/docs/docs/index.html

lint: $(INSTALLED)test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Build isolation fetches only setuptools: torch is not needed to build.
$(INSTALLED)%: $(SETTINGS) | $(VENV)/bin/python
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# This environment has no pip: the pip of $(VENV) installs into it.
$(BASE)/bin/python: | $(VENV)/bin/python
	$(PYTHON) -m venv --without-pip $(BASE)

clean:
	rm -rf $(VENV) build outputs *.egg-info
