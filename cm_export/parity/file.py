"""What can be said of a family's file before anything is computed: whether its parts fit each other and transformers' model.

Each check gives sentences about what is wrong; none: it holds.
"""

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..base import dims
from ..base.errors import GateFailed, InputError
from ..families import Picture, Port, Tower
from ..plugins.core_ffn.op import ACTIVATIONS
from .proof import Found
from .subject import Subject

FACTS = 8  # faults of one file that are told at once
PATCHES = 1 << 14  # of a picture for which memory and lengths of axes are asked


def holds(of: Subject) -> Found:
    """Raises GateFailed that names what does not hold, InputError for a sample that the family itself refuses."""
    of.family.check_config(of.config)
    if of.shape.activation not in ACTIVATIONS:
        raise InputError(f"CoreFFN knows no activation {of.shape.activation!r}", fix=f"known: {', '.join(ACTIVATIONS)}")
    found = [*_names(of), *(_tower(of, of.tower) if of.tower else _blind(of))]
    if found:
        more = f"; and {len(found) - FACTS} more" if len(found) > FACTS else ""
        raise GateFailed("; ".join(found[:FACTS]) + more, where=f"family {type(of.family).__name__}")
    return Found(0, 0, "names, sizes, inputs and outputs fit transformers' model")


def left_to_defaults(of: Subject) -> list[str]:
    """What the file leaves to the contract, although more could be asked with it."""
    found = []
    if of.tower and type(of.tower).sample is Tower.sample:
        found.append("Tower.sample is the contract's: no layouts are asked but those of probes")
    return found


def _names(of: Subject) -> Iterator[str]:
    """Weights by which the surgery finds its sites, and their sizes."""
    family, shape = of.family, of.shape
    there = {name: tuple(p.shape) for name, p in of.model.named_parameters()}
    heads = shape.heads * shape.head_dim
    expected = [(family.embedding, (shape.vocab, shape.hidden))]  # one name may be given twice, wrongly
    parts = {"gate": (shape.ffn, shape.hidden), "up": (shape.ffn, shape.hidden), "down": (shape.hidden, shape.ffn)}
    for i in range(shape.layers):
        begin = family.layer.format(layer=i)
        expected += [(begin + getattr(family, part), size) for part, size in parts.items()]
        expected.append((begin + family.attention_out, (shape.hidden, heads)))
    for name, size in expected:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.3)
            yield f"{family.model_class} has no weight {name}" + (f", it has {near[0]}" if near else "")
            return  # the others are named alike
        if there[name] != size:
            yield f"{name} is {there[name]}, by Family.shape {size}"
    if (layers := len(of.model.get_decoder().layers)) != shape.layers:
        yield f"transformers' decoder has {layers} layers, Family.shape says {shape.layers}"


def _blind(of: Subject) -> Iterator[str]:
    if of.shape.sees:
        yield "Family.shape says that it sees, and Family.tower gives no tower"


def _tower(of: Subject, tower: Tower) -> Iterator[str]:
    """The tower's ports, pictures and estimates."""
    if not of.shape.sees:
        yield "Family.tower gives a tower, and Family.shape does not say that it sees"
        return
    names = [name for name, _ in of.model.named_parameters()]
    yield from (
        f"no weight begins with {p!r} (prefixes)" for p in tower.prefixes if not any(n.startswith(p) for n in names)
    )
    if not tower.outputs or tower.outputs[0].axes != (dims.IMAGE_TOKENS, of.shape.hidden):
        yield f"the first of outputs must have the axes ({dims.IMAGE_TOKENS!r}, {of.shape.hidden})"
    rng = np.random.default_rng(0)
    made = {"probes": tower.probes(rng), "sample": tower.sample(rng)}
    tokens, some = _sized(tower, max(p.tokens for p in made["probes"]), rng)
    made |= {f"sized({tokens})": some}
    for name, pictures in made.items():
        if not pictures or not all(p.tokens for p in pictures):
            yield f"{name} makes a picture without image tokens"
            return
        yield from (f"{fault}, of {name}" for fault in _fed(tower.inputs, tower.feeds(pictures)))
    if (count := len(made["probes"])) != 2:
        yield f"probes makes {count} pictures, two are asked for"
    if (count := sum(p.tokens for p in made[f"sized({tokens})"])) != tokens:
        yield f"sized({tokens}) makes pictures of {count} image tokens"
    ranges = tower.axis_ranges(PATCHES)
    named = {axis for port in tower.inputs for axis in port.axes if isinstance(axis, str)}
    yield from (f"axis_ranges says nothing of {axis!r}" for axis in sorted(named - ranges.keys()))
    yield from (
        f"axis_ranges: {n} = {r} does not ascend" for n, r in ranges.items() if list(r) != sorted(r) or r[0] < 1
    )
    bytes_of = {"memory": tower.memory(made["probes"][0]), "engine_memory": tower.engine_memory(PATCHES, fused=False)}
    yield from (f"{name} is {value} bytes" for name, value in bytes_of.items() if not value > 0)


def _sized(tower: Tower, most: int, rng: np.random.Generator) -> tuple[int, list[Picture]]:
    """The largest number of image tokens up to `most` that pictures of `sized` have, and these pictures; 0 and none."""
    for tokens in range(most, 0, -1):
        with contextlib.suppress(InputError):
            return tokens, tower.sized(tokens, rng)
    return 0, []


def _fed(ports: tuple[Port, ...], feeds: Mapping[str, Any]) -> Iterator[str]:
    """Whether arrays are what ports say."""
    if odd := {p.name for p in ports} ^ feeds.keys():
        yield f"inputs and feeds differ in {', '.join(sorted(odd))}"
        return
    for port in ports:
        array, axes = feeds[port.name], port.axes
        fits = array.ndim == len(axes) and all(
            isinstance(a, str) or a == n for a, n in zip(axes, array.shape, strict=True)
        )
        if not fits or array.dtype != port.dtype:
            yield f"{port.name} is {array.dtype} {array.shape}, its Port says {np.dtype(port.dtype)} {axes}"
