"""Low-bit weights on ONNX Runtime: one packed copy serves every graph, natively or by ONNX Runtime's own products."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import low_bits, take_stages
from tolerances import agrees

from cm_export.backends.onnxruntime import backend, pack
from cm_export.base.errors import BundleError, InputError
from cm_export.build import drift
from cm_export.bundle import unpacked
from cm_export.bundle.bundle import Bundle
from cm_export.bundle.packed import FILE, TOWER, Entry
from cm_export.bundle.predictor import copy_bytes
from cm_export.bundle.weights import FILE as WEIGHTS
from cm_export.bundle.weights import index
from cm_export.cli import main
from cm_export.evals import bench
from cm_export.evals.exam import write
from cm_export.evals.other_policies import with_policies
from cm_export.evals.tasks import easy_vqa
from cm_export.evals.weights_read import Steps, of_dense, site_sizes
from cm_export.host.decode import Reader
from cm_export.host.images import open_image
from cm_export.host.loaded import LoadedBundle
from cm_export.host.runner import Budget, Runner
from cm_export.plugins.cpu import library
from cm_export.quant import remainder, rows
from cm_export.recipe.recipe import from_dict
from cm_export.recipe.stored import StoredWeights
from cm_export.recipe.vary import varied
from cm_export.surgery import packable
from cm_export.surgery.nodes import is_plain_gemm
from cm_export.surgery.packable import entries

IDS = [5, 9, 12, 4, 20]


@pytest.fixture(scope="module", params=["int8", "int4"])
def low(request, demo_bundle):
    return Bundle(low_bits(demo_bundle, request.param))


class Rounded:
    """A weight file whose packed weights are the numbers that their codes stand for: what products of them must give."""

    def __init__(self, bundle):
        self.path, self.tensors, self._file = bundle.weights.path, bundle.weights.tensors, bundle.weights
        self._own = {}
        for name, entry in bundle.packed.entries.items():
            whole, begin = rows.numbers(bundle.packed.rows(name)), 0
            for weight, outputs in zip(entry.weights, entry.outputs, strict=True):
                part = whole[: entry.inputs, begin : begin + outputs]
                self._own[weight] = np.ascontiguousarray(part.T if entry.turned else part)
                begin += -(-outputs // rows.PANEL) * rows.PANEL if entry.padded else outputs

    def __getitem__(self, name):
        return self._own.get(name, self._file[name])

    def __contains__(self, name):
        return name in self._file

    def release(self):
        pass


def logits(runner, asked, graph="decode_dense"):
    """Of the prompt's last token, and of IDS read at once and one by one after it."""
    prefilled = runner.prefill(asked, Budget(dense=graph == "decode_dense"))
    together, single = (prefilled.row(graph=graph, listed=None) for _ in range(2))
    Reader(runner.backend).read([together], [IDS])
    for token in IDS:
        Reader(runner.backend).read([single], [[token]])
    return np.concatenate([prefilled.logits, together.logits, single.logits[None]])


def asked_of(runner):
    question = easy_vqa.questions("sentence")[40]
    return runner.ask(question.text, runner.see([open_image(question.pictures[0])]))


def exact(bundle, monkeypatch):
    """A runner over the same graphs in float32, with the numbers that the packed codes stand for."""
    runner = Runner(bundle, 1)
    monkeypatch.setattr(runner.backend, "_low_bits", None)
    monkeypatch.setattr(runner.backend, "weights", Rounded(bundle))
    return runner


@pytest.mark.parametrize("native", [True, False])
def test_products_are_those_of_the_stored_numbers(low, native, monkeypatch):
    """In the tower, prefill, and decode of one and of several tokens; x is rounded to 8 bits, which is all that differs."""
    if native and library.find() is None:
        pytest.skip("no native library: there is no compiler")
    if not native:
        monkeypatch.setattr(library, "find", lambda: None)
    runner, reference = Runner(low, 1), exact(low, monkeypatch)
    assert (runner.backend.native is not None) == native
    if not native:
        assert "low-bit products run on ONNX Runtime's own" in runner.backend.notes[-1]
    ours, theirs = (logits(r, asked_of(r)) for r in (runner, reference))
    size = np.abs(theirs).max()
    # Of a head in two times 4 bits, the lowest logits are those of the first 4.
    near = ours >= ours.max(-1, keepdims=True) - (9 if native and low.packed.entries["head"].refined else np.inf)
    agrees("rounded x", ours[near] / size, theirs[near] / size)
    agrees("four bits of a head", ours / size, theirs / size)
    assert not np.array_equal(ours, theirs)
    plain = Runner(low, 1)
    monkeypatch.setattr(plain.backend, "_low_bits", None)
    off = np.abs(logits(plain, asked_of(plain)) - theirs).max()
    if is_slim(low):
        assert off == 0, "what stands in for float32 weights are the numbers of the codes"
    else:
        assert off > 1e-5 * np.abs(theirs).max(), "rounding does something"


