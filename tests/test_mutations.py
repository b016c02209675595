"""No gate can be fooled by what it claims to see: every row of the table in mutations.py is planted, and its gate must say so."""

import copy as copying
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mutations import MUTATIONS, NAN, Mutation, scaled, table
from random_models import copy, request

from cm_export import families
from cm_export.backends.onnxruntime import backend as onnxruntime
from cm_export.backends.onnxruntime import whole_picture
from cm_export.backends.tensorrt.check_engine import check_engine, check_network
from cm_export.backends.tensorrt.export import Source, write_graphs
from cm_export.backends.tensorrt.quantize import Part
from cm_export.backends.tensorrt.targets import target
from cm_export.base import core_index
from cm_export.base.errors import CmExportError
from cm_export.base.metrics import divergence, kept_of_dense, wilson
from cm_export.build import drift, gates, gates_lowered, quality
from cm_export.build.quality import Requirement
from cm_export.build.stages import Stages
from cm_export.bundle import bundle as bundles
from cm_export.bundle import directory, predictor, weights
from cm_export.bundle.names import core_row_names
from cm_export.evals import user_data
from cm_export.evals.task import Question, Task
from cm_export.host import guard
from cm_export.host.core_rows import ROWS, CoreRows
from cm_export.host.runner import Budget, Prefilled, Runner
from cm_export.host.sampling import Chooser, Rule
from cm_export.quant import packing
from cm_export.quant.rounding import nearest
from cm_export.quant.scheme import Scheme
from cm_export.recipe.recipe import Recipe
from cm_export.report.pareto import choose
from cm_export.source import model as hf
from cm_export.source.probe import probe
from cm_export.source.probe import reference as stock
from cm_export.tune import verdict
from cm_export.tune.held_out import Goal

PAGE = Path(__file__).parent.parent / "docs" / "gates.md"
RECIPE = Recipe().replace(tokens__cache="index", tokens__prune_layer=1, engine__capacity=96, engine__max_prompt=64)


@dataclasses.dataclass
class Planted:
    """An export that is right until something is planted in it, and the gates over it."""

    x: object
    folder: Path
    patch: pytest.MonkeyPatch
    graphs: dict
    asked: object
    expected: dict
    feeds: dict = dataclasses.field(default_factory=dict)  # (graph, key) -> change
    file: Path | None = None

    def subject(self) -> gates.Subject:
        planted = self

        class Fed(onnxruntime.Backend):
            def prefill(self, feeds, graph="prefill"):
                changes = {key: change for (name, key), change in planted.feeds.items() if name == graph}
                return super().prefill({k: changes.get(k, lambda v: v)(v) for k, v in feeds.items()}, graph)

        file = weights.WeightFile(self.file) if self.file else self.x.weights
        rows = core_row_names(self.x.family, self.x.shape.layers)
        backend = Fed(lambda n: copy(self.graphs[n]), file, threads=1, row_names=rows)
        return gates.Subject(backend, self.x.family, self.x.shape, self.x.tower, RECIPE, self.asked, self.expected)

    def run(self) -> str:
        return " ".join(g.name for g in gates.run_gates(self.subject()))

    def weight(self, part, change) -> str:
        name = next(n for n in self.x.weights.tensors if part in n)
        self.file = changed(self.x.weights.path, self.folder, name, change)
        return self.run()

    def graph(self, name, change) -> str:
        self.graphs = self.graphs | {name: copy(self.graphs[name])}
        before = self.graphs[name].SerializeToString()
        change(self.graphs[name])
        assert self.graphs[name].SerializeToString() != before
        return self.run()

    def feed(self, name, key, change) -> str:
        self.feeds[name, key] = lambda v: change(v.copy())
        return self.run()

    def reference(self, key, change) -> str:
        self.expected = dict(self.expected)
        found = self.expected.pop(key)
        if change is not None:
            self.expected[key] = change(found)
        return self.run()

    def half(self, part, change) -> str:
        source = self.source()
        write_graphs(source, self.folder, target("10.3"))
        file = self.folder / gates_lowered.weight_file("fp16")
        name = next(n for n in weights.index(file) if part in n)
        changed(file, self.folder, name, change, in_place=True)
        found = gates_lowered.run_gates(
            source, target("10.3"), self.x.family, self.x.tower, self.asked, self.folder, threads=1
        )
        return " ".join(g.name for g in found)

    def source(self) -> Source:
        x = self.x
        return Source(lambda n: copy(self.graphs[n]), tuple(self.graphs), x.weights, x.shape, RECIPE, x.tower)

    def index(self, kind, ids) -> str:
        ids = np.array(ids, np.int32)
        if kind == "neurons":
            core_index.check_core_neurons(np.broadcast_to(ids, (2, 1, len(ids))), 2, 1, 16)
        else:
            core_index.check_core_tokens(ids[None], 1, 9)
        return "unseen"

    def call(self, name) -> str:
        return CALLS[name](self)

    def bundle(self, name, how) -> str:
        file = whole_bundle(self) / name
        content = bytearray(file.read_bytes())
        if how == "missing":
            file.unlink()
        elif how == "empty":
            file.write_bytes(b"")
        elif how == "bit":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        else:
            manifest = json.loads(content)
            manifest[how] = {"agreement": 1.0} if how == "drift" else [g | {"passed": True} for g in manifest[how]]
            file.write_text(json.dumps(manifest))
        bundles.Bundle(file.parent).wait_verified()
        return "unseen"


