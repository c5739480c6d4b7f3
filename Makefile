# The commands of this repository. Each works from a bare clone: the first one installs into .venv.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PROFILE ?= cpu
PROFILES := smoke cpu gpu paper
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
BOOK := .venv/bin/jupyter-book build . --config _config.yml --toc book/_toc.yml

export BOOK_PROFILE := $(PROFILE)
export PYTHONUTF8 := 1
# Some machines set this; every process would then compile all of torch's Python anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help
help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo '  Options: PROFILE=$(subst $() ,|,$(PROFILES)), default cpu.'

# The stamp is written last, so that an interrupted installation is begun anew.
# --no-compile halves the time: Python compiles the few modules that are used when it meets them.
.venv/installed: requirements.txt pyproject.toml
	@test -e $@ || rm -rf .venv
	@rm -f $@
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: profile
profile: .venv/installed
	@case ' $(PROFILES) ' in *' $(PROFILE) '*) ;; \
	    *) echo 'PROFILE=$(PROFILE) is unknown: use one of $(PROFILES).' >&2; exit 1;; esac
	@test '$(PROFILE)' != gpu || $(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or \
	    sys.exit("PROFILE=gpu needs a CUDA device and none was found: use PROFILE=cpu.")'

.PHONY: book
book: profile ## execute the chapters and build the pages
	@rm -rf _build/html _build/.doctrees
	$(BOOK) --all -W -n --keep-going
	@echo '$(CURDIR)/_build/html/index.html'

.PHONY: preview
preview: profile ## rebuild only the pages that changed; warnings do not stop it
	$(BOOK)
	@echo '$(CURDIR)/_build/html/index.html'

.PHONY: test
test: profile ## test the library, the chapters and the built book
	$(PYTEST)

.PHONY: reference
reference: profile ## rewrite the reference outputs of the chapters; read the diff before a commit
	$(PYTEST) chapters book --update-reference

.PHONY: run
run: profile ## train and measure: make run RUN=name [PROFILE=gpu] [RESUME=1]
	@test -n '$(RUN)' || { echo 'make run needs RUN=name, a file in configs/.' >&2; exit 1; }
	$(PYTHON) -m lib.run 'configs/$(RUN).yaml' --profile $(PROFILE) $(if $(RESUME),--resume)

.PHONY: tables
tables: .venv/installed ## rewrite the tables of paper versus ours from results/
	$(PYTHON) -m lib.results

.PHONY: exercises
exercises: .venv/installed ## write the chapters without solutions, as notebooks, for a class
	$(PYTHON) -m lib.exercises

.PHONY: slides
slides: profile ## write the slides of each part, from the executed chapters
	$(PYTHON) -m lib.slides

.PHONY: bench
bench: .venv/installed ## time the library against its peers, into book/tables/benchmarks.json
	$(PYTHON) benchmarks/_all.py

.PHONY: clean
clean: ## remove the built book, the executed chapters and caches; .venv stays
	rm -rf _build .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