@pytest.mark.parametrize("graph", ["decode_dense", "decode"])
def test_logits_of_a_token_are_the_same_to_the_last_bit_alone_and_among_others(low, graph):
    """Behind products that round x to 8 bits, two ways to sum the same attention were 1e-1 of a logit apart."""
    found = logits(Runner(low, 1), asked_of(Runner(low, 1)), graph)
    assert np.array_equal(found[-2], found[-1]) and not np.array_equal(found[-3], found[-1])


def test_attention_of_the_native_library_is_there_and_changes_no_token(low, monkeypatch):
    if library.find() is None:
        pytest.skip("no native library: there is no compiler")

    def answer():
        runner = Runner(low, 1)
        prefilled = runner.prefill(asked_of(runner), Budget(dense=True))
        key = ("decode_dense", True, False, True)
        model, _ = runner.backend._prepared(runner.backend._graph(key[0]), key)
        ops = [n.op_type for n in model.graph.node]
        return list(runner.tokens(prefilled, 12, frozenset())), ops.count("CachedAttention")

    ids, ops = answer()
    assert ops == low.shape.layers
    monkeypatch.setattr(backend, "attend_natively", lambda *_: None)
    assert answer() == (ids, 0)


def test_every_product_of_every_graph_is_packed(low):
    for name in ("vision", "prefill_dense", "decode_dense", "prefill", "decode"):
        model = onnx.load(low.graph(name), load_external_data=False)
        if name.endswith("dense"):
            model = pack.gather_ffns(model, low.family, low.shape)
        found = pack.Packing(model, low.packed, True, True).run()
        left = {t.name for t in found.graph.initializer} & set(low.packed.entry_of)
        read = {i for n in found.graph.node for i in n.input}
        turned = {n.output[0] for n in found.graph.node if n.op_type == "Transpose" and n.input[0] in left}
        assert not {w for w in left if w in read} - {n.input[0] for n in found.graph.node if n.op_type == "Transpose"}
        assert not turned & {i for n in found.graph.node if n.op_type != "Transpose" for i in n.input}
        assert {n.op_type for n in found.graph.node} & {"PackedMatMul", "PackedFFN"}


def test_entries_hold_every_weight_of_the_products(low, demo_bundle):
    bundle = Bundle(demo_bundle)
    graphs = [onnx.load(bundle.graph(n), load_external_data=False) for n in ("decode_dense", "vision")]
    found = entries(*graphs, bundle.weights, bundle.family, bundle.shape, StoredWeights(precision="int8"))
    assert {n.partition(".")[0] for n in found} == {"layers", "head", "vision"}
    assert sum(n.startswith("layers.") for n in found) == 4 * bundle.shape.layers
    assert len(found["layers.0.attention_in"].weights) == 3 and len(found["layers.0.ffn_in"].weights) == 2
    assert sum(n.startswith("vision.") for n in found) == 18
    assert all(Entry.of(json.loads(json.dumps(e.to_dict()))) == e for e in found.values())
    some = StoredWeights(precision="int4", ffn="fp32", vision="fp32")
    kinds = {
        n.split(".")[-1]: e.bits for n, e in entries(*graphs, bundle.weights, bundle.family, bundle.shape, some).items()
    }
    assert kinds == {"attention_in": 4, "value": 8, "attention_out": 4, "head": 8}
    assert found["head"].table and not any(e.table for n, e in found.items() if n != "head")
    for weights in (StoredWeights(precision="int8", embedding="fp32"), StoredWeights(precision="int8", head="fp32")):
        made = entries(*graphs, bundle.weights, bundle.family, bundle.shape, weights)
        assert not any(e.table for e in made.values()) and "embedding" not in made