def changed(file: Path, folder: Path, name: str, change, in_place: bool = False) -> Path:
    """A copy of a weight file in which one tensor is another."""
    place = weights.index(file)[name]
    content = bytearray(file.read_bytes())
    here = slice(place.offset, place.offset + place.length)
    before = np.frombuffer(bytes(content[here]), place.dtype).reshape(place.shape)
    content[here] = np.ascontiguousarray(change(before), place.dtype).tobytes()
    target = file if in_place else folder / weights.FILE
    target.write_bytes(content)
    return target


def whole_bundle(planted: Planted) -> Path:
    """A bundle of the export, so small that every row can have its own."""
    x, out = planted.x, planted.folder / "x.plan"
    with directory.assemble(out) as folder:
        for name, model in planted.graphs.items():
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        (folder / weights.FILE).write_bytes(x.weights.path.read_bytes())
        manifest = {"model": {"type": "qwen2_vl", "config": dict(x.config)}, "recipe": RECIPE.to_dict()}
        failed = dataclasses.asdict(gates.Gate("prefill", 1.0, 1e-4, False, ""))
        manifest |= {"graphs": {name: {} for name in planted.graphs}, "gates": [failed], "drift": {"agreement": 0.1}}
        bundles.write_manifest(folder, manifest)
    return out


@pytest.fixture(scope="module")
def whole(exported):
    """What is planted in, made once."""
    x = exported(0)
    asked = probe(x.shape, x.tower, x.config)
    return x, x.graphs(RECIPE), asked, stock(x.model, asked, x.tower)


@pytest.fixture
def planted(whole, tmp_path, monkeypatch) -> Planted:
    x, graphs, asked, expected = whole
    return Planted(x, tmp_path, monkeypatch, dict(graphs), asked, {k: v.copy() for k, v in expected.items()})


def said(mutation: Mutation, planted: Planted) -> str:
    """What the gates say to it."""
    kind, *how = mutation.how
    try:
        return getattr(planted, kind)(*how)
    except (CmExportError, ValueError) as e:
        return str(e)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.where}: {m.what}")
def test_a_mutation_is_seen_by_the_gate_of_its_row(mutation, planted):
    assert mutation.gate in said(mutation, planted)


def test_an_export_without_a_mutation_passes_every_gate(planted):
    assert planted.run() == (
        "vision vision, one picture positions prefill decode full budget, prefill core rows functions "
        "full budget, decode turn"
    )
    assert bundles.Bundle(whole_bundle(planted)).wait_verified() is None


def test_the_page_lists_every_mutation_and_what_sees_it():
    shown = re.search(r"<!-- mutations -->\n(.*)<!-- end mutations -->", PAGE.read_text(encoding="utf-8"), re.S)
    assert shown and shown[1] == table(), f"put this between the marks of {PAGE.name}:\n{table()}"


def test_every_row_is_another_one():
    assert len({(m.where, m.what) for m in MUTATIONS}) == len(MUTATIONS)
    assert {m.how[1] for m in MUTATIONS if m.how[0] == "call"} == CALLS.keys()


