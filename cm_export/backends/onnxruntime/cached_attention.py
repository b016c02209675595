"""What stands between the products of a decode step becomes one node of the native library, attention over the cache included.

    Slice, Add (bias), Reshape, RMSNormalization, Transpose, rotation   of q and of k, less of v  |
    ScatterND                                                           of k and of v             |->  CachedAttention
    Attention or CoreAttention, Transpose, Reshape                                                |

    rotation   RotaryEmbedding(x, cos, sin)                             cos [B,N,r/2]     r: numbers of a head that are turned
          or   x * cos + Concat(-x[d/2:], x[:d/2]) * sin                cos [B,1,N,d]

A step of a small model has some 25 such nodes a layer, and each costs some microseconds whatever it computes. A layer that
looks otherwise stays as it is. The op computes every head of every token by itself (attention.h), so a token has the same
numbers alone and among others.

The cache may be narrow, in float16 or bytes: the type of its inputs says which.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx

from ...quant.cache_rows import CELLS, cells_of_row
from .grouped import is_plain
from .in_place import BIAS, SLOTS
from .lower import attribute, names_read
from .pack import NATIVE

OP = "CachedAttention"
_TO_HEADS = [0, 2, 1, 3]  # [B,N,H,d] <-> [B,H,N,d]
_MOST = 512  # numbers of a head, kMaxHead of the kernels


@dataclass(frozen=True)
class _Heads:
    """Where the heads of q, k or v are read, and what is done to them."""

    source: str
    first: int = 0
    bias: str = ""
    norm: str = ""
    epsilon: float = 0.0


@dataclass(frozen=True)
class _Turned:
    """A rotation: names of cos and sin, "" where there is none, and how many numbers of a head are turned."""

    cos: str = ""
    sin: str = ""
    rotary: int = 0


def attend_natively(model: onnx.ModelProto, heads: int) -> None:
    """Rewrite in place every attention of a graph that writes into its cache (in_place.py); `heads`: of queries.

    Nodes that nobody reads any longer are left to `lower`.
    """
    if not any(v.name == SLOTS for v in model.graph.input):
        return
    _Graph(model, heads).run()
    if not any(o.domain == NATIVE for o in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(NATIVE, 1))


def reads_natively(model: onnx.ModelProto) -> bool:
    """Whether nothing but such nodes reads the cache of a decode graph, whose dead nodes are gone."""
    pasts = {v.name for v in model.graph.input if v.name.startswith("past.")}
    read = [(n.op_type, name) for n in model.graph.node for name in pasts.intersection(names_read(n))]
    return bool(pasts) and {kind for kind, _ in read} == {OP} and {name for _, name in read} == pasts


def read_narrow(model: onnx.ModelProto, form: str) -> None:
    """Let those nodes read and write a cache in fp16, [B,Hk,C,d], or int8, [B,Hk,C,w]."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past.", "present.")):
            kind = value.type.tensor_type
            kind.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(CELLS[form]))
            kind.shape.dim[3].dim_value = cells_of_row(form, kind.shape.dim[3].dim_value)


