"""The backend that runs on a CUDA device, on this CPU: the same calls, values that live apart, the same answers.

Place("cpu", apart=True) makes every call of Place("cuda", 0): weights bound as inputs, caches and rows that stay, gathered there.
What only a GPU can show, CUDA's own kernels and its speed, is not shown here.
"""

import json

import numpy as np
import pytest
from conftest import active_bundle
from fake_ort import FakeOrt
from random_models import copy, request
from tolerances import agrees

from cm_export.backends.onnxruntime import backend as backends
from cm_export.backends.onnxruntime import place as places
from cm_export.backends.onnxruntime.backend import Backend
from cm_export.backends.onnxruntime.place import Place
from cm_export.base.errors import InputError
from cm_export.bundle import predictor
from cm_export.bundle.bundle import Bundle
from cm_export.bundle.names import core_row_names
from cm_export.bundle.weights import WeightFile
from cm_export.cli import main
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Reader, Row, teacher_forced
from cm_export.host.images import open_image
from cm_export.host.loaded import load
from cm_export.host.request import kept_slots, prefill_feeds, sparse_feeds
from cm_export.plugins.cpu import library
from cm_export.recipe import aliases
from cm_export.recipe.recipe import Recipe
from cm_export.surgery import pipeline

APART, HALF = Place("cpu", apart=True), Place("cpu", apart=True, products=np.dtype(np.float16))
IMAGE = sorted((aliases.DEMO.parent / "images").glob("*.png"))[0]
ASKED = (
    ("describe : what shape is in the image?", 4),
    ("is there a circle?", None),
    ("describe the image.", None),
)
CUT = Recipe().replace(tokens__prune_layer=1)


def backend_of(x, place, recipe=CUT):
    graphs = x.graphs(recipe)
    rows = core_row_names(x.family, x.shape.layers)
    return Backend(lambda name: copy(graphs[name]), x.weights, 1, row_names=rows, heads=x.shape.heads, place=place)


def core_of(x, share, seed):
    rng = np.random.default_rng(seed)
    count = max(1, round(share * x.shape.ffn))
    ids = np.stack([np.sort(rng.permutation(x.shape.ffn)[:count]) for _ in range(x.shape.layers)])
    return CoreSet(ids[:, None].astype(np.int32), np.full(x.shape.layers, count, np.int64), x.shape.ffn)


def rows_of(x, backend, recipe=CUT):
    """Three requests at the beginning of their answers: other prompts, other neurons and other numbers of them."""
    out = []
    for seed, share in ((1, 0.5), (2, 0.25), (3, 1.0)):
        asked = request(x, seed)
        feeds = prefill_feeds(asked) | sparse_feeds(asked, recipe, None)
        found, cache = backend.prefill(feeds | kept_slots(asked, feeds))
        core = CoreSet.whole(x.shape) if share == 1 else core_of(x, share, seed)
        out.append(Row(asked, core, cache, found["logits"][0], kept=found["kept_mask"][0]))
    return out


def answers(x, backend, steps=9):
    """[3 requests, steps, V]: the first alone, then two together, then three, then the last alone again."""
    reader, rows, said = Reader(backend), rows_of(x, backend), [[], [], []]
    for step in range(steps):
        taking = [[0], [0, 1], [0, 1, 2], [0, 1, 2], [2]][min(step // 2, 4)]
        reader.read([rows[i] for i in taking], [[5 + step + i] for i in taking])
        for i in taking:
            said[i].append(rows[i].last)
    return [np.stack([row.logits, *logits]) for row, logits in zip(rows, said, strict=True)]


@pytest.fixture(scope="module")
def here(exported):
    return answers(exported(1), backend_of(exported(1), Place()))


def test_requests_that_share_steps_answer_as_on_the_cpu(exported, here):
    for ours, theirs in zip(answers(exported(1), backend_of(exported(1), APART)), here, strict=True):
        agrees("export", ours, theirs)


def test_in_16_bit_the_answers_are_the_same_to_three_digits(exported, here):
    backend = backend_of(exported(1), HALF)
    for ours, theirs in zip(answers(exported(1), backend), here, strict=True):
        assert ours.shape == theirs.shape
        worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert 1e-5 < worst < 3e-2, worst  # rounded, and nothing else
    rows = rows_of(exported(1), backend)
    assert {held.dtype for held in rows[0].cache.memory.held.values()} == {np.dtype(np.float16)}


def test_rows_of_a_device_are_those_of_the_host(exported):
    x = exported(1)
    cores = [core_of(x, 0.5, 1), core_of(x, 0.2, 2), CoreSet.whole(x.shape)]
    for some in (cores[:2], cores[2:], cores):
        host, device = (backend_of(x, place) for place in (Place(), APART))
        expected, found = host.rows.gather(some).rows, device.device_rows.gather(some)
        assert found.keys() == expected.keys()
        for name, rows in found.items():
            ours, theirs = np.broadcast_to(rows.numpy(), expected[name].shape), expected[name]
            fill = theirs.any(-1) if name.endswith("down") else np.broadcast_to(theirs.any(-1), theirs.shape[:2])
            np.testing.assert_array_equal(ours[fill], theirs[fill])
            assert not name.endswith("down") or not ours[~fill].any()  # what pads a list adds nothing


PLANTED = {
    "rows land one further": lambda real: (
        lambda self, to, at, source, of, count: real(self, to, (at[0], at[1] + 1), source, of, count - 1)
    ),
    "a neighbour's rows": lambda real: (
        lambda self, to, at, source, of, count: real(self, to, (0, at[1]), source, of, count)
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_rows_that_are_copied_wrongly_on_the_device_are_noticed(exported, here, monkeypatch, fault):
    monkeypatch.setattr(places.Place, "copy_rows", PLANTED[fault](places.Place.copy_rows))
    found = answers(exported(1), backend_of(exported(1), APART))
    with pytest.raises(AssertionError):
        for ours, theirs in zip(found, here, strict=True):
            agrees("export", ours, theirs)


def deciding(x, recipe, place):
    """A backend whose decode graph decides by itself what it reads."""
    file = x.folder / predictor.FILE
    if not file.exists():
        predictor.write(file, x.weights, x.family, x.shape)
    copies = WeightFile(file)
    decode, _ = pipeline.sparse_decode(copy(x.dense["decode"]), x.family, x.shape, recipe, copies.tensors, x.weights)
    graphs = {"decode": decode, "prefill_dense": x.dense["prefill"]}
    return Backend(lambda n: copy(graphs[n]), x.weights, 1, copies, heads=x.shape.heads, place=place)


@pytest.mark.parametrize("policy", ["predicted", "active"])
def test_what_decode_decides_itself_it_decides_on_a_device_too(exported, policy):
    x = next(m for seed in range(12) if (m := exported(seed)).shape.hidden % 16 == 0)
    recipe = Recipe().replace(neurons__policy=policy, tokens__policy="dense")
    counts, thresholds = np.full(x.shape.layers, x.shape.ffn // 3), np.full(4 * x.shape.layers + 1, 0.8, np.float32)
    core = CoreSet(None, counts, x.shape.ffn, thresholds=thresholds if policy == "active" else None)
    said = {}
    for place in (Place(), APART, HALF):
        backend, asked = deciding(x, recipe, place), request(x, 1)
        found, cache = backend.prefill(prefill_feeds(asked), "prefill_dense")
        said[place] = teacher_forced(backend, Row(asked, core, cache, found["logits"][0]), [5, 6, 7, 8])
    # The CPU's chooser rounds x to 8 bits, the device's does not, so of the later tokens they may name other neurons.
    same = slice(2) if policy == "predicted" else slice(None)
    agrees("export", said[APART][same], said[Place()][same])
    # A neuron or channel at the border falls out or in where the last layer's x was rounded otherwise.
    assert np.abs(said[HALF] - said[APART]).max() < 0.1 * np.abs(said[APART]).max()


@pytest.mark.skipif(library.find() is None, reason="the CPU ops are not built here")
def test_a_device_gets_no_op_of_the_cpu(demo_bundle):
    bundle = Bundle(active_bundle(demo_bundle, "int8"))
    low_bits = backends.LowBits(bundle.packed, bundle.family, bundle.shape, False)
    for place, there in ((Place(), True), (APART, False)):
        backend = Backend(bundle.graph, bundle.weights, 1, low_bits=low_bits, heads=bundle.shape.heads, place=place)
        model, _ = backend._prepared(bundle.graph("decode"), ("decode", True, False, True))
        found = {n.op_type for n in model.graph.node if n.domain == library.DOMAIN}
        assert found == ({"CachedAttention", "PackedFFN", "PackedMatMul", "ResidualNorm"} if there else set())


def test_later_questions_and_the_guard_work_on_a_device(whole_bundle, monkeypatch):
    def answered(place):
        monkeypatch.setattr(backends, "place_for", lambda *_: (place, []))
        model = load(whole_bundle, threads=1, device="cuda" if place.apart else None)
        talk = model.conversation([open_image(IMAGE)])
        turns = [talk.ask(text, max_new_tokens=9, guard=guard) for text, guard in ASKED]
        return [turn.token_ids for turn in turns], [turn.stats["guard"]["checks"] for turn in turns[:1]]

    ours, theirs = answered(APART), answered(Place())
    assert ours[0] == theirs[0] and len(ours[0][0]) > 3
    assert ours[1][0] > 0, "drafts were checked, several tokens at once"


# ---------------------------------------------------------------------------------------------------- the calls to CUDA
@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as ONNX Runtime's Python classes can tell."""

    def at(**how):
        ort = FakeOrt(**how)
        monkeypatch.setattr(places, "ort", ort)
        monkeypatch.setattr(places.ctypes, "CDLL", lambda name: None)
        monkeypatch.setattr(places.libraries, "trusted", lambda: None)  # of a machine where it is there
        return ort

    return at


def test_a_step_takes_up_what_is_new_and_nothing_of_the_cache(exported, here, gpu):
    ort, x = gpu(), exported(1)
    place, notes = places.place_for("auto", np.float32)
    assert place.name == "cuda:0" and notes == ["runs on cuda:0: float32 on ONNX Runtime's CUDA provider"]
    backend = backend_of(x, place)
    rows, reader = rows_of(x, backend), Reader(backend)
    weights = sum(held.value._inner.numpy().nbytes for held in backend._views.values())
    reader.read(rows[:2], [[5], [6]])  # they are put side by side, their neurons gathered
    assert sum(n for what, n in ort.log if what == "up" and n > 1 << 16) <= weights, "no weight goes up twice"
    cache = sum(held.value._inner.numpy().nbytes for held in rows[0].cache.memory.held.values())
    for step in range(3):
        ort.log.clear()
        reader.read(rows[:2], [[7 + step], [8 + step]])
        up = sum(n for what, n in ort.log if what == "up")
        down = [n for what, n in ort.log if what == "down"]
        assert down == [2 * x.shape.vocab * 4], "the logits come down, once"
        assert up < cache / 4, (up, cache)
    for ours, theirs in zip(answers(x, backend), here, strict=True):
        agrees("export", ours, theirs)
    assert {("OrtValue", "ortvalue_from_numpy"), ("IOBinding", "bind_ortvalue_output")} <= ort.calls
    assert {name for owner, name in ort.calls if owner == "IOBinding"} >= {
        "bind_cpu_input",
        "bind_output",
        "get_outputs",
    }


def test_outputs_that_come_down_and_go_up_again_are_noticed(exported, gpu, monkeypatch):
    """The fake can tell: a cache that is not left on the device is refused where it is bound again."""
    gpu()
    backend = backend_of(exported(1), places.place_for("cuda", np.float32)[0])
    monkeypatch.setattr(places.Place, "bind_output", lambda self, binding, name, stays: binding.bind_output(name))
    with pytest.raises(TypeError, match="is not on the device"):
        rows_of(exported(1), backend)


@pytest.mark.parametrize(
    ("how", "device", "said", "fix"),
    [
        ({"has_provider": False}, "cuda", r"the installed ONNX Runtime [\d.]+ has no CUDA provider", "onnxruntime-gpu"),
        ({}, "cuda:3", "CUDA failure 101: invalid device ordinal", "nvidia-smi"),
        ({"falls_back": True}, "cuda", "fell back to its CPU provider", "--device cpu"),
        ({}, "tpu", "unknown device 'tpu'", "cpu, cuda, cuda:1 or auto"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(gpu, how, device, said, fix):
    gpu(**how)
    with pytest.raises(InputError, match=said) as error:
        places.place_for(device)
    assert fix in str(error.value) and "\n" not in str(error.value)
    if device != "tpu":
        gpu(**{**how, "gpus": 0})
        place, notes = places.place_for("auto")
        assert place == Place() and len(notes) == 1 and notes[0].startswith("runs on the CPU: ")


def test_libraries_that_do_not_load_are_named(gpu, monkeypatch, tmp_path):
    ort = gpu()
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").touch()
    ort.__file__ = str(tmp_path / "__init__.py")

    def load(name):
        raise OSError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(places.ctypes, "CDLL", load)
    with pytest.raises(InputError, match=r"does not load \(libcudnn.so.9.*pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
        places.place_for("cuda")


def test_run_and_doctor_say_what_is_missing(demo_bundle, capsys):
    """On this machine: ONNX Runtime without CUDA."""
    ask = ["run", str(demo_bundle), "--prompt", "describe", "--max-new-tokens", "2", "--json", "--threads", "1"]
    assert main([*ask, "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no CUDA provider" in said and "onnxruntime-gpu" in said
    assert main([*ask, "--device", "auto"]) == 0
    assert any("runs on the CPU" in note for note in json.loads(capsys.readouterr().out)["notes"])
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cuda"]["missing"].endswith("has no CUDA provider")
