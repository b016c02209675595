"""What can be wrong with an export or a figure, as a table: every row is planted, and the gate that it names must see it.

Mutation(where, what is wrong, gate that sees it, how to plant it)          docs/gates.md is generated from these rows

`how` is data for test_mutations.py: weight(part of a name, change), graph(name, change), reference(key, change), ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


@dataclass(frozen=True)
class Mutation:
    """`gate`: what the message of the error must hold, and how the page names it."""

    where: str
    what: str
    gate: str
    how: Any


# ---------------------------------------------------------------- changes of arrays; each returns another array


def row(number: int, factor: float = 2.0) -> Callable:
    """One row multiplied."""

    def change(a: np.ndarray) -> np.ndarray:
        a = a.copy()
        a[number] = a[number] * np.asarray(factor, a.dtype)
        return a

    return change


def one(value: float, at: int = 0) -> Callable:
    """One number replaced."""

    def change(a: np.ndarray) -> np.ndarray:
        a = a.copy()
        a.reshape(-1)[at] = value
        return a

    return change


def scaled(factor: float) -> Callable:
    return lambda a: (a * np.asarray(factor, a.dtype)).astype(a.dtype)


def rolled(by: int, axis: int = 0) -> Callable:
    return lambda a: np.roll(a, by, axis)


def first(count: int) -> Callable:
    """Only the first rows, or none."""
    return lambda a: a[:count]


def other(a: np.ndarray) -> np.ndarray:
    """What belongs to something else: the values in another order."""
    return a[::-1].copy()


# ---------------------------------------------------------------- changes of graphs, in place


def _read(graph: onnx.GraphProto, old: str, new: str, but: str = "") -> None:
    for node in graph.node:
        if node.name != but:
            node.input[:] = [new if i == old else i for i in node.input]


def between(name: str, op: str, *more: np.ndarray, **attributes: Any) -> Callable:
    """Every reader of an input reads op(input, more) instead."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        extra = [numpy_helper.from_array(value, f"bug.{i}") for i, value in enumerate(more)]
        graph.initializer.extend(extra)
        _read(graph, name, "bug.out")
        inputs = [name, *(t.name for t in extra)]
        graph.node.insert(0, helper.make_node(op, inputs, ["bug.out"], name="bug", **attributes))

    return change


def layers_swapped(part: str) -> Callable:
    """Layers 0 and 1 read each other's weights whose name ends so."""

    def change(model: onnx.ModelProto) -> None:
        names = {i for n in model.graph.node for i in n.input if i.endswith(part)}
        swap = {n: n.replace(".0.", ".?.").replace(".1.", ".0.").replace(".?.", ".1.") for n in names}
        assert any(a != b for a, b in swap.items()), names
        for node in model.graph.node:
            node.input[:] = [swap.get(i, i) for i in node.input]

    return change


def attribute(op: str, name: str, value: Any, nodes: int | None = None) -> Callable:
    """Another attribute in the nodes of this kind, or in the first ones."""

    def change(model: onnx.ModelProto) -> None:
        for node in [n for n in model.graph.node if n.op_type == op][:nodes]:
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def function(name: str, old: tuple[str, ...], new: str) -> Callable:
    """Another operator inside a function that the graph brings along."""

    def change(model: onnx.ModelProto) -> None:
        body = next(f for f in model.functions if f.name == name)
        node = next(n for n in body.node if n.op_type in old)
        node.op_type = new
        del node.attribute[:]

    return change


def kind(old: tuple[str, ...], new: str) -> Callable:
    """Another operator in the place of the first of these."""

    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type in old)
        node.op_type = new
        node.domain = ""
        del node.attribute[:]

    return change


def function_input(name: str, old: str, new: str) -> Callable:
    """A function that reads another of its inputs."""

    def change(model: onnx.ModelProto) -> None:
        for node in next(f for f in model.functions if f.name == name).node:
            node.input[:] = [new if i == old else i for i in node.input]

    return change


def bias_dropped(part: str) -> Callable:
    """The first sum with this bias passes its other operand through."""

    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "Add" and any(i.endswith(part) for i in n.input))
        kept = [i for i in node.input if not i.endswith(part)]
        node.op_type, node.input[:] = "Identity", kept

    return change


# ---------------------------------------------------------------- how a row of the table is planted


def weight(part: str, change: Callable) -> tuple:
    """In the weight file, in the first tensor whose name ends so."""
    return "weight", part, change


def graph(name: str, change: Callable) -> tuple:
    return "graph", name, change


def feed(name: str, key: str, change: Callable) -> tuple:
    """In what this graph is given."""
    return "feed", name, key, change


def reference(key: str, change: Callable) -> tuple:
    """In PyTorch's answers; None takes a key away."""
    return "reference", key, change


