"""Neurons chosen inside the decode graph: the copies, the choice in torch and in ONNX, the lowered graph, the real command."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import built, here, take_stages
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import copy, family, request
from stepping import Decoder, constants, every_neuron, gatherer, prefill, step_feeds
from tolerances import agrees

from cm_export.backends.onnxruntime.backend import Backend
from cm_export.backends.onnxruntime.lower import lower
from cm_export.base.errors import InputError
from cm_export.base.onnx_text import model_of
from cm_export.build.gates import COPY_LIMIT
from cm_export.bundle import predictor
from cm_export.bundle.weights import WeightFile
from cm_export.host.core_set import choose
from cm_export.host.request import prefill_feeds
from cm_export.policies.neurons import predicted
from cm_export.quant import packing
from cm_export.quant.rounding import least_squares
from cm_export.quant.scheme import Scheme
from cm_export.recipe.recipe import Recipe
from cm_export.surgery import pipeline

CASES = settings(max_examples=25, deadline=None)
RECIPE = Recipe().replace(neurons__policy="predicted", tokens__policy="dense")


# ------------------------------------------------------------------------------------------------ the copies
def fit(weight, group):
    found = least_squares(weight, Scheme(4, group))
    return found.codes, found.scale


@CASES
@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([16, 32, 64]), st.integers(0, 2**32 - 1))
def test_a_copy_is_what_onnx_unpacks_and_within_a_step_of_the_weight(ffn, blocks, group, seed):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((ffn, blocks * group)) * rng.choice([1e-3, 1, 50])).astype(np.float32)
    q, scale = fit(weight, group)
    tensor = onnx.TensorProto(dims=q.shape, data_type=onnx.TensorProto.INT4, raw_data=packing.packed(q, 4).tobytes())
    assert (onnx.numpy_helper.to_array(tensor).astype(np.int8) == q).all()
    assert q.min() >= -8 and q.max() <= 7
    back = q.reshape(ffn, blocks, group) * scale[..., None]
    error = np.square(back - weight.reshape(back.shape)).sum(-1)
    # Whatever scale was tried, the plain one (largest value on -8) must not beat it.
    peak = np.take_along_axis(weight.reshape(back.shape), np.abs(weight.reshape(back.shape)).argmax(-1)[..., None], -1)
    step = peak / -8
    plain = np.square(np.clip(np.rint(weight.reshape(back.shape) / step), -8, 7) * step - weight.reshape(back.shape))
    assert (error <= plain.sum(-1) * (1 + 1e-4) + 1e-12).all()
    assert error.sum() <= 0.02 * np.square(weight).sum(), "four bits keep 98 % of the energy of a Gaussian"


def test_a_copy_in_a_wrong_place_fails_the_build(layered):
    """At full budget decode is dense whatever the copies say, so they have a gate of their own."""
    x, _, copies = layered
    error, _ = predictor.copy_error(copies, x.weights, family, x.shape)
    assert error < 0.2 < COPY_LIMIT
    for name, shift in (("predictor.1.gate", 1), ("predictor.0.up_scale", 1), ("predictor.1.norm", 2)):
        moved = {n: np.roll(copies[n], shift, axis=0) if n == name else copies[n] for n in copies.tensors}
        error, where = predictor.copy_error(moved, x.weights, family, x.shape)
        assert error > COPY_LIMIT and where == name.removesuffix("_scale")


def test_zeros_stay_zeros_and_are_not_divided_by():
    q, scale = fit(np.zeros((3, 32), np.float32), 32)
    assert (q == 0).all() and np.isfinite(scale).all()


def test_the_share_of_bytes_counts_both_copies_and_their_scales():
    hidden, ffn = 1536, 8960
    bits = 2 * (4 * ffn * hidden + 32 * ffn * hidden / 64)
    assert predictor.predictor_share(hidden) == pytest.approx(bits / (3 * 16 * ffn * hidden))


# ------------------------------------------------------------------------------------------------ the choice
@st.composite
def exact_layers(draw):
    """Whole numbers and powers of two, so that every runtime computes the same sums; many ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    block = draw(st.sampled_from([1, 1, 8]))
    ffn, group = block * draw(st.integers(2, 9)), draw(st.sampled_from([16, 32]))
    hidden = group * draw(st.integers(1, 2))
    feeds = {
        "x": rng.integers(-2, 3, (draw(st.integers(1, 3)), draw(st.integers(1, 4)), hidden)).astype(np.float32),
        "norm": 2.0 ** rng.integers(-1, 2, ffn).astype(np.float32),
        "count": np.array([block * draw(st.integers(1, ffn // block))], np.int64),
    }
    for part in ("gate", "up"):
        feeds[part] = rng.integers(-8, 8, (ffn, hidden)).astype(np.int8)
        feeds[f"{part}_scale"] = 2.0 ** rng.integers(-2, 1, (ffn, hidden // group)).astype(np.float32)
    return feeds, group, block


def chosen_by_torch(feeds, group, block):
    def copy_of(part):
        q, scale = feeds[part].astype(np.float32), feeds[f"{part}_scale"]
        return torch.from_numpy((q.reshape(*scale.shape, group) * scale[..., None]).reshape(q.shape))

    x = torch.from_numpy(feeds["x"])
    zp = torch.relu(x @ copy_of("gate").T) * (x @ copy_of("up").T)
    return predicted.choose(zp, torch.from_numpy(feeds["norm"]), int(feeds["count"][0]), block).numpy()


def chosen_by_onnx(feeds, group, block, lowered):
    """PredictNeurons alone, its copies as initializers in memory; `lowered`: as ONNX Runtime multiplies them."""
    types = (
        "float[B,N,D] x, {0} gate, float[F,G] gate_scale, {0} up, float[F,G] up_scale, float[F] norm, int64[1] count"
    )
    body = predicted.decode_function("relu")
    model = model_of(body, types.format("int4[F,D]"), "int32[B,N,K] core_neurons", group=group, block=block)
    for value in [v for v in model.graph.input if v.name not in ("x", "count")]:
        model.graph.input.remove(value)
        if value.name in ("gate", "up"):
            packed = packing.packed(feeds[value.name], 4)
            shape, kind = feeds[value.name].shape, onnx.TensorProto.INT4
            model.graph.initializer.add(name=value.name, dims=shape, data_type=kind, raw_data=packed.tobytes())
        else:
            model.graph.initializer.append(onnx.numpy_helper.from_array(feeds[value.name], value.name))
    if lowered:
        # a node that reads the choice, as in a decode graph
        reader = onnx.helper.make_node(
            "CoreFFN", ["x", "norm", "norm", "norm", "core_neurons"], ["y"], domain="cm_export", activation="relu"
        )
        model.graph.node.append(reader)
        model.graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None))
        lower(model, rows_as_inputs=True)
        del model.graph.node[-1], model.graph.output[-1]
        for t in model.graph.initializer:
            if t.name in ("gate", "up"):
                assert t.data_type == onnx.TensorProto.UINT8
                t.raw_data = packing.blocks(packing.packed(feeds[t.name], 4), 4, group).tobytes()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": feeds["x"], "count": feeds["count"]})[0]


@CASES
@given(exact_layers())
def test_torch_and_onnx_choose_the_same_ids_for_every_token(case):
    feeds, group, block = case
    expected = chosen_by_torch(feeds, group, block)
    got = chosen_by_onnx(feeds, group, block, lowered=False)
    assert got.dtype == np.int32 and (got == expected).all()
    assert (np.diff(got, axis=-1) > 0).all()


@CASES
@given(exact_layers())
def test_the_lowered_choice_is_the_same_set(case):
    feeds, group, block = case
    # Whole numbers up to 2 and one of 127, per group: int8 holds x exactly, so the low-bit product is exact as well.
    feeds["x"][..., ::group] = 127
    expected = chosen_by_torch(feeds, group, block)
    assert (np.sort(chosen_by_onnx(feeds, group, block, lowered=True), axis=-1) == expected).all()


def test_law_c_constant_activations_choose_the_first_ids():
    zp, norm = torch.full((2, 3, 40), -0.7), torch.ones(40)
    assert (predicted.choose(zp, norm, 7) == torch.arange(7)).all()
    assert (predicted.choose(zp, norm, 16, 8) == torch.arange(16)).all()


@CASES
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_law_b_permuting_neurons_permutes_only_the_ids(seed, count):
    rng = np.random.default_rng(seed)
    zp, norm = torch.from_numpy(rng.standard_normal((2, 3, 30))).float(), torch.from_numpy(rng.random(30)).float()
    order = torch.from_numpy(rng.permutation(30))
    ids, moved = predicted.choose(zp, norm, count), predicted.choose(zp[..., order], norm[order], count)
    assert (order[moved.long()].sort(-1).values == ids).all()


# ------------------------------------------------------------------------------------------------ the decode graph
@pytest.fixture(scope="module")
def layered(exported):
    """A random model whose hidden size can be packed, its predictor, and its decode graph that chooses."""
    x = next(m for seed in range(12) if (m := exported(seed)).shape.hidden % 16 == 0)
    file = x.folder / predictor.FILE
    predictor.write(file, x.weights, family, x.shape)
    copies = WeightFile(file)
    graph, log = pipeline.sparse_decode(copy(x.dense["decode"]), family, x.shape, RECIPE, copies.tensors)
    assert {p.name: p.count for p in log}["predict_neurons"] == x.shape.layers
    dense = x.graphs(RECIPE)
    graphs = dense | {"decode": graph}
    return x, Backend(lambda n: copy(graphs[n]), x.weights, 1, copies), copies


def steps(x, backend, graph, constants, tokens):
    feeds = request(x, 3)
    cache = prefill(backend, prefill_feeds(feeds), "prefill")
    decoder = Decoder(backend, graph, cache, constants)
    return decoder.read(step_feeds(feeds, tokens, 0))[0]


def test_law_a_every_neuron_is_the_dense_model(layered):
    x, backend, _ = layered
    rows = gatherer(x.weights, x.family, x.shape.layers)
    tokens = [8, 9, 10]
    dense = steps(x, backend, "decode_dense", {}, tokens)
    agrees("same numbers", steps(x, backend, "decode", every_neuron(rows), tokens), dense)
    few = every_neuron(rows) | {"core_counts": np.full(x.shape.layers, 3, np.int64)}
    assert np.abs(steps(x, backend, "decode", few, tokens) - dense).max() > 1e-2


def test_law_i_each_layer_reads_its_own_count(layered):
    x, backend, _ = layered
    rows = gatherer(x.weights, x.family, x.shape.layers)
    full = steps(x, backend, "decode", every_neuron(rows), [8])
    for layer in range(x.shape.layers):
        counts = np.full(x.shape.layers, x.shape.ffn, np.int64)
        counts[layer] = 1
        one = steps(x, backend, "decode", every_neuron(rows) | {"core_counts": counts}, [8])
        assert np.abs(one - full).max() > 1e-3, layer


def test_decode_computes_the_neurons_that_are_largest_for_each_token(layered):
    """Against stock PyTorch whose FFNs keep, token by token, the K largest |z| x row norm as the copies predict them."""
    x, backend, copies = layered
    core = choose({}, RECIPE.neurons, x.shape, None, share=0.4)
    tokens = [8, 9, 10]
    asked = request(x, 3)
    past = {
        n.replace("present", "past"): v.numpy() for n, v in prefill(backend, prefill_feeds(asked), "prefill").items()
    }
    # The portable graph with its two files, by ONNX Runtime as anybody would run it.
    graph, _ = pipeline.sparse_decode(copy(x.dense["decode"]), family, x.shape, RECIPE, copies.tensors)
    onnx.save(graph, x.folder / "portable.onnx")
    plain = ort.InferenceSession(x.folder / "portable.onnx", providers=["CPUExecutionProvider"])
    feeds = step_feeds(asked, tokens, 0) | past | {"core_counts": core.counts}
    got = plain.run(["logits"], {i.name: feeds[i.name] for i in plain.get_inputs()})[0][0]

    def sparse(layer, module):
        group = predictor.group_of(x.shape.hidden)

        def full(part):
            packed = copies[f"predictor.{layer}.{part}"]
            q = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.int8)
            q = np.where(q > 7, q - 16, q).astype(np.float32)
            scale = copies[f"predictor.{layer}.{part}_scale"]
            return torch.from_numpy((q.reshape(len(q), -1, group) * scale[..., None]).reshape(q.shape))

        gate, up = full("gate"), full("up")
        norm = module.down_proj.weight.norm(dim=0)

        def forward(h):
            zp = module.act_fn(h @ gate.T) * (h @ up.T)
            keep = torch.zeros_like(zp).scatter_(-1, (zp.abs() * norm).topk(int(core.counts[layer])).indices, 1.0)
            keep[:, : -len(tokens)] = 1  # the prompt is read densely
            return module.down_proj(module.act_fn(module.gate_proj(h)) * module.up_proj(h) * keep)

        return forward

    layers = x.model.get_decoder().layers
    before = [m.mlp.forward for m in layers]
    try:
        for i, m in enumerate(layers):
            m.mlp.forward = sparse(i, m.mlp)
        embeds = torch.from_numpy(np.concatenate([asked.inputs_embeds, feeds["inputs_embeds"]], 1))
        places = torch.from_numpy(np.concatenate([asked.position_ids, feeds["position_ids"]], 2))
        with torch.no_grad():
            hidden = x.model.get_decoder()(inputs_embeds=embeds, position_ids=places).last_hidden_state
            expected = x.model.get_output_embeddings()(hidden)[0, -len(tokens) :].numpy()
    finally:
        for m, forward in zip(layers, before, strict=True):
            m.mlp.forward = forward
    agrees("export", got, expected)
    # The lowered graph rounds x to int8 to choose, which may swap neurons at the border of a set: those count least.
    rows = gatherer(x.weights, x.family, x.shape.layers)
    lowered, dense = (steps(x, backend, "decode", c, tokens) for c in (constants(core, rows), every_neuron(rows)))
    assert np.abs(lowered - expected).mean() < 0.5 * np.abs(dense - expected).mean()


# ------------------------------------------------------------------------------------------------ refusals, the command
def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"neurons\.fill with predicted"):
        Recipe().replace(neurons__policy="predicted", neurons__fill="prompt")
    with pytest.raises(InputError, match="no multiple of 16"):
        predictor.group_of(72)
    with pytest.raises(InputError, match="no multiple of 16"):
        pipeline.check_recipe(RECIPE, type("Shape", (), {"layers": 4, "ffn": 64, "hidden": 72}))


@pytest.fixture(scope="module")
def predicting(demo_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predicted")
    take_stages(demo_bundle, folder / "p.plan")
    return built(folder / "p.plan", "--recipe", "demo", "--neurons", "predicted", "--neuron-share", "0.2")


def test_a_fifth_of_the_neurons_answers_like_the_dense_model(predicting, tmp_path):
    done = here(
        "eval", predicting, "--task", "easy-vqa", "--kinds", "sentence", "--limit", "12", "--threads", "1", "--json",
        "--neurons", "predicted", "--tokens", "dense",
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["dense"]["accuracy"] >= 0.95
    assert report["sparse"]["neuron_share"] == pytest.approx(0.2, abs=0.001)
    assert report["sparse"]["ffn_bytes_share"] == pytest.approx(0.2 + 0.1875, abs=0.001)
    assert report["sparse"]["of_dense"] >= 0.95
    assert report["random"]["neuron_share"] == pytest.approx(report["sparse"]["ffn_bytes_share"], abs=0.001)
    assert report["random"]["accuracy"] < report["sparse"]["accuracy"]


def test_its_graph_takes_counts_and_no_neurons_and_the_links_say_so(predicting):
    manifest = json.loads((predicting / "manifest.json").read_text())
    names = {v["name"] for v in manifest["graphs"]["decode"]["inputs"]}
    assert "core_counts" in names and "core_neurons" not in names
    assert not any("core_neurons" in link["to"] for link in manifest["links"])
    onnx.checker.check_model(str(predicting / "decode.onnx"))


def test_a_damaged_predictor_is_noticed_before_an_answer(predicting, tmp_path):
    broken = tmp_path / "broken.plan"
    shutil.copytree(predicting, broken)
    data = bytearray((broken / predictor.FILE).read_bytes())
    data[-9] ^= 1
    (broken / predictor.FILE).write_bytes(data)
    done = here("run", broken, "--prompt", "what shape is present?", "--image", "cm_export/demo/images/teal-circle.png")
    assert done.returncode != 0 and "predictor.safetensors" in done.stderr and done.stdout == ""
