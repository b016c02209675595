# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := artifacts/demo.plan
PICTURE := cm_export/demo/pictures/four-shapes.png
QUESTION := "describe the image."
ASK = run $(DEMO) --image $(PICTURE) --prompt $(QUESTION)
SPEED = bench $(DEMO) --image-tokens 144 --threads 1
STAMP := .venv/.installed

.PHONY: demo test test-wide test-families test-triton lint clean accuracy bench-quality bench-precision bench-neurons bench-policies bench-matching bench-guard plugins bench-kernels gpu-proof gpu-rehearsal lowest bench-cpu bench-peers bench-active bench-serve bench-serve-2b bench-lossless

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("the versions of constraints.txt need Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The tables of the build are kept in a file: `cm-export inspect` shows them, too.
demo: $(STAMP)
	@echo '1. A trained Qwen2-VL of 7 M parameters becomes ONNX graphs, which must equal PyTorch (about a minute)'
	@$(BIN)/cm-export build --recipe first-look --out $(DEMO) > artifacts/demo-build.txt
	@echo
	@echo '2. Ask it about $(PICTURE), first pruned, then with every neuron and every image token'
	@echo '$$ $(BIN)/cm-export $(ASK) --overlay artifacts/overlay.png'
	@$(BIN)/cm-export $(ASK) --overlay artifacts/overlay.png --quiet
	@echo '$$ $(BIN)/cm-export $(ASK) --dense'
	@$(BIN)/cm-export $(ASK) --dense --quiet
	@echo
	@echo '3. Time both: prefill reads picture and question, gather fetches the chosen neurons once, decode writes a token'
	@echo '$$ $(BIN)/cm-export $(SPEED)'
	@$(BIN)/cm-export $(SPEED) --quiet
	@echo
	@echo 'artifacts/overlay.png shows the image tokens that were kept (bright): they cover the four shapes.'
	@echo 'The model is a toy: its answers show that pruning works, its times say nothing about a model of real size.'
	@echo 'README.md says what to try next.'

# Types are checked by one of the tests, beside the others.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What `make test` leaves to the night, since it shows one case of each kind: the same tests on further configurations, precisions,
# TensorRT versions and planted bugs (an hour). `test-families` are those of them that concern families and checkpoints.
test-wide: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'wide and not triton'

FAMILY_TESTS := tests/test_*famil*.py tests/test_*pictures.py tests/test_configuration.py tests/test_packings*.py tests/test_rounds.py tests/test_clips*.py
test-families: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'wide and not triton' $(FAMILY_TESTS)

# A real Triton server, set up under artifacts/triton without a GPU or containers, loads what `deploy triton` writes (a few minutes).
# SOAK=1 loads it for two minutes besides, and looks at its memory; SOAK_SECONDS=900 for longer.
TRITON := artifacts/triton
$(TRITON)/.installed: $(STAMP) tests/triton_setup.sh tests/triton_stand_in.py | $(DEMO)
	rm -rf $(TRITON) && mkdir -p $(TRITON)
	$(BIN)/cm-export deploy triton $(DEMO) --out $(TRITON)/models --quiet --no-warm-up
	PYTHON=$(PYTHON) bash tests/triton_setup.sh $(TRITON) $(TRITON)/models/requirements.txt
	@touch $@

test-triton: $(TRITON)/.installed
	TRITON_HOME=$(TRITON) $(BIN)/python -m pytest -m 'triton$(if $(SOAK),, and not wide)' tests/test_triton_server.py

# The table of docs/accuracy.md: all official test questions, dense and random controls beside (about 40 minutes).
accuracy: $(STAMP)
	$(BIN)/cm-export build --recipe demo --out artifacts/easy-vqa.plan
	$(BIN)/cm-export eval artifacts/easy-vqa.plan --task easy-vqa --threads 1 --out artifacts/easy-vqa.json

# Neuron policies on a real language model: benchmarks/quality/*.json and the table of docs/quality.md (about 20 minutes).
bench-quality: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python recipes/fetch_smollm2.py --out artifacts/smollm2-135m
	$(BIN)/python benchmarks/neuron_quality.py --model artifacts/smollm2-135m --out benchmarks/quality/smollm2-135m.json --docs docs/quality.md

# Weights in 4 and 8 bits on a real language model and the demo models: benchmarks/quality/precision.json and docs/precision.md (half an hour).
bench-precision: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,eval]'
	$(BIN)/python recipes/fetch_smollm2.py --out artifacts/smollm2-135m
	$(BIN)/python benchmarks/precision.py --smollm2 artifacts/smollm2-135m --out benchmarks/quality/precision.json --docs docs/precision.md