def call(name: str) -> tuple:
    """A function of test_mutations.py that plants, and asks the gate."""
    return "call", name


NAN, INF = float("nan"), float("inf")
SWISH = ("Sigmoid", "Erf", "Tanh", "Relu", "Gelu", "Swish")
PORTABLE = "portable graphs"
BUILD = (
    Mutation(
        PORTABLE, "one row of an up projection is doubled", "gate 'prefill'", weight("1.mlp.up_proj.weight", row(3))
    ),
    Mutation(PORTABLE, "one row of a down projection is zero", "gate 'prefill'", weight("0.mlp.down_proj", row(5, 0))),
    Mutation(
        PORTABLE,
        "one row of a gate projection changes its sign",
        "gate 'prefill'",
        weight("0.mlp.gate_proj.weight", row(0, -1)),
    ),
    Mutation(
        PORTABLE,
        "rows of a query projection are off by one",
        "gate 'prefill'",
        weight("0.self_attn.q_proj.weight", rolled(1)),
    ),
    Mutation(
        PORTABLE,
        "one row of an output projection is doubled",
        "gate 'prefill'",
        weight("1.self_attn.o_proj.weight", row(1)),
    ),
    Mutation(PORTABLE, "a bias of keys is zero", "gate 'prefill'", weight("0.self_attn.k_proj.bias", scaled(0))),
    Mutation(
        PORTABLE,
        "one weight of a norm is 5 % larger",
        "gate 'prefill'",
        weight("0.input_layernorm.weight", row(2, 1.05)),
    ),
    Mutation(
        PORTABLE,
        "the last norm is 1 % larger",
        "gate 'prefill'",
        weight("model.language_model.norm.weight", scaled(1.01)),
    ),
    Mutation(PORTABLE, "a weight is NaN", "gate 'prefill'", weight("0.mlp.up_proj.weight", one(NAN))),
    Mutation(PORTABLE, "one row of the vision tower is doubled", "gate 'vision'", weight("mlp.fc1.weight", row(2))),
    Mutation(
        PORTABLE,
        "layers 0 and 1 swap their queries",
        "gate 'prefill'",
        graph("prefill_dense", layers_swapped("q_proj.weight")),
    ),
    Mutation(
        PORTABLE,
        "another activation in the dense prefill",
        "gate 'prefill'",
        graph("prefill_dense", kind(SWISH, "Softsign")),
    ),
    Mutation(
        PORTABLE,
        "a bias is not added in dense decode",
        "gate 'decode'",
        graph("decode_dense", bias_dropped("q_proj.bias")),
    ),
    Mutation(
        PORTABLE,
        "rotary sections in another order",
        "gate 'prefill'",
        graph("prefill_dense", between("position_ids", "Gather", np.array([1, 2, 0]), axis=0)),
    ),
    Mutation(
        PORTABLE,
        "rotary positions one further in decode only",
        "gate 'decode'",
        graph("decode_dense", between("position_ids", "Mul", np.array(2))),
    ),
    Mutation(
        PORTABLE,
        "attention among the patches of one picture gives its values",
        "gate 'vision, one picture'",
        call("values_of_one_picture"),
    ),
    Mutation(PORTABLE, "positions of the host off by one", "gate 'positions'", call("positions_off_by_one")),
    Mutation(
        PORTABLE,
        "a token of the prompt is masked",
        "gate 'prefill'",
        feed("prefill_dense", "attention_mask", one(0, 1)),
    ),
    Mutation(
        PORTABLE,
        "a row of the cache is masked in decode",
        "gate 'decode'",
        graph("decode_dense", between("attention_mask", "ScatterElements", np.array([[1]]), np.array([[0]]), axis=1)),
    ),
    Mutation(
        PORTABLE,
        "a token is dropped at full budget",
        "gate 'full budget, decode'",
        feed("prefill", "image_keep", lambda a: a - 1),
    ),
    Mutation(
        PORTABLE,
        "another activation in every CoreFFN node",
        "gate 'functions'",
        graph("decode", attribute("CoreFFN", "activation", "relu2")),
    ),
    Mutation(
        PORTABLE,
        "another activation in one CoreFFN",
        "several activations",
        graph("decode", attribute("CoreFFN", "activation", "relu2", nodes=1)),
    ),
    Mutation(
        PORTABLE,
        "another activation in the function CoreFFN",
        "gate 'functions'",
        graph("decode", function("CoreFFN", SWISH, "Softsign")),
    ),
    Mutation(
        PORTABLE,
        "the function CoreFFN reads up rows in the place of gate rows",
        "gate 'functions'",
        graph("decode", function_input("CoreFFN", "w_gate", "w_up")),
    ),
    Mutation(
        PORTABLE,
        "another scale in CoreAttention",
        "gate 'full budget, decode'",
        graph("decode", attribute("CoreAttention", "scale", 0.1)),
    ),
    Mutation(
        PORTABLE,
        "a later question at positions of its own",
        "gate 'turn'",
        graph("turn", between("position_ids", "Mul", np.array(2))),
    ),
    Mutation(PORTABLE, "rows of core neurons are off by one", "gate 'core rows'", call("rows_off_by_one")),
    Mutation(PORTABLE, "gate and up rows change places", "gate 'core rows'", call("rows_of_another_part")),
    Mutation(PORTABLE, "rows of another layer", "gate 'core rows'", call("rows_of_another_layer")),
    Mutation("reference", "a NaN in PyTorch's logits", "gate 'prefill'", reference("logits", one(NAN))),
    Mutation(
        "reference",
        "an infinity in PyTorch's cache, other outputs right",
        "gate 'prefill'",
        reference("cache.0.key", one(INF)),
    ),
    Mutation("reference", "logits of another model", "gate 'prefill'", reference("logits", other)),
    Mutation("reference", "steps of another answer", "gate 'decode'", reference("step_logits", other)),
    Mutation(
        "reference",
        "other tokens than those of the steps",
        "gate 'decode'",
        reference("tokens", lambda a: (a + 1) % 50),
    ),
    Mutation("reference", "no steps: a decode of length 0", "decode", reference("step_logits", first(0))),
    Mutation("reference", "neither steps nor tokens", "nothing to compare", call("no_steps_at_all")),
    Mutation(
        "reference",
        "the cache of a layer is missing",
        "prefill_dense.onnx: past.1.value",
        reference("cache.1.value", None),
    ),
    Mutation("reference", "the tower's answer is missing", "vision.onnx", reference("image_embeds", None)),
    Mutation(
        "reference",
        "positions of a prompt without its last token",
        "gate 'positions'",
        reference("position_ids", lambda a: a[:, :-1]),
    ),
    Mutation("reference", "an output is compared with itself", "compared with itself", call("compared_with_itself")),
    Mutation("reference", "a NaN in one output, right ones after it", "holds NaN", call("nan_before_right_outputs")),
    Mutation("reference", "an output of length 0", "is empty", call("empty_output")),
    Mutation("reference", "no output at all", "nothing to compare", call("no_outputs")),
)
LOWERED = "lowered graphs"
PACKED = (
    Mutation(LOWERED, "one row of a 16-bit weight is zero", "gate 'half", ("half", "mlp.up_proj.weight", row(1, 0))),
    Mutation(LOWERED, "a 16-bit bias is NaN", "gate 'half", ("half", "k_proj.bias", one(NAN))),
    Mutation(LOWERED, "codes of one packed row are those of the next", "packing", call("packed_row_of_another")),
    Mutation(LOWERED, "the scale of one group is doubled", "packing", call("packed_scale_doubled")),
    Mutation(LOWERED, "a scale is NaN", "packing", call("packed_scale_nan")),
    Mutation(LOWERED, "an output of the lowered graph is missing", "is missing", call("lowered_output_missing")),
    Mutation("predictor", "one group of one copy has another scale", "predictor", call("copy_scale_doubled")),
    Mutation("predictor", "norms of another layer's rows", "predictor", call("copy_norms_moved")),
    Mutation(
        "weights", "one element of a stored tensor differs", "differs from the checkpoint", call("stored_element")
    ),
    Mutation("stages", "one byte of a finished stage differs", "the stage is made anew", call("stage_byte")),
)
ENGINE = "engine checks"
ENGINES = (
    Mutation(
        ENGINE, "an index is no input of the network", "index core_neurons is no input", call("network_without_index")
    ),
    Mutation(ENGINE, "an input reaches no output", "reaches no output", call("network_ignores_an_input")),
    Mutation(ENGINE, "an input has another type", "is HALF, not FLOAT", call("network_of_another_type")),
    Mutation(
        ENGINE, "the plugin layer is missing in the engine", "no plugin layer for ffn.0", call("engine_without_plugin")
    ),
)
INDEX = "index guard"
INDEXES = tuple(
    Mutation(INDEX, what, words, ("index", kind, ids))
    for what, kind, ids, words in (
        ("a neuron beyond the last", "neurons", [1, 2, 16], "id 16"),
        ("a neuron before the first", "neurons", [-1, 0, 1], "id -1"),
        ("neurons not in order", "neurons", [2, 1, 3], "2 is followed by 1"),
        ("a neuron twice", "neurons", [1, 1, 3], "1 is followed by 1"),
        ("no neuron", "neurons", [], "K >= 1"),
        ("a token beyond the prompt", "tokens", [0, 1, 9], "id 9"),
        ("tokens not in order", "tokens", [0, 2, 1], "2 is followed by 1"),
        ("a token twice", "tokens", [0, 2, 2], "2 is followed by 2"),
        ("no token", "tokens", [], "M >= 1"),
    )
)
GUARD = "run --guard"
RUNNING = (
    Mutation(
        GUARD, "the sparse model writes nonsense", "the answer stays the dense one", call("guard_and_sparse_nonsense")
    ),
    Mutation(GUARD, "the sparse model's logits are NaN", "no numbers", call("guard_and_sparse_nan")),
    Mutation(GUARD, "the dense model's logits are NaN", "no numbers", call("guard_and_dense_nan")),
    Mutation(GUARD, "drafts of 0 tokens", "drafts of 0 tokens", call("guard_of_nothing")),
    Mutation("decode loop", "a prefill's logits are NaN", "no numbers", call("prefill_nan")),
    Mutation("decode loop", "a prefill lists a token twice", "followed by", call("prefill_token_twice")),
)
FIGURES = "figures"
NUMBERS = (
    Mutation(FIGURES, "KL of logits with a NaN", "no numbers", call("divergence_nan")),
    Mutation(FIGURES, "KL of an infinite reference", "no numbers", call("divergence_inf")),
    Mutation(FIGURES, "KL over no token", "no tokens", call("divergence_empty")),
    Mutation(FIGURES, "sparse answers to fewer questions than dense ones", "answers beside", call("kept_of_fewer")),
    Mutation(FIGURES, "a Wilson bound over no question", "0 to 1, which no floor accepts", call("wilson_of_nothing")),
    Mutation(
        "--require-accuracy", "a floor above 1", "no share that can be required", call("accuracy_floor_above_one")
    ),
    Mutation("--require-accuracy", "a floor of 0", "no share that can be required", call("accuracy_floor_zero")),
    Mutation("--require-retained", "a floor that is NaN", "no share that can be required", call("retained_floor_nan")),
    Mutation("--require-accuracy", "no questions", "no questions", call("no_questions")),
    Mutation("--require-accuracy", "a question twice", "question 2 repeats question 1", call("question_twice")),
    Mutation("--require-accuracy", "an accuracy that is NaN", "below the required", call("accuracy_nan")),
    Mutation("--require-retained", "a dense model that is never right", "nothing right", call("dense_never_right")),
    Mutation("--data", "a line twice", "question 2 repeats question 1", call("line_twice")),
    Mutation("--data", "an empty file", "no questions", call("empty_file")),
    Mutation("tune", "a floor above 1", "no share that can be required", call("tune_floor_above_one")),
    Mutation("report", "a floor above 1", "no share that can be required", call("report_floor_above_one")),
    Mutation("report", "an interval that is NaN", "no point holds the floor", call("report_interval_nan")),
    Mutation("report", "no points", "no point holds the floor", call("report_without_points")),
    Mutation("tune", "a floor below 0", "no share that can be required", call("tune_floor_negative")),
    Mutation("tune", "no held-out questions", "nothing is recommended", call("tune_nothing_held_out")),
    Mutation("tune", "a dense model that is never right", "nothing is recommended", call("tune_dense_never_right")),
    Mutation("tune", "a cost that is NaN", "nothing is recommended", call("tune_cost_nan")),
    Mutation(
        "--require-agreement", "a floor above 1", "no share that can be required", call("agreement_floor_above_one")
    ),
    Mutation(
        "--require-agreement", "an agreement that was not measured", "was not measured", call("agreement_missing")
    ),
    Mutation("--require-agreement", "an agreement that is NaN", "below the required", call("agreement_nan")),
    Mutation("--require-agreement", "an agreement below the floor", "below the required", call("agreement_low")),
)
BUNDLE = "bundle"
SEALS = tuple(
    Mutation(BUNDLE, what, words, ("bundle", name, how))
    for what, name, how, words in (
        ("one bit of the weights", "weights.safetensors", "bit", "weights.safetensors"),
        ("one bit of a graph", "decode.onnx", "bit", "decode.onnx"),
        ("an empty graph", "prefill.onnx", "empty", "prefill.onnx"),
        ("a missing graph", "decode_dense.onnx", "missing", "decode_dense.onnx"),
        ("a gate that passed after all", "manifest.json", "gates", "seal"),
        ("another drift", "manifest.json", "drift", "seal"),
    )
)
MUTATIONS = (*BUILD, *PACKED, *ENGINES, *INDEXES, *RUNNING, *NUMBERS, *SEALS)


def table() -> str:
    """The rows as docs/gates.md shows them."""
    lines = ["| where | what is wrong | what it ends with |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {m.where} | {m.what} | {m.gate} |" for m in MUTATIONS)]) + "\n"