# ---------------------------------------------------------------- what takes more than a change of an array
CALLS = {}


def plants(function):
    CALLS[function.__name__] = function
    return function


@plants
def positions_off_by_one(planted):
    family = copying.copy(planted.x.family)
    real = family.positions
    family.positions = lambda *given: (real(*given)[0] + 1, real(*given)[1] + 1)
    return " ".join(g.name for g in gates.run_gates(dataclasses.replace(planted.subject(), family=family)))


@plants
def values_of_one_picture(planted):
    real = whole_picture._whole_picture

    def wrong(heads):
        made = real(heads)
        reshape = next(n for n in made.node if n.output[0] == "y_rows")
        reshape.input[0] = "v_flat"  # what is seen is left out
        return made

    planted.patch.setattr(whole_picture, "_whole_picture", wrong)
    return planted.run()


def _gather(planted, change):
    real = CoreRows.gather

    def wrong(self, cores):
        found = real(self, cores)
        if not all(core.is_whole for core in cores):
            found.rows = change(self, cores[0], found.rows)
        return found

    planted.patch.setattr(CoreRows, "gather", wrong)
    return planted.run()


@plants
def rows_off_by_one(planted):
    def change(self, core, rows):
        parts = ((f"ffn.{layer}.{p}", i, layer) for layer in range(len(self.sources)) for i, p in enumerate(ROWS))
        return {n: np.roll(self.sources[layer][i], -1, 0)[core.of_layer(layer)][None] for n, i, layer in parts}

    return _gather(planted, change)


@plants
def rows_of_another_part(planted):
    turned = {"gate": "up", "up": "gate", "down": "down"}
    name = lambda n: f"{n.rpartition('.')[0]}.{turned[n.rpartition('.')[2]]}"  # noqa: E731
    return _gather(planted, lambda self, core, rows: {n: rows[name(n)] for n in rows})


@plants
def rows_of_another_layer(planted):
    return _gather(
        planted,
        lambda self, core, rows: {
            n: rows[n.replace(".0.", ".?.").replace(".1.", ".0.").replace(".?.", ".1.")] for n in rows
        },
    )


@plants
def no_steps_at_all(planted):
    planted.expected |= {k: planted.expected[k][:0] for k in ("tokens", "step_logits")}
    return planted.run()


def _compared(pairs):
    gates.compared("made up", "x.onnx", pairs, None, "", "mend it")
    return "unseen"


@plants
def compared_with_itself(planted):
    same = np.ones(3, np.float32)
    return _compared({"logits": (same, same[:])})


@plants
def nan_before_right_outputs(planted):
    right = np.ones(3, np.float32)
    return _compared({"logits": (right * NAN, right.copy()), "past.0.key": (right, right.copy())})


@plants
def empty_output(planted):
    return _compared({"logits": (np.ones((0, 3)), np.ones((0, 3)))})


@plants
def no_outputs(planted):
    return _compared({})


@plants
def lowered_output_missing(planted):
    some = {"logits": np.ones(3), "present.0.key": np.ones(3)}
    gates_lowered._gate("lowered decode", "decode", {"decode": {"logits": np.ones(3)}}, {"decode": some}, 1e-4, "")
    return "unseen"


def _packed(planted, change):
    """A weight in four bits, as a builder gets it; `change` spoils its words and scales."""
    scheme, rng = Scheme(4, 64, scale=np.float16), np.random.default_rng(0)
    matrix = rng.standard_normal((512, 256)).astype(np.float32)
    found = nearest(matrix, scheme)
    words, scale = change(packing.words(found.codes, 4), found.scale.copy())
    tensors = {"w/int4.words": words, "w/int4.scale": scale}
    write(planted.folder / gates_lowered.weight_file("int4"), tensors)
    part = Part("w", scheme, "codes", words.dtype, words.shape, "w/int4.scale")
    planted.patch.setattr(gates_lowered, "lowered_with_parts", lambda *_: (None, {"w/int4.words": part}))
    held = type("Held", (dict,), {"release": lambda self: None})({"w": matrix})
    source = SimpleNamespace(recipe=RECIPE.replace(engine__precision="int4"), weights=held)
    return gates_lowered._packing(source, None, planted.folder, 4).name + " passed"


