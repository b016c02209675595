"""Products whose weights are packed become the native library's, or, where it is missing, ONNX Runtime's own low-bit ones.

MatMul, Gemm, CoreLinear over the weights of one entry, all reading x  ->  PackedMatMul(x, entry), Split
CoreFFN(x, Wg, Wu, Wd_t[, norms and thresholds])                       ->  PackedFFN(x, ffn_in, ffn_out)
                                               or, where z is read, too   PackedMatMul, Split, act, Mul, PackedMatMul

a head in 4 bits and a remainder: PackedMatMul, RefineLogits, which reads the remainder of the outputs that may be chosen

without the library: x, channels below the threshold at 0 -> MatMulNBits on the same codes, in the order that it takes
                     (and once more on the remainder, whole)
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from ...base.onnx_text import DOMAIN
from ...bundle.packed import PARTS, REMAINDER, Packed
from ...families import Arrays, Family, Shape
from ...plugins.core_ffn.body import ACTIVATIONS
from ...plugins.threshold import above
from ...quant import remainder
from ...quant.rows import unpack
from ...surgery.nodes import is_plain_gemm, names_read
from .lower import ACTIVE_INPUTS, attribute, local_function

NATIVE = "com.cm_export.native"
_MICROSOFT = "com.microsoft"


def gather_ffns(model: onnx.ModelProto, family: Family, shape: Shape) -> onnx.ModelProto:
    """A dense graph with each FFN as one CoreFFN, so that it can become one packed op as well."""
    from ...surgery.edit import Edit  # with graphsurgeon, which the graphs of float32 bundles do not wait for
    from ...surgery.replace_ffn import replace_ffn

    edit = Edit(model)
    replace_ffn(edit, family, shape.layers, shape.activation, indexed=False)
    return edit.export()


class Packing:
    """One graph under the knife. `every_neuron`: whether rows that core_neurons lists are all of them.

    `x_bytes`: to which the native library rounds what it multiplies with weights of 8 bits. Two cost nothing where reading
    weights decides the time, and twice the arithmetic where a prompt does; 0, for prompts and pictures: one, or bfloat16 if the
    processor has tiles of it. `made`: arrays that were made for another graph of the same file.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        packed: Packed,
        native: bool,
        every_neuron: bool,
        x_bytes: int = 0,
        made: Arrays | None = None,
    ):
        self.model, self.packed, self.native, self.every_neuron = model, packed, native, every_neuron
        self.x_bytes = x_bytes
        self.made = {} if made is None else made
        self.arrays: Arrays = {}  # what the session gets as initializers, besides views of the file
        graph = model.graph
        self._turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose"}
        self._read = {name for node in graph.node for name in names_read(node)} | {o.name for o in graph.output}
        self._nodes: list[onnx.NodeProto] = []
        self._made: dict[tuple[str, str], dict[str, str]] = {}  # (entry, x) -> weight -> y
        self._used: set[str] = set()
        self._activations: set[str] = set()
        self._constants: set[str] = set()

    def run(self) -> onnx.ModelProto:
        """Rewrite in place and return the model; initializers that nobody reads are left to `lower`."""
        graph = self.model.graph
        for node in graph.node:
            if not self._replaced(node):
                self._nodes.append(node)
        del graph.node[:]
        graph.node.extend(self._nodes)
        if self._used:
            if self.native:
                self.model.opset_import.append(onnx.helper.make_opsetid(NATIVE, 1))
            graph.initializer.extend(self._initializers())
            graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(0, np.float32), "packed/none"))
            self.model.functions.append(_kept())
            self.model.functions.extend(_gated(name) for name in sorted(self._activations))
        return self.model

    def _replaced(self, node: onnx.NodeProto) -> bool:
        """Whether the node has become others."""
        if node.op_type == "CoreFFN":
            return self._ffn(node)
        entry = self._entry(node)
        if entry is None:
            return False
        weight = self._weight(node)
        key = (entry, node.input[0])
        if key not in self._made:
            limits = list(node.input[2:4]) if node.op_type == "CoreLinear" else []
            self._made[key] = self._product(entry, node.input[0], limits)
        y = self._made[key][weight]
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            self._add("Add", [y, node.input[2]], [node.output[0]])
        else:
            self._add("Identity", [y], [node.output[0]])
        return True

    def _weight(self, node: onnx.NodeProto) -> str:
        return self._turned.get(node.input[1], node.input[1])

    def _entry(self, node: onnx.NodeProto) -> str | None:
        """The entry of the weight that a product reads, if it is one and its weight is packed."""
        if node.op_type == "CoreLinear" or (node.op_type == "Gemm" and is_plain_gemm(node)):
            return self.packed.entry_of.get(node.input[1])
        is_product = node.op_type == "MatMul" and node.input[1] in self._turned
        return self.packed.entry_of.get(self._turned[node.input[1]]) if is_product else None

    def _ffn(self, node: onnx.NodeProto) -> bool:
        gate, _, down = node.input[1:4]
        into, out = self.packed.entry_of.get(gate), self.packed.entry_of.get(down)
        listed = len(node.input) == 5  # x, three weights, core_neurons
        if into is None or out is None or (listed and not self.every_neuron):
            return False
        limits = list(node.input[4:]) if len(node.input) == ACTIVE_INPUTS else []
        activation, (y, z) = attribute(node, "activation"), [*node.output, ""][:2]
        if self.native and z not in self._read:
            self._fused(node, into, out, limits, activation)
            return True
        x_norm, z_norm, x_threshold, z_threshold = limits or [""] * 4
        both = self._product(into, node.input[0], [x_norm, x_threshold] if limits else [])
        self._activations.add(activation)
        gate_out, up_out = (both[w] for w in self.packed.entries[into].weights)
        z = z or f"{node.name}/z"
        self._add(f"Gated_{activation}", [gate_out, up_out], [z], domain=DOMAIN)
        z_limits = [z_norm, z_threshold] if limits else []
        self._add("Identity", [self._product(out, z, z_limits)[down]], [y])
        return True

    def _fused(self, node: onnx.NodeProto, into: str, out: str, limits: list[str], activation: str) -> None:
        one, other = self.packed.entries[into], self.packed.entries[out]
        self._used |= {into, out}
        x_norm, z_norm, x_threshold, z_threshold = limits or ["packed/none"] * 4
        parts = [f"{name}.{part}" for name in (into, out) for part in PARTS]
        inputs = [node.input[0], *parts, x_norm, z_norm, x_threshold, z_threshold]
        self._add("PackedFFN", inputs, [node.output[0]], domain=NATIVE, activation=activation, D=one.inputs,
                  F=other.inputs, bits_in=one.bits, group_in=one.group, bits_out=other.bits, group_out=other.group,
                  x_bytes=self.x_bytes)  # fmt: skip

    def _product(self, name: str, x: str, limits: list[str]) -> dict[str, str]:
        """x times an entry: the result for each of its weights, by the weight's name."""
        entry = self.packed.entries[name]
        self._used.add(name)
        base = f"packed/{name}/{len(self._made)}/{len(self._nodes)}"
        norm, threshold = limits or ["packed/none"] * 2
        width = entry.columns
        y = f"{base}/y"
        four = f"{base}/four" if entry.refined else y
        if self.native:
            inputs = [x, *(f"{name}.{part}" for part in PARTS), norm, threshold]
            # The head reads one row of a prompt, for which tiles are slower.
            x_bytes = max(self.x_bytes, 1) if name == "head" else self.x_bytes
            self._add("PackedMatMul", inputs, [four], domain=NATIVE, bits=entry.bits, group=entry.group, N=width,
                      x_bytes=x_bytes)  # fmt: skip
            if entry.refined:
                self._add("RefineLogits", [four, x, f"{name}.{REMAINDER}", norm, threshold], [y], domain=NATIVE)
        else:
            if limits:
                x = self._add("Kept", [x, norm, threshold], [f"{base}/kept"], domain=DOMAIN)
            inputs = [x, *(f"{name}.nbits.{part}" for part in PARTS)]
            self._nbits(inputs, four, entry.inputs, width, entry.bits, entry.group)
            if entry.refined:
                rest = [f"{name}.nbits.{REMAINDER}.{part}" for part in PARTS]
                rest_y = self._nbits([x, *rest], f"{base}/rest", entry.inputs, width, 4, remainder.GROUP)
                self._add("Add", [four, rest_y], [y])
        if len(entry.outputs) == 1 and width == entry.outputs[0]:
            return {entry.weights[0]: y}
        out, begin = {}, 0
        for weight, outputs, stored in zip(entry.weights, entry.outputs, entry.widths, strict=True):
            ends = [self._constant([n]) for n in (begin, begin + outputs, -1)]
            out[weight] = self._add("Slice", [y, *ends], [f"{base}/{weight}"])
            begin += stored
        return out

    def _nbits(self, inputs: list[str], y: str, K: int, N: int, bits: int, group: int) -> str:
        # accuracy_level 4 rounds x to int8 with a scale per group, as the native kernel does.
        return self._add("MatMulNBits", inputs, [y], domain=_MICROSOFT, K=K, N=N, bits=bits, block_size=group,
                         accuracy_level=4)  # fmt: skip

    def _add(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self._nodes.append(onnx.helper.make_node(kind, inputs, outputs, f"{outputs[0]}/{kind}", **attributes))
        return outputs[0]

    def _constant(self, values: list[int]) -> str:
        name = f"packed/{values}"
        if name not in self._constants:
            self._constants.add(name)
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _initializers(self) -> Iterator[onnx.TensorProto]:
        """Of every entry that is read: tensors of the file, or those made of them for MatMulNBits."""
        for name in sorted(self._used):
            if self.native:
                parts = self.packed.entries[name].parts
                found = {f"{name}.{part}": self.packed.file[f"{name}.{part}"] for part in parts}
            else:
                if f"{name}.nbits.codes" not in self.made:
                    self.made |= {
                        f"{name}.nbits.{part}": array for part, array in _for_nbits(self.packed, name).items()
                    }
                found = {own: array for own, array in self.made.items() if own.startswith(f"{name}.nbits.")}
            self.arrays |= found
            yield from (_external(tensor, array) for tensor, array in found.items())


def _external(name: str, array: np.ndarray) -> onnx.TensorProto:
    """An initializer that the session is given; its path is checked by ONNX Runtime and never read."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    out = onnx.TensorProto(name=name, dims=array.shape, data_type=kind, data_location=onnx.TensorProto.EXTERNAL)
    out.external_data.add(key="location", value="packed.safetensors")
    return out


def _for_nbits(packed: Packed, name: str) -> Arrays:
    """What MatMulNBits takes of an entry: codes, scale, zero, and those of its remainder behind "remainder."."""
    stored = packed.rows(name)
    codes, scale, zero = unpack(stored)
    zero = np.full(scale.shape, 1 << (stored.bits - 1), np.uint8) if zero is None else zero
    found = _nbits_of(codes.T, scale.T, zero.T, stored.bits, stored.group)
    if stored.remainder is not None:
        codes, scale = remainder.unpack_remainder(stored.remainder)
        rest = _nbits_of(codes, scale, np.full(scale.shape, 8, np.uint8), 4, remainder.GROUP)
        found |= {f"{REMAINDER}.{part}": array for part, array in rest.items()}
    return found


def _nbits_of(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int, group: int) -> Arrays:
    """codes [N,K], scale and zero [N,K/g] -> uint8 [N,K/g,g*bits/8], float32 [N*K/g], uint8 [N*K/g*bits/8 rounded up]."""
    codes = np.ascontiguousarray(codes).reshape(len(codes), -1, group)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
        zero = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)), constant_values=8)
        zero = zero[:, ::2] | zero[:, 1::2] << 4
    return {
        "codes": np.ascontiguousarray(codes),
        "scale": np.ascontiguousarray(scale).astype(np.float32).ravel(),
        "zero": np.ascontiguousarray(zero).ravel(),
    }


def _kept() -> onnx.FunctionProto:
    return local_function(f"Kept (x, norm, threshold) => (x_kept) {{ {above('x', 'norm', 'threshold', 'x_kept')} }}")


def _gated(activation: str) -> onnx.FunctionProto:
    """z = act(gate) * up."""
    return local_function(f"""Gated_{activation} (gate_out, up_out) => (z) {{
        {ACTIVATIONS[activation]}
        z = Mul (activated, up_out)
    }}""")
