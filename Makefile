# Everything runs in a private virtual environment (.venv), made on first use from setup.py.
#   make demo    train the quickstart model, measure it, draw a sample sheet     (runs/quickstart)
#   make test    the test suite
#   make lint    ruff and mypy
#   make notebooks    run the notebooks from top to bottom
#   make parity  compare pretrained parts with the packages they come from (PyTorch, in .venv-parity)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint notebooks parity clean

demo: $(VENV)/.installed
	$(BIN)/mmdiff train experiments/quickstart.py --workdir runs/quickstart
	$(BIN)/mmdiff evaluate runs/quickstart
	$(BIN)/mmdiff sample runs/quickstart --prompt "first, a large red circle at the top left" --images 0 \
		--out runs/quickstart/story --overwrite
	@echo "sample sheets: runs/quickstart/samples    a document the model wrote: runs/quickstart/story/index.html"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n auto --max-worker-restart 0 --dist loadfile --no-loadscope-reorder \
		--ignore tests/test_notebooks.py

notebooks: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q tests/test_notebooks.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --no-cache .   # its cache remembers which modules did not exist yet
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: .venv-parity/.installed
	.venv-parity/bin/python -m pytest -q tests/pretrained

.venv-parity/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install --quiet --upgrade pip
	-.venv-parity/bin/pip install --quiet torch --index-url https://download.pytorch.org/whl/cpu    # smaller, if it can be had
	.venv-parity/bin/pip install --quiet --editable ".[parity]"
	@touch $@

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mmdiff needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs
