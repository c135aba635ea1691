# Everything here builds on `make install`. STACK=3.11 chooses the fallback stack in an environment of its own.
STACK ?=
VENV := .venv$(if $(STACK),-$(STACK))
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/installed
WHICH_STACK = stack=$$($(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
# uv, from where pip is told to install from
INSTALL = env $${PIP_FIND_LINKS:+UV_FIND_LINKS="$$PIP_FIND_LINKS"} $${PIP_INDEX_URL:+UV_DEFAULT_INDEX="$$PIP_INDEX_URL"} \
	$${PIP_EXTRA_INDEX_URL:+UV_INDEX="$$PIP_EXTRA_INDEX_URL"} $(VENV)/bin/uv pip install -q

# Without bytecode each process compiles what it imports, which takes three times as long: uv makes none unless it is
# told to, and container images often forbid Python to.
export UV_COMPILE_BYTECODE := 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install install-trl install-sglang quickstart test test-core test-lowest test-sglang test-mbridge test-slurm kill-campaign check format bench

install: $(STAMP)

$(STAMP): setup.py tools/find_python.sh $(wildcard constraints/*.txt)
	@python=$$(tools/find_python.sh $(STACK)) && echo "== environment $(VENV) with $$python" && $$python -m venv --clear $(VENV)
	@$(WHICH_STACK) && echo "== installing the $$stack stack (constraints/$$stack.txt)" && \
	$(PYTHON) -m pip install -q uv==0.13.9 && \
	$(INSTALL) --python $(PYTHON) -c constraints/$$stack.txt -e '.[dev]'
	@touch $(STAMP)

# TRL, the baseline of tools/bench/step_vs_trl.py, on the same torch and transformers in an environment of its own.
TRL_VENV := .venv-trl

install-trl: $(TRL_VENV)/installed

$(TRL_VENV)/installed: tools/bench/trl_constraints.txt $(STAMP)
	@$(WHICH_STACK) && echo "== environment $(TRL_VENV) ($$stack) with TRL" && \
	$(PYTHON) -m venv --clear $(TRL_VENV) && \
	$(INSTALL) --python $(TRL_VENV)/bin/python \
	-c constraints/$$stack.txt -c tools/bench/trl_constraints.txt trl
	@touch $@

# SGLang, whose strict pins (Python 3.12, its own torch) want an environment of their own: about 11 GB, some minutes.
SGLANG_VENV := .venv-sglang
SGLANG_VERSION := 0.5.23
SGLANG_FREE_GB := 14

install-sglang: $(SGLANG_VENV)/installed

$(SGLANG_VENV)/installed: tools/find_python.sh | $(STAMP)
	@free=$$(df --output=avail -BG . | tail -1 | tr -dc 0-9); [ "$$free" -ge $(SGLANG_FREE_GB) ] || \
	{ echo "SGLang needs $(SGLANG_FREE_GB) GB of free disk, and there are $$free: make room in $(CURDIR)." >&2; exit 1; }
	@python=$$(tools/find_python.sh 3.12) && echo "== environment $(SGLANG_VENV) with $$python" && \
	"$$python" -m venv --clear $(SGLANG_VENV) && \
	$(INSTALL) --prerelease allow \
	--python $(SGLANG_VENV)/bin/python sglang==$(SGLANG_VERSION)
	@touch $@

quickstart: install
	$(PYTHON) tools/quickstart.py

# One worker a core, a file to a worker: fixtures that start servers and runs are shared within a file. tests/conftest.py
# has the longest files first; xdist would begin with those of many tests, which are short.
PYTEST := $(PYTHON) -m pytest -n $(shell nproc) --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST)

# The long mode of the kill tests: random processes of real runs, killed at random instants.
KILLS := 100

kill-campaign: install
	RLOOP_KILLS=$(KILLS) $(PYTHON) -m pytest -s tests/system/test_campaign.py

# What the fallback stack must pass too: all that computes with Megatron, torch and NumPy, which are others there; not how
# engines fail, which is a matter of processes and sockets.
CORE := actor algorithm data evaluation parallel planning platform rollout trajectory weights test_*.py

test-core: install
	$(PYTEST) $(addprefix tests/,$(CORE)) --ignore tests/rollout/test_faults.py

# The oldest versions that setup.py allows: a user's environment may have them already.
LOWEST := .venv-lowest
OF_VERSIONS := weights rollout/test_engine.py rollout/test_contract.py main/test_cli.py system/test_commands.py test_compose.py

test-lowest: install
	@python=$$(tools/find_python.sh 3.12) && "$$python" -m venv --clear $(LOWEST)
	@$(INSTALL) --python $(LOWEST)/bin/python --resolution lowest-direct -e .
	@$(INSTALL) --python $(LOWEST)/bin/python pytest pytest-timeout hypothesis
	$(LOWEST)/bin/python -m pytest $(addprefix tests/,$(OF_VERSIONS))

# The engines' contract, byte for byte the tests that the embedded engine passes, against the real server on this CPU.
test-sglang: install install-sglang
	RLOOP_TEST_ENGINE=sglang $(PYTHON) -m pytest --timeout 1200 tests/rollout/test_contract.py tests/rollout/test_sglang.py

# Names and layouts of parameters against an independent description of the same families. Its own dependencies (TE) are
# not installed: what is asked of it needs none.
MBRIDGE := .venv-mbridge

test-mbridge: install
	@$(INSTALL) --no-deps --python $(PYTHON) --target $(MBRIDGE) mbridge==0.15.1 einops
	PYTHONPATH=$(MBRIDGE) $(PYTHON) -m pytest tests/weights/test_mbridge.py

# Whole runs as jobs of a real Slurm on this machine: needs root, and Debian's packages, which it installs.
test-slurm: install
	RLOOP_SLURM=1 $(PYTHON) -m pytest -v --durations 12 tests/slurm/test_real_slurm.py

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: install
	$(PYTHON) tools/bench/run_all.py
