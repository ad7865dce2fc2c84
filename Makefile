# One door for people and for CI. `make` alone explains itself.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
PARAMS ?= default
IMAGE  ?= celestial
OVERLAY ?= prod
NAMESPACE = celestial$(if $(filter dev,$(OVERLAY)),-dev)
CONTAINERS ?= docker
TARGET ?= serve
export IMAGE REASON ISSUES   # a recipe reads them as $$IMAGE: what somebody types there is never run
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
UV     := $(shell command -v uv 2>/dev/null)

# The tools of the environment first, whether or not somebody activated it.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Compiled modules are kept, whatever the shell says: else TensorFlow takes twice as long to import, each time.
unexport PYTHONDONTWRITEBYTECODE
export GRADIO_ANALYTICS_ENABLED := False
export PLOOMBER_STATS_ENABLED := false
export NO_MKDOCS_2_WARNING := 1

.PHONY: help
help:  ## this list
	@echo "celestial_ml: from a notebook to a served model"; echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12 | sed 's/^/  make /'
	@echo; echo "First time here?  make run, then make serve."

# The environment: everything in the lock, by hash. A second call starts at once.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "Setting up $(VENV): once, some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(UV),)
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
else
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
endif
	@touch $(READY)

.PHONY: setup
setup: $(READY)  ## the environment alone; every other target does it when needed

.PHONY: run
run: $(READY)  ## the pipeline; PARAMS=guide runs another params file than default, ARGS="--with stress" more
	@celestial run $(PARAMS) $(ARGS)

.PHONY: report
report: $(READY)  ## the run PARAMS beside that of the revision BASE (or the champion), in comparison/
	@mkdir -p comparison
	@celestial report $(PARAMS) $(if $(BASE),--base $(BASE)) --output comparison/report.md --output comparison/comparison.html \
	  2> comparison/errors.txt || { cat comparison/errors.txt >&2; \
	  { sed 's/^/> /' comparison/errors.txt; echo; celestial report $(PARAMS); } > comparison/report.md; }  # BASE may keep no run yet

.PHONY: gate
gate: $(READY)  ## exit code 1 unless the gate let the run PARAMS pass
	@celestial report $(PARAMS) --json | python -c 'import json, sys; v = json.load(sys.stdin)[0]["verdict"]; \
	  print(*v["reasons"], sep="\n"); sys.exit(v["decision"] not in ("promote", "same"))'

# In a function of make a comma would end its argument.
TO_ISSUES = --set 'alerts.sinks=[log,github]' --set "alerts.github_repository=$$ISSUES"
.PHONY: monitor
monitor: $(READY)  ## one look at the deployed model; with ISSUES=OWNER/NAME an alert opens an issue there
	@celestial monitor check --params $(PARAMS) $(if $(ISSUES),$(TO_ISSUES)) || test $$? = 1 -a -n "$$ISSUES"  # then the issue is the alarm

.PHONY: retrain
retrain: $(READY)  ## train anew if a trigger has a reason, or for REASON; results/PARAMS and comparison/ show what came of it
	@celestial retrain $(PARAMS) $(if $(REASON),--reason "$$REASON",--if-triggered) --json > retrain.json || { cat retrain.json; exit 1; }
	@run=$$(python -c 'import json; print(json.load(open("retrain.json")).get("run", ""))'); cat retrain.json; rm retrain.json; \
	  test -z "$$run" || { celestial keep $$run; rm -rf results/$(PARAMS); mv results/$$run results/$(PARAMS); rm -rf results/retrain; \
	  mkdir -p comparison; celestial report $$run --output comparison/report.md; }

.PHONY: serve
serve: $(READY)  ## the HTTP API and the demo on http://127.0.0.1:8000
	@celestial serve

.PHONY: lab
lab: $(READY)  ## JupyterLab: workspace, notebook diffs, reloaded modules; ARGS="--port=9999 --no-browser" go to it
	@python -m celestial_ml.workbench.lab $(ARGS)

.PHONY: mlflow
mlflow: $(READY)  ## MLflow's page on the runs and versions, on http://127.0.0.1:5000
	@celestial ui

.PHONY: test
test: $(READY)  ## all tests: library notebooks, contracts, pipeline, HTTP, browser
	@pytest

# Where a secret could be. 3: one of the baseline's has moved to another line.
SCANNED := ':!celestial_ml/*.py' ':!nbs/images' ':!results' ':!*.lock' ':!*.dvc' ':!*.npz' ':!.secrets.baseline'
.PHONY: secrets
secrets: $(READY)  ## no key and no password in what git keeps
	@git ls-files -z -- . $(SCANNED) | xargs -0 -P 2 -n 100 sh -c 'b=$$(mktemp); cp .secrets.baseline $$b; \
	  found=$$(detect-secrets-hook --baseline $$b "$$@"); code=$$?; rm $$b; \
	  test $$code = 0 -o $$code = 3 || { echo "$$found"; exit 1; }' _

