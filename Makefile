PYTHON ?= python3
SAMPLE = --call height=64 --call width=64 --call num_inference_steps=20 --call guidance_scale=0.0 \
         --call max_sequence_length=16 --prompt "red apple, noto style" --prompt "fox, fluent style" \
         --prompt "guitar, noto style" --prompt "rocket, fluent style"
RECIPES = fp8 int8 nf4 nvfp4 mxfp4 mixed

.PHONY: demo test lint docs sheet clean

demo: build/demo-venv/installed  ## quantize the bundled model and draw its pictures before and after
	build/demo-venv/bin/quantize --recipe tiny-flux-fp8.yaml --out build/tiny-flux-fp8 --overwrite --eval
	build/demo-venv/bin/python -P -m bitroute.eval.sheet builtin:tiny-flux build/tiny-flux-fp8 $(SAMPLE) \
	    --out build/before-after.png
	@echo "look at build/before-after.png and build/tiny-flux-fp8-report/report.html"

test: build/test-venv/installed  ## the whole suite, in a fresh environment
	build/test-venv/bin/python -m pytest

lint: build/test-venv/installed
	build/test-venv/bin/ruff check .
	build/test-venv/bin/ruff format --check .
	.ci/typecheck build/test-venv/bin/python

docs: build/test-venv/installed  ## regenerate docs/cli.md and docs/recipes.md
	build/test-venv/bin/python docs/generate.py

sheet: build/demo-venv/installed  ## regenerate docs/tiny-flux.png, all six recipes beside the original
	for name in $(RECIPES); do \
	    build/demo-venv/bin/quantize --recipe tiny-flux-$$name --out build/$$name --overwrite --no-verify || exit 1; \
	done
	build/demo-venv/bin/python -P -m bitroute.eval.sheet builtin:tiny-flux $(RECIPES:%=build/%) $(SAMPLE) \
	    --out docs/tiny-flux.png

build/demo-venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear build/demo-venv
	build/demo-venv/bin/pip install --quiet -c constraints.txt .
	touch $@

build/test-venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear build/test-venv
	build/test-venv/bin/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf build .typing *.egg-info
