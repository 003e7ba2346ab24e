# simkvm: `make` alone lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
OUT    ?= results

.DEFAULT_GOAL := help
.PHONY: help setup run validation answers test lint bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## virtual environment in .venv with the locked dependencies

# The dependencies are installed again only when their lock changes, so everything works offline after.
$(STAMP): requirements/dev.lock
	$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no venv: on Debian, install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: $(STAMP) ## the main job: sweep two workloads over kernels; tables here, figures in results/
	$(BIN)/simkvm sweep workloads/access-tracking.yaml --out $(OUT)/access-tracking
	$(BIN)/simkvm plot $(OUT)/access-tracking
	$(BIN)/simkvm sweep workloads/trace-unmap.yaml --out $(OUT)/trace-unmap
	$(BIN)/simkvm plot $(OUT)/trace-unmap

validation: answers ## write docs/validation.md and docs/answers anew (some 40 minutes)
	$(BIN)/simkvm validate page --out docs --store $(OUT)/validation

answers: $(STAMP) ## write docs/answers and docs/sensitivity.md anew; runs go on where they were
	$(BIN)/simkvm answers --out docs --store $(OUT)/answers

test: $(STAMP) lint ## lint, strict types, and all tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP) ## style and strict types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify notebooks/*.ipynb

bench: $(STAMP) ## speed and memory as ratios, side by side in one run
	$(BIN)/python benchmarks/bench.py

lock: ## make requirements/dev.lock anew from pyproject.toml (needs uv)
	uv lock
	uv export --frozen --no-emit-project --no-header --extra dev --format requirements-txt -o requirements/dev.lock
	rm uv.lock

clean: ## remove the virtual environment and caches; studies in results/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
