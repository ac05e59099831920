PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# An environment is of one Python: it is made anew where PYTHON is another one than made it.
MADE := .made-by-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
CLIENTS := tests/peers/test_clients.py tests/peers/test_hub_clients.py tests/peers/test_task_clients.py
# Debian's browser, where it can be installed. Elsewhere the tests say what they skip.
CHROMIUM := command -v chromium >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null)
# The loader of Vulkan's drivers, in the same way.
VULKAN := test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libvulkan1 >/dev/null
PACKAGES := 'import sysconfig; print(sysconfig.get_path("purelib"))'
BENCH := $(BIN)/python benchmarks
# The floor in pyproject.toml is that of Linux and Python 3.11, so other platforms in CI do not measure.
COVERAGE ?= 1
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow check test-processors test-versions test-executorch test-tensorflow test-device test-eval test-serve test-clients test-llama test-triton test-ray test-all fuzz corpora bench bench-convert bench-export bench-decode bench-speculate bench-fidelity bench-adapters bench-attention bench-kernels bench-pair bench-sampling bench-score bench-serve bench-serve_soak bench-soak bench-plot bench-train_draft clean

demo: $(VENV)/.demo ## set up what is needed, then run an end-to-end demo with the small model that ships with gpt2x
	$(BIN)/gpt2x demo

test: $(VENV)/.ready check ## set up, then lint, type-check and test, and print the coverage of lines and branches; COVERAGE= does without it
	$(PYTEST) $(if $(WITHOUT_CLIENTS),$(addprefix --ignore=,$(CLIENTS))) $(if $(COVERAGE),--cov --cov-report=term:skip-covered)

test-slow: $(VENV)/.ready ## the tests that prove more than a change needs
	$(PYTEST) -m slow $(addprefix --ignore=,$(CLIENTS))

test-processors: $(VENV)/.ready $(VENV)-processors/.ready ## gpt2x on emulated processors: x86-64 without VNNI, and two of ARM
	$(BIN)/python -m pytest -rs tests/processors

test-versions: $(VENV)/.ready ## old and new versions of the runtimes, and tools of others, installed for real: 3 GB
	$(BIN)/python tests/versions/measure.py
	$(BIN)/python -m pytest -rs tests/versions

test-executorch: $(VENV)-executorch/.ready ## ExecuTorch lowers and runs the .pt2 that export wrote, in its own environment
	$(VENV)-executorch/bin/python -m pytest -rs -m 'not huge' tests/gpt2x/export/test_torch_programs.py

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

test-tensorflow: $(VENV)-tensorflow/.ready ## the reader and writer against a live TensorFlow, in its own environment
	$(VENV)-tensorflow/bin/python -m pytest tests/peers/test_tensorflow.py

test-device: $(VENV)-device/.ready ## a cache in a device's memory, on WebGPU with the software Vulkan driver of Debian's chromium
	-@$(CHROMIUM)
	-@$(VULKAN)
	test -n "$$VK_ICD_FILENAMES" || export VK_ICD_FILENAMES=/usr/lib/chromium/vk_swiftshader_icd.json; \
	$(VENV)-device/bin/python -m pytest -rs -k webgpu tests/gpt2x/runtimes/test_device_memory.py

test-eval: $(VENV)-eval/.ready ## lm-evaluation-harness runs tasks on gpt2x, in its own environment
	$(VENV)-eval/bin/python -m pytest -rs tests/peers/test_lm_eval.py

test-serve: $(VENV)-serve/.ready ## clients of OpenAI's interface, and a browser, on a running server, in an environment of their own
	-@$(CHROMIUM)
	$(VENV)-serve/bin/python -m pytest -rs tests/peers/test_serve_clients.py

test-clients: $(VENV)/.ready $(VENV)-optimum/.ready examples/node_modules/.ready ## other programs load what export wrote
	test -d $(VENV)-headers || sh tests/peers/clients/headers.sh $(abspath $(VENV)-headers) || rm -rf $(VENV)-headers
	-@$(CHROMIUM)
	$(BIN)/python -m pytest -rs -m 'not huge' $(CLIENTS)

test-llama: $(VENV)/.ready $(VENV)-llama/.ready ## llama.cpp loads the GGUF that convert writes
	$(BIN)/python -m pytest -rs tests/peers/test_llama.py

test-triton: $(VENV)-triton/.ready ## Triton Inference Server serves what export --triton writes, in its own environment
	$(VENV)-triton/bin/python -m pytest -rs tests/peers/test_triton.py

test-ray: $(VENV)-ray/.ready ## the example on Ray Serve loses a replica and a node, in its own environment
	$(VENV)-ray/bin/python -m pytest -W default -rs tests/peers/test_ray_serve.py # Ray leaves sockets to the garbage collector

test-all: test test-slow test-processors test-versions test-executorch test-tensorflow test-device test-eval test-serve test-clients test-llama test-triton test-ray ## everything, and what takes gigabytes
	$(BIN)/python -m pytest -m huge

