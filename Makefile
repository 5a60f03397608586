# Two commands are all the set-up there is: `make autopilot` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# processes that run tests
JOBS ?= 2
HERE := not slurm and not nodes and not cuda and not browser and not emulated

# a folder that holds tinyshakespeare.txt, where the text is at hand already
ifneq ($(wildcard ../shared/data/tinyshakespeare.txt),)
export EBC_LAB_DATA ?= $(abspath ../shared/data)
endif

# containers often set it: then every process compiles all of the code, and pytest every test, again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install autopilot test test-all test-slow test-matrix test-cuda test-emulated test-emulated-quick test-browser test-browser-quick test-slurm test-slurm-quick test-nodes test-nodes-quick lint lock package proof site site-links clean

install: $(VENV)/installed  ## the environment

autopilot: $(VENV)/installed  ## the main job, at the right scale for this machine
	$(BIN)/ebc-lab autopilot $(ARGS)

# a worker that has run out of tests takes some of another's, so that both end together
test: $(VENV)/installed-dev  ## what is not marked as thorough: CONTRIBUTING.md
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not thorough and not slow and $(HERE)" $(ARGS)

test-all: $(VENV)/installed-dev  ## everything that runs in minutes on two cores
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and $(HERE)" $(ARGS)

test-slow: $(VENV)/installed-dev  ## full matrices, and ten times as many invented examples
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile slow -m "(slow or hypothesis) and $(HERE)" $(ARGS)

test-cuda: $(VENV)/installed-dev  ## on the GPU of this machine
	$(BIN)/python -m pytest -m cuda $(ARGS)

# of ten thousand tests only the files with such ones are read
MARKED_FILES = $(shell grep -rl --include='*.py' 'mark\.$(firstword $(MARKED))' tests)

test-emulated: ON_IT := tests/emulated tests/axiom tests/lowbit tests/verity
test-emulated: MARKED := emulated or cuda
test-emulated-quick: ON_IT := tests/emulated
test-emulated-quick: MARKED := emulated and not slow
test-emulated test-emulated-quick: $(VENV)/installed-dev  ## on a GPU that is emulated (Linux, a C++ compiler)
	EMULATED_CUDA=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "$(MARKED)" $(ARGS) $(ON_IT)

test-slurm: MARKED := slurm
test-slurm-quick: MARKED := slurm and not slow
test-slurm test-slurm-quick: $(VENV)/installed-dev  ## on a real one-node Slurm, brought up and taken down (root, Debian)
	scripts/test_slurm.sh run $(BIN)/python -m pytest -m "$(MARKED)" $(ARGS) $(MARKED_FILES)

test-nodes: MARKED := nodes
test-nodes-quick: MARKED := nodes and not slow
test-nodes test-nodes-quick: export TEST_SLURM_NODES := 4
test-nodes test-nodes-quick: export TEST_SLURM_GPUS := 0
test-nodes test-nodes-quick: export TEST_SLURM_CPUS := 2
test-nodes test-nodes-quick: $(VENV)/installed-dev  ## on four Slurm nodes of this machine, which are cut off, drained and killed (root, Debian)
	scripts/test_slurm.sh run $(BIN)/python -m pytest -m "$(MARKED)" $(ARGS) $(MARKED_FILES)

test-browser: MARKED := browser
test-browser-quick: MARKED := browser and not slow
# in a real Chromium, with axe-core; as root on Debian what is missing is installed
test-browser test-browser-quick: $(VENV)/installed-dev  ## the page
	scripts/browser.sh
	$(BIN)/python -m pytest -m "$(MARKED)" $(ARGS) $(MARKED_FILES)

# PYTHONS="python3.11 python3.12" names the Pythons; TORCH_INDEX=https://download.pytorch.org/whl/cpu spares gigabytes
test-matrix: $(VENV)/installed-dev  ## the wheel under every Python that is found, and with older and newer packages
	$(BIN)/nox -f scripts/noxfile.py

lint: $(VENV)/installed-dev  ## ruff, mypy (strict but for ebc_lab/report), the layers of docs/architecture.md, the lock
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python scripts/house.py
	$(BIN)/python scripts/lock.py --check

# but for torch, whose newest build may be for GPUs: raise its line by hand; run the tests before you commit it
lock: $(VENV)/installed-dev  ## constraints.txt with the newest versions that go together
	grep '^torch==' constraints.txt > $(VENV)/torch.txt
	$(PIP) -c $(VENV)/torch.txt --upgrade --upgrade-strategy eager -e ".[dev]"
	$(BIN)/python scripts/lock.py --write

package: $(VENV)/installed-dev  ## wheel and sdist, in dist: built twice to the same bytes, with a bill of materials; both installed in clean environments and used there
	$(BIN)/python scripts/package.py

proof: $(VENV)/installed-dev  ## every suite, whole, in a fresh clone of the last commit; goes on where a call before it was ended
	$(BIN)/python scripts/proof.py $(ARGS)

SPHINX = $(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --nitpicky --quiet
# NOTEBOOK=off leaves the notebook, which takes a minute, as it is written
site: $(VENV)/installed-dev  ## the documentation, in build/site: built strictly, its notebook executed, its links checked
	rm -rf build/site
	$(SPHINX) -b html -d build/doctrees docs build/site
	$(BIN)/python scripts/site_links.py build/site

site-links: export NOTEBOOK := off
site-links: $(VENV)/installed-dev  ## whether what the documentation links to elsewhere is there; needs the network
	$(SPHINX) -b linkcheck -d build/doctrees docs build/site-links

clean:
	rm -rf $(VENV) dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache

# torch comes first and pinned: an unpinned one brings gigabytes of CUDA to a machine without a GPU. A torch that the
# environment already has (a venv made with --system-site-packages on a GPU machine) is kept. pip would spend half a
# minute compiling everything: only what the quick commands import is compiled here.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) -c constraints.txt torch
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt -e .
	$(BIN)/python -m compileall -q -j 0 ebc_lab $(addprefix $(VENV)/lib/python*/site-packages/,typer rich numpy filelock)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@
