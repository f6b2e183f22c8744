# `make demo`, `make test` and `make bench` need Python 3.10 or newer and a C++ compiler; they make their own
# environment in .venv. TORCH is what pip is told to install first, for example
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# where the CPU is enough, or TORCH=torch for the newest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# processes of one thread that share the tests
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# the package is installed editable: Python files are read where they lie, these make a new build
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

# threads that wait for each other in a busy loop stall a run as soon as anything else wants a core
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow test-gpu lint bench bench-step bench-gpu cuda-all clean

demo: $(INSTALLED)
	$(BIN)/ssiuu-fast demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

# needs a CUDA device; the kernels are built for it where the build finds nvcc
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/penalty.py

# whole unlearning steps beside gradient difference alone; an hour or two on two cores. STEP="--quick" shows that it works
bench-step: $(INSTALLED)
	$(BIN)/python benchmarks/step.py $(STEP)

bench-gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py

# every CUDA kernel for every architecture, with what the compiler gave it; needs nvcc, no GPU
cuda-all:
	$(PYTHON) benchmarks/kernel_resources.py

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[unlearn,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist
