"""Wrapper module -> ONNX: the only caller of torch's exporter.

Weights are *inputs* while tracing, so the exporter cannot fold, merge or copy them: tracing a 2 B-parameter model
takes half a gigabyte, and every weight keeps the name it has in the checkpoint.
"""

import contextlib
import functools
import gc
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call

from ..base import dims
from ..base.dims import cache_names
from ..base.frames import with_room
from ..base.onnx_text import OPSET
from ..families import Config, Family, Port, Tower
from . import layers, wrappers

Axes = list[str | int]
# Lengths that torch may take for granted; other named axes it must infer, such as the patches of a picture.
_LEAST = {dims.BATCH: None, dims.PROMPT: 2, dims.PAST: 1, dims.NEW: 1}


@dataclass(frozen=True)
class GraphSpec:
    """One graph to trace. Axes: a length, or the name of one that may change."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Any]  # name -> sample tensor, or name -> such a mapping (`past`, `rows`)
    input_axes: Mapping[str, Axes]  # of every tensor, in the order of the graph's inputs
    outputs: Mapping[str, Axes]
    prefixes: tuple[str, ...]  # of names of weights that it reads
    others: tuple[str, ...]  # of names of weights that it does not read, whatever the line above says

    def reads(self, weight: str) -> bool:
        """Whether the graph can read a weight of the checkpoint."""
        return weight.startswith(self.prefixes) and not weight.startswith(self.others)


class _WeightsAsInputs(nn.Module):
    """The same computation with the parameters handed in."""

    def __init__(self, body: nn.Module):
        super().__init__()
        object.__setattr__(self, "body", body)  # hidden from torch, or its parameters would be exported as well

    def forward(self, inputs, weights):
        return functional_call(self.body, weights, kwargs=inputs)


def specs(model: nn.Module, family: Family, config: Config) -> list[GraphSpec]:
    """The graphs that `Shape.traced` names; `model` is transformers', with or without weights."""
    shape, tower = family.shape(config), family.tower(config)
    b, s, p, n = 2, 9, 7, 3
    seen = tower.prefixes if tower else ()
    cache: Axes = [dims.BATCH, shape.kv_heads, dims.PAST, shape.head_dim]

    def border(new: str, context: str) -> dict[str, Axes]:
        return {
            "inputs_embeds": [dims.BATCH, new, shape.hidden],
            "position_ids": [shape.position_axes, dims.BATCH, new],
            "attention_mask": [dims.BATCH, context],
        }

    def samples(new: int, context: int) -> dict[str, torch.Tensor]:
        return {
            "inputs_embeds": torch.zeros(b, new, shape.hidden),
            "position_ids": torch.zeros(shape.position_axes, b, new, dtype=torch.int64),
            "attention_mask": torch.ones(b, context, dtype=torch.int64),
        }

    def present(rows: str) -> dict[str, Axes]:
        return {name: [*cache[:2], rows, cache[3]] for name in cache_names(shape.layers, "present")}

    further = tower.outputs[1:] if tower else ()
    more = {port.name: _prompt_rows(port) for port in further}
    rows = {port.name: torch.zeros(b, s, *port.row) for port in further}
    last_logits: dict[str, Axes] = {"logits": [dims.BATCH, shape.vocab]}
    logits: dict[str, Axes] = {"logits": [dims.BATCH, dims.NEW, shape.vocab]}
    prefill = GraphSpec(
        "prefill",
        wrappers.Prefill(model, family),
        samples(s, s) | ({"rows": rows} if rows else {}),
        border(dims.PROMPT, dims.PROMPT) | more,
        last_logits | present(dims.PROMPT),
        ("",),
        seen,
    )
    past = cache_names(shape.layers, "past")
    decode = GraphSpec(
        "decode",
        wrappers.Decode(model, family),
        samples(n, p + n) | {"past": {name: torch.zeros(b, shape.kv_heads, p, shape.head_dim) for name in past}},
        border(dims.NEW, dims.CONTEXT) | dict.fromkeys(past, cache),
        logits | present(dims.CONTEXT),
        ("",),
        seen,
    )
    return [*([_vision(model, tower)] if tower else []), prefill, decode]


def _vision(model: nn.Module, tower: Tower) -> GraphSpec:
    feeds = tower.feeds(tower.probes(np.random.default_rng(0)))
    return GraphSpec(
        "vision",
        tower.module(model),
        {port.name: torch.from_numpy(feeds[port.name]) for port in tower.inputs},
        {port.name: list(port.axes) for port in tower.inputs},
        {port.name: list(port.axes) for port in tower.outputs},
        tower.prefixes,
        (),
    )