def write(file: Path, tensors: dict) -> Path:
    weights.write(file, [weights.Planned(n, a.dtype, a.shape, lambda a=a: [a]) for n, a in tensors.items()])
    return file


def test_a_right_pack_passes(planted):
    assert _packed(planted, lambda words, scale: (words, scale)) == "packing passed"


@plants
def packed_row_of_another(planted):
    def change(words, scale):
        words[7] = words[8]
        return words, scale

    return _packed(planted, change).replace("packing passed", "unseen")


@plants
def packed_scale_doubled(planted):
    def change(words, scale):
        scale[100, 2] *= 2
        return words, scale

    return _packed(planted, change).replace("packing passed", "unseen")


@plants
def packed_scale_nan(planted):
    def change(words, scale):
        scale[3, 1] = NAN
        return words, scale

    return _packed(planted, change).replace("packing passed", "unseen")


def _copies(planted, change):
    """The gate of the copies by which `predicted` chooses, over made-up weights."""
    family, shape, rng = (
        families.find("llama"),
        SimpleNamespace(layers=2, hidden=128, ffn=256),
        np.random.default_rng(0),
    )
    names = [n for layer in core_row_names(family, 2) for n in layer]
    made = {n: rng.standard_normal((shape.ffn, shape.hidden)).astype(np.float32) for n in names}
    file = weights.WeightFile(write(planted.folder / weights.FILE, made))
    predictor.write(planted.folder / predictor.FILE, file, family, shape)
    copies = weights.WeightFile(planted.folder / predictor.FILE)
    found = {n: copies[n].copy() for n in copies.tensors}
    change(found)
    backend = SimpleNamespace(predictor=found, weights=file)
    gates._Proofs(SimpleNamespace(backend=backend, family=family, shape=shape))._predictor()
    return "unseen"


def test_right_copies_pass(planted):
    assert _copies(planted, lambda found: None) == "unseen"


@plants
def copy_scale_doubled(planted):
    def change(found):
        found["predictor.1.up_scale"][200, 1] *= 2

    return _copies(planted, change)


@plants
def copy_norms_moved(planted):
    return _copies(planted, lambda found: found.update({"predictor.0.norm": found["predictor.1.norm"]}))


@plants
def stored_element(planted):
    x, name = planted.x, "model.language_model.layers.0.mlp.up_proj.weight"
    file = changed(
        x.weights.path, planted.folder, name, lambda a: np.where(np.arange(a.size).reshape(a.shape) == 7, 1, a)
    )
    hf._compare(file, name, dict(x.model.named_parameters())[name], x.family, x.path)
    return "unseen"


@plants
def stage_byte(planted):
    stages = Stages(planted.folder / "stages")
    stages.run("graphs", "key", lambda folder: (folder / "x.onnx").write_bytes(b"abc") and None)
    assert stages.finished("graphs", "key") is not None
    (planted.folder / "stages" / "graphs" / "x.onnx").write_bytes(b"abd")
    return "the stage is made anew" if stages.finished("graphs", "key") is None else "unseen"


# ---------------------------------------------------------------- engines
EXPECTED = {
    "inputs": [{"name": n, "dtype": d, "shape": ["b"]} for n, d in (("x", "float"), ("core_neurons", "int32"))],
    "outputs": [{"name": "logits", "dtype": "float", "shape": ["b"]}],
    "plugin_nodes": ["ffn.0"],
    "index_inputs": ["core_neurons"],
}


def network(inputs=(("x", "FLOAT"), ("core_neurons", "INT32")), read=("x", "core_neurons")):
    def tensor(name, kind):
        return SimpleNamespace(name=name, dtype=SimpleNamespace(name=kind), shape=(-1,))

    given, out = [tensor(*i) for i in inputs], tensor("logits", "FLOAT")
    used = [t for t in given if t.name in read]
    layer = SimpleNamespace(
        name="ffn.0", type=SimpleNamespace(name="PLUGIN_V3"), num_inputs=len(used), num_outputs=1,
        get_input=lambda i: used[i], get_output=lambda i: out,
    )  # fmt: skip
    return SimpleNamespace(
        num_inputs=len(given), num_outputs=1, num_layers=1, get_input=lambda i: given[i], get_output=lambda i: out,
        get_layer=lambda i: layer,
    )  # fmt: skip


