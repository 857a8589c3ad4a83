# What the README's commands call. Everything is set up in a virtual environment of this clone's own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: quickstart test drills lint bench docs clean

$(INSTALLED): setup.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'flowback_hf needs Python 3.11 or later, and this is ' + sys.version.split()[0] + '. Try: make PYTHON=python3.12')"
	@echo "Installing into $(VENV): this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	@# torch comes first and by itself: what is installed next would otherwise choose one, with gigabytes of CUDA.
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable .[train,demo,eval,app,test]
	touch $(INSTALLED)

quickstart:
	@start=$$(date +%s); $(MAKE) --no-print-directory $(INSTALLED) && \
	$(BIN)/python training/quickstart.py --output_dir outputs/quickstart --setup_seconds $$(($$(date +%s) - start))

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

# The long forms of tests/drills, and what takes too long for `make test`: about a quarter of an hour.
drills: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m drill tests/drills tests/training

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/prepare_flow.py
	$(BIN)/python benchmarks/sampling.py --compile

docs: $(INSTALLED)
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) outputs build dist src/*.egg-info
