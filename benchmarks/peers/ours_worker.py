"""This project as a contestant: python ours_worker.py BUNDLE '{"dense": true}' THREADS

dense: every neuron and token            token_share: instead of the bundle's own
plain: low-bit products by ONNX Runtime's MatMulNBits, as on a machine without a compiler
"""

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime
from serving import serve

import cm_export
from cm_export.host.loaded import load
from cm_export.host.runner import Budget
from cm_export.plugins.cpu import library

NEVER = frozenset({-1})  # no end token ends an answer


def main() -> None:
    bundle, options, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    if options.get("plain"):
        library.find = lambda: None
    elif library.find() is None:
        raise SystemExit("the native library is not there, so this would measure something else")
    model = load(bundle, threads)
    budget = Budget(dense=options.get("dense", False), token_share=options.get("token_share"))

    def ask(pixels: np.ndarray, prompt: str, tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        pictures = model.see([pixels])
        seen = time.perf_counter()
        request = model.ask(prompt, pictures)
        prefilled = model.prefill(request, budget)
        counts, ids = library.find() is not None, []
        for token in model.tokens(prefilled, tokens, NEVER):
            ids.append(token)
            if len(ids) == 1:
                first = time.perf_counter()
                if counts:
                    library.reset()
        model.chat.decode(ids)
        ended = time.perf_counter()
        out = {"picture_ms": seen - started, "first_ms": first - started, "answer_ms": ended - started}
        out = {name: 1000 * seconds for name, seconds in out.items()}
        out |= {"prompt_tokens": request.tokens, "kept_tokens": prefilled.kept_tokens.shape[1], "tokens": len(ids)}
        if counts and library.counts()[1]:
            read, dense = library.counts()
            out |= {"read_mb": read / (len(ids) - 1) / 1e6, "read_share": read / dense}
        return out

    model.bundle.wait_verified()
    versions = {"cm-export": cm_export.__version__, "onnxruntime": onnxruntime.__version__}
    serve(ask, {"versions": versions, "kernel": library.info()["instructions"] if library.find() else None})


if __name__ == "__main__":
    main()