.PHONY: check
check: secrets  ## format, lint, types, no secrets, clean notebooks, no stale export
	@ruff format --check nbs tests bench
	@ruff check nbs tests bench
	@mypy
	@pytest -q -n 0 tests/test_notebooks.py

.PHONY: bench
bench: $(READY)  ## speeds beside other tools', as ratios; QUICK=1: a small part within 5 minutes
	@python -m bench $(if $(QUICK),--quick) $(ARGS)

# A guide runs again when its notebook has changed; `make -B guides` runs them all.
GUIDES := $(patsubst nbs/%,output/%,$(wildcard nbs/guides/*.ipynb))
output/guides/%.ipynb: nbs/guides/%.ipynb | $(READY)
	@echo "$<: a minute or two"
	@CELESTIAL_TERMINAL=1 jupyter nbconvert --to notebook --execute --log-level ERROR --ExecutePreprocessor.timeout=900 --output-dir output/guides $<
	@jupyter nbconvert --to notebook --inplace --coalesce-streams --log-level ERROR $@

.PHONY: guides
guides: $(READY) $(GUIDES)  ## run the guides that have changed, into output/guides; `make docs` shows their outputs

.PHONY: docs
docs: $(READY) $(GUIDES)  ## the documentation site, in site/; the first time it runs the guides, for some minutes
	@mkdocs build --strict
	@echo "look:  site/index.html"

.PHONY: export
export: $(READY)  ## after editing notebooks: format, clean, export, README, params/default.yaml
	@ruff format --quiet nbs tests bench
	@nbdev_clean
	@nbdev_export
	@python -m celestial_ml.workbench.generated_files
	@touch $(READY)   # nbdev has written pyproject.toml anew, with nothing new in it

# pip-audit doesn't resolve beside the lock.
AUDIT := .cache/pip-audit
.PHONY: audit
audit: $(READY)  ## licences and bill of materials of the environment, into build/audit/; known vulnerabilities of the lock
	@mkdir -p build/audit
	@pip-licenses --format=markdown --with-urls --output-file build/audit/licences.md
	@cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o build/audit/sbom.json
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1; }
	@$(AUDIT)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock || { \
	  echo "make audit: not passed. Vulnerable packages are listed above; 'could not be audited': PyPI's JSON API was not reached, nothing is known" >&2; exit 1; }

.PHONY: dist
dist: $(READY)  ## what the package index gets, in dist/
	@rm -rf dist
	@python -m build --no-isolation --outdir dist . > /dev/null
	@ls dist

.PHONY: version
version: $(READY)  # of the package: the tag of a release is v and this
	@python -c 'import celestial_ml; print(celestial_ml.__version__)'

.PHONY: image
image:  ## the container IMAGE, with the model of the run PARAMS; TARGET=train trains; CONTAINERS=podman builds it without Docker
	@$(CONTAINERS) build --target $(TARGET) --build-arg MODEL=output/$(PARAMS) --build-arg REVISION=$$(git rev-parse HEAD) --tag "$$IMAGE" .

.PHONY: deploy
deploy:  ## roll IMAGE=NAME@sha256:… (or two of them) out with kubectl, to OVERLAY; back to the one before if it doesn't get ready
	@mkdir -p build/deploy
	@{ echo 'resources: [../../deploy/kubernetes/overlays/$(OVERLAY)]'; echo 'images:'; for one in $${IMAGE:-nothing}; do \
	  [[ $$one =~ ^([^@]*/([^@/:]+))@(sha256:[0-9a-f]{64})$$ ]] || { echo "$$one is no NAME@sha256:…" >&2; exit 2; }; \
	  printf '  - {name: "ghcr.io/celestial-ml/%s", newName: "%s", digest: "%s"}\n' "$${BASH_REMATCH[2]}" "$${BASH_REMATCH[1]}" "$${BASH_REMATCH[3]}"; \
	  done; } > build/deploy/kustomization.yaml
	@kubectl apply -k build/deploy
	@kubectl -n $(NAMESPACE) rollout status deployment -l app.kubernetes.io/name=celestial --timeout=10m || \
	  { kubectl -n $(NAMESPACE) rollout undo deployment -l app.kubernetes.io/name=celestial; exit 1; }

.PHONY: lock
lock:  ## resolve requirements.lock anew, for Python 3.11 to 3.13, and deploy/gpu.lock; needs uv
	@uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-header --quiet --upgrade -o requirements.lock
	@mkdir -p build
	@uv pip compile pyproject.toml --extra gpu -c requirements.lock --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet --upgrade -o build/gpu.lock
	@awk '/^[a-z]/ {more = /^(nvidia-|tensorflow==)/} more' build/gpu.lock > deploy/gpu.lock   # the rest is in requirements.lock

.PHONY: clean
clean:  ## remove what was made: output, state, caches, site; keeps the environment and data/raw
	@rm -rf output .celestial site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
