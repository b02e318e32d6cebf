# One command from a fresh clone: `make demo`. Everything it needs is set up on the way, inside .venv.
#
#   make setup   .venv with the tested versions (constraints.txt); again in a second once it is there
#   make demo    pretrain on drawn scenes, score the frozen features: runs/demo/report.html
#   make test    the tests            make lint   ruff and mypy           make clean   remove what set-up made
#   make test-all      and those marked `long`
#   make test-oldest   the tests with the oldest torch that pyproject.toml admits, in an environment of its own
#
# PYTHON=python3.12 make setup   chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
OLDEST := .venv-oldest
OLDEST_TORCH := 2.8.0
OLDEST_TORCHVISION := 0.23.0
OLDEST_NUMPY := 2.3.5
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_FOR_TESTS := $(VENV)/.ready-for-tests
FFCV_PACKAGES := libturbojpeg0-dev libopencv-dev pkg-config
HAVE_FFCV_PACKAGES := pkg-config --exists opencv4 libturbojpeg 2>/dev/null

.PHONY: setup demo test test-all test-oldest lint clean ffcv-packages

setup: $(READY)

# One resolve for everything: installing torchvision or the project by itself could exchange a CPU build of torch for
# a CUDA build of several GB. FFCV is optional: it compiles against system libraries, and without it folders are read
# through Pillow.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "nearfar needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: PYTHON=python3.12 make setup" >&2; \
		exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "$(VENV) could not be made. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; }
	@$(MAKE) --no-print-directory ffcv-packages
	@echo "Installing the Python packages into $(VENV) (a few minutes, once) ..."
	@install="$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e"; \
	if ! $(HAVE_FFCV_PACKAGES); then $$install '.[dev]'; \
	elif ! $$install '.[dev,ffcv]'; then \
		echo "With the extra 'ffcv' the packages did not install (pip says why above); going on without FFCV."; \
		$$install '.[dev]'; \
	fi
	@touch $@

ffcv-packages:
	@if $(HAVE_FFCV_PACKAGES); then exit 0; fi; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		echo "Installing the system packages of FFCV: $(FFCV_PACKAGES) ..."; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $(FFCV_PACKAGES); } >/dev/null 2>&1 || true; \
	fi; \
	$(HAVE_FFCV_PACKAGES) || echo "FFCV is left out: it needs the system packages $(FFCV_PACKAGES)." \
		"To add it: install them (Debian, Ubuntu: sudo apt-get install $(FFCV_PACKAGES))," \
		"then $(BIN)/pip install -c $(CONSTRAINTS) -e '.[ffcv]'"

demo: setup
	$(BIN)/nearfar demo

# What few users need and some tests read or write with: kept out of `make setup`, which a demo waits for.
$(READY_FOR_TESTS): $(READY)
	@echo "Installing what only tests need: wandb, pyarrow, transformers ..."
	@if $(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) wandb pyarrow transformers; then \
		touch $@; \
	else echo "They did not install (pip says why above); their tests are skipped."; fi

# Three processes of one thread each, also on two cores: those with the cluster's files, which go first
# (tests/conftest.py) and not those with the most tests, wait half of the time.
test: TESTS := -m "not long"
test test-all: $(READY_FOR_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(TESTS)

# The tested versions but for torch and torchvision, and for numpy, since the interpreter of the Triton that belongs to
# that torch fails on a newer one. PyPI's torch of that age is the CUDA build (several GB); where pip is configured with
# an index of CPU builds, it takes the CPU build of the same release.
$(OLDEST)/constraints.txt: constraints.txt Makefile
	@mkdir -p $(OLDEST)
	@sed -e 's/^torch==.*/torch==$(OLDEST_TORCH)/' -e 's/^torchvision==.*/torchvision==$(OLDEST_TORCHVISION)/' \
		-e 's/^numpy==.*/numpy==$(OLDEST_NUMPY)/' $< > $@

test-oldest: $(OLDEST)/constraints.txt
	@$(MAKE) --no-print-directory test VENV=$(OLDEST) CONSTRAINTS=$<

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) build dist nearfar.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
