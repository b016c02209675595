"""Wrapper module -> ONNX: the only caller of torch's exporter.

Weights are *inputs* while tracing, so the exporter cannot fold, merge or copy them: tracing a 2 B-parameter model
takes half a gigabyte, and every weight keeps the name it has in the checkpoint.
"""

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call

from ..base import dims
from ..base.onnx_text import OPSET
from . import wrappers


@dataclass(frozen=True)
class GraphSpec:
    """One graph to trace: sample inputs, dynamic axes by letter name, output names with axes."""

    name: str
    module: nn.Module
    inputs: dict[str, Any]  # name -> tensor, or list of tensors for `past`
    axes: dict[str, Any]  # name -> {axis: Dim}, same nesting
    input_names: list[str]
    outputs: dict[str, list[str | int]]  # name -> shape with axis names


class _WeightsAsInputs(nn.Module):
    """The same computation with the parameters handed in."""

    def __init__(self, body: nn.Module):
        super().__init__()
        object.__setattr__(self, "body", body)  # hidden from torch, or its parameters would be exported as well

    def forward(self, inputs, weights):
        return functional_call(self.body, weights, kwargs=inputs)


def specs(model: nn.Module, shape: Any) -> list[GraphSpec]:
    """The graphs that `shape.traced` names. `shape` is the family's Shape."""
    batch, prompt, past, new = Dim(dims.BATCH), Dim(dims.PROMPT, min=2), Dim(dims.PAST, min=1), Dim(dims.NEW, min=1)
    b, s, p, n, layers = 2, 9, 7, 3, shape.layers
    rows = [b, shape.kv_heads, p, shape.head_dim]

    def kv_out(axis: str) -> dict[str, list[str | int]]:
        return {n: [dims.BATCH, shape.kv_heads, axis, shape.head_dim] for n in dims.cache_names(layers, "present")}

    logits: dict[str, list[str | int]] = {"logits": [dims.BATCH, shape.vocab]}
    prefill = GraphSpec(
        "prefill",
        wrappers.Prefill(model),
        {
            "inputs_embeds": torch.zeros(b, s, shape.hidden),
            "position_ids": torch.zeros(shape.position_axes, b, s, dtype=torch.int64),
            "attention_mask": torch.ones(b, s, dtype=torch.int64),
        },
        {
            "inputs_embeds": {0: batch, 1: prompt},
            "position_ids": {1: batch, 2: prompt},
            "attention_mask": {0: batch, 1: prompt},
        },
        ["inputs_embeds", "position_ids", "attention_mask"],
        logits | kv_out(dims.PROMPT),
    )
    decode = GraphSpec(
        "decode",
        wrappers.Decode(model),
        {
            "inputs_embeds": torch.zeros(b, n, shape.hidden),
            "position_ids": torch.zeros(shape.position_axes, b, n, dtype=torch.int64),
            "attention_mask": torch.ones(b, p + n, dtype=torch.int64),
            "past": [torch.zeros(rows) for _ in range(2 * layers)],
        },
        {
            "inputs_embeds": {0: batch, 1: new},
            "position_ids": {1: batch, 2: new},
            "attention_mask": {0: batch, 1: Dim.DYNAMIC},  # past + new, which torch can only infer
            "past": [{0: batch, 2: past}] * (2 * layers),
        },
        ["inputs_embeds", "position_ids", "attention_mask", *dims.cache_names(layers, "past")],
        {"logits": [dims.BATCH, dims.NEW, shape.vocab]} | kv_out(dims.CONTEXT),
    )
    return [*([_vision(model, shape)] if shape.sees else []), prefill, decode]


def _vision(model: nn.Module, shape: Any) -> GraphSpec:
    patches, segments = 4 * shape.merge**2, 2
    return GraphSpec(
        "vision",
        wrappers.Vision(model),
        {
            "pixel_values": torch.zeros(patches, shape.patch_dim),
            "position_ids": torch.zeros(patches, 2, dtype=torch.int64),
            "cu_seqlens": torch.tensor([0, patches // 2, patches]),
        },
        # The number of patches is a multiple of merge^2, which torch can only infer.
        {
            "pixel_values": {0: Dim.DYNAMIC},
            "position_ids": {0: Dim.DYNAMIC},
            "cu_seqlens": {0: Dim("borders", min=segments)},
        },
        ["pixel_values", "position_ids", "cu_seqlens"],
        {"image_embeds": [dims.IMAGE_TOKENS, shape.hidden]},
    )


def trace(spec: GraphSpec) -> onnx.ModelProto:
    """The ONNX graph of one wrapper; weights are graph inputs named as in the checkpoint. Opset as in onnx_text."""
    body = spec.module.eval().requires_grad_(False)
    prefix = "model."
    used = {n: p for n, p in body.named_parameters() if _used(spec.name, n.removeprefix(prefix))}
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _WeightsAsInputs(body),
            (),
            kwargs={"inputs": spec.inputs, "weights": used},
            dynamo=True,
            dynamic_shapes={"inputs": spec.axes, "weights": dict.fromkeys(used)},
            input_names=[*spec.input_names, *(n.removeprefix(prefix) for n in used)],
            output_names=list(spec.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    proto = program.model_proto
    _strip(proto)
    for value, axes in zip(proto.graph.output, spec.outputs.values(), strict=True):
        _set_axes(value, axes)
    for value in proto.graph.input:
        if value.name in _INPUT_AXES:
            _set_axes(value, _INPUT_AXES[value.name][spec.name])
        elif value.name.startswith("past."):
            _set_axes(value, [dims.BATCH, None, dims.PAST, None])
    return proto


_INPUT_AXES: dict[str, dict[str, list[str | int | None]]] = {
    "inputs_embeds": {"prefill": [dims.BATCH, dims.PROMPT, None], "decode": [dims.BATCH, dims.NEW, None]},
    "position_ids": {
        "prefill": [None, dims.BATCH, dims.PROMPT],
        "decode": [None, dims.BATCH, dims.NEW],
        "vision": [dims.PATCHES, 2],
    },
    "attention_mask": {"prefill": [dims.BATCH, dims.PROMPT], "decode": [dims.BATCH, dims.CONTEXT]},
    "pixel_values": {"vision": [dims.PATCHES, None]},
    "cu_seqlens": {"vision": [f"{dims.SEGMENTS}+1"]},
}


def _used(graph: str, name: str) -> bool:
    """Whether that graph can read a parameter: the vision graph reads the tower, the others the rest."""
    return (".visual." in name) == (graph == "vision")


def _set_axes(value: onnx.ValueInfoProto, axes: list[str | int | None]) -> None:
    """Write axis names into a graph input or output; None leaves the size that is there."""
    for dim, axis in zip(value.type.tensor_type.shape.dim, axes, strict=True):
        if isinstance(axis, str):
            dim.dim_param = axis
        elif axis is not None:
            dim.dim_value = axis


def _strip(proto: onnx.ModelProto) -> None:
    """Drop what the exporter knows about the machine: stack traces with paths, producer, symbolic shapes in between."""
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    for holder in (proto.graph.node, proto.graph.input, proto.graph.output, proto.graph.initializer):
        for item in holder:
            del item.metadata_props[:]
            item.doc_string = ""
    proto.graph.name, proto.producer_name, proto.producer_version = "cm_export", "cm_export", ""


@contextlib.contextmanager
def _quiet():
    """The exporter prints and warns about things that its caller cannot change."""
    levels = {n: logging.getLogger(n).level for n in ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
