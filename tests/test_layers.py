"""A few layers of a decoder are traced, the others are written like the last of them: only where they are alike."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from random_models import random_checkpoint
from torch import nn

from cm_export import families
from cm_export.source import layers
from cm_export.source import model as hf
from cm_export.source import trace as tracing

WEIGHTS = "model.layers.{layer}."


# ---------------------------------------------------------------- which may be left out


class Layer(nn.Module):
    """Of a made-up decoder, with all that layers can differ in."""

    def __init__(self, index: int, width: int = 4, window: int | None = None, table: float = 1.0, act=torch.relu):
        super().__init__()
        self.layer_idx, self.window, self.act = index, window, act
        self.up = nn.Linear(4, width)
        self.register_buffer("table", torch.full((3,), table))


def of(count: int, **odd: object) -> list[Layer]:
    """Layers of which those at `odd`, a name like _5, have settings of their own."""
    return [Layer(i, **odd.get(f"_{i}", {})) for i in range(count)]


def never(_: int) -> bool:
    return False


def test_of_layers_that_are_alike_three_are_traced():
    assert layers.enough(of(28), never) == 3
    assert layers.enough(of(3), never) == 3 and layers.enough(of(2), never) == 2


@pytest.mark.parametrize("setting", [{"width": 5}, {"window": 7}, {"table": 2.0}, {"act": torch.tanh}])
@pytest.mark.parametrize(("odd", "traced"), [(0, 4), (4, 8), (8, 12), (10, 12), (11, 12)])
def test_all_up_to_the_last_that_differs_are_traced(setting, odd, traced):
    assert layers.enough(of(12, **{f"_{odd}": setting}), never) == traced


def test_layers_after_which_something_is_added_are_traced():
    assert layers.enough(of(12), lambda i: i < 3) == 6
    assert layers.enough(of(12), lambda i: i == 11) == 12


def test_a_part_of_another_kind_is_a_difference():
    found = of(8)
    found[2].up = nn.Linear(4, 4, bias=False)
    assert layers.enough(found, never) == 6
    found = of(8)
    found[2].norm = nn.Identity()
    assert layers.enough(found, never) == 6


def test_a_decoder_has_all_its_layers_again_also_after_a_failure():
    decoder = SimpleNamespace(layers=nn.ModuleList(of(5)))
    whole = decoder.layers
    with pytest.raises(KeyError), layers.only(decoder, 3):
        assert len(decoder.layers) == 3
        raise KeyError
    assert decoder.layers is whole


# ---------------------------------------------------------------- how they are written

F = TensorProto.FLOAT


def toy(count: int, change: Callable[[int, list[onnx.NodeProto]], None] = lambda *_: None) -> onnx.ModelProto:
    """A decoder: y = x W, present = past + y, x' = x + present * length, and x' + x' at the end; the first computes a length."""
    nodes, x = [helper.make_node("Shape", ["past.0.key"], ["length"])], "x"
    for i in range(count):
        block = [
            helper.make_node("MatMul", [x, f"model.layers.{i}.w"], [f"y{i}"]),
            helper.make_node("Clip", [f"y{i}", "low"], [f"z{i}"]),
            helper.make_node("Add", [f"past.{i}.key", f"z{i}"], [f"present.{i}.key"]),
            helper.make_node("Expand", [f"present.{i}.key", "length"], [f"e{i}"]),
            helper.make_node("Add", [x, f"e{i}"], [f"x{i}"]),
        ]
        change(i, block)
        nodes += block
        x = f"x{i}"
    nodes.append(helper.make_node("Mul", [x, "model.norm"], ["out"]))
    inputs = [
        "x",
        *(f"past.{i}.key" for i in range(count)),
        *(f"model.layers.{i}.w" for i in range(count)),
        "model.norm",
    ]
    outputs = ["out", *(f"present.{i}.key" for i in range(count))]
    values = [
        [helper.make_tensor_value_info(n, F, [2, "p"] if n[0] == "p" else [2, 2]) for n in names]
        for names in (inputs, outputs)
    ]
    constants = [
        helper.make_tensor("low", F, [], [0.0]),
        helper.make_tensor("low2", F, [], [0.0]),
        helper.make_tensor("high", F, [], [1.0]),
    ]
    return helper.make_model(helper.make_graph(nodes, "toy", *values, constants))


NUMBERS: dict[tuple, int] = {}  # of what is computed from what, the same for all graphs


