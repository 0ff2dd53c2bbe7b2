# Everything runs in a virtual environment, .venv, made on first use and remade in place when its inputs change.

PROFILE ?= quick
PYTHON ?= python3

ENVIRONMENT := .venv/.installed
RUN := .venv/bin/python -m

.DEFAULT_GOAL := help
.PHONY: help book pdf sweep test clean

help:
	@echo 'make book   run every notebook and render the book; only what changed is done again'
	@echo 'make pdf    make the book, and of all of its pages one PDF, to print or to keep; needs Chromium'
	@echo 'make sweep  run one chapter over values of its parameters, and lay its results side by side, such as'
	@echo '            make sweep CHAPTER=02_gradient_ascent OVER="corpus=reuters,tales seeds=2"'
	@echo 'make test   check the code and its layers, and run all tests, the whole book at profile quick among them'
	@echo 'make clean  remove what these commands made here; downloads and trained models stay in the user cache'
	@echo
	@echo 'make book PROFILE=quick   small models, minutes on a laptop (the default)'
	@echo 'make book PROFILE=cpu     reference results: more seeds and a 135M-parameter model, hours on 2 cores'
	@echo 'make book PROFILE=gpu     models and datasets from the Hugging Face hub, for one 80 GB GPU'
	@echo 'PYTHON=python3.12         the interpreter to use, 3.11 or later (the default: python3)'

book: $(ENVIRONMENT)
	@$(RUN) unlearnlib.book.build --profile '$(PROFILE)'

pdf: $(ENVIRONMENT)
	@$(RUN) unlearnlib.book.build --profile '$(PROFILE)' --pdf

sweep: $(ENVIRONMENT)
	@$(RUN) unlearnlib.book.sweep '$(CHAPTER)' $(OVER) --profile '$(PROFILE)'

# One thread per process: the tests run two at a time, and sums over more threads differ in their last digits.
# The tests run every notebook through papermill; nbval runs the last as Jupyter would, with its own defaults.
test: export OMP_NUM_THREADS = 1
test: export PYTHONHASHSEED = 0
test: export TOKENIZERS_PARALLELISM = false
test: $(ENVIRONMENT)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@.venv/bin/lint-imports --no-cache --no-logo
	@$(RUN) pytest -n 2 --dist loadscope --nbval-lax --nbval-current-env tests notebooks/23_claims.ipynb

clean:
	rm -rf .venv _build notebooks/results .pytest_cache .ruff_cache unlearnlib.egg-info
	find unlearnlib tests notebooks -name __pycache__ -prune -exec rm -rf {} +

# The stamp comes last: an installation that was interrupted is taken up again.
$(ENVIRONMENT): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'error: $(PYTHON) is not there, or older than the Python 3.11 that is needed; name one with PYTHON='; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet "$$(grep '^pip==' requirements.txt)"
	$(RUN) pip install -r requirements.txt
	PYTHONWARNINGS=ignore $(RUN) pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
