# make demo            what fusion does here and why, text from the trained checkpoint at TP=2, parity with JAX
# make demo CUDA=1     the same with the GPU packages (in .venv-cuda)
# make test            everything that runs without a GPU
# make lint            ruff and basedpyright

PYTHON ?= python3
MODEL  := tests/data/tiny-qwen3-next
PROMPT := def __enter__(self):

ifdef CUDA
VENV   := .venv-cuda
EXTRAS := cuda,bench
else
VENV   := .venv
EXTRAS := jax,test,lint
endif
BIN := $(VENV)/bin

.PHONY: demo test lint gpu-test clean

demo: $(VENV)/.installed
	$(BIN)/python -m shared_config explain --model $(MODEL) --tp 2
	$(BIN)/python -m core_torch generate --model $(MODEL) --tp 2 --max-tokens 96 --prompt "$(PROMPT)"
	$(BIN)/python -m jax_bridge parity --model $(MODEL) --tp 2 --prompts 2 --max-tokens 48

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "not gpu" -n 2

gpu-test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# torch goes first and by its exact version, so that nothing else chooses a build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv .venv-cuda
