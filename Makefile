# make train    a virtual environment, the package, and the main job on the embedded digits
# make test     the same for the tests;  SLOW=1 runs the slow ones too
# make soak     the drills that take long or measure time, on a machine with nothing else to do
# make docs     the documentation as a site, site/; a dead link is an error
# CONFIG=configs/resnet_cifar.py:20  ARGS="--config.seed=1"  EXTRAS=dev,cuda  PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/resnet20_digits.py
ARGS ?=
EXTRAS ?=
BIN = $(VENV)/bin
comma := ,
SELECT = $(if $(SLOW),-m "not soak",-m "not slow and not soak")

.PHONY: train eval test soak lint docs clean
train: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m jax_resnet.main --config $(CONFIG) $(ARGS)

eval: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m jax_resnet.main --mode=eval --config $(CONFIG) $(ARGS)

test: $(VENV)/installed-dev-$(EXTRAS)
	$(BIN)/python -m pytest $(SELECT) $(ARGS)

soak: $(VENV)/installed-dev-$(EXTRAS)
	SOAK=1 $(BIN)/python -m pytest -m "soak or timed" $(ARGS)

lint: $(VENV)/installed-dev-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-$(EXTRAS): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

$(VENV)/installed-dev-$(EXTRAS): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]"
	@touch $@ $(VENV)/installed-$(EXTRAS)

$(VENV)/docs-installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@
