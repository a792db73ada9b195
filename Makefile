# Two commands do everything: `make latency` and `make test`. VENV=none uses the current environment.
VENV ?= .venv
PYTHON ?= python3
OLDEST_TRITON := 3.6.0
OLDEST_PEFT := 0.18
JOBS ?= 2

ifeq ($(VENV),none)
RUN :=
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/ready
endif
OLD := .triton-$(OLDEST_TRITON)
OLD_PEFT := .peft-$(OLDEST_PEFT)

.PHONY: latency test test-gpu test-gpu-slow soak lint format clean

latency: $(READY)
	$(PY) benchmarks/latency.py --quick

test: lint $(READY) $(OLD)/ready $(OLD_PEFT)/ready
	FUSED_LORA_OLD_TRITON=$(abspath $(OLD)) $(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow"
	PYTHONPATH=$(OLD) $(PY) -m pytest -n $(JOBS) --dist loadfile -m "kernels and not slow"
	PYTHONPATH=$(OLD_PEFT) $(PY) -m pytest -n $(JOBS) --dist loadfile -m "peft and not slow"

test-gpu:
	$(PYTHON) -m pytest -m "(gpu or device or kernels or peft) and not slow"

test-gpu-slow:
	$(PYTHON) -m pytest -m "(gpu or device or kernels) and slow"

soak: $(READY)
	$(PY) -m pytest tests/test_soak.py -m "slow or not slow"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip setuptools wheel
	$(VENV)/bin/pip install --quiet --no-build-isolation -e ".[test,bench,peft,trl,examples,metrics]"
	touch $@

# the kernels are also tested on the oldest Triton we support; its interpreter needs numpy < 2.4
$(OLD)/ready: | $(READY)
	$(PY) -m pip install --quiet --no-deps --target $(OLD) "triton==$(OLDEST_TRITON)" "numpy<2.4"
	touch $@

# the PEFT integration is also tested on the oldest PEFT we support
$(OLD_PEFT)/ready: | $(READY)
	$(PY) -m pip install --quiet --no-deps --target $(OLD_PEFT) "peft==$(OLDEST_PEFT).*"
	touch $@

clean:
	rm -rf $(VENV) $(OLD) $(OLD_PEFT) build dist *.egg-info
