"""What a manifest says about graphs: inputs and outputs with axes, operators, and how graphs are wired.

ports(model.graph.input)   [{"name": "x", "dtype": "float", "shape": ["batch", 1, 256]}]
links(layers, described)   [{"from": "prefill.core_scores", "to": "decode.core_neurons"}]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


def ports(values: Iterable[onnx.ValueInfoProto]) -> list[dict[str, Any]]:
    """Name, type as ONNX names it, and axes (a name where the length may change) of graph inputs or outputs."""
    from onnx import TensorProto

    return [
        {
            "name": v.name,
            "dtype": TensorProto.DataType.Name(v.type.tensor_type.elem_type).lower(),
            "shape": [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        }
        for v in values
    ]


def describe(proto: onnx.ModelProto) -> dict[str, Any]:
    """Inputs and outputs with dtype and axes, nodes, and how often each op is used."""
    ops: dict[str, int] = {}
    for node in proto.graph.node:
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        ops[op] = ops.get(op, 0) + 1
    return {
        "inputs": ports(proto.graph.input),
        "outputs": ports(proto.graph.output),
        "nodes": len(proto.graph.node),
        "ops": dict(sorted(ops.items())),
    }


def links(layers: int, graphs: dict[str, Any]) -> list[dict[str, str]]:
    """How the graphs are wired, as data that any runner can follow: of all wires, those whose two ends exist."""
    pairs = [("vision.image_embeds", "prefill.inputs_embeds"), ("prefill.core_scores", "decode.core_neurons")]
    pairs += [("prefill.kept_mask", "decode.attention_mask"), ("prefill.kept_tokens", "decode.core_tokens")]
    pairs += [("turn.core_scores", "decode.core_neurons"), ("turn.kept_tokens", "decode.core_tokens")]
    pairs += [(f"prefill.core_mean_{x}", "decode.core_bias") for x in "zy"]
    for i in range(layers):
        for part in ("key", "value"):
            pairs.append((f"prefill.present.{i}.{part}", f"decode.past.{i}.{part}"))
            pairs.append((f"decode.present.{i}.{part}", f"decode.past.{i}.{part}"))
            pairs.append((f"prefill.present.{i}.{part}", f"turn.past.{i}.{part}"))
            pairs.append((f"turn.present.{i}.{part}", f"decode.past.{i}.{part}"))
    ends = {f"{g}.{v['name']}" for g, described in graphs.items() for v in described["inputs"] + described["outputs"]}
    return [{"from": a, "to": b} for a, b in pairs if {a, b} <= ends]