def test_a_large_head_beside_four_bits_is_stored_twice_in_four(demo_bundle, monkeypatch):
    """Unless 8 bits that are all read are asked for: `head = "int8"`, or int8 for everything."""
    bundle = Bundle(demo_bundle)
    graph = onnx.load(bundle.graph("decode_dense"), load_external_data=False)
    size = bundle.shape.vocab * bundle.shape.hidden
    int4, own, int8 = (StoredWeights(precision=p, head=h) for p, h in (("int4", ""), ("int4", "int8"), ("int8", "")))
    for weights, worth, refined in ((int4, size, True), (int4, size + 1, False), (own, 0, False), (int8, 0, False)):
        monkeypatch.setattr(packable, "WORTH_REFINING", worth)
        head = entries(graph, None, bundle.weights, bundle.family, bundle.shape, weights)["head"]
        assert (head.refined, head.bits) == (refined, 4 if refined else 8)


def test_z_that_a_policy_reads_is_the_one_that_is_multiplied(low, monkeypatch):
    """`overlap` judges image tokens by z, so its FFNs cannot be one op each; what is kept and said must not change."""
    recipe = low.recipe.replace(tokens__policy="overlap", tokens__share=0.5)
    from cm_export.evals.other_policies import with_policies

    runner, reference = with_policies(Runner(low, 1), recipe), with_policies(exact(low, monkeypatch), recipe)
    monkeypatch.setattr(reference.backend, "_low_bits", None)
    monkeypatch.setattr(reference.backend, "weights", Rounded(low))
    found = [r.prefill(asked_of(r), Budget()) for r in (runner, reference)]
    same = np.isin(found[0].kept_tokens, found[1].kept_tokens).mean()
    assert same > 0.9
    model = onnx.load(low.graph("prefill_dense"), load_external_data=False)
    whole = pack.Packing(pack.gather_ffns(model, low.family, low.shape), low.packed, True, True).run()
    assert "PackedFFN" in {n.op_type for n in whole.graph.node}


def test_the_manifest_and_the_gates_say_what_rounding_changed(low):
    gates = {g["name"]: g for g in low.manifest["gates"]}
    assert gates["weights: top-1 agreement"]["value"] >= 0.95
    assert 0 < gates["weights: KL to float32"]["value"] < 0.1
    assert low.manifest["weights_drift"]["places"] > 50
    head = low.packed.entries["head"]
    assert (head.bits, head.refined) == ((4, True) if low.recipe.weights.precision == "int4" else (8, False))


def test_a_build_below_the_required_agreement_writes_nothing(
    bare_bundle, bare_checkpoint, tmp_path, monkeypatch, capsys
):
    """The logits of random weights lie close together, so that four bits change some first places for certain."""
    take_stages(bare_bundle, tmp_path / "x.plan")
    options = ["--model", bare_checkpoint, "--neurons", "dense", "--weights", "int4", "--prune-layer", "1"]
    monkeypatch.setattr(drift, "PLACES", 64)
    words = ["build", "--out", tmp_path / "x.plan", *options, "--least-agreement", "1"]
    assert main([*map(str, words)]) == 1 and not (tmp_path / "x.plan").exists()
    said = capsys.readouterr().err
    assert "gate 'weights'" in said and "no bundle was written" in said


def test_a_damaged_or_missing_packed_file_is_refused(low, tmp_path):
    copy = tmp_path / "x.plan"
    shutil.copytree(low.path, copy)
    with open(copy / FILE, "r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x7f")
    bundle = Bundle(copy)
    with pytest.raises(BundleError, match=r"packed.safetensors.*do not match"):
        bundle.wait_verified()
    (copy / FILE).unlink()
    with pytest.raises(BundleError, match=r"packed.safetensors"):
        Bundle(copy)


def test_products_read_the_mapped_file_and_no_copy_of_it(low):
    runner = Runner(Bundle(low.path), 1)
    packed = runner.bundle.packed
    runner.backend.ready("decode")
    read = {
        name: view for name, view in runner.backend._views.items() if name in packed.file and packed.file[name].size
    }
    assert read
    for name, view in read.items():
        assert view.value.data_ptr() == packed.file[name].ctypes.data, name


def is_slim(bundle):
    return bundle.recipe.weights.precision == "int4"


def external(bundle, graph):
    model = onnx.load(bundle.graph(graph), load_external_data=False)
    tensors = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return {t.name: {entry.key: entry.value for entry in t.external_data} for t in tensors}


