# leansense: `make` alone lists what there is. Everything works from a fresh clone, with nothing activated.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup tables test gates lab papers notebooks prepare hooks clean unlock
.DELETE_ON_ERROR:

SYSTEM  ?=
SCALE   ?= demo
DATA    ?=
PROFILE ?= default
CORES   ?= 0
FRESH   ?=
PORT    ?= 8888
PYTHON  ?= python3
# A folder may be named $(x) or $HOME: taken as it stands, never expanded, and handed on through the environment. Recipes
# name these as "$$DATA", which the shell does not read a second time.
override SYSTEM := $(value SYSTEM)
override SCALE := $(value SCALE)
override DATA := $(value DATA)
override PROFILE := $(value PROFILE)
override CORES := $(value CORES)
override FRESH := $(value FRESH)
override PORT := $(value PORT)
export SYSTEM SCALE DATA PROFILE CORES FRESH PORT

bin := .venv/bin
# what tests, export, benchmark and pretrained rows (weights of images and of text) need on top of the requirements
EXTRAS := dev,onnx,bench,weights,text
ready := .venv/ready-$(shell cat settings.ini setup.py pyproject.toml | cksum | cut -d' ' -f1)
export LEANSENSE_ROOT := $(CURDIR)

help:  ## this list
	@echo "leansense: efficient perception, one notebook a step"
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## ?(.*)/  make \1|\2/' | column -t -s '|'
	@echo "options: SYSTEM=leaf  SCALE=smoke|demo|paper  DATA=folder  FRESH=1  PROFILE=default|slurm  CORES=n  PORT=8888"

setup: $(ready)  ## make .venv with all that is needed (once; tables, test and lab do it by themselves)

$(ready):
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.11 or newer, or name one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: name a Python of 3.11 or newer, as in make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --help >/dev/null 2>&1 || { echo "Python has no venv: apt-get install python3-venv"; exit 1; }
	@echo "setting up .venv (a few minutes, about 6 GB: PyTorch comes with CUDA) ..."
	@test -x $(bin)/python || $(PYTHON) -m venv .venv
	@$(bin)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@rm -f .venv/ready-*; touch $@

tables: $(ready)  ## rows without a current record, then tables, figures and PDF: the main job
	@$(bin)/python -m leansense.core.batch --system="$$SYSTEM" --scale="$$SCALE" --data="$$DATA" \
		--profile="$$PROFILE" --cores="$$CORES" $(if $(filter-out 0,$(FRESH)),--fresh)

test: $(ready)  ## the test suite, on up to four cores; it measures no time
	@$(bin)/python -m pytest -q -n auto --dist worksteal --durations=20

gates: $(ready)  ## the tests that measure time; one that fails is measured again when the machine is quiet
	@$(bin)/python -m pytest -q -m gate -rA

lab: $(ready)  ## JupyterLab on localhost, with its token; it opens the tour
	@$(bin)/python -m jupyterlab --ip=127.0.0.1 --port="$$PORT" --notebook-dir=. \
		--LabApp.default_url=/lab/tree/nbs/00_tour.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

papers: tables  ## the same as tables: it ends with the PDFs

notebooks: $(ready)  ## run the notebooks that teach and keep their outputs in place
	@$(bin)/python -m leansense.core.notebooks --system="$$SYSTEM" --jobs="$$CORES"

prepare: $(ready)  ## for developers: notebooks formatted, checked, exported and cleaned (outputs stay), then the tests
	@$(bin)/ruff format nbs tests setup.py && $(bin)/ruff check nbs tests setup.py
	@$(bin)/nbdev_export && $(bin)/nbdev_clean && $(MAKE) --no-print-directory test

hooks: $(ready)  ## for developers: nbdev's git and Jupyter hooks (also writes to ~/.jupyter)
	@$(bin)/nbdev_install_hooks

clean: unlock  ## remove runs/ and the LaTeX by-products; records, data and .venv stay
	@rm -rf runs .snakemake .pytest_cache; rm -f papers/*/main.{aux,bbl,blg,log,out,fls,fdb_latexmk}

# while another run is at work this says so and stops
unlock:  ## after a crash: take away locks and half-written files (tables does this by itself)
	@if [ -x $(bin)/python ]; then $(bin)/python -m leansense.core.batch unlock; else rm -rf .snakemake/locks; fi