fuzz: $(VENV)/.fuzz ## damaged files for every reader, others each time: make fuzz MINUTES=60 FORMAT=gguf
	$(BIN)/python tests/fuzz/run.py --minutes $(or $(MINUTES),10) $(addprefix --format ,$(FORMAT))
	$(BIN)/python tests/fuzz/shrink.py --examples 300 $(FORMAT)

corpora: $(VENV)/.ready ## files of others that must be refused: downloads them from GitHub, 3 MB, and tests with them
	$(BIN)/python tests/fuzz/corpora.py $(VENV)/corpora
	GPT2X_CORPORA=$(abspath $(VENV)/corpora) $(BIN)/python -m pytest -rs tests/fuzz/test_corpora.py

bench: bench-convert bench-export bench-decode ## speed and memory next to peers; takes 20 GB of disk and an hour. Each part by itself: make bench-score, and others below

bench-convert: $(VENV)/.ready $(VENV)-bench/.ready ## conversions next to cp; ARGS='--rounds 9' of this and all other parts are options of the script
	$(BENCH)/convert.py --gpt2x $(abspath $(VENV)-bench/bin/gpt2x) $(ARGS)

bench-export: $(VENV)/.ready $(VENV)-bench/.ready $(VENV)-optimum/.ready $(VENV)-mobius/.ready ## exports to ONNX, and decoding in fp32
	$(BENCH)/export.py --gpt2x $(abspath $(VENV)-bench/bin/gpt2x) \
		--optimum $(abspath $(VENV)-optimum/bin/optimum-cli) --mobius $(abspath $(VENV)-mobius/bin/mobius) $(ARGS)

bench-decode: $(VENV)/.ready $(VENV)-bench/.ready $(VENV)-optimum/.ready $(VENV)-ctranslate2/.ready $(VENV)-llama/.ready ## every precision next to other programs
	$(BENCH)/decode.py --gpt2x $(abspath $(VENV)-bench/bin/gpt2x) --transformers $(abspath $(BIN)/python) \
		--optimum $(abspath $(VENV)-optimum/bin/python) --ctranslate2 $(abspath $(VENV)-ctranslate2/bin/python) \
		--llama $(abspath $(VENV)-llama/bin/python) $(ARGS)

bench-speculate: $(VENV)/.ready ## guesses next to plain decoding, with the shipped model; CACHE=inplace-int8 for another cache
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/gpt2x export gpt2x/shakespeare --onnx "$$folder/onnx" --precision fp32,int8,w8a8 --cache $(or $(CACHE),inplace) && \
	$(BENCH)/speculate.py "$$folder/onnx" $(ARGS)

bench-fidelity: $(VENV)/.ready $(VENV)-llama/.ready ## accuracy of each precision next to llama.cpp's; TEXT=FILE for another text
	$(BENCH)/fidelity.py --text $(or $(TEXT),gpt2x/coriolanus.txt) --llama $(abspath $(VENV)-llama/bin/python) $(ARGS)

bench-adapters bench-attention bench-kernels bench-pair bench-sampling bench-score bench-serve_soak bench-soak bench-plot bench-train_draft: bench-%: $(VENV)/.ready ## LoRA inputs; two graphs; two kernels; the memory of a pair of precisions; choosing tokens; scoring; a server with clients that misbehave; memory; two models for speculation; the plot of docs/benchmarks.md
	$(BENCH)/$*.py $(ARGS)

bench-serve: $(VENV)/.ready $(VENV)-ctranslate2/.ready $(VENV)-xllamacpp/.ready ## gpt2x serve under load next to other servers; ARGS='--prefix' for prompts that begin alike
	$(BENCH)/serve.py --ctranslate2 $(abspath $(VENV)-ctranslate2/bin/python) --llama $(abspath $(VENV)-xllamacpp/bin/python) $(ARGS)

%/$(MADE):
	rm -rf $*
	$(PYTHON) -m venv $*
	touch $@

# make test adds to what make demo has installed.
$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/$(MADE)
	$(BIN)/python $(PIP) --no-compile --editable '.[export]'
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt $(VENV)/$(MADE)
	$(BIN)/python $(PIP) --no-compile --editable '.[dev]'
	touch $@ $(VENV)/.demo

# Atheris guides the fuzzer by coverage. There are wheels for Linux on x86-64; elsewhere the fuzzer runs without it.
$(VENV)/.fuzz: $(VENV)/.ready
	-$(BIN)/python $(PIP) --only-binary :all: atheris
	touch $@

$(VENV)-tensorflow/.ready: pyproject.toml constraints.txt $(VENV)-tensorflow/$(MADE)
	$(VENV)-tensorflow/bin/python $(PIP) --editable . pytest tensorflow-cpu
	touch $@

# All packages of ONNX Runtime install the same module. torch first, so that nothing brings another one.
$(VENV)-device/.ready: pyproject.toml constraints.txt $(VENV)-device/$(MADE)
	$(VENV)-device/bin/python $(PIP) torch
	$(VENV)-device/bin/python $(PIP) --editable '.[export]' pytest
	$(VENV)-device/bin/python -m pip uninstall --quiet --yes onnxruntime
	$(VENV)-device/bin/python -m pip --disable-pip-version-check install --quiet --no-deps onnxruntime-webgpu==1.27.0
	touch $@

