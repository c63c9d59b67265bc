# Build, test and demo from a checkout. Needs Python 3.11 or newer, a C++20 compiler and make. Everything is installed into
# .venv, which is created once. All paths are relative, so that the checkout's path may contain spaces.
VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
PIP := $(PYTHON_IN_VENV) -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/installed
SOURCES := setup.py pyproject.toml constraints.txt $(filter-out %.md,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*))
CXX_FILES := $(filter-out %.md,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/emulator_kernels/*))
KERNEL_TESTS := tests/test_memory.py tests/test_causal_conv1d.py tests/test_fused_ops.py tests/test_serving.py $(wildcard tests/test_gated_delta*.py tests/test_simple_gla*.py tests/test_hype_attention*.py)

.PHONY: demo test build-asan test-asan fuzz-asan bench lint clean

# By default glibc returns the large buffers of a training step to the system, and the next step page-faults them in again.
KEEP_BUFFERS := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
demo: $(INSTALLED)
	$(KEEP_BUFFERS) $(VENV)/bin/halo demo

test: $(INSTALLED)
	$(PYTHON_IN_VENV) -m pytest

# Takes under a minute; `python -m bench` runs everything.
bench: $(INSTALLED)
	$(PYTHON_IN_VENV) -m bench ops --quick

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

# The CPU kernels under AddressSanitizer and UBSan, in a separate build; -P keeps the checkout's own modules from being
# imported. Skips tests that run no further kernel code (compile, opcheck) or take too long (gradcheck, thousands of tokens).
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH="$$(echo build/asan/lib.*)" $(PYTHON_IN_VENV) -P
build-asan: $(INSTALLED)
	CXXFLAGS="$(SANITIZE) -O1 -g -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" HYPENET_SKIP_CUDA_BUILD=1 \
		$(PYTHON_IN_VENV) setup.py --quiet build --build-base build/asan
	$(SANITIZED) -c "from hypenet_kernels import _native; assert 'asan' in _native.cpu().__file__, _native.cpu()"

test-asan: build-asan
	$(SANITIZED) -m pytest -k "not compile and not opcheck and not gradcheck and not thousand" $(KERNEL_TESTS)

# Random calls of every op under the same: CASES of them, from seed FIRST on.
CASES := 100000
FIRST := 0
fuzz-asan: build-asan
	$(SANITIZED) tests/fuzz_loop.py --cases $(CASES) --first $(FIRST)

clean:
	rm -rf build .mypy_cache hypenet.egg-info hypenet_kernels/*.so hypenet_kernels/_build.json $(INSTALLED)

# Editable, so that tests and demo import the checkout; without build isolation, so that a rebuild needs no network.
$(INSTALLED): $(SOURCES) | $(PYTHON_IN_VENV)
	$(PIP) install --constraint constraints.txt setuptools pybind11 ninja
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable ".[halo,bench,test,dev]"
	@touch $@

$(PYTHON_IN_VENV):
	@for python in "$${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do \
		if "$$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
			"$$python" -m venv $(VENV) && exit 0; \
			rm -rf $(VENV); \
			echo "make: $$python cannot create a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; \
			exit 1; \
		fi; \
	done; \
	echo "make: Python 3.11 or newer was not found; to name one: make PYTHON=/path/to/python3" >&2; \
	exit 1
