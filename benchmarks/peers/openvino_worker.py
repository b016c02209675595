"""OpenVINO GenAI as a contestant: python openvino_worker.py FOLDER '{"pruning_ratio": 75}' THREADS

picture_ms is its own "prepare embeddings": vision tower, tokenizer, embedding and, where it prunes, the choice of tokens.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from serving import serve


def main() -> None:
    folder, options, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    pipeline = openvino_genai.VLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    config = openvino_genai.GenerationConfig()
    config.do_sample, config.ignore_eos = False, True
    for name, value in options.items():
        setattr(config, name, value)

    def ask(pixels: np.ndarray, prompt: str, tokens: int) -> dict[str, Any]:
        config.max_new_tokens = tokens
        started = time.perf_counter()
        answer = pipeline.generate(prompt, images=[openvino.Tensor(pixels[None])], generation_config=config)
        ended = time.perf_counter()
        found = answer.perf_metrics
        out = {"picture_ms": found.get_prepare_embeddings_duration().mean, "first_ms": found.get_ttft().mean}
        out |= {"answer_ms": 1000 * (ended - started), "prompt_tokens": found.get_num_input_tokens()}
        return out | {"tokens": found.get_num_generated_tokens()}

    versions = {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__}
    serve(ask, {"versions": versions})


if __name__ == "__main__":
    main()
