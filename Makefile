# Every target sets up what it needs in .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := .venv-clients/.installed

.PHONY: options docs help demo serve clients test parity test-gpu lint format check repository models metrics clean
help:                 ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Triptych needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two on first use)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[server,dev]'
	@touch $@

$(CLIENTS): tests/clients/requirements.txt
	@test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	@echo "installing the client packages of the tests into .venv-clients"
	@.venv-clients/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

demo: $(INSTALLED)    ## start the server on the built-in model and ask it about a picture, a video and a sound
	@$(BIN)/python examples/demo.py

serve: $(INSTALLED)   ## serve MODEL (default: the built-in one) on port 30000; more options with ARGS="..."
	@$(BIN)/triptych serve $(MODEL) $(ARGS)

clients: $(CLIENTS)   ## the client packages that tests ask the server with: litellm, langchain-openai

test: $(INSTALLED) $(CLIENTS)  ## all tests that need no GPU (two at a time)
	@$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

parity: $(INSTALLED)  ## every model family beside transformers' generate, in process and served (two at a time)
	@$(BIN)/python -m pytest tests/parity --families all -n 2 --dist loadgroup $(ARGS)

test-gpu: $(INSTALLED)  ## the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(INSTALLED)    ## ruff: lint and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED)  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check: $(INSTALLED)   ## mypy, strict
	@test ! -L .typing/triptych || rm .typing/triptych
	@mkdir -p .typing/triptych && ln -sf $(foreach p,kernels python_models backends client,../../$(p)) .typing/triptych
	@ln -sf $(foreach p,$(wildcard triptych/*.py),../../$(p)) .typing/triptych
	@$(BIN)/mypy

repository: $(INSTALLED)  ## write model_repository/ anew from the contract
	@$(BIN)/python -m triptych.python_models.repository --output model_repository

models: $(INSTALLED)  ## write docs/models.md anew from the registry and docs/parity.json
	@$(BIN)/python docs/models_table.py

options: $(INSTALLED) ## write docs/serve.md anew from the parser
	@$(BIN)/python docs/serve_table.py

docs: $(INSTALLED)    ## the documentation as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

metrics: $(INSTALLED) ## write docs/metrics.md and the dashboards anew from the code
	@$(BIN)/python docs/metrics_table.py
	@$(BIN)/python docker/grafana/dashboards.py

clean:                ## remove the environment and all caches
	@rm -rf $(VENV) .venv-clients .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