class _Graph:
    def __init__(self, model: onnx.ModelProto, heads: int):
        self.graph, self.heads = model.graph, heads
        self._merge_angles()
        self.made = {o: n for n in self.graph.node for o in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {t.name: t for t in self.graph.initializer}
        self.pasts = {v.name: v.type.tensor_type.shape for v in self.graph.input if v.name.startswith("past.")}
        self.outputs = {o.name for o in self.graph.output}

    def run(self) -> None:
        nodes, gone = [], set[str]()
        for node in self.graph.node:
            made = self._fused(node)
            if made is not None:
                gone.update(made.output)
            nodes.append(made or node)
        kept = [n for n in nodes if n.op_type == OP or not gone.intersection(n.output)]
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def _merge_angles(self) -> None:
        """Each layer may have a Cos and a Sin of its own, of the same angles: q and k must name the same ones."""
        first: dict[tuple[str, str], str] = {}
        same: dict[str, str] = {}
        for node in self.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = same.get(name, name)
            if node.op_type in ("Cos", "Sin"):
                same[node.output[0]] = first.setdefault((node.op_type, node.input[0]), node.output[0])

    # ------------------------------------------------------------------------------------------ one layer
    def _fused(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The node that takes the place of an attention, if all around it is as expected."""
        is_core = node.op_type == "CoreAttention" and len(node.input) in (4, 5) and len(node.output) == 1
        if not (is_core or is_plain(node)) or node.input[3] != BIAS:
            return None
        stores = [self._store(name) for name in node.input[1:3]]
        y = self._mixed(node.output[0])
        if None in stores or y is None:
            return None
        key, value = (s for s in stores if s is not None)
        kv_heads, _, width = (d.dim_value for d in self.pasts[key.input[0]].dim[1:])
        if not 0 < width <= _MOST or not kv_heads or self.heads % kv_heads:
            return None
        (q, q_turned), (k, k_turned) = (self._turned(name, width) for name in (node.input[0], key.input[2]))
        found = [
            self._heads_of(name, count, width)
            for name, count in ((q, self.heads), (k, kv_heads), (value.input[2], kv_heads))
        ]
        of = [h for h in found if h is not None]
        norms = {h.epsilon for h in of if h.norm}
        if q_turned != k_turned or len(of) < 3 or of[2].norm or len(norms) > 1 or not self._is_rows(y, width):
            return None
        q_of, k_of, v_of = of
        inputs = [h.source for h in of] + [key.input[0], value.input[0], SLOTS, BIAS, q_turned.cos, q_turned.sin]
        inputs += [h.bias for h in of] + [q_of.norm, k_of.norm, *node.input[4:]]
        return onnx.helper.make_node(
            OP, inputs, [y.output[0], key.output[0], value.output[0]], node.name, domain=NATIVE,
            heads=self.heads, kv_heads=kv_heads, d=width, rotary=q_turned.rotary, scale=float(attribute(node, "scale")),
            epsilon=max(norms, default=0.0), q_first=q_of.first, k_first=k_of.first, v_first=v_of.first,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ its parts
    def _producer(self, name: str, kind: str) -> onnx.NodeProto | None:
        while (node := self.made.get(name)) is not None and node.op_type == "Identity":
            name = node.input[0]
        return node if node is not None and node.op_type == kind and not node.domain else None

    def _numbers(self, name: str) -> list[int] | None:
        """A small constant of whole numbers."""
        found = self.constants.get(name)
        if (
            found is None
            or found.data_location == onnx.TensorProto.EXTERNAL
            or found.data_type != onnx.TensorProto.INT64
        ):
            return None
        return onnx.numpy_helper.to_array(found).ravel().tolist()

    def _only_reader(self, name: str, kind: str) -> onnx.NodeProto | None:
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind and name not in self.outputs else None

    def _store(self, name: str) -> onnx.NodeProto | None:
        """The node that writes rows into a cache which this attention alone reads."""
        node = self._producer(name, "ScatterND")
        if node is None or len(self.readers[name]) != 1 or node.input[0] not in self.pasts or node.input[1] != SLOTS:
            return None
        return node if node.output[0] == name else None

    def _mixed(self, name: str) -> onnx.NodeProto | None:
        """The Reshape behind an attention, to [B,N,H d]."""
        transposed = self._only_reader(name, "Transpose")
        if transposed is None or attribute(transposed, "perm") != _TO_HEADS:
            return None
        return self._only_reader(transposed.output[0], "Reshape")

    def _is_rows(self, reshape: onnx.NodeProto, width: int) -> bool:
        sizes = self._sizes(reshape.input[1])
        return len(sizes) == 3 and sizes[2] in (-1, self.heads * width)

    def _sizes(self, name: str) -> list[int | None]:
        """The shape that a Reshape is told; None for a size that is known when it runs."""
        whole = self._numbers(name)
        if whole is not None:
            return list(whole)
        joined = self._producer(name, "Concat")
        parts = [] if joined is None else [self._numbers(part) for part in joined.input]
        return [part[0] if part is not None and len(part) == 1 else None for part in parts]

    def _turned(self, name: str, width: int) -> tuple[str, _Turned]:
        """(what is turned, how)."""
        rotary = self._producer(name, "RotaryEmbedding")
        if rotary is not None:
            turned = attribute(rotary, "rotary_embedding_dim") or width
            plain = len(rotary.input) == 3 and not attribute(rotary, "interleaved") and turned % 2 == 0
            return (rotary.input[0], _Turned(rotary.input[1], rotary.input[2], turned)) if plain else (name, _Turned())
        added = self._producer(name, "Add")
        products = [] if added is None else [self._producer(i, "Mul") for i in added.input]
        for straight, crossed in (products, products[::-1]) if len(products) == 2 else ():
            if straight is None or crossed is None:
                continue
            for (x, cos), (half, sin) in ((s, c) for s in _both(straight) for c in _both(crossed)):
                if self._is_crossed(half, x, width):
                    return x, _Turned(cos, sin, width)
        return name, _Turned()

    def _is_crossed(self, name: str, x: str, width: int) -> bool:
        """Whether it is Concat(-x[d/2:], x[:d/2])."""
        joined = self._producer(name, "Concat")
        if joined is None or len(joined.input) != 2 or width % 2 or attribute(joined, "axis") not in (-1, 3):
            return False
        negated = self._producer(joined.input[0], "Neg")
        second = None if negated is None else self._producer(negated.input[0], "Slice")
        return self._is_part(second, x, width // 2, width) and self._is_part(
            self._producer(joined.input[1], "Slice"), x, 0, width // 2
        )

    def _is_part(self, node: onnx.NodeProto | None, x: str, begin: int, end: int) -> bool:
        if node is None or node.input[0] != x:
            return False
        starts, ends, axes, *steps = (self._numbers(i) or [] for i in node.input[1:])
        exact = starts == [begin] and len(ends) == 1 and (ends[0] == end or (ends[0] > end and begin > 0))
        return exact and axes in ([-1], [3]) and steps in ([], [[1]])

    def _heads_of(self, name: str, count: int, width: int) -> _Heads | None:
        """Where the heads [B,H,N,d] of that name are read."""
        transposed = self._producer(name, "Transpose")
        if transposed is None or attribute(transposed, "perm") != _TO_HEADS:
            return None
        by_heads = transposed.input[0]
        norm, epsilon = "", 0.0
        normed = self._producer(by_heads, "RMSNormalization")
        if normed is not None:
            weight = self.constants.get(normed.input[1])
            if attribute(normed, "axis") != -1 or weight is None or list(weight.dims) != [width]:
                return None
            by_heads, norm, epsilon = normed.input[0], normed.input[1], float(attribute(normed, "epsilon"))
        reshaped = self._producer(by_heads, "Reshape")
        if reshaped is None or len(self._sizes(reshaped.input[1])) != 4:
            return None
        source, bias = reshaped.input[0], ""
        added = self._producer(source, "Add")
        if added is not None:
            for x, other in _both(added):
                if other in self.constants and list(self.constants[other].dims) == [count * width]:
                    source, bias = x, other
        first, columns, sliced = 0, count * width, self._producer(source, "Slice")
        if sliced is not None and len(sliced.input) == 4:
            begin, end, axis = (self._numbers(i) for i in sliced.input[1:])
            if begin and end and axis == [-1] and end[0] - begin[0] == columns:
                source, first = sliced.input[0], begin[0]
        return _Heads(source, first, bias, norm, epsilon)


def _both(node: onnx.NodeProto) -> list[tuple[str, str]]:
    a, b = node.input
    return [(a, b), (b, a)]