def test_a_right_network_and_engine_have_no_problem():
    layers = json.dumps({"Layers": [{"Name": "ffn.0", "LayerType": "PluginV3"}]})
    assert check_network(network(), EXPECTED) == check_engine(["x", "core_neurons", "logits"], layers, EXPECTED) == []


@plants
def network_without_index(planted):
    return " ".join(check_network(network(inputs=(("x", "FLOAT"),)), EXPECTED))


@plants
def network_ignores_an_input(planted):
    return " ".join(check_network(network(read=("x",)), EXPECTED))


@plants
def network_of_another_type(planted):
    return " ".join(check_network(network(inputs=(("x", "HALF"), ("core_neurons", "INT32"))), EXPECTED))


@plants
def engine_without_plugin(planted):
    layers = json.dumps({"Layers": [{"Name": "matmul", "LayerType": "gemm"}]})
    return " ".join(check_engine(["x", "core_neurons", "logits"], layers, EXPECTED))


# ---------------------------------------------------------------- the guard and the decode loop
def _asking(planted, decoded):
    """Dense and guarded tokens of one request; `decoded(graph, logits)` is what the decode graphs are made to say."""
    x = planted.x
    bundle = SimpleNamespace(
        weights=x.weights, family=x.family, shape=x.shape, config=x.config, calibration=None, packed=None, phrases=None
    )
    runner = Runner(bundle, 1, RECIPE, lambda name: copy(planted.graphs[name]))
    asked = request(x, 5)
    dense = list(runner.tokens(runner.prefill(asked, Budget(dense=True)), 12, frozenset()))
    made, real = onnxruntime.Decoder.__init__, onnxruntime.Decoder.read

    def init(self, backend, graph, *given):
        made(self, backend, graph, *given)
        self.graph = graph

    def read(self, *given):
        logits, cache = real(self, *given)
        return decoded(self.graph, logits), cache

    planted.patch.setattr(onnxruntime.Decoder, "__init__", init)
    planted.patch.setattr(onnxruntime.Decoder, "read", read)
    choose = Chooser(Rule(), asked.ids, frozenset())
    found = list(guard.guarded(runner, runner.prefill(asked, Budget()), 12, choose, guard.Report(4)))
    return "the answer stays the dense one" if found == dense and len(found) == 12 else f"{found} beside {dense}"


@plants
def guard_and_sparse_nonsense(planted):
    return _asking(planted, lambda graph, logits: logits[..., ::-1].copy() if graph == "decode" else logits)


@plants
def guard_and_sparse_nan(planted):
    return _asking(planted, lambda graph, logits: logits * NAN if graph == "decode" else logits)


@plants
def guard_and_dense_nan(planted):
    return _asking(planted, lambda graph, logits: logits * NAN if graph == "decode_dense" else logits)


@plants
def guard_of_nothing(planted):
    return str(guard.Report(0))


def _prefilled(found):
    shape = SimpleNamespace(layers=2, ffn=16)
    runner = SimpleNamespace(recipe=RECIPE, bundle=SimpleNamespace(shape=shape, calibration=None))
    Prefilled(runner, SimpleNamespace(tokens=9), Budget(dense=True), found, None)
    return "unseen"


@plants
def prefill_nan(planted):
    return _prefilled({"logits": np.array([[1, NAN, 0]], np.float32)})


@plants
def prefill_token_twice(planted):
    ids = np.array([[0, 2, 2]], np.int32)
    return _prefilled(
        {"logits": np.ones((1, 3), np.float32), "kept_tokens": ids, "kept_mask": np.ones((1, 3), np.int64)}
    )


# ---------------------------------------------------------------- figures
LOGITS = np.eye(3, dtype=np.float32)


@plants
def divergence_nan(planted):
    return str(divergence(LOGITS, np.where(LOGITS == 1, NAN, LOGITS)))


@plants
def divergence_inf(planted):
    return str(divergence(np.where(LOGITS == 1, np.inf, LOGITS), LOGITS))


@plants
def divergence_empty(planted):
    return str(divergence(LOGITS[:0], LOGITS[:0]))


