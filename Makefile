# On a fresh machine: `make demo` prunes a model, `make test` checks everything.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types wheel tests random slow browser format clean

demo: $(VENV)/installed
	$(BIN)/prunekit demo --output demo-output

# lint, types and wheel side by side; tests come last, so that their count is what one reads at the end
test: $(VENV)/installed-dev
	$(MAKE) --no-print-directory --jobs 2 --output-sync types wheel lint
	$(MAKE) --no-print-directory tests

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports

types: $(VENV)/installed-dev
	$(BIN)/pyright

wheel: $(VENV)/installed-dev
	$(BIN)/python tests/wheel_check.py

tests: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu"

# other examples, in another order, than everybody's; `make random SEED=…` says again what one found
SEED := $(or $(SEED),$(shell date +%s))
random: $(VENV)/installed-dev
	HYPOTHESIS_PROFILE=random $(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu" --randomly-seed=$(SEED) --hypothesis-seed=$(SEED)

slow: $(VENV)/installed-dev
	$(BIN)/pytest -m "slow and not gpu"

# pages in a browser: what is missing is an error here, where the other targets leave these tests out
browser: $(VENV)/installed-dev
	$(PIP) --no-build-isolation --editable ".[browser]"
	@command -v chromium || command -v google-chrome || command -v chrome || { echo "make browser needs chromium or google-chrome on the PATH, e.g. apt-get install chromium"; exit 1; }
	BROWSER_TESTS=1 $(BIN)/pytest -m slow tests/core/report/test_page_browser.py

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo-output demo-output.partial .*_cache .hypothesis

# torch first: a build that lies on this machine will do; hatchling, so that the pinned one builds
$(VENV)/installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch hatchling
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@
