# PYTHON makes the environment, once; PIP_ARGS is handed to pip. The small CPU build of torch on Linux:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow train-nano calibrate-nano quality quality-quick bench bench-gpu

demo: $(INSTALLED)
	@mkdir -p outputs
	$(BIN)/python inference.py --seed 7 --output outputs/demo.png
	@echo "The picture: $(CURDIR)/outputs/demo.png"

test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

# Everything from nothing; each part goes on from its checkpoint. TIER=gpu DEVICE=cuda trains the larger world.
TIER ?= cpu
DEVICE ?= cpu
RUNS := training/runs/$(TIER)
NANO := assets/hidream-nano

train-nano: $(INSTALLED)
	$(BIN)/python -m training.vae --tier $(TIER) --device $(DEVICE) --output $(RUNS)/vae
	$(BIN)/python -m training.text --output $(RUNS)/text
	$(BIN)/python -m training.train --compile --tier $(TIER) --device $(DEVICE) --vae $(RUNS)/vae --text $(RUNS)/text --output $(RUNS)/transformer
	$(BIN)/python -m training.assemble --vae $(RUNS)/vae --text $(RUNS)/text --transformer $(RUNS)/transformer/transformer --output $(NANO)
	$(BIN)/python -m training.evaluate --tier $(TIER) --device $(DEVICE) --output $(RUNS)/evaluation.json --sheet $(RUNS)/sheet.png
	$(MAKE) calibrate-nano DEVICE=$(DEVICE)

# Calibrations of the bundled model, for the samplers and guidances of the quality benchmark. The matrices of x0 and
# velocity serve Euler, and other pipelines' loops, which do not show the branches of guidance.
CALIBRATE = $(BIN)/python calibrate.py --device $(DEVICE) --num_prompts 160 --num_held_out 64 --batch_size 16 --calibration_dir $(NANO)/calibration
CALIBRATE_STARTS = $(CALIBRATE) --num_prompts 112 --num_held_out 48 --prompt_file outputs/starts_inputs/prompts.jsonl

calibrate-nano: $(INSTALLED)
	$(CALIBRATE) --full_steps 25,17,13,10,8,7,6,5
	$(CALIBRATE) --full_steps 25,17,13,10,8,7,6,5 --guidance 4
	$(CALIBRATE) --full_steps 25,17,13,10,8,7,6,5 --guidance 5
	for target in x0 velocity; do for guidance in 2 4; do \
		$(CALIBRATE) --full_steps 25,17,13,10,8,7,5 --guidance $$guidance --target $$target || exit; \
		$(CALIBRATE) --full_steps 13,8 --scheduler euler --guidance $$guidance --target $$target || exit; done; done
	$(CALIBRATE) --full_steps 14,10,7,5 --model_type nano-dev
	$(CALIBRATE) --full_steps 8,6,4 --model_type nano-fast
	$(BIN)/python -m benchmarks.starts --write_inputs outputs/starts_inputs --num_inputs 112
	$(CALIBRATE_STARTS) --strength 0.4 --full_steps 10,7,6,5,4
	$(CALIBRATE_STARTS) --strength 0.6 --full_steps 15,10,8,6
	$(CALIBRATE_STARTS) --strength 0.8 --full_steps 20,14,10,8

# Rows are kept in outputs/quality: a stopped run goes on. DRAWBENCH=FILE adds tables of DrawBench's prompts. The whole takes hours on two cores, the quick one minutes.
quality: $(INSTALLED)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt matplotlib
	$(BIN)/python -m benchmarks.quality --plot docs/quality.png $(if $(DRAWBENCH),--drawbench $(DRAWBENCH))

quality-quick: $(INSTALLED)
	$(BIN)/python -m benchmarks.quality --quick

# Every way to draw, in one process on the same weights; the result files are written to benchmarks/results.
bench: $(INSTALLED)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt cache-dit
	$(BIN)/python -m benchmarks.peers --size nano
	$(BIN)/python -m benchmarks.peers --size small --rounds 3
	$(BIN)/python -m benchmarks.peers --family flux
	$(BIN)/python -m benchmarks.peers --family qwen-image
	$(BIN)/python -m benchmarks.profiling --size small
	$(BIN)/python -m benchmarks.variants --size small

# The 17.1 B configuration with random weights on one GPU of 80 GB, in under 9 minutes. BENCH_SIZE=small tries it out.
BENCH_SIZE ?= real
BENCH_ROUNDS ?= 2
bench-gpu: $(INSTALLED)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt cache-dit
	$(BIN)/python -m benchmarks.peers --size $(BENCH_SIZE) --rounds $(BENCH_ROUNDS)
	$(BIN)/python -m benchmarks.profiling --size $(BENCH_SIZE) --repeats 3
	$(BIN)/pytest -q -m gpu tests

$(INSTALLED): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -r requirements.txt ruff mypy pytest gguf openai
	@touch $@
