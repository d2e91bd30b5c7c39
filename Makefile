# `make demo` and `make test` are all a newcomer needs; each makes the environment by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --progress-bar off
NOISY := data/demo/noisy/best/model.safetensors
# What every recipe prints before it runs it is an ordinary command: copy it, change it, run it yourself.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup demo test test-all check bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup     the environment in .venv, from pinned requirements"
	@echo "make demo      synthetic speech → shards → two-rank training → CER, in under six minutes on two cores, installation included"
	@echo "make test      the tests; make test-all also runs the long ones"
	@echo "make check     ruff, mypy --strict, no import cycles"
	@echo "make bench     sharder, plan, stream, training, transcription and splitting beside what others use: 2 h, 8 GB"
	@echo "make clean     removes .venv, data/demo and data/bench"

setup: $(VENV)/.installed

# torch comes first and alone: what others ask of it is then satisfied, and nothing fetches another build.
$(VENV)/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into $(VENV) takes a minute or a few; pip writes to $(VENV)/install.log"
	@$(PYTHON) -m venv $(VENV)
	@{ $(PIP) $(shell grep '^torch==' requirements.txt) && $(PIP) -r requirements.txt -r requirements-dev.txt && \
		$(PIP) --no-deps --editable .; } \
		>$(VENV)/install.log 2>&1 || { tail -20 $(VENV)/install.log; exit 1; }
	@touch $@

# Two CPU ranks everywhere, also where there is one GPU
demo test test-all $(NOISY): export DS_ACCELERATOR := cpu

demo: setup
	streamtrain demo-corpus data/demo/raw --minutes 24 --children 48
	streamtrain build data/demo/raw/* --max-duration 6 --out data/demo/shards
	streamtrain train --config demo --ranks 2
	streamtrain evaluate --ranks 2 --model data/demo/run/best --shards data/demo/shards --out data/demo/run
	@streamtrain summary data/demo/run

# Three processes, for most tests wait for processes of their own; a file's tests share what they made, so stay together
PYTEST := python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
	--cov=sharding --cov=streamtrain --cov-report=term:skip-covered

test: setup
	$(PYTEST) -m "not long"

test-all: setup
	$(PYTEST)

check: setup
	ruff check .
	ruff format --check .
	mypy
	python -m pytest -q tests/test_architecture.py

bench: $(VENV)/.installed-bench $(NOISY)
	python -m tests.benchmarks.sharding
	python -m tests.benchmarks.streaming
	python -m tests.benchmarks.training
	python -m tests.benchmarks.transcribing
	python -m tests.benchmarks.splitting $(dir $(NOISY))
	python -m tests.benchmarks.languages
	python -m tests.benchmarks.scale

# The demo's model, trained on in noise: what hears words in noisy rooms.
$(NOISY): | $(VENV)/.installed-bench
	test -e data/demo/run/best/model.safetensors || $(MAKE) demo
	streamtrain train --config demo --ranks 2 --set model.scratch=null \
		model.pretrained=data/demo/run/best data.noise_snr_db=[5,40] train.run_dir=data/demo/noisy

$(VENV)/.installed-bench: $(VENV)/.installed requirements-bench.txt
	@$(PIP) -r requirements-bench.txt >>$(VENV)/install.log 2>&1 || { tail -20 $(VENV)/install.log; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) data/demo data/bench
