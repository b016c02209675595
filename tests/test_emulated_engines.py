"""Engines whose plugin layers run our kernels, emulated: what a build hands to the plugin gives the portable bundle's answers.

From the recipe through the lowered graph, its packed weights and the fields of each plugin to enqueue; nothing in between is
a function of ours that stands for a kernel.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import shared
from conftest import active_bundle, low_bits, wide
from emulated_plugins import Layer, Program, with_plugins
from fake_engines import add_engines, machine, policies_in_memory
from test_tensorrt_sessions import ask, engines_of, logits_of

from cm_export.build.gates_lowered import HALF_LIMIT
from cm_export.bundle.bundle import Bundle
from cm_export.host.loaded import load

SMALL = {"engine__dense": False, "engine__turns": False}
RECIPES = {
    "int4": {"engine__precision": "int4"},
    "int8": {"engine__precision": "int8"},
    "blocks": {"neurons__block": 8},
    "blocks, int4": {"neurons__block": 32, "engine__precision": "int4"},
    "active": {},
    "active, int4": {"engine__precision": "int4"},
    "active, int8": {"engine__precision": "int8"},
}
BITS = {"int4": 4, "int8": 8, "fp16": 0}


@pytest.fixture
def built(on_machine, demo_bundle, monkeypatch):
    """(name of RECIPES, version) -> a machine with these engines, as fake_tensorrt runs them."""

    def build(name, version):
        if not name.startswith("active"):
            return on_machine(version, "cut", **SMALL, **RECIPES[name])
        bundle = active_bundle(demo_bundle, "fp32")

        def make(folder):
            with pytest.MonkeyPatch.context() as patch:
                add_engines(patch, bundle, folder / "demo.plan", machine(version), **SMALL, **RECIPES[name])

        out = shared.once(f"engines_{name}_{version}", make) / "demo.plan"
        return replace(machine(version), bundle=out, made_of=bundle)

    return lambda name, version: build(name, version).sit_at(monkeypatch)


@functools.cache
def portable(bundle, name):
    """The same bundle on ONNX Runtime, in float32, under the policies of the engines."""
    opened = Bundle(bundle)
    policies = {n: v for n, v in RECIPES[name].items() if not n.startswith("engine__")}
    if not policies:
        return load(bundle, threads=1, backend="onnxruntime")
    return policies_in_memory(opened, opened.recipe.replace(**policies), None)


def next_tokens(model, answer, **budget):
    """What it chooses after each of the given tokens, its prompt first, and the logits that say so."""
    logits, _ = logits_of(model, answer, **budget)
    return logits.argmax(-1).tolist(), logits


@pytest.mark.parametrize(
    ("name", "version", "steps"),
    [
        ("blocks", "10.3.0", 3),
        ("active, int4", "10.3.0", 2),
        *(wide(name, version, 20) for name in RECIPES for version in ("10.3.0", "10.16.1")),
    ],
)
def test_the_kernels_answer_as_the_portable_bundle_does(built, monkeypatch, name, version, steps):
    """Token for token; and logits as of the functions that the kernels stand for, over the same codes."""
    at = built(name, version)
    functions, theirs = engines_of(at), portable(at.made_of, name)
    answer = ask(theirs).token_ids[: steps + 1]
    Program.ran.clear()
    ours = engines_of(with_plugins(at).sit_at(monkeypatch))
    found, logits = next_tokens(ours, answer[:-1])
    assert found == answer
    off = np.abs(logits - next_tokens(functions, answer[:-1])[1]).max()
    assert off < HALF_LIMIT * np.abs(logits).max()
    if "int4" in name:  # so little that what 4 bits do to the logits can be seen beside it
        assert 3 * off < np.abs(logits - next_tokens(theirs, answer[:-1])[1]).max()
    shape, count, ran = ours.bundle.shape, len(answer) - 1, dict(Program.ran)
    op, each = ("CoreLinear", 7) if "active" in name else ("CoreFFN", 1)
    bits = BITS[RECIPES[name].get("engine__precision", "fp16")]
    wanted = {"bits": bits} | ({} if "active" in name else {"block": RECIPES[name].get("neurons__block", 1)})
    fields = {key: n for key, n in ran.items() if key[0] == op and wanted.items() <= dict(key[1]).items()}
    assert sum(fields.values()) >= shape.layers * count * (each if bits != 8 else 1), ran
    assert sum(n for (kind, _), n in ran.items() if kind == "CoreAttention") == shape.layers * count


@pytest.mark.wide
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_every_weight_in_few_bits_answers_as_the_portable_bundle_of_as_many_does(
    built, demo_bundle, monkeypatch, precision
):
    """Whose codes are others (GPTQ on ONNX Runtime, to nearest in engines): the answers are not."""
    whole = {"neuron_share": 1.0, "token_share": 1.0}
    answer = ask(load(low_bits(demo_bundle, precision), threads=1)).token_ids[:4]
    ours = engines_of(with_plugins(built(precision, "10.3.0")).sit_at(monkeypatch))
    assert ours.bundle.recipe.engine.precision == precision
    assert next_tokens(ours, answer[:-1], **whole)[0] == answer


def _one_by_one(patch):
    """An id of a block is taken for one neuron."""
    real = Layer.__init__

    def made(self, node):
        for attribute in node.attribute:
            if attribute.name == "block":
                attribute.i = 1
        real(self, node)

    patch.setattr(Layer, "__init__", made)


def _next(place):
    def plant(patch):
        real = Layer.run

        def run(self, given):
            turned = self.node.op_type != "CoreAttention"
            return real(self, [np.roll(a, turned, 0) if i == place else a for i, a in enumerate(given)])

        patch.setattr(Layer, "run", run)

    return plant


FAULTS = {
    "an id of a block is one neuron": ("blocks", _one_by_one),
    "codes of another neuron": ("int4", _next(1)),
    "scales of another neuron": ("int4", _next(4)),
    "codes of another input": ("active, int4", _next(1)),
    "scales of another input": ("active, int4", _next(2)),
}
QUICK = ("an id of a block is one neuron", "codes of another input")


@pytest.mark.parametrize("fault", [name if name in QUICK else wide(name) for name in FAULTS])
def test_what_goes_wrong_on_the_way_to_a_kernel_is_noticed(built, monkeypatch, fault):
    name, plant = FAULTS[fault]
    at = built(name, "10.3.0")
    answer = ask(portable(at.made_of, name)).token_ids[:1]
    expected = next_tokens(engines_of(at), answer)[1]
    plant(monkeypatch)
    _, logits = next_tokens(engines_of(with_plugins(at).sit_at(monkeypatch)), answer)
    assert np.abs(logits - expected).max() > HALF_LIMIT * np.abs(expected).max()
