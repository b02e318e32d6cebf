# One command from a fresh clone: `make demo`. Everything it needs is set up on the way, inside .venv.
#
#   make setup   .venv with the tested versions (constraints.txt); again in a second once it is there
#   make demo    pretrain on drawn scenes, score the frozen features: runs/demo/report.html
#   make test    every test           make lint   ruff and mypy           make clean   remove what set-up made
#
# PYTHON=python3.12 make setup   chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FFCV_PACKAGES := libturbojpeg0-dev libopencv-dev pkg-config
HAVE_FFCV_PACKAGES := pkg-config --exists opencv4 libturbojpeg 2>/dev/null

.PHONY: setup demo test lint clean ffcv-packages

setup: $(READY)

# One resolve for everything: installing torchvision or the project by itself could exchange a CPU build of torch for
# a CUDA build of several GB. FFCV is optional: it compiles against system libraries, and without it folders are read
# through Pillow.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "nearfar needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: PYTHON=python3.12 make setup" >&2; \
		exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "$(VENV) could not be made. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; }
	@$(MAKE) --no-print-directory ffcv-packages
	@echo "Installing the Python packages into $(VENV) (a few minutes, once) ..."
	@install="$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e"; \
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
		"then $(BIN)/pip install -c constraints.txt -e '.[ffcv]'"

demo: setup
	$(BIN)/nearfar demo

# Two test processes of one thread each: faster than one of two threads, since most tests are small. The cluster's
# files go first (tests/conftest.py) and not those with the most tests.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist nearfar.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
