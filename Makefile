# The two commands to know: `make demo` and `make test`. Both set up what they need first.
#   PYTHON=python3.11   interpreter that makes the environment
#   VENV=.venv          its folder; VENV=system uses the packages that PYTHON has already
#   DETECTRON2=official install detectron2 from its own repository instead of the package registry
#   demo: DATA=blood_cells|bccd BCCD=<folder> DETECTOR=retinanet|gfl|atss|fcos SEEDS=1 ITERATIONS=200 OUTPUT=<folder>
PYTHON ?= python3
VENV ?= .venv
DETECTRON2 ?= registry
DATA ?= blood_cells
DETECTOR ?= retinanet
SEEDS ?= 1
ITERATIONS ?= 200
RUN = $(if $(filter system,$(VENV)),$(PYTHON),$(VENV)/bin/python)

.PHONY: setup demo test lint types

setup:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" DETECTRON2="$(DETECTRON2)" bash scripts/setup.sh

demo: setup
	@$(RUN) tools/demo.py --data "$(DATA)" --bccd "$(BCCD)" --detector "$(DETECTOR)" --seeds $(SEEDS) --iterations $(ITERATIONS) \
	  $(if $(OUTPUT),--output "$(OUTPUT)") $(DEMO_OPTIONS)

test: setup
	$(RUN) -m pytest $(TESTS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup
	$(RUN) -m mypy