# torch first, so that nothing brings another one. The harness's own model needs transformers and accelerate.
$(VENV)-eval/.ready: pyproject.toml constraints.txt $(VENV)-eval/$(MADE)
	$(VENV)-eval/bin/python $(PIP) torch
	$(VENV)-eval/bin/python $(PIP) --editable '.[export,eval]' pytest transformers accelerate
	touch $@

# Clients on top of what make test has installed, whose packages the .pth file adds.
$(VENV)-serve/.ready: $(VENV)/.ready $(VENV)-serve/$(MADE)
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(PACKAGES))')" >$$($(VENV)-serve/bin/python -c $(PACKAGES))/make-test.pth
	$(VENV)-serve/bin/python $(PIP) --no-compile openai langchain-openai 'lm-eval[api]>=0.4.13,<0.5'
	-npm install --prefix $(VENV)-serve/node --no-package-lock --no-audit --no-fund --silent openai@7
	touch $@

# The stub of Triton's Python backend in this wheel reads arrays of NumPy 1 only. torch first, so that nothing brings another one.
$(VENV)-triton/.ready: pyproject.toml constraints.txt $(VENV)-triton/$(MADE)
	$(VENV)-triton/bin/python $(PIP) torch
	$(VENV)-triton/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[export]' pytest 'numpy<2' nvidia-pytriton==0.7.0 'tritonclient[http,grpc]'
	touch $@

# torch first, so that nothing brings another one.
$(VENV)-ray/.ready: pyproject.toml constraints.txt $(VENV)-ray/$(MADE)
	$(VENV)-ray/bin/python $(PIP) torch
	$(VENV)-ray/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[export,serve]' pytest 'ray[serve]==2.60.0'
	touch $@

# optimum needs transformers < 5; torch first, so that nothing brings another one.
$(VENV)-optimum/.ready: pyproject.toml constraints.txt $(VENV)-optimum/$(MADE)
	$(VENV)-optimum/bin/python $(PIP) torch
	$(VENV)-optimum/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 'optimum-onnx[onnxruntime]==0.1.0' 'transformers<5'
	touch $@

examples/node_modules/.ready: examples/package.json
	cd examples && ONNXRUNTIME_NODE_INSTALL=skip npm install --no-package-lock --no-audit --no-fund --silent
	touch $@

# Debian's and pip's packages, in a folder. Where there is no apt, the tests say what they skip.
$(VENV)-processors/.ready: constraints.txt tests/processors/environment.sh
	rm -rf $(VENV)-processors
	sh tests/processors/environment.sh $(VENV)-processors $(BIN)/python && touch $@ || rm -rf $(VENV)-processors

# torch first, so that nothing brings another one. Compiled as it is installed: in torchao, that warns, which would be an error
# in the tests.
$(VENV)-executorch/.ready: pyproject.toml constraints.txt $(VENV)-executorch/$(MADE)
	$(VENV)-executorch/bin/python $(PIP) torch
	$(VENV)-executorch/bin/python $(PIP) --editable . pytest executorch==1.5.1
	touch $@

# A peer of make bench-export alone.
$(VENV)-mobius/.ready: constraints.txt $(VENV)-mobius/$(MADE)
	$(VENV)-mobius/bin/python $(PIP) torch transformers mobius-onnx
	touch $@

# And another, which needs transformers < 5 to read a model.
$(VENV)-ctranslate2/.ready: constraints.txt $(VENV)-ctranslate2/$(MADE)
	$(VENV)-ctranslate2/bin/python $(PIP) torch
	$(VENV)-ctranslate2/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 'transformers<5' ctranslate2 fastapi uvicorn
	touch $@

# llama.cpp, which is compiled here: it takes a C++ compiler and some minutes. Where a processor has AMX, GCC drops the
# stores that llama.cpp configures it with, and the program ends in an illegal instruction; hence the flags.
$(VENV)-llama/.ready: constraints.txt $(VENV)-llama/$(MADE)
	CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" $(VENV)-llama/bin/python $(PIP) --no-cache-dir llama-cpp-python gguf safetensors
	touch $@

# llama.cpp's server, of which this package has compiled wheels.
$(VENV)-xllamacpp/.ready: constraints.txt $(VENV)-xllamacpp/$(MADE)
	$(VENV)-xllamacpp/bin/python $(PIP) xllamacpp
	touch $@

# As a user has it: installed, not editable, and with nothing but what gpt2x itself needs.
$(VENV)-bench/.ready: pyproject.toml constraints.txt $(wildcard converters/*.py converters/*/*.py gpt2x/*.py gpt2x/*/*.py)
	$(PYTHON) -m venv --clear $(VENV)-bench
	$(VENV)-bench/bin/python $(PIP) '.[export,formats]'
	rm -rf build
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-processors $(VENV)-versions $(VENV)-executorch $(VENV)-tensorflow $(VENV)-eval $(VENV)-serve $(VENV)-triton $(VENV)-ray $(VENV)-optimum $(VENV)-headers $(VENV)-bench $(VENV)-mobius $(VENV)-ctranslate2 $(VENV)-llama examples/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