def _prompt_rows(port: Port) -> Axes:
    """Axes of a further output of the tower where prefill reads it: a row for every token of the prompt."""
    return [dims.BATCH, dims.PROMPT, *port.axes[1:]]


def trace(spec: GraphSpec) -> onnx.ModelProto:
    """The ONNX graph of one wrapper; weights are graph inputs named as in the checkpoint. Opset as in onnx_text.

    Of a decoder whose layers are alike only the first are traced (layers.py).
    """
    body = spec.module.eval().requires_grad_(False)
    if isinstance(body, wrappers.Decoder) and (count := body.differing(spec.inputs)) < body.layers:
        with contextlib.suppress(layers.Unlike):
            return _repeated(spec, body, count)
    return _traced(spec)


def _repeated(spec: GraphSpec, body: wrappers.Decoder, count: int) -> onnx.ModelProto:
    """The same of its first `count` layers, repeated. Raises Unlike."""
    later = {n for kind in ("past", "present") for n in cache_names(body.layers, kind)[2 * count :]}
    whole = [*spec.input_axes, *_weights(spec)], [*spec.outputs]

    def kept(named: Mapping[str, Any]) -> dict[str, Any]:
        return {n: kept(v) if isinstance(v, dict) else v for n, v in named.items() if n not in later}

    inputs, axes, outputs = kept(spec.inputs), kept(spec.input_axes), kept(spec.outputs)
    with layers.only(body.decoder, count):
        proto = _traced(replace(spec, inputs=inputs, input_axes=axes, outputs=outputs))
    layers.repeat(proto, body.family.layer, count, body.layers, *whole)
    return proto


def _weights(spec: GraphSpec) -> dict[str, nn.Parameter]:
    """Name in the checkpoint -> parameter, of all that the graph reads."""
    prefix = "model."  # of the attribute in which every wrapper holds transformers' model
    named = {n.removeprefix(prefix): p for n, p in spec.module.named_parameters()}
    return {n: p for n, p in named.items() if spec.reads(n)}


def _traced(spec: GraphSpec) -> onnx.ModelProto:
    """The graph of all layers that the module has."""
    used = _weights(spec)
    parameters = {f"model.{n}": p for n, p in used.items()}
    with torch.no_grad(), _quiet(), _seldom_collected(), _operators_listed_once():
        program = with_room(
            torch.onnx.export,
            _WeightsAsInputs(spec.module),
            (),
            kwargs={"inputs": spec.inputs, "weights": parameters},
            dynamo=True,
            dynamic_shapes={"inputs": _dynamic(spec), "weights": dict.fromkeys(parameters)},
            input_names=[*spec.input_axes, *used],
            output_names=list(spec.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # dynamo=True returns one
    proto = program.model_proto
    _strip(proto)
    for value, axes in zip(proto.graph.output, spec.outputs.values(), strict=True):
        _set_axes(value, axes)
    for value in proto.graph.input:
        if value.name in spec.input_axes:
            _set_axes(value, spec.input_axes[value.name])
    return proto


def _dynamic(spec: GraphSpec) -> dict[str, Any]:
    """Dynamic axes in torch's terms, nested as the inputs are."""
    known = {name: Dim(name, min=least) if least else Dim(name) for name, least in _LEAST.items()}

    def of(axes: Axes) -> dict[int, Any]:
        return {i: known.get(axis, Dim.DYNAMIC) for i, axis in enumerate(axes) if isinstance(axis, str)}

    return {
        name: {inner: of(spec.input_axes[inner]) for inner in sample}
        if isinstance(sample, dict)
        else of(spec.input_axes[name])
        for name, sample in spec.inputs.items()
    }


def _set_axes(value: onnx.ValueInfoProto, axes: Axes) -> None:
    """Write axis names and lengths into a graph input or output."""
    for dim, axis in zip(value.type.tensor_type.shape.dim, axes, strict=True):
        if isinstance(axis, str):
            dim.dim_param = axis
        else:
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
def _operators_listed_once() -> Iterator[None]:
    """The exporter lists what it can translate anew for every graph, a second each; the list is always the same."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        plain = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):  # another version of torch: it only takes that second longer
        yield
        return
    ONNXRegistry.from_torchlib = staticmethod(_table(plain))  # type: ignore[method-assign]
    try:
        yield
    finally:  # others who export in this process may add to their lists
        ONNXRegistry.from_torchlib = staticmethod(plain)  # type: ignore[method-assign]


@functools.cache
def _table(plain: Any) -> Any:
    return functools.cache(plain)


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """The exporter makes objects by the million, and the collector would look through all that was imported again and again."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


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