def meaning(model: onnx.ModelProto) -> list[tuple]:
    """What each output is made of, and how it and the inputs are declared; names of values between do not matter."""
    made: dict[str, object] = {v.name: v.name for v in model.graph.input}
    for tensor in model.graph.initializer:
        nameless = TensorProto.FromString(tensor.SerializeToString())
        nameless.name = ""
        made[tensor.name] = nameless.SerializeToString(deterministic=True)
    for node in model.graph.node:
        settings = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        # Of any layer's keys it takes the length.
        inputs = ["past" if node.op_type == "Shape" and x.startswith("past.") else made[x] for x in node.input]
        number = NUMBERS.setdefault((node.domain, node.op_type, *settings, *inputs), len(NUMBERS))
        made |= {o: (number, i) for i, o in enumerate(node.output)}
    return [(v.name, made[v.name], v.type.SerializeToString()) for v in (*model.graph.input, *model.graph.output)]


def repeated(few: onnx.ModelProto, whole: onnx.ModelProto, traced: int, count: int) -> onnx.ModelProto:
    """`few` with `count` layers, and with inputs and outputs in the order of `whole`."""
    orders = ([v.name for v in values] for values in (whole.graph.input, whole.graph.output))
    layers.repeat(few, WEIGHTS, traced, count, *orders)
    onnx.checker.check_model(few)
    return few


@pytest.mark.parametrize("count", [4, 12])
@pytest.mark.parametrize("traced", [3, 5])
def test_the_graph_is_the_one_of_all_layers(traced, count):
    count = max(count, traced)
    assert meaning(repeated(toy(traced), toy(count), traced, count)) == meaning(toy(count))


def test_constants_of_equal_value_are_the_same():
    def change(i, block):
        if i == 2:
            block[1].input[1] = "low2"

    assert len(repeated(toy(3, change), toy(6), 3, 6).graph.node) == len(toy(6).graph.node)


def another_operator(i, block):
    block[1].op_type = "Relu6" if i == 2 else "Clip"


def another_setting(i, block):
    block[0].attribute.append(helper.make_attribute("k", i))


def another_constant(i, block):
    block[1].input[1] = "high" if i == 2 else "low"


def reads_the_first_layer(i, block):
    if i == 2:
        block[4].input[0] = "x0"


def reads_two_layers_back(i, block):
    block[4].input[0] = f"x{i - 2}" if i > 1 else "x"


def a_node_less(i, block):
    if i == 2:
        block[4].input[1] = f"present.{i}.key"
        del block[3]


def another_weight(i, block):
    if i == 2:
        block[0].input[1] = "model.layers.1.w"


def the_end_reads_inside(i, block):
    if i == 2:
        block.append(helper.make_node("Add", [f"y{i}", "model.norm"], ["more"]))


BREAKS = [another_operator, another_setting, another_constant, reads_the_first_layer, reads_two_layers_back, a_node_less,
          another_weight, the_end_reads_inside]  # fmt: skip


@pytest.mark.parametrize("change", BREAKS)
def test_a_layer_that_does_not_repeat_the_one_before_is_noticed(change):
    with pytest.raises(layers.Unlike):
        repeated(toy(3, change), toy(6), 3, 6)


# ---------------------------------------------------------------- through the exporter


def deep(name: str, folder: Path) -> list[tracing.GraphSpec]:
    """Prefill and decode of a random model with layers enough to leave some out."""
    family = families.find(name)
    config = family.sample(3)
    (config.get("text_config") or config)["num_hidden_layers"] = 6
    path = random_checkpoint(config, folder / "deep")
    found = tracing.specs(hf.skeleton(path, family), family, hf.read_config(path))
    return [spec for spec in found if spec.name != "vision"]


@pytest.fixture
def traced(monkeypatch) -> list[int]:
    """How many layers each call of torch's exporter saw."""
    plain, seen = tracing._traced, []

    def counted(spec: tracing.GraphSpec) -> onnx.ModelProto:
        seen.append(spec.module.layers)
        return plain(spec)

    monkeypatch.setattr(tracing, "_traced", counted)
    return seen


@pytest.mark.wide
@pytest.mark.parametrize("name", families.names())
def test_a_deep_model_is_the_same_graph_as_traced_wholly(name, tmp_path, traced):
    for spec in deep(name, tmp_path):
        few, whole = tracing.trace(spec), tracing._traced(spec)
        assert meaning(few) == meaning(whole)
    adds = {"qwen3_vl": 1}  # layers after which features of pictures are added
    assert traced == [adds.get(name, 0) + 3, 6, 3, 6]


def test_where_layers_turn_out_unlike_all_are_traced(tmp_path, traced, monkeypatch):
    monkeypatch.setattr(tracing, "_traced", lambda spec: traced.append(spec.module.layers) or toy(3, another_operator))
    tracing.trace(deep("llama", tmp_path)[0])
    assert traced == [3, 6]