SCENES := artifacts/scenes.plan
SCENES_LLAVA := artifacts/scenes-llava.plan
$(SCENES) $(SCENES_LLAVA): artifacts/%.plan: $(STAMP)
	$(BIN)/cm-export calibrate --model $* --out artifacts/$*-calibration.safetensors --prompts 112 --threads 1
	$(BIN)/cm-export build --recipe $* --calibration artifacts/$*-calibration.safetensors --out $@

# Policies of neurons and tokens beside each other at four budgets, on two architectures: benchmarks/policies/scenes.json and
# scenes-llava.json, docs/policies.md (about an hour).
bench-policies: $(SCENES) $(SCENES_LLAVA)
	for bundle in $^; do name=$$(basename $$bundle .plan); \
		$(BIN)/python benchmarks/policies.py $$bundle --limit 60 --out benchmarks/policies/$$name.json --docs docs/policies.md || exit 1; done

# Fills, layer budgets and blocks of every neuron policy: benchmarks/policies/neurons.json and docs/neurons.md (half an hour).
bench-neurons: $(SCENES)
	$(BIN)/python benchmarks/neuron_policies.py $(SCENES) --out benchmarks/policies/neurons.json --docs docs/neurons.md

# The paper's question, whether tokens and neurons are better chosen together: benchmarks/policies/matching.json (about 15 minutes).
bench-matching: $(SCENES)
	$(BIN)/python benchmarks/matching.py $(SCENES) --limit 30 --out benchmarks/policies/matching.json --docs docs/policies.md

# Thresholds and low bits along a real model's own answers: benchmarks/quality/active.json and docs/active.md (about 20 minutes).
bench-active: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python recipes/fetch_smollm2.py --out artifacts/smollm2-135m
	for bits in fp32 int8 int4; do $(BIN)/cm-export build --model artifacts/smollm2-135m --neurons active --weights $$bits \
		--out artifacts/smollm2-$$bits.plan --work-dir artifacts/.smollm2.stages || exit 1; done
	$(BIN)/python benchmarks/active.py artifacts/smollm2-fp32.plan artifacts/smollm2-int8.plan artifacts/smollm2-int4.plan \
		--out benchmarks/quality/active.json --docs docs/active.md

# What the guard costs where nothing is wrong: benchmarks/guard.json and the table of docs/guard.md (about 10 minutes, 10 GB of memory).
bench-guard: $(STAMP)
	$(BIN)/cm-export build --recipe demo --token-cache index --out artifacts/guard.plan
	$(BIN)/python benchmarks/random_bundle.py --out artifacts/mid.plan
	$(BIN)/python benchmarks/random_bundle.py --out artifacts/2b.plan --sizes qwen2-vl-2b
	$(BIN)/python benchmarks/guard.py artifacts/guard.plan --random artifacts/mid.plan artifacts/2b.plan --every 16 --questions 24 \
		--tokens 33 --repeats 3 --neuron-share 0.4 --out benchmarks/guard.json --docs docs/guard.md

# The guard beside dense decoding at the same answer, weights in 4 bits: benchmarks/lossless.json and docs/guard.md (10 minutes).
bench-lossless: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python recipes/fetch_smollm2.py --out artifacts/smollm2-135m
	$(BIN)/cm-export build --model scenes --neurons active --tokens dense --weights int4 --out artifacts/scenes-int4.plan
	$(BIN)/cm-export build --model artifacts/smollm2-135m --neurons active --weights int4 --out artifacts/smollm2-int4.plan
	$(BIN)/python benchmarks/lossless.py artifacts/scenes-int4.plan artifacts/smollm2-int4.plan --out benchmarks/lossless.json --docs docs/guard.md

# The race against OpenVINO GenAI: benchmarks/peers.json and docs/race.md. The first time it makes everything under artifacts/peers
# (about 20 minutes), afterwards it only measures (2 minutes); PEERS= for more options, such as --rebuild or --large.
bench-peers: $(STAMP)
	$(BIN)/python benchmarks/bench_peers.py --out benchmarks/peers.json --docs docs/race.md $(PEERS)