def test_what_is_held_in_few_bits_is_held_only_so_unless_the_recipe_keeps_it(low):
    own = index(low.path / WEIGHTS)
    held = set(low.packed.entry_of)
    assert len(held) > 20 and own and (not held & own.keys() if is_slim(low) else held < own.keys())
    assert low.manifest["recipe"]["weights"]["float32"] != is_slim(low)
    for graph in low.manifest["graphs"]:
        places = external(low, graph)
        for name, place in places.items():
            lost = is_slim(low) and name in held
            assert place["location"] == (unpacked.FILE if lost else WEIGHTS)
            tensor = low.weights.tensors[name]
            assert (int(place["offset"]), int(place["length"])) == (tensor.offset, tensor.length)
        assert any(name in held for name in places)
    assert not (low.path / unpacked.FILE).exists()


def test_no_runtime_takes_other_bytes_for_weights_that_are_not_there(low):
    if is_slim(low):
        with pytest.raises(Exception, match=unpacked.FILE):
            onnxruntime.InferenceSession(low.graph("vision"))
    else:
        onnxruntime.InferenceSession(low.graph("vision"))


def test_float32_numbers_that_are_not_kept_are_those_of_the_codes(low):
    """Of every weight, also of those that lie side by side and begin within a panel; said once."""
    if not is_slim(low):
        return
    bundle, expected = Bundle(low.path), Rounded(low)
    assert bundle.weights.tensors.keys() >= expected._own.keys()
    for name, numbers in expected._own.items():
        assert name in bundle.weights and bundle.weights.tensors[name].shape == numbers.shape
        np.testing.assert_array_equal(bundle.weights[name], numbers)
    assert len(bundle.notes) == 1 and "--keep-floats" in bundle.notes[0]
    norm = next(name for name in bundle.weights.tensors if "norm" in name and name not in expected._own)
    assert not np.array_equal(bundle.weights[norm], np.zeros_like(bundle.weights[norm]))


def test_a_token_is_embedded_by_the_numbers_of_the_head(low):
    expected, low = Rounded(low), Bundle(low.path)
    ids = np.array([0, 5, 5, low.shape.vocab - 1])
    rows_of_head = expected._own[low.family.embedding][ids]
    np.testing.assert_array_equal(low.embedding[ids], rows_of_head)
    asked = Runner(low, 1).ask("what is it ?", Runner(low, 1).see([]))
    np.testing.assert_array_equal(asked.inputs_embeds[0], low.embedding[asked.ids])
    assert not low.notes


