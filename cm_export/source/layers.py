"""A decoder's layers compute alike, each with weights of its own: a few are traced, the others are written as they are.

decoder of 28 layers  ->  layers 0, 1 and 2 traced  ->  layers 3 to 27: the nodes of layer 2 with names of their own

Tracing takes longer for each layer than all else that is done with it. It is followed only where it can be shown that it is
right: the modules of the layers left out hold the same settings and shapes as the last one traced, nothing is added after
them, and in the traced graph the last layer repeats the one before it node for node. All layers are traced otherwise.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import NodeProto, ValueInfoProto
from torch import nn

_FEW = 3  # traced beyond those that differ: one that also computes what all share, a pattern, and its repetition
_OF_TORCH = frozenset(vars(nn.Module()))  # hooks, children and so on, which every module has
_OF_ITS_OWN = frozenset({"layer_idx"})


class Unlike(Exception):
    """The traced layers do not repeat each other: what differs."""


def enough(layers: Sequence[nn.Module], changes: Callable[[int], bool]) -> int:
    """How many of a decoder's layers must be traced. `changes(i)`: whether something is added after layer i."""
    first = len(layers)
    while first > 0 and not changes(first - 1) and _alike(layers[first - 1], layers[-1]):
        first -= 1
    return min(len(layers), first + _FEW)


@contextmanager
def only(decoder: Any, count: int) -> Iterator[None]:
    """Inside, a decoder has the first `count` of its layers."""
    whole = decoder.layers
    decoder.layers = whole[:count]
    try:
        yield
    finally:
        decoder.layers = whole


def _alike(one: Any, other: Any) -> bool:
    """Whether two modules compute the same but for the values of their parameters."""
    if type(one) is not type(other):
        return False
    mine, theirs = (
        {n: v for n, v in vars(m).items() if n not in _OF_TORCH and n not in _OF_ITS_OWN} for m in (one, other)
    )
    if mine.keys() != theirs.keys() or any(mine[n] is not theirs[n] and mine[n] != theirs[n] for n in mine):
        return False
    shapes, others = ({n: (p.shape, p.dtype) for n, p in m.named_parameters(recurse=False)} for m in (one, other))
    tables, further = (dict(m.named_buffers(recurse=False)) for m in (one, other))
    if shapes != others or tables.keys() != further.keys():
        return False
    if any(not torch.equal(t, further[n]) for n, t in tables.items()):
        return False
    parts, counterparts = dict(one.named_children()), dict(other.named_children())
    return parts.keys() == counterparts.keys() and all(_alike(p, counterparts[n]) for n, p in parts.items())


class _Names:
    """Names that are one layer's own: weights, and keys and values at the border of a graph."""

    def __init__(self, weights: str):
        """`weights`: how those of a layer begin, such as "model.layers.{layer}."."""
        before, after = map(re.escape, weights.split("{layer}"))
        self._weights = re.compile(f"{before}([0-9]+){after}")
        self._any = re.compile(rf"({before}|past\.|present\.)([0-9]+)(\.)")

    def layer_of_weight(self, name: str) -> int:
        """Whose weight it is, or -1."""
        found = self._weights.match(name)
        return int(found[1]) if found else -1

    def moved(self, name: str, layer: int | None, to: int) -> str:
        """A name of `layer`, None: of any, as a name of another one; any other name as it is."""
        found = self._any.match(name)
        return f"{found[1]}{to}{name[found.end(2) :]}" if found and layer in (None, int(found[2])) else name