# What servers add to a token and how many clients they carry: benchmarks/serve.json and the tables of docs/serve.md, docs/triton.md and
# docs/scale.md (3 minutes); fails where it is more than 2 ms, or four clients get less than 1.5 times the tokens of one.
bench-serve: $(TRITON)/.installed $(DEMO)
	$(BIN)/python benchmarks/serve.py $(DEMO) --triton $(TRITON) --threads 1 --lanes 2 --most-ms 2 --least-gain 1.5 \
		--out benchmarks/serve.json --docs docs

# The same at the sizes of Qwen2-VL-2B, random weights of 4 bits: benchmarks/serve-2b.json (making the bundle takes half an hour and 12 GB of
# memory); fails where a token takes more than a tenth longer than in one process.
bench-serve-2b: $(TRITON)/.installed
	test -d artifacts/2b-int4.plan || $(BIN)/python benchmarks/random_bundle.py --out artifacts/2b-int4.plan --sizes qwen2-vl-2b --weights int4
	$(BIN)/python benchmarks/serve.py artifacts/2b-int4.plan --triton $(TRITON) --threads 2 --lanes 1 --tokens 24 --rounds 3 --clients 1 \
		--most-share 0.1 --out benchmarks/serve-2b.json --docs docs --part=-2b

# The TensorRT plugins for every GPU that this nvcc knows (a few minutes); TENSORRT_INCLUDE= the directory of NvInferRuntime.h,
# ARCHITECTURES= for fewer, such as 87.
plugins: $(STAMP)
	$(BIN)/python -m cm_export.plugins.build --out artifacts/plugins --harness \
		$(if $(TENSORRT_INCLUDE),--tensorrt-include $(TENSORRT_INCLUDE)) $(if $(ARCHITECTURES),--architectures '$(ARCHITECTURES)')

# The kernels beside dense products: artifacts/kernels.json. Needs a CUDA device and a torch that uses it.
bench-kernels: plugins
	$(BIN)/python benchmarks/kernels.py --library artifacts/plugins/libcm_plugins.so --out artifacts/kernels.json

# The CPU ops beside ONNX Runtime's own and a plain read of memory: artifacts/cpu-kernels.json (two minutes, 2 GB of memory).
bench-cpu: $(STAMP)
	$(BIN)/python benchmarks/cpu_kernels.py --out artifacts/cpu-kernels.json

# Everything of docs/gpu.md on a CUDA machine: artifacts/gpu-proof/proof.json. Its python needs torch, numpy, onnx and onnxruntime,
# and nothing is installed; without a network give TENSORRT_INCLUDE=.
gpu-proof:
	$(PYTHON) benchmarks/gpu_proof.py --out artifacts/gpu-proof $(if $(TENSORRT_INCLUDE),--tensorrt-include $(TENSORRT_INCLUDE))

# The same without a GPU (5 minutes): the emulator runs what the GPU would, nvcc compiles it.
gpu-rehearsal: $(STAMP)
	$(BIN)/python benchmarks/gpu_proof.py --rehearse --out artifacts/gpu-rehearsal \
		$(if $(TENSORRT_INCLUDE),--tensorrt-include $(TENSORRT_INCLUDE))

# The lowest versions that pyproject.toml admits, in an environment of their own: they must answer as the newest do (a minute).
# EXTRAS=export tries those of making bundles as well.
lowest: $(STAMP) $(DEMO)
	rm -rf .venv/lowest && $(PYTHON) -m venv .venv/lowest
	$(BIN)/python tests/lowest.py $(EXTRAS) > artifacts/lowest.txt
	.venv/lowest/bin/python -m pip install --quiet --constraint artifacts/lowest.txt '.$(if $(EXTRAS),[$(EXTRAS)])'
	.venv/lowest/bin/cm-export doctor
	$(if $(EXTRAS),.venv/lowest/bin/cm-export build --recipe demo --out artifacts/lowest.plan)
	for how in --dense --token-share=0.5; do \
		.venv/lowest/bin/cm-export run $(DEMO) --image $(PICTURE) --prompt $(QUESTION) $$how > artifacts/lowest.answer && \
		$(BIN)/cm-export run $(DEMO) --image $(PICTURE) --prompt $(QUESTION) $$how | diff - artifacts/lowest.answer || exit 1; done

$(DEMO):
	$(BIN)/cm-export build --recipe first-look --out $(DEMO)

lint: $(STAMP)
	$(BIN)/ruff check . --fix
	$(BIN)/ruff format .

clean:
	rm -rf .venv artifacts/* *.egg-info .pytest_cache .ruff_cache .hypothesis
