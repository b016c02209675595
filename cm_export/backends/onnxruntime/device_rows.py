"""The FFN rows that core sets name, gathered on a device from the weights there: once for all steps of a decoder.

ids of B requests [B,K] up, gate, up and down rows [B,K,D] stay     as host/core_rows.py does in this process's memory
a layer of which every request reads all neurons: the weights [F,D] themselves
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import onnx
import onnxruntime as ort

from ...base.onnx_text import IR_VERSION, OPSET
from ...host.core_rows import ROWS
from ...host.core_set import CoreSet, padded
from .place import Held, Place


class DeviceRows:
    """`names`: of every layer's gate, up and down rows [F,D]; `weight`: what holds a weight on the device."""

    def __init__(self, place: Place, names: Sequence[tuple[str, str, str]], weight: Callable[[str], Held]):
        self._place, self._names, self._weight = place, names, weight

    def gather(self, cores: Sequence[CoreSet]) -> dict[str, ort.OrtValue]:
        """The rows of these requests together, by input name; behind those of a request that has fewer, zeros."""
        counts = np.stack([core.counts for core in cores])
        out: dict[str, ort.OrtValue] = {}
        for layer, names in enumerate(self._names):
            weights = [self._weight(name).value for name in names]
            rows: Sequence[ort.OrtValue] = weights
            if (counts[:, layer] < cores[0].ffn).any():
                rows = self._gathered(weights, padded([[core.of_layer(layer) for core in cores]], 1)[0])
            out |= {f"ffn.{layer}.{part}": value for part, value in zip(ROWS, rows, strict=True)}
        return out

    def _gathered(self, weights: Sequence[ort.OrtValue], ids: np.ndarray) -> Sequence[ort.OrtValue]:
        binding = self._session.io_binding()
        for part, weight in zip(ROWS, weights, strict=True):
            binding.bind_ortvalue_input(part, weight)
            self._place.bind_output(binding, f"{part}_rows", stays=True)
        binding.bind_cpu_input("ids", ids)
        self._session.run_with_iobinding(binding)
        found: Sequence[ort.OrtValue] = binding.get_outputs()
        return found

    @cached_property
    def _session(self) -> ort.InferenceSession:
        """An id of -1 is padding: its down row is zero, so its neuron adds nothing."""
        kind = "float16" if self._place.products == np.float16 else "float"
        given = ", ".join(f"{kind}[F,D] {part}" for part in ROWS)
        made = ", ".join(f"{kind}[B,K,D] {part}_rows" for part in ROWS)
        return self._place.session(
            onnx.parser.parse_model(f"""
            <ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>
            gather ({given}, int32[B,K] ids) => ({made}) {{
                none = Constant <value = int32 {{0}}> ()
                last = Constant <value_ints = [-1]> ()
                places = Max (ids, none)
                gate_rows = Gather (gate, places)
                up_rows = Gather (up, places)
                down_all = Gather (down, places)
                is_padding = Less (ids, none)
                is_padding_BK1 = Unsqueeze (is_padding, last)
                zero_f32 = Constant <value = float {{0}}> ()
                zero = CastLike (zero_f32, down)
                down_rows = Where (is_padding_BK1, zero, down_all)
            }}""")
        )
