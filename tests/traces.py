"""A graph is traced once in a run of tests: builds and exports of equal configurations take each other's, over all processes.

with traced_once():  build, or export      of code as it is; a test that changes what is traced stays outside
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator

import onnx
import pytest
import shared

from cm_export.build import workers


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Inside, the exporter runs only for graphs that nobody has traced yet; a build traces in this process."""
    from cm_export.source import trace

    plain = trace.trace

    def known(spec: trace.GraphSpec) -> onnx.ModelProto:
        folder = shared.once(f"trace_{digest(spec)}", lambda here: onnx.save(plain(spec), here / "graph.onnx"))
        return onnx.load(folder / "graph.onnx")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "trace", known)
        patch.setattr("cm_export.build.steps.trace.workers", lambda _, folder: workers.workers(0, folder))
        yield


def digest(spec) -> str:
    """Of all that a graph is made of: configuration, parameters, inputs and outputs. The code is the same.

    The tower's graph follows no setting of the decoder, and the decoder's no other; what a family adds to layers is its own.
    """
    model = spec.module.model
    inputs = [(n, [(k, v.shape) for k, v in _flat(s)]) for n, s in spec.inputs.items()]
    whole = model.config if spec.name == "vision" else model.get_decoder().config
    config = json.loads(whole.to_json_string(use_diff=False), object_hook=_of_the_graph)
    config.pop("text_config", None)
    config["adds"] = spec.inputs.get("rows") and str(type(spec.module.family))
    said = [
        spec.name, f"{type(spec.module).__module__}.{type(spec.module).__qualname__}", config, inputs,
        dict(spec.input_axes), dict(spec.outputs), spec.prefixes, spec.others,
        [(n, p.shape, str(p.dtype)) for n, p in spec.module.named_parameters() if spec.reads(n.removeprefix("model."))],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _of_the_graph(part):
    """Without where it lies on this machine, and without heads that are tied: the parameters show that."""
    return {k: v for k, v in part.items() if k not in ("_name_or_path", "tie_word_embeddings")}


def _flat(sample):
    return sample.items() if isinstance(sample, dict) else [("", sample)]
