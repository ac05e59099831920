PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test check test-tensorflow test-clients test-llama test-all bench clean

demo: $(VENV)/.ready ## set up, then walk the main road on the model that ships with gpt2x
	$(BIN)/gpt2x demo

test: $(VENV)/.ready check ## set up, then lint, type-check and test
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-tensorflow: $(VENV)-tensorflow/.ready ## the reader and writer against a live TensorFlow, in its own environment
	$(VENV)-tensorflow/bin/python -m pytest tests/test_tensorflow.py

test-clients: $(VENV)/.ready $(VENV)-optimum/.ready examples/node_modules/.ready ## other programs load what export wrote
	test -d $(VENV)-headers || sh tests/clients/headers.sh $(abspath $(VENV)-headers) || rm -rf $(VENV)-headers
	$(BIN)/python -m pytest -rs tests/test_clients.py

test-llama: $(VENV)/.ready $(VENV)-llama/.ready ## llama.cpp loads the GGUF that convert writes
	$(BIN)/python -m pytest -rs tests/test_llama.py

test-all: test test-tensorflow test-clients test-llama ## everything, and what is slow
	$(BIN)/python -m pytest -m slow

fuzz: $(VENV)/.ready ## damaged files for every reader, others each time: make fuzz MINUTES=60
	$(BIN)/python tests/fuzz/run.py --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))
	$(BIN)/python tests/fuzz/shrink.py --examples 300

bench: $(VENV)/.ready $(VENV)-bench/.ready $(VENV)-optimum/.ready $(VENV)-mobius/.ready $(VENV)-ctranslate2/.ready $(VENV)-llama/.ready ## speed and memory beside peers; takes 20 GB of disk and an hour
	$(BIN)/python benchmarks/convert.py --gpt2x $(abspath $(VENV)-bench/bin/gpt2x)
	$(BIN)/python benchmarks/export.py --gpt2x $(abspath $(VENV)-bench/bin/gpt2x) \
		--optimum $(abspath $(VENV)-optimum/bin/optimum-cli) --mobius $(abspath $(VENV)-mobius/bin/mobius)
	$(BIN)/python benchmarks/decode.py --gpt2x $(abspath $(VENV)-bench/bin/gpt2x) --transformers $(abspath $(BIN)/python) \
		--optimum $(abspath $(VENV)-optimum/bin/python) --ctranslate2 $(abspath $(VENV)-ctranslate2/bin/python) \
		--llama $(abspath $(VENV)-llama/bin/python)

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --editable '.[dev]'
	touch $@

$(VENV)-tensorflow/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-tensorflow
	$(VENV)-tensorflow/bin/python $(PIP) --editable . pytest tensorflow-cpu
	touch $@

# optimum needs transformers < 5; torch first, so that nothing brings another one.
$(VENV)-optimum/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-optimum
	$(VENV)-optimum/bin/python $(PIP) torch
	$(VENV)-optimum/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 'optimum-onnx[onnxruntime]==0.1.0' 'transformers<5'
	touch $@

examples/node_modules/.ready: examples/package.json
	cd examples && ONNXRUNTIME_NODE_INSTALL=skip npm install --no-package-lock --no-audit --no-fund --silent
	touch $@

# A peer of make bench alone.
$(VENV)-mobius/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)-mobius
	$(VENV)-mobius/bin/python $(PIP) torch transformers mobius-onnx
	touch $@

# And another, which needs transformers < 5 to read a model.
$(VENV)-ctranslate2/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)-ctranslate2
	$(VENV)-ctranslate2/bin/python $(PIP) torch
	$(VENV)-ctranslate2/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 'transformers<5' ctranslate2
	touch $@

# llama.cpp, which is compiled here: it takes a C++ compiler and some minutes. Where a processor has AMX, GCC drops the
# stores that llama.cpp configures it with, and the program ends in an illegal instruction; hence the flags.
$(VENV)-llama/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)-llama
	CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" $(VENV)-llama/bin/python $(PIP) --no-cache-dir llama-cpp-python gguf safetensors
	touch $@

# As a user has it: installed, not editable, and with nothing but what gpt2x itself needs.
$(VENV)-bench/.ready: pyproject.toml constraints.txt $(wildcard converters/*.py gpt2x/*.py gpt2x/*/*.py)
	$(PYTHON) -m venv --clear $(VENV)-bench
	$(VENV)-bench/bin/python $(PIP) '.[export,formats]'
	rm -rf build
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tensorflow $(VENV)-optimum $(VENV)-headers $(VENV)-bench $(VENV)-mobius $(VENV)-ctranslate2 $(VENV)-llama examples/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