def damaged(bundle, folder, file, place):
    """A copy with a bit of one byte turned."""
    shutil.copytree(bundle.path, folder)
    with open(folder / file, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return folder


def test_an_answer_waits_for_what_it_reads_and_not_for_float32_weights_that_it_does_not(low, tmp_path):
    """`inspect`, and whoever reads one of those weights after all, wait for them; the embedding is read from the head."""
    places = {name: tensor.offset for name, tensor in low.weights.tensors.items()}
    norm = next(name for name in places if name not in low.packed.entry_of and "norm" in name)
    broken = Bundle(damaged(low, tmp_path / "norm.plan", WEIGHTS, places[norm]))
    with pytest.raises(BundleError, match=r"weights.safetensors.*do not match"):
        broken.wait_read_verified()
    if is_slim(low):
        return
    for number, name in enumerate((low.packed.entries["layers.1.ffn_out"].weights[0], low.family.embedding)):
        bundle = Bundle(damaged(low, tmp_path / f"{number}.plan", WEIGHTS, places[name]))
        assert LoadedBundle(bundle, 1).generate("what is it ?").stats["prompt_tokens"]
        with pytest.raises(BundleError, match=r"weights.safetensors.*do not match"):
            bundle.weights[name]
        with pytest.raises(BundleError, match=r"weights.safetensors.*do not match"):
            Bundle(bundle.path).wait_verified()


@pytest.mark.parametrize("part", ["layers.1.ffn_out.codes", "head.scale", ""])
def test_no_answer_is_shown_before_the_low_bit_weights_that_it_reads_were_verified(low, part, tmp_path):
    """Of a part, or of the header that says where the parts lie."""
    place = low.packed.file.tensors[part].offset if part else 60
    folder = damaged(low, tmp_path / "x.plan", FILE, place)
    with pytest.raises(BundleError, match=r"packed.safetensors.*(do not match|unreadable)"):
        list(LoadedBundle(Bundle(folder), 1).stream("what is it ?"))


def test_a_damaged_tower_is_met_by_the_first_picture_and_by_no_question_about_text(low, tmp_path):
    name = next(n for n in low.packed.file.tensors if n.startswith(TOWER) and n.endswith("codes"))
    model = LoadedBundle(Bundle(damaged(low, tmp_path / "x.plan", FILE, low.packed.file.tensors[name].offset)), 1)
    assert model.generate("what is it ?").stats["prompt_tokens"]
    picture = easy_vqa.questions("sentence")[40].pictures[0]
    with pytest.raises(BundleError, match=r"packed.safetensors.*do not match"):
        list(model.stream("what is it ?", picture))
    with pytest.raises(BundleError, match=r"packed.safetensors.*do not match"):
        model.generate("what is it ?")  # whoever met it once trusts nothing of the bundle any more


def test_what_is_expected_from_the_start_is_all_that_an_answer_reads(low):
    """Besides the tower, which a question about text does not read: nothing of it is hashed before a picture is seen."""
    runner, names, checks = Runner(Bundle(low.path), 1), set(), Bundle(low.path)._checks
    for file in (runner.bundle.weights, runner.bundle.packed.file):
        before = file._checks.before
        file._checks.before = lambda name, before=before: (names.add(name), before(name))
    hashed = runner.bundle._jobs._put
    expected = set(hashed)
    text = runner.ask("what is it ?", runner.see([]))
    for budget in (Budget(dense=True), Budget()):
        runner.prefill(text, budget)
    runner.backend.ready("decode")
    assert names and hashed == expected
    assert not any(str(name).startswith(TOWER) for _, name in hashed)
    asked_of(runner)
    tower = {name for name in checks[FILE].tensors if name.startswith(TOWER)}
    assert tower and tower == {name for _, name in hashed - expected}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weights": {"precision": "int3"}}, "weights.precision = 'int3'"),
        ({"weights": {"group": 48}}, "weights.group = 48"),
        ({"weights": {"head": "int2"}}, "weights.head = 'int2'"),
        ({"weights": {"precision": "int8"}, "neurons": {"policy": "griffin"}}, "gathered from float32 weights only"),
        ({"weights": {"precision": "fp32", "least_agreement": 0.9}}, "least_agreement with float32 weights"),
        ({"weights": {"precission": "int8"}}, "did you mean 'precision'"),
    ],
)
def test_what_cannot_be_stored_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        from_dict(values)


def test_fixed_sets_of_neurons_run_with_float32_ffns_beside_low_bit_attention():
    recipe = from_dict({"weights": {"precision": "int8", "ffn": "fp32"}, "neurons": {"policy": "griffin"}})
    assert (recipe.weights.of("ffn"), recipe.weights.of("attention"), recipe.weights.of("vision")) == (32, 8, 8)


def test_only_a_plain_gemm_is_a_product():
    make = onnx.helper.make_node
    assert is_plain_gemm(make("Gemm", ["x", "w", "b"], ["y"], transB=1))
    for odd in ({"alpha": 0.5, "transB": 1}, {"beta": 2.0, "transB": 1}, {"transB": 0}, {"transA": 1, "transB": 1}):
        assert not is_plain_gemm(make("Gemm", ["x", "w", "b"], ["y"], **odd))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [128, 200, 96])
