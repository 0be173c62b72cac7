# make demo    set everything up and watch GRPO improve the nano policy (about twelve minutes on two cores)
# make test    set everything up and run the tests
# make install only the set-up: .venv with the package (editable) and the development tools
# make fuzz    thousands of damaged pictures, recipes, policies, runs and files (some minutes): `make test` has a share
# make lint    ruff
# make bench   speed of sampling (with and without the cache, and against the published algorithm), rewards, updates,
#              Inception and precision/recall (against torch-fidelity)
# make nano    train the nano world again (hours; in build/nano), put it into the package and measure it
# make diversity   what keeps diversity, method by method: docs/diversity.md (two hours or so; goes on if stopped)
# make paper-nano  the paper's tables in the nano world, on one page: docs/paper_nano.md (about an hour)
#
# Variables: PYTHON=python3.12   the Python to make .venv with, 3.11 or newer
#            PIP_ARGS="..."      more arguments for pip, for instance an index with CPU-only torch wheels
#            DEMO=runs/demo      where the demo goes
#            WORKERS=2           processes that run the tests, about 2 GB each

PYTHON ?= python3
PIP_ARGS ?=
DEMO ?= runs/demo
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test fuzz lint bench nano paper-nano diversity

install: $(STAMP)

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or say PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is too old; Python 3.11 or newer is needed, for instance make PYTHON=python3.12" >&2; exit 2; }
	@echo "Installing into $(VENV), a few minutes the first time."
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'
	@touch $@

# A finished demo is shown again, an interrupted one is continued, otherwise it starts.
demo: install
	@if [ -d "$(DEMO)/policy" ]; then \
		echo "The demo has been run already:"; \
		echo "before and after   $(DEMO)/before_after.png"; \
		echo "curves             $(DEMO)/curves.png"; \
		echo "report             $(DEMO)/report.html"; \
		echo "trained policy     $(DEMO)/policy"; \
		echo "use it             $(BIN)/argrpo sample --policy $(DEMO) --out images"; \
		echo "To run it afresh: make demo DEMO=runs/demo-2 (or remove $(DEMO) first)"; \
	elif [ -f "$(DEMO)/recipe.yaml" ]; then \
		$(BIN)/argrpo train --resume "$(DEMO)"; \
	else \
		$(BIN)/argrpo train nano/c2i_loo_fid --out "$(DEMO)"; \
	fi

# Workers with one thread each are done sooner than one with several. A file's tests stay together: they share what
# they have prepared.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rP -m fuzz -n $(WORKERS) tests/fuzz

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	@for name in nano sampler rewards train eval; do $(BIN)/python -m argrpo_cli.bench $$name || exit; done

nano: install
	$(BIN)/python -m argrpo_cli.nano.make.build --install

paper-nano: install
	$(BIN)/python -m argrpo_cli.paper_nano

diversity: install
	$(BIN)/python -m argrpo_cli.diversity_nano