@plants
def kept_of_fewer(planted):
    return str(kept_of_dense(np.array([True, True]), np.array([True])))


@plants
def wilson_of_nothing(planted):
    low, high = wilson(0, 0)
    return "0 to 1, which no floor accepts" if (low, high) == (0.0, 1.0) else f"{low} to {high}"


QUESTION = Question("all", (), "what is it?", ("x",))


def task(*questions):
    return Task("made up", list(questions), {"all": 4}, lambda name: None)


@plants
def accuracy_floor_above_one(planted):
    return str(Requirement(task(QUESTION), accuracy=1.01))


@plants
def accuracy_floor_zero(planted):
    return str(Requirement(task(QUESTION), accuracy=0.0))


@plants
def retained_floor_nan(planted):
    return str(Requirement(task(QUESTION), retained=NAN))


@plants
def no_questions(planted):
    return str(Requirement(task(), accuracy=0.5))


@plants
def question_twice(planted):
    return str(Requirement(task(QUESTION, dataclasses.replace(QUESTION, answers=("y",))), accuracy=0.5))


def _required(planted, found, of_dense, **required):
    row = {"accuracy": found, "of_dense": of_dense, "ci": [0.0, 1.0]}
    report = {"task": "made up", "n": 1, "dense": row, "sparse": row, "random": None}
    planted.patch.setattr(quality, "compare", lambda *_: report)
    return str(quality.check(planted.folder, Requirement(task(QUESTION), **required), RECIPE, 1, lambda *_: None))


@plants
def accuracy_nan(planted):
    return _required(planted, NAN, 1.0, accuracy=0.5)


@plants
def dense_never_right(planted):
    return _required(planted, 0.0, None, retained=0.5)


@plants
def line_twice(planted):
    file = planted.folder / "my.jsonl"
    file.write_text('{"question": "a?", "answer": "b"}\n\n{"question": "a?", "answer": "c"}\n')
    return str(user_data.load(file))


@plants
def empty_file(planted):
    (planted.folder / "my.jsonl").write_text("\n")
    return str(user_data.load(planted.folder / "my.jsonl"))


@plants
def tune_floor_above_one(planted):
    return str(Goal(1.2, "memory", 3))


@plants
def tune_floor_negative(planted):
    return str(Goal(-0.1, "memory", 3))


def _decided(**change):
    right = verdict.HeldOut(0, (True,) * 500, (True,) * 500, 0.5)
    assert verdict.decide([right], 0.9, 1) == right
    return str(verdict.decide([dataclasses.replace(right, **change)], 0.9, 1) or "nothing is recommended")


@plants
def tune_nothing_held_out(planted):
    return _decided(dense=(), right=())


@plants
def tune_dense_never_right(planted):
    return _decided(dense=(False,) * 500)


@plants
def tune_cost_nan(planted):
    return _decided(cost=NAN)


def _chosen(floor, *lows):
    def point(low):
        figures = SimpleNamespace(of_dense_ci=[low, 1.0], kept=[low, 1.0])
        return SimpleNamespace(deployable=True, figures=figures, key=str(low), decode=None, prefill=None, memory=1)

    return "holds" if choose([point(low) for low in lows], floor).holds else "no point holds the floor"


@plants
def report_floor_above_one(planted):
    assert _chosen(0.9, 0.95) == "holds"
    return _chosen(1.01, 0.95)


@plants
def report_interval_nan(planted):
    return _chosen(0.9, NAN)


@plants
def report_without_points(planted):
    return _chosen(0.9)


def _agreement(value, least):
    found = drift.Drift(value, (0.0, 1.0), 0.1, 10, 1, "not measured: made up" if value is None else "10 places")
    drift.require(found.to_dict(), least)
    return "unseen"


@plants
def agreement_floor_above_one(planted):
    return _agreement(1.0, 1.01)


@plants
def agreement_missing(planted):
    return _agreement(None, 0.9)


@plants
def agreement_nan(planted):
    return _agreement(NAN, 0.9)


@plants
def agreement_low(planted):
    return _agreement(0.89, 0.9)


def test_an_agreement_at_the_floor_passes():
    assert _agreement(0.9, 0.9) == _agreement(0.2, None) == "unseen"
    assert scaled(2)(np.ones(2)).tolist() == [2, 2]