def test_matmulnbits_gets_the_same_numbers(bits, columns, tmp_path):
    """Its own order of codes, scales and zeros, read back by hand."""
    rng = np.random.default_rng(columns)
    codes = rng.integers(0, 2**bits, (96, columns), dtype=np.uint8)
    scale = rng.uniform(0.01, 1, (3, columns)).astype(np.float16)
    zero = rng.integers(0, 2**bits, (3, columns), dtype=np.uint8)
    stored = rows.pack(codes, scale, zero, bits, 32)
    entry = Entry(("w",), bits, 32, 96, (columns,))

    whole = rows.PackedRows(stored.codes, stored.scale, stored.zero, bits, 32, entry.rows, entry.columns)
    made = pack._for_nbits(SimpleNamespace(entries={"e": entry}, rows=lambda name: whole), "e")
    for n in (0, 1, columns - 1):
        for k in (0, 33, 95):
            block = made["codes"][n, k // 32]
            code = block[k % 32] if bits == 8 else block[k % 32 // 2] >> (4 * (k % 2)) & 15
            zeros = made["zero"].reshape(columns, -1)[n]
            z = zeros[k // 32] if bits == 8 else zeros[k // 64] >> (4 * (k // 32 % 2)) & 15
            assert (code, z) == (codes[k, n], zero[k // 32, n])
            assert made["scale"][n * 3 + k // 32] == np.float32(scale[k // 32, n])


def stored_bytes(bundle, names):
    """Of packed matrices, their scales and zeros included."""
    return sum(bundle.packed.file.tensors[f"{n}.{part}"].length for n in names for part in ("codes", "scale", "zero"))


def row_bytes(bundle):
    """Of the token embedding: an output of the head, which has 8 bits."""
    head = bundle.packed.entries["head"]
    rest = remainder.row_bytes(head.inputs) if head.refined else 0
    return stored_bytes(bundle, ["head"]) / (head.panels * rows.PANEL) + rest


def refining(bundle):
    """Bytes that a step may read of a remainder: that of 32 outputs to look how large it is, and of those that may be chosen."""
    head = bundle.packed.entries["head"]
    each = remainder.row_bytes(head.inputs) if head.refined else 0
    return each * 33, each * (32 + head.columns)


def test_bench_says_how_many_bits_a_step_reads_and_how_fast_memory_is(low):
    if library.find() is None:
        pytest.skip("only the native library counts")
    found = bench.measure(low.path, prompt_tokens=8, new_tokens=2, repeats=1, threads=1)
    bits = {"int8": 8.5, "int4": 4.75}[low.recipe.weights.precision]  # of most weights, scales and zeros included
    assert bits < found["bits_read_per_weight"]["dense"] < bits + 1  # v and the head have 8 bits, panels are filled up
    rows_of = {row["mode"]: row for row in found["rows"] if row["phase"] == "decode"}
    entries_bytes = stored_bytes(low, [name for name in low.packed.entries if not name.startswith("vision.")])
    entries_bytes += row_bytes(low)
    least, most = refining(low)
    read = 1e6 * rows_of["dense"]["read_mb"]
    assert (entries_bytes + least) * (1 - 1e-6) <= read <= (entries_bytes + most) * (1 + 1e-6)
    assert 1e8 < found["read_bandwidth"] < 1e12 and 0 < rows_of["dense"]["of_bandwidth"] < 2
    assert any("bits read per weight" in note for note in found["notes"])


@pytest.mark.parametrize("native", [True, False])
def test_sets_of_neurons_read_float32_rows_beside_low_bit_products(low, native, monkeypatch):
    """The library counts what it multiplies only; the rows of a set come from the float32 weights."""
    if native and library.find() is None:
        pytest.skip("only the native library counts")
    if not native:
        monkeypatch.setattr(library, "find", lambda: None)
    runner, shape = Runner(low, 1), low.shape
    recipe = varied(low.recipe, neurons__policy="griffin", neurons__share=0.5, tokens__policy="dense")
    made = with_policies(runner, recipe)
    asked = asked_of(runner)
    found = write(made, made.prefill(asked, Budget()), 6)
    products = [name for name, entry in low.packed.entries.items() if entry.site is not None and "ffn" not in name]
    packed = stored_bytes(low, products)
    rows_read = 4 * 3 * shape.layers * shape.hidden * found.prefilled.neurons
    least, most = refining(low) if native else (0, 0)
    assert least <= found.read.bytes - (packed + rows_read + row_bytes(low)) <= most and found.read.exact == native
    assert found.read.bits > of_dense(runner).bits, "half of the rows in 32 bits are more than all of them in 8"


def test_a_predictor_is_read_for_every_token(low):
    runner, shape = Runner(low, 1), low.shape
    made = with_policies(runner, varied(low.recipe, neurons__policy="predicted", neurons__share=0.5))
    found = Steps(made).per_step(made.prefill(asked_of(runner), Budget()), 0)
    without = with_policies(runner, varied(low.recipe, neurons__policy="griffin", neurons__share=0.5))
    fixed = Steps(without).per_step(without.prefill(asked_of(runner), Budget()), 0)
    assert found.bytes == pytest.approx(fixed.bytes + copy_bytes(shape)) and not found.exact


def test_sites_are_all_the_weights_of_the_products(low):
    sizes = site_sizes(low.shape)
    assert sizes.sum() == low.shape.weights
    left = sizes.copy()
    for name, entry in low.packed.entries.items():
        if not name.startswith("vision."):
            left[entry.site] -= entry.inputs * sum(entry.outputs)
    assert not left.any(), "every product is packed"
