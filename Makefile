# Commands. Each sets up what it needs first.
#   make demo        train a teacher, a plain student and a distilled student on small images, and write a report
#   make test        all tests
#   make test-fast   the tests for every day: all but those marked slow
#   make docs        build the documentation as a site, in site/
#   make lint        ruff: rules and format
#   make types       mypy
#   make setup       only the environment
#   make help        this text
#
# Variables, as in `make test PYTHON=python3.11`:
#   PYTHON=python3           interpreter that makes the environment (3.9 to 3.13)
#   VENV=.venv               its folder; VENV=system uses the packages that PYTHON already has, and installs nothing
#   DETECTRON2=              registry, official, or a path or URL of detectron2's source; empty keeps what is installed
#   TESTS=                   test files or node ids; empty means all
#   PYTEST_OPTIONS=...       options of pytest; by default as many processes as there are cores, at most four
#   DATA=blood_cells         the demo's images: blood_cells (drawn) or bccd (real, with BCCD=<folder>)
#   DETECTOR=retinanet       the demo's detector: retinanet, gfl, atss or fcos
#   SEEDS=1 ITERATIONS=200   the demo's repetitions and length
#   OUTPUT=                  the demo's output folder
#   DEMO_OPTIONS=            further options of tools/demo.py

PYTHON ?= python3
VENV ?= .venv
DETECTRON2 ?=
PYTEST_OPTIONS ?= -n auto --maxprocesses 4
DATA ?= blood_cells
DETECTOR ?= retinanet
SEEDS ?= 1
ITERATIONS ?= 200
RUN = $(if $(filter system,$(VENV)),$(PYTHON),$(VENV)/bin/python)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast docs lint types

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" DETECTRON2="$(DETECTRON2)" bash scripts/setup.sh

demo: setup
	@$(RUN) tools/demo.py --data "$(DATA)" --bccd "$(BCCD)" --detector "$(DETECTOR)" --seeds $(SEEDS) --iterations $(ITERATIONS) \
	  $(if $(OUTPUT),--output "$(OUTPUT)") $(DEMO_OPTIONS)

test: setup
	$(RUN) -m pytest $(PYTEST_OPTIONS) $(TESTS)

test-fast: setup
	$(RUN) -m pytest -m "not slow" $(PYTEST_OPTIONS) $(TESTS)

docs: setup
	$(RUN) scripts/options.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup
	$(RUN) -m mypy