def repeat(
    proto: onnx.ModelProto, weights: str, traced: int, layers: int, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Write the layers from `traced` on into a graph, each as the last one traced, so that there are `layers`.

    `weights`: how the names of a layer's weights begin, such as "model.layers.{layer}."; `inputs`, `outputs`: those of the
    whole graph in their order. Raises Unlike where the last layer traced does not repeat the one before.
    """
    names, last, graph = _Names(weights), traced - 1, proto.graph
    blocks = _blocks(graph.node, names, traced)
    pattern, found = blocks[last - 1], blocks[last]
    body, tail = found[: len(pattern)], found[len(pattern) :]
    counterpart, carried = _matched(pattern, body, names, last, _shared(graph, names))
    own, handed_on = {o for node in body for o in node.output}, {counterpart[v] for v in carried}

    def named(value: str, layer: int) -> str:
        """What is called `value` in the last layer traced, in another."""
        moved = names.moved(value, last, layer)
        return moved if moved != value or layer == last else f"{value}.{layer}"

    def fed(value: str, layer: int) -> str:
        """What a node that reads `value` in the last layer traced reads in another."""
        if value in carried:
            return named(counterpart[value], layer - 1)
        return named(value, layer) if value in own else names.moved(value, last, layer)

    further = []
    for layer in range(traced, layers):
        for node in body:
            further.append(copy := NodeProto())
            copy.CopyFrom(node)
            copy.name = f"{node.name}.{layer}" if node.name else ""
            copy.input[:] = [fed(value, layer) for value in node.input]
            copy.output[:] = [named(value, layer) for value in node.output]
    for node in tail:
        for i, value in enumerate(node.input):
            if value in own and value not in handed_on:
                raise Unlike(f"{value} of layer {last} is read after it, and not by the next layer")
            node.input[i] = named(value, layers - 1) if value in own else value
    end = 1 + max(i for i, node in enumerate(graph.node) if own.intersection(node.output))
    nodes = [*graph.node[:end], *further, *graph.node[end:]]
    del graph.node[:]
    graph.node.extend(nodes)
    for values, order in ((graph.input, inputs), (graph.output, outputs)):
        _declare(values, order, names, last)


def _blocks(nodes: Iterable[NodeProto], names: _Names, traced: int) -> list[list[NodeProto]]:
    """The nodes of each layer, and with those of the last all that follows it; what follows no layer's weights is in none."""
    place: dict[str, int] = {}
    blocks: list[list[NodeProto]] = [[] for _ in range(traced)]
    for node in nodes:
        at = max((place.get(x, names.layer_of_weight(x)) for x in node.input), default=-1)
        place |= dict.fromkeys(node.output, at)
        if at >= 0:
            blocks[at].append(node)
    return blocks


def _shared(graph: onnx.GraphProto, names: _Names) -> dict[str, Hashable]:
    """Value that follows no layer's weights -> what it is made of, which is equal for equal values."""
    known: dict[str, Hashable] = {}
    numbers: dict[Hashable, int] = {}  # of what nodes do, with what
    for tensor in graph.initializer:
        nameless = onnx.TensorProto()
        nameless.CopyFrom(tensor)
        nameless.name = ""
        known[tensor.name] = nameless.SerializeToString(deterministic=True)
    known |= {v.name: v.name for v in graph.input if names.layer_of_weight(v.name) < 0}
    for node in graph.node:
        if all(x in known for x in node.input):
            made = numbers.setdefault((_operation(node), *(known[x] for x in node.input)), len(numbers))
            known |= {o: (made, i) for i, o in enumerate(node.output)}
    return known


def _matched(
    pattern: list[NodeProto], body: list[NodeProto], names: _Names, last: int, shared: Mapping[str, Hashable]
) -> tuple[dict[str, str], set[str]]:
    """Value of the layer before the last -> its counterpart in the last; and those of them that the last one reads."""
    counterpart: dict[str, str] = {}
    before: dict[str, str] = {}  # what the pattern reads of earlier layers -> what the last one reads there
    if len(body) < len(pattern):
        raise Unlike(f"layer {last} has {len(body)} nodes, the one before {len(pattern)}")
    for mine, theirs in zip(pattern, body, strict=True):
        if _operation(mine) != _operation(theirs):
            raise Unlike(f"layer {last} has {theirs.op_type} where the one before has {mine.op_type}")
        for x, y in zip(mine.input, theirs.input, strict=True):
            expected = counterpart.get(x) or names.moved(x, last - 1, last)
            if (y == expected and y != x) or (x in shared and shared[x] == shared.get(y)):
                continue
            if expected != x or before.setdefault(x, y) != y:
                raise Unlike(f"{theirs.op_type} of layer {last} reads {y}, where the one before reads {x}")
        counterpart |= dict(zip(mine.output, theirs.output, strict=True))
    carried = {y for x, y in before.items() if x != y}
    if not carried <= counterpart.keys():
        raise Unlike(f"layer {last} reads {min(carried - counterpart.keys())}, which is not of the layer before")
    return counterpart, carried


def _operation(node: NodeProto) -> tuple[object, ...]:
    attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
    return node.domain, node.op_type, len(node.input), len(node.output), *attributes


def _declare(values: Any, order: Sequence[str], names: _Names, last: int) -> None:
    """Inputs or outputs in this order; those of further layers have the types and shapes of the last one traced."""
    known = {value.name: value for value in values}
    declared = []
    for name in order:
        declared.append(value := ValueInfoProto())
        value.CopyFrom(known[name] if name in known else known[names.moved(name, None, last)])
        value.name = name
    del values[:]
    values.extend(declared)
