# LogicRD's verbs. `make demo` and `make test` set up what they need, from nothing on Debian 12 or Ubuntu; a second run
# finds it there. What set-up does is in deploy/local/setup.sh.

SHELL := /bin/bash
SETUP := deploy/local/setup.sh
STACK := .venv/bin/python deploy/local/stack.py
UV := .cache/uv/bin/uv
# One lock for the machines the embedded stack runs on: x86-64 Linux with glibc 2.35 or newer, Python 3.11.
COMPILE = $(UV) pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	--python-platform x86_64-manylinux_2_35 $(UV_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check static faults chart bench images lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | while IFS=$$'\t' read -r verb what; do \
		printf '  make %-12s %s\n' "$$verb" "$$what"; done

setup: ## install what is missing: system packages, the three environments, the Kafka broker, helm, an S3 server
	@$(SETUP) line triton training stack chart s3

demo: ## 60 s of four simulated cameras; SOURCE=<address, video or folder> PRODUCT=<name> for your own pictures
	@$(SETUP) line triton stack
	.venv/bin/python deploy/local/demo.py $(if $(SOURCE),--source "$(SOURCE)") $(if $(PRODUCT),--product "$(PRODUCT)")

test: ## every check and every test, against the real Triton, Kafka, Redis, RTSP and S3
	@$(SETUP) line triton training stack chart s3 faults
	@$(MAKE) --no-print-directory static
	.venv/bin/pytest -n 2 --dist loadfile tests/unit/pipeline tests/contract tests/integration tests/e2e tests/unit/models_repo
	.venv-training/bin/pytest tests/unit/training

faults: ## the fault suite's long form, 78 cases in 20 minutes to an hour, as root; SEED=<number> repeats a run
	@$(SETUP) line triton stack faults
	.venv/bin/pytest -v -m "" tests/integration/faults --fault-seed $(or $(SEED),$(shell date +%s)) \
		--fault-table tests/integration/faults/README.md

check: static ## lint, types, secrets in the tree, known weaknesses of the locked packages (asks a public database)
	.venv/bin/python deploy/local/audit.py packages requirements/{dev,training,triton,triton-image}.txt || [ $$? = 4 ]

# What of it needs no network.
static:
	@$(SETUP) line training
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/python deploy/local/audit.py secrets
	.venv/bin/mypy
	.venv/bin/mypy deploy/local deploy/docker deploy/examples/mes tests/benchmarks
	.venv-training/bin/mypy training

chart: ## write what is generated in the chart, then lint it and test it against Kubernetes' schemas and promtool
	@$(SETUP) line chart
	.venv/bin/python deploy/local/chart.py
	.venv/bin/pytest tests/contract/test_chart_*.py

bench: ## measure the line and the served model against the limit of this machine; leaves the stack up
	@$(SETUP) line triton training stack
	@$(STACK) up
	.venv-training/bin/logicrd-train export --fused .cache/fused.onnx --product fastener-tray
	.venv/bin/logicrd bench serving --product fastener-tray --fused .cache/fused.onnx --json
	.venv/bin/logicrd bench line --product fastener-tray --fused .cache/fused.onnx --json
	.venv/bin/logicrd bench delivery --json

images: ## run the images' steps in a clean Debian root (as root), and list what they install in build/sbom (CycloneDX)
	@$(SETUP) line
	.venv/bin/python deploy/docker/rehearse.py --target worker --max-mb 400 deploy/docker/worker.Dockerfile -- --help
	.venv/bin/python deploy/docker/rehearse.py --target worker-genicam deploy/docker/worker.Dockerfile -- --help
	.venv/bin/python deploy/docker/rehearse.py --target training deploy/docker/training.Dockerfile -- --help
	mkdir -p build/sbom
	for image in pipeline training triton-image; do .venv/bin/cyclonedx-py requirements requirements/$$image.txt \
		--output-reproducible --of JSON -o build/sbom/$$image.cdx.json || exit 1; done

lock: $(UV) ## pin requirements/*.txt anew, with hashes; UV_FLAGS=--upgrade takes newer versions
	$(COMPILE) --extra tracing --extra s3 pyproject.toml -o requirements/pipeline.txt
	$(COMPILE) -c requirements/pipeline.txt --extra tracing --extra s3 pyproject.toml requirements/dev.in -o requirements/dev.txt
	$(COMPILE) -c requirements/pipeline.txt --extra training pyproject.toml requirements/training.in -o requirements/training.txt
	$(COMPILE) requirements/triton.in -o requirements/triton.txt
	$(COMPILE) -c requirements/dev.txt requirements/build.in -o requirements/build.txt
	$(subst 3.11,3.12,$(COMPILE)) -c requirements/pipeline.txt requirements/triton-image.in -o requirements/triton-image.txt

$(UV):
	python3.11 -m venv .cache/uv
	.cache/uv/bin/pip install --quiet uv

clean: ## stop the stack, then remove the environments, the stack's data and every cache
	@if [ -x .venv/bin/python ]; then $(STACK) down; fi
	rm -rf .venv .venv-training .venv-triton .stack .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache *.egg-info build demo
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +
