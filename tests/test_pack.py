"""Archives for Jetson: the same bytes twice, nothing unsafe in them, a script that tells what is wrong in one line.

The device is made of files and small programs (fake_jetson.py). What an engine on a real one answers is not tested here;
that the expected answers belong to the archive's own graphs is: ONNX Runtime runs those from the unpacked files.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import cm_export, wide
from fake_jetson import Jetson

from cm_export.backends.tensorrt.export import write_graphs
from cm_export.backends.tensorrt.targets import target
from cm_export.base.errors import InputError
from cm_export.bundle.bundle import Bundle
from cm_export.cli import main
from cm_export.cli.verbs.pack import memory_table
from cm_export.deploy.jetson import archive, memory, pack, trtexec
from cm_export.deploy.jetson import devices as jetson
from cm_export.families import Pictures, qwen2_vl
from cm_export.host.decode import teacher_forced
from cm_export.host.loaded import load as load_bundle
from cm_export.host.runner import Budget
from cm_export.recipe.engine import EngineSettings
from cm_export.recipe.option import options_of
from cm_export.source.probe import probe as synthetic

DEVICES = {"6.2": "jetson-orin-nano", "7.1": "jetson-thor", "7.2": "jetson-orin"}
releases = pytest.mark.parametrize("jetpack", DEVICES)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def packed(bare_bundle, tmp_path_factory):
    """JetPack (and precision) -> the archive of a tiny model, packed once."""
    made = {}

    def one(jetpack: str, precision: str = "fp16") -> Path:
        if (jetpack, precision) not in made:
            out = tmp_path_factory.mktemp("packed") / "tiny.tar.gz"
            options = ["--target", DEVICES[jetpack], "--jetpack", jetpack, "--precision", precision]
            assert main(["pack", str(bare_bundle), *options, "--capacity", "256", "--quiet", "--out", str(out)]) == 0
            made[jetpack, precision] = out
        return made[jetpack, precision]

    return one


def unpack(file: Path, folder: Path) -> Path:
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    return folder / "tiny"


@pytest.fixture
def unpacked(packed, tmp_path):
    return lambda *which: unpack(packed(*which), tmp_path)


@pytest.fixture
def device(tmp_path):
    """JetPack, changes -> a device of it."""

    def make(jetpack: str = "6.2", **changes: object) -> Jetson:
        folder = tmp_path / "device"
        folder.mkdir(exist_ok=True)
        return Jetson(folder, jetpack, **changes)

    return make


@pytest.fixture(scope="session")
def ran(packed, tmp_path_factory):
    """JetPack -> (archive on which the script ran, its device, what it printed), not to be changed."""
    made = {}

    def one(jetpack: str) -> tuple[Path, Jetson, subprocess.CompletedProcess]:
        if jetpack not in made:
            archive, place = unpack(packed(jetpack), tmp_path_factory.mktemp("ran")), tmp_path_factory.mktemp("device")
            jetson_ = Jetson(place, jetpack, available_gb=60)
            made[jetpack] = archive, jetson_, jetson_.run(archive)
        return made[jetpack]

    return one


@pytest.fixture
def built(ran, tmp_path):
    """The archive for JetPack 6.2 with its engines, to be changed."""
    return lambda: Path(shutil.copytree(ran("6.2")[0], tmp_path / "tiny"))


def one_line(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    told = [line for line in done.stderr.splitlines() if line.startswith("build_on_device: error: ")]
    assert (done.returncode, len(told)) == (code, 1), done.stderr
    for word in words:
        assert word in told[0], told[0]


# ---------------------------------------------------------------- the archive


def test_the_same_bundle_and_name_give_the_same_bytes(packed, bare_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    shutil.copytree(bare_bundle, "copy.plan")
    options = ("--target", "jetson-orin-nano", "--capacity", "256", "--out", "tiny.tar.gz", "--json")
    done = cm_export("pack", "copy.plan", *options, umask=0o077)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == Path("tiny.tar.gz").stat().st_size
    assert Path("tiny.tar.gz").read_bytes() == packed("6.2").read_bytes()


@releases
def test_an_archive_holds_plain_files_below_its_own_name(packed, jetpack):
    with tarfile.open(packed(jetpack)) as tar:
        entries = tar.getmembers()
    names = [e.name for e in entries]
    assert names == sorted(set(names))
    for entry in entries:
        path = PurePosixPath(entry.name)
        assert entry.isreg() and path.parts[0] == "tiny" and ".." not in path.parts and not path.is_absolute()
        assert (entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime) == (0, 0, "", "", 315532800)
        assert entry.mode == (0o755 if path.suffix == ".sh" else 0o644)
    inside = {n.removeprefix("tiny/") for n in names}
    assert {"manifest.json", "recipe.toml", "README.txt", "SHA256SUMS", "build_on_device.sh"} <= inside
    assert {"onnx/vision.onnx", "onnx/prefill.onnx", "onnx/decode.onnx", "plugins/CMakeLists.txt"} <= inside
    assert not [n for n in inside if n.startswith("plugins/") and n.endswith((".py", ".pyc"))]


def test_an_archive_tells_nothing_of_the_machine_that_packed_it(unpacked, bare_bundle):
    words = [str(Path.home()), str(Path(__file__).parent.parent), str(bare_bundle.parent), os.uname().nodename]
    for file in (p for p in unpacked("6.2").rglob("*") if p.is_file() and p.suffix not in (".bin", ".safetensors")):
        content = file.read_bytes()
        assert not [w for w in words if len(w) > 5 and w.encode() in content], file


def test_the_sums_are_those_of_every_other_file(unpacked):
    folder = unpacked("6.2")
    sums = dict(line.split("  ", 1)[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in archive.files_of(folder) if n != "SHA256SUMS"
    }


def test_a_failure_leaves_the_old_archive_and_nothing_else(bare_bundle, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.tar.gz"
    out.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(archive, "_add", full)
    options = ["--target", "jetson-orin", "--capacity", "256", "--out", str(out), "-q"]
    assert main(["pack", str(bare_bundle), *options]) == 1
    assert "no space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["x.tar.gz"] and out.read_bytes() == b"old"


def test_what_a_killed_run_left_is_removed_by_the_next(packed, bare_bundle, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".x.tar.gz.{dead.pid}.tmp" / "onnx").mkdir(parents=True)
    (tmp_path / f".x.tar.gz.{os.getppid()}.tmp").mkdir()  # of one that is still at work
    options = ["--target", "jetson-orin", "--capacity", "256", "--out", str(tmp_path / "x.tar.gz"), "-q"]
    assert main(["pack", str(bare_bundle), *options]) == 0
    assert sorted(os.listdir(tmp_path)) == [f".x.tar.gz.{os.getppid()}.tmp", "x.tar.gz"]


def test_a_large_file_is_streamed(tmp_path):
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "weights.safetensors", "wb") as f:
        f.truncate(64_000_000)
    tracemalloc.start()
    archive.write_sums(tmp_path / "in")
    archive.write(tmp_path / "in", tmp_path / "x.tar.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
    with tarfile.open(tmp_path / "x.tar.gz") as tar:
        assert tar.getmember("x/weights.safetensors").size == 64_000_000


def test_a_link_is_not_packed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="neither a plain file"):
        archive.write(tmp_path / "in", tmp_path / "x.tar.gz")
    assert not (tmp_path / "x.tar.gz").exists()


@releases
def test_the_recorded_embedding_is_the_models(unpacked, bare_bundle, jetpack):
    folder, bundle = unpacked(jetpack), Bundle(bare_bundle)
    place = json.loads((folder / "manifest.json").read_text())["embedding"]
    table = np.fromfile(folder / place["file"], np.float16, int(np.prod(place["shape"])), offset=place["offset"])
    np.testing.assert_array_equal(
        table.reshape(place["shape"]), bundle.weights[bundle.family.embedding].astype(np.float16)
    )


# ---------------------------------------------------------------- the expected answers


def load(folder: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, folder / "device" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported(outputs: dict[str, np.ndarray]) -> str:
    """As trtexec writes --exportOutput."""
    text = []
    for name, value in outputs.items():
        values = ", ".join("nan" if v != v else f"{v:.6g}" for v in value.ravel().tolist())
        text.append(
            f'{{ "name" : "{name}"\n  , "dimensions" : "{"x".join(map(str, value.shape))}"\n  , "values" : [ {values} ]\n  }}'
        )
    return "[\n  " + "\n, ".join(text) + "\n]\n"


@pytest.mark.parametrize(
    ("jetpack", "precision"), [("6.2", "fp16"), ("7.1", "fp16"), ("7.2", "fp16"), ("7.1", "int8"), ("7.2", "int4")]
)
def test_the_archives_own_graphs_answer_its_probes(unpacked, jetpack, precision, tmp_path):
    """From the files alone, as trtexec would read them. Before 10.7 decode has plugin nodes without a meaning."""
    folder = unpacked(jetpack, precision)
    manifest, compare = json.loads((folder / "manifest.json").read_text()), load(folder, "compare")
    asked = []
    for name, probe in manifest["probes"].items():
        if probe["graph"] == "decode" and jetpack == "6.2":
            continue
        model = onnx.load(folder / "onnx" / f"{probe['graph']}.onnx", load_external_data=False)
        for node in model.graph.node:  # said to TensorRT alone
            kept = [a for a in node.attribute if a.name != "TRT_decomposable"]
            del node.attribute[:]
            node.attribute.extend(kept)
        options = ort.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder / "onnx"))
        session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        given = dict(word.split(":") for word in probe["shapes"].split(","))
        feeds = {}
        for tensor in session.get_inputs():
            kind = tensor.type[7:-1].replace("float16", "half").replace("float", "float32").replace("half", "float16")
            shape = [int(n) for n in given[tensor.name].split("x")] if tensor.name in given else tensor.shape
            feeds[tensor.name] = np.fromfile(folder / probe["inputs"][tensor.name], kind).reshape(shape)
        names = [o.name for o in session.get_outputs()]
        (tmp_path / "out.json").write_text(exported(dict(zip(names, session.run(names, feeds), strict=True))))
        results, problem = compare.judge(probe, tmp_path / "out.json")
        assert problem is None and set(results) == set(probe["outputs"])
        assert all(r["measure"] < 1e-3 or r["limit"] == 0.9 for r in results.values()), (name, results)
        asked.append(name)
    assert (
        asked == ["vision", "prefill-all", "prefill-core", "decode-core", "decode-full"][: 3 if jetpack == "6.2" else 5]
    )


def test_the_expected_answers_are_the_dense_models_where_nothing_is_left_out(unpacked, bare_bundle):
    """The bundle's own dense graphs in float32, run by what answers questions, on the same prompt."""
    folder, model = unpacked("6.2"), load_bundle(bare_bundle, threads=1)
    probes, bundle = json.loads((folder / "manifest.json").read_text())["probes"], model.bundle
    given = synthetic(bundle.shape, bundle.tower, bundle.config)
    found = model.backend.vision(bundle.tower.feeds(given.pictures))
    pictures = Pictures(found, tuple(picture.layout for picture in given.pictures))
    prefilled = model.prefill(model.request(given.ids, pictures), Budget(dense=True))
    step = teacher_forced(model.backend, prefilled.row(), given.ids[:1].tolist())[1]
    first = found["image_embeds"][: given.pictures[0].tokens]
    for name, output, theirs in (
        ("vision", "image_embeds", first),
        ("prefill-all", "logits", prefilled.logits),
        ("decode-full", "logits", step),
    ):
        ours = np.fromfile(folder / probes[name]["outputs"][output]["file"], np.float32)
        assert np.abs(ours - theirs.ravel()).max() / np.abs(theirs).max() < 0.03, name


def test_probes_are_within_the_profiles(unpacked):
    manifest = json.loads((unpacked("6.2") / "manifest.json").read_text())
    for probe in manifest["probes"].values():
        for word in probe["shapes"].split(","):
            tensor, _, shape = word.partition(":")
            least, _, most = manifest["graphs"][probe["graph"]]["profile"][tensor]
            assert all(a <= int(n) <= b for a, n, b in zip(least, shape.split("x"), most, strict=True)), word


def test_probes_are_within_the_profiles_of_the_smallest_sizes_that_pack_takes(bare_bundle, tmp_path):
    out, low = tmp_path / "small.tar.gz", {name: o.low for name, o in options_of(EngineSettings).items()}
    sizes = ["--capacity", str(low["capacity"]), "--max-patches", str(low["max_patches"])]
    assert main(["pack", str(bare_bundle), "--target", "jetson-orin", *sizes, "--out", str(out), "-q"]) == 0
    with tarfile.open(out) as tar:
        manifest = json.loads(tar.extractfile("small/manifest.json").read())
    for probe in manifest["probes"].values():
        for word in probe["shapes"].split(","):
            tensor, _, shape = word.partition(":")
            least, _, most = manifest["graphs"][probe["graph"]]["profile"][tensor]
            assert all(a <= int(n) <= b for a, n, b in zip(least, shape.split("x"), most, strict=True)), word


@pytest.fixture
def gate(unpacked, tmp_path):
    """gate(values, change of the entry): compare.judge of one output of which 12 numbers were expected."""
    folder = unpacked("6.2")
    compare = load(folder, "compare")
    theirs = np.linspace(-2, 4, 12, dtype=np.float32)

    def judge(ours: np.ndarray, name: str = "y", **entry: object):
        (folder / "expected").write_bytes(theirs[:: entry.get("every", 1)].tobytes())
        plain = {
            "file": "expected",
            "stored": "float32",
            "shape": [3, 4],
            "every": 1,
            "compare": "values",
            "limit": 0.01,
        }
        (tmp_path / "out.json").write_text(exported({"other": np.arange(3), name: ours.reshape(3, -1)}))
        return compare.judge({"outputs": {"y": plain | entry}}, tmp_path / "out.json")

    judge.theirs, judge.compare, judge.folder = theirs, compare, folder
    return judge


def test_the_gate_measures_against_the_largest_expected_number(gate):
    ours = gate.theirs.copy()
    ours[5] += 0.036
    results, problem = gate(ours)
    assert problem is None and results["y"]["measure"] == pytest.approx(0.009, rel=1e-3)
    ours[5] += 0.008
    assert gate(ours)[1] == "y: differs by 0.011 (limit 0.01)"


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50, 1 << 20])
@pytest.mark.parametrize("every", [1, 3, 5])
def test_the_gate_reads_in_pieces_what_it_would_read_at_once(gate, piece, every):
    gate.compare.PIECE = piece
    results, problem = gate(gate.theirs, every=every)
    assert problem is None and results["y"]["measure"] < 1e-5  # six digits are written
    wrong = gate.theirs.copy()
    wrong[every] += 1
    assert gate(wrong, every=every)[1]


def test_the_gate_refuses_nan_another_shape_and_a_missing_output(gate):
    ours = gate.theirs.copy()
    ours[3] = np.nan
    assert "differs by nan" in gate(ours)[1]
    assert "expected [4, 3]" in gate(gate.theirs, shape=[4, 3])[1]
    assert "expected [3, 4]" in gate(gate.theirs[:9])[1]
    assert "did not answer" in gate(gate.theirs, name="z")[1]


def test_the_gate_takes_a_share_of_ids(gate):
    ids = np.arange(12)
    (gate.folder / "ids").write_bytes(ids.tobytes())
    entry = {"file": "ids", "stored": "int64", "compare": "ids", "limit": 0.9}
    assert gate(np.where(ids == 3, 99, ids), **entry)[1] is None
    assert gate(np.where(ids < 2, 99, ids), **entry)[1] == "y: agrees in only 0.833 (limit 0.9)"


def test_a_file_that_is_cut_short_fails_the_gate_in_one_line(gate, tmp_path, capsys):
    (tmp_path / "out.json").write_text('[ { "name" : "logits" , "dimensions" : "1x9" , "values" : [ 1, 2')
    assert gate.compare.main("prefill-all", tmp_path / "out.json", tmp_path / "result.json") == 1
    assert "cut short" in capsys.readouterr().err
    assert json.loads((tmp_path / "result.json").read_text())["passed"] is False


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("precision", memory.PRECISIONS)
def test_weights_are_estimated_as_they_are_written(bare_bundle, precision, tmp_path):
    """Low-bit ones roughly: a hidden size of 112 makes smaller groups, and so more scales, than those of real models."""
    bundle = Bundle(bare_bundle)
    order = pack.Order(*jetson.find("jetson-orin"), precision, capacity=256)
    written = write_graphs(pack._source(bundle, order), tmp_path, target("10.3"), pack.GRAPHS)["graphs"]
    for graph, size in memory.estimated_weights(bundle, pack.GRAPHS, precision).items():
        assert size == pytest.approx(written[graph]["weight_bytes"], rel=0.03 if precision == "fp16" else 0.15)


def test_int8_packs_the_ffn_of_decode_and_int4_the_matrices_of_every_layer(bare_bundle):
    bundle = Bundle(bare_bundle)
    shape, by = bundle.shape, {p: memory.estimated_weights(bundle, pack.GRAPHS, p) for p in memory.PRECISIONS}
    assert by["fp16"]["vision"] == by["int8"]["vision"] == by["int4"]["vision"]
    assert by["fp16"]["prefill"] == by["int8"]["prefill"]
    ffn = 3 * shape.layers * shape.ffn * shape.hidden
    heads = shape.heads + shape.kv_heads
    attention = 2 * shape.layers * shape.hidden * heads * shape.head_dim  # q and o, k and v
    assert by["fp16"]["decode"] - by["int8"]["decode"] == pytest.approx(ffn * (2 - 1 - 2 / 128), abs=2)
    for graph in ("prefill", "decode"):
        saved = by["fp16"][graph] - by["int4"][graph]
        assert saved == pytest.approx((ffn + attention) * (2 - 0.5 - 2 / 64), abs=2)


def qwen2_vl_2b(**vision):
    """What the prediction asks of a bundle: Qwen2-VL-2B's decoder, behind a tower of these widths."""
    shape = SimpleNamespace(layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, head_dim=128, vocab=151936)
    sizes = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "hidden_size": 1536}
    return SimpleNamespace(shape=shape, tower=qwen2_vl.FAMILY.tower({"vision_config": sizes | vision}))


def test_a_2_b_model_fits_an_orin_nano_in_int4_only():
    """Weights of Qwen2-VL-2B's decoder, counted by hand; vision as small as benchmarks/random_bundle.py makes it."""
    bundle = qwen2_vl_2b(embed_dim=64, num_heads=4)
    ffn, attention, head = 28 * 3 * 1536 * 8960, 28 * 2 * (1536 * 1536 + 1536 * 256), 2 * 151936 * 1536
    low = {"int8": 1 + 2 / 128, "int4": 0.5 + 2 / 64}
    both = {
        "fp16": (2 * (ffn + attention) + head, 2 * (ffn + attention) + head),
        "int8": (2 * (ffn + attention) + head, low["int8"] * ffn + 2 * attention + head),
        "int4": (low["int4"] * (ffn + attention) + head, low["int4"] * (ffn + attention) + head),
    }
    found = {}
    for precision, (prefill, decode) in both.items():
        weights = {"vision": 200_000, "prefill": round(prefill), "decode": round(decode)}
        found[precision] = memory.predict(weights, bundle, EngineSettings(), "copy", False, 5_200_000_000)
    assert [p for p, prediction in found.items() if prediction.fits] == ["int4"]
    int4 = found["int4"]
    assert int4.run_bytes == sum(int4.parts.values()) and int4.build_bytes == 3 * weights["decode"] + 600_000_000
    assert int4.parts["cache"] == 2 * 28 * 2 * 2 * 128 * 2 * 4096
    assert (
        memory.predict(weights, bundle, EngineSettings(), "in_place", True, 1).parts["cache"]
        == int4.parts["cache"] // 2
    )


def test_requests_that_decode_together_count_each_and_prompts_count_once():
    weights, bundle = {"vision": 1, "prefill": 1, "decode": 1}, qwen2_vl_2b(embed_dim=64, num_heads=4)
    one, four = (memory.predict(weights, bundle, EngineSettings(max_batch=n), "copy", False, 1).parts for n in (1, 4))
    assert four["cache"] == 4 * one["cache"] and "cache, regrouped" not in one
    assert four["cache, regrouped"] == 7 * one["cache"] // 2  # a group of four, and three that join, in one set each
    for name in ("vision", "prefill"):
        assert four[f"activations of {name}"] == one[f"activations of {name}"]
    fixed = 4 << 20
    assert four["activations of decode"] - fixed == 4 * (one["activations of decode"] - fixed)


def test_qwen2_vl_2b_with_its_own_vision_fits_an_orin_nano_with_smaller_pictures_and_a_shorter_cache(monkeypatch):
    """Vision of 665 M parameters: together with it nothing alone suffices, and what is named does."""
    bundle = qwen2_vl_2b(embed_dim=1280, num_heads=16)
    by = {
        p: {"vision": 1_330_000_000, "prefill": d, "decode": d}
        for p, d in (("fp16", 3.09e9), ("int8", 2e9), ("int4", 1.163e9))
    }
    monkeypatch.setattr(memory, "estimated_weights", lambda _bundle, _graphs, precision: by[precision])
    ask = (bundle, pack.GRAPHS, "fp16", EngineSettings(), "copy", False, 5_200_000_000)
    told = memory.smaller(*ask)
    assert told == "--precision int4 --capacity 2048 --max-patches 256"
    for capacity, patches in ((2048, 256), (1024, 1024)):
        engine = memory.at(EngineSettings(), capacity, patches)
        assert memory.predict(by["int4"], bundle, engine, "copy", False, 5_200_000_000).fits
    for capacity, patches in ((2048, 512), (4096, 256)):
        engine = memory.at(EngineSettings(), capacity, patches)
        assert not memory.predict(by["int4"], bundle, engine, "copy", False, 5_200_000_000).fits


@pytest.fixture
def small_device(monkeypatch):
    """usable bytes -> jetson-orin-nano has no more than that."""

    def shrink(usable: int) -> None:
        devices = [replace(d, usable_bytes=usable) if d.name == "jetson-orin-nano" else d for d in jetson.DEVICES]
        monkeypatch.setattr(jetson, "DEVICES", tuple(devices))

    return shrink


def test_what_does_not_fit_is_refused_and_what_is_named_instead_fits(bare_bundle, small_device, tmp_path, capsys):
    bundle, engine = Bundle(bare_bundle), EngineSettings(capacity=4096)
    weights = memory.estimated_weights(bundle, pack.GRAPHS, "fp16")
    sizes = {
        c: memory.predict(weights, bundle, memory.at(engine, c, engine.max_patches), "copy", False, 0).run_bytes
        for c in (4096, 2048, 1024, 512)
    }
    small_device((sizes[1024] + sizes[512]) // 2)
    base = ["pack", str(bare_bundle), "--target", "jetson-orin-nano", "--out", str(tmp_path / "x.tar.gz"), "-q"]
    assert main(base) == 2
    told = capsys.readouterr().err
    assert "predicted" in told and "--capacity 512" in told and "--force" in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert main([*base, "--capacity", "512"]) == 0
    assert main([*base, "--capacity", "1024"]) == 2
    assert main([*base, "--capacity", "1024", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["fits"] is False


def test_weights_are_measured_again_once_they_are_written(bare_bundle, small_device, tmp_path, monkeypatch, capsys):
    def weights_alone(weights, *rest):
        return replace(predict(weights, *rest), parts={"weights": sum(weights.values())})

    predict = memory.predict
    monkeypatch.setattr(memory, "predict", weights_alone)
    monkeypatch.setattr(memory, "estimated_weights", lambda _bundle, graphs, _precision: dict.fromkeys(graphs, 0))
    small_device(memory.FACTORS["runtime"][0] + 1000)
    options = ["--target", "jetson-orin-nano", "--capacity", "256", "--out", str(tmp_path / "x.tar.gz")]
    assert main(["pack", str(bare_bundle), *options]) == 2
    err = capsys.readouterr().err
    assert "lower the graphs" in err and "building is predicted" in err and not list(tmp_path.iterdir())


def test_where_nothing_smaller_fits_nothing_is_named(bare_bundle, small_device, tmp_path, capsys):
    small_device(1000)
    assert main(["pack", str(bare_bundle), "--target", "jetson-orin-nano", "--out", str(tmp_path / "x.tar.gz")]) == 2
    err = capsys.readouterr().err
    assert "larger device" in err and "lower the graphs" not in err  # told before the long part


def test_the_table_says_that_it_is_a_prediction(packed, bare_bundle, tmp_path, capsys):
    out = tmp_path / "x.tar.gz"
    assert main(["pack", str(bare_bundle), "--target", "jetson-orin", "--capacity", "256", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "never checked on a device" in text and "building" in text and "28,000.0 MB" in text and "\nfits\n" in text
    assert "DOES NOT FIT" in memory_table(
        {"parts": {}, "run_bytes": 2, "build_bytes": 1, "limit_bytes": 1, "fits": False, "status": "x"}
    )


# ---------------------------------------------------------------- the command line

BAD = {
    "unknown target": (["--target", "jetson-orin-nona"], "did you mean 'jetson-orin-nano'?"),
    "no target": ([], "--target"),
    "jetpack that the target lacks": (["--target", "jetson-thor", "--jetpack", "6.2"], "give 7.1 or 7.2"),
    "and the other way round": (["--target", "jetson-orin", "--jetpack", "7.1"], "7.1 is for jetson-thor"),
    "unknown jetpack": (["--target", "jetson-orin", "--jetpack", "5.1"], "give 6.2 or 7.2"),
    "unknown precision": (["--target", "jetson-orin", "--precision", "fp8"], "fp8"),
    "no rows": (["--target", "jetson-orin", "--capacity", "12"], "--capacity"),
    "a picture smaller than a probe": (["--target", "jetson-orin", "--max-patches", "16"], "--max-patches"),
    "out is a directory": (["--target", "jetson-orin", "--out", "there.tar.gz"], "is a directory"),
    "out is a pipe": (["--target", "jetson-orin", "--out", "pipe.tar.gz"], "not a regular file"),
    "out of another kind": (["--target", "jetson-orin", "--out", "x.zip"], "end in .tar.gz"),
    "out in no directory": (["--target", "jetson-orin", "--out", "no/x.tar.gz"], "no directory"),
    "out where nothing can be made": (["--target", "jetson-orin", "--out", "/proc/x.tar.gz"], "/proc/x.tar.gz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, bare_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.tar.gz").mkdir()
    os.mkfifo("pipe.tar.gz")
    options, word = BAD[name]
    out = [] if "--out" in options else ["--out", "x.tar.gz"]
    assert main(["pack", str(bare_bundle), "-q", *options, *out]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and word in err, err
    assert sorted(os.listdir()) == ["pipe.tar.gz", "there.tar.gz"]


def test_what_is_no_bundle_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, word in (("none.plan", "no such bundle"), ("empty", "not a bundle")):
        assert (
            main(["pack", str(tmp_path / path), "--target", "jetson-orin", "--out", str(tmp_path / "x.tar.gz"), "-q"])
            == 2
        )
        assert word in capsys.readouterr().err


def test_damaged_weights_leave_no_archive(bare_bundle, tmp_path, capsys):
    shutil.copytree(bare_bundle, tmp_path / "x.plan")
    file = tmp_path / "x.plan" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    options = ["--target", "jetson-orin", "--capacity", "256", "--out", str(tmp_path / "x.tar.gz"), "-q"]
    assert main(["pack", str(tmp_path / "x.plan"), *options]) == 2
    assert "weights.safetensors" in capsys.readouterr().err and os.listdir(tmp_path) == ["x.plan"]


def test_an_installation_without_plugin_sources_is_told(bare_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "plugins_folder", lambda: tmp_path)
    assert main(["pack", str(bare_bundle), "--target", "jetson-orin", "--out", str(tmp_path / "x.tar.gz"), "-q"]) == 1
    assert "no CMakeLists.txt" in capsys.readouterr().err


def test_every_device_has_a_default_that_it_can_run():
    for device in jetson.DEVICES:
        found, release = jetson.find(device.name)
        assert found is device and release.name == device.jetpacks[0]
        assert target(release.tensorrt).name == release.tensorrt


def test_flags_follow_the_version():
    graph = {"inputs": [{"name": "x", "shape": ["batch", 4]}, {"name": "past", "shape": [1, 4]}]}
    graph["profile"] = {"x": [[1, 4], [2, 4], [3, 4]], "past": [[1, 4]] * 3}
    old, new = (trtexec.build_words(graph, target(v), 3) for v in ("10.3", "11.0"))
    assert set(old) - set(new) == {"--stronglyTyped"} and set(new) < set(old)
    assert "--maxShapes=x:3x4" in old and "past" not in " ".join(old)
    assert {"--minShapes", "--loadInputs", "--dynamicPlugins", "--iterations"} <= set(trtexec.flags(old))


# ---------------------------------------------------------------- the script


def test_the_script_passes_shellcheck():
    script = Path(pack.__file__).parent / "device" / "build_on_device.sh"
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("jetpack", ["6.2", "7.1", wide("7.2")])
def test_on_a_fit_device_the_script_ends_well_and_reports(ran, jetpack):
    folder, jetson_, done = ran(jetpack)
    assert (done.returncode, "error" in done.stderr) == (0, False), done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "passed" and report["failure"] is None and report["warnings"] == []
    assert list(report["engines"]) == ["vision", "prefill", "decode"] == jetson_.built()
    assert [p["probe"] for p in report["parity"]] == [
        "vision",
        "prefill-all",
        "prefill-core",
        "decode-core",
        "decode-full",
    ]
    assert all(p["passed"] for p in report["parity"])
    core, full = report["speed"]["decode-core"], report["speed"]["decode-full"]
    assert core["neurons"] < full["neurons"] == full["of"]
    assert full["gpu_compute_time_median_ms"] == pytest.approx(full["neurons"] / 1000)
    assert report["device"]["tensorrt"] == jetson_.tensorrt
    needs = report["asking"]["needs"]  # its Python has the standard library only, with which everything above works
    assert "no package tensorrt" in needs and "then bash build_on_device.sh --no-bench" in needs
    assert not report["asking"]["ready"] and needs in (folder / "report.txt").read_text()
    assert (folder / "report.txt").read_text() == done.stdout
    calls = "\n".join(jetson_.calls)
    assert f"-DCMAKE_CUDA_ARCHITECTURES={110 if jetpack == '7.1' else 87}" in calls
    builds = [c for c in jetson_.calls if "--saveEngine" in c]
    assert all("--stronglyTyped" in c and "--dynamicPlugins=work/libcm_plugins.so" in c for c in builds)


def test_help_and_a_dry_run_build_nothing(unpacked, device):
    folder, jetson_ = unpacked("6.2"), device()
    before = sorted(folder.rglob("*"))
    assert "Usage: bash build_on_device.sh" in jetson_.run(folder, "--help").stdout
    done = jetson_.run(folder, "--dry-run")
    assert done.returncode == 0 and "--onnx=onnx/decode.onnx" in done.stdout and "cmake --build" in done.stdout
    assert sorted(folder.rglob("*")) == before and jetson_.built() == []


UNFIT = {
    "little memory": (
        {"available_gb": 0.3, "swap_gb": 9},
        "memory: running needs about",
        "close the desktop",
        "--precision int4",
    ),
    "no swap": ({"available_gb": 1.0, "swap_gb": 0}, "memory: building needs about", "add swap"),
    "little disk": ({"disk_gb": 0.1}, "disk: the engines need", "free some"),
    "older JetPack": ({"release": "# R35 (release), REVISION: 4.1"}, "Jetson Linux 35.4.1", "JetPack 6.2", "--jetpack"),
    "newer JetPack": ({"release": "# R39 (release), REVISION: 2.0"}, "Jetson Linux 39.2.0", "36.4, 36.5"),
    "no JetPack": ({"without": ("/etc/nv_tegra_release",)}, "JetPack: neither"),
    "another TensorRT": ({"tensorrt": "10.7.0.23-1"}, "TensorRT: 10.7.0.23-1 is installed", "for 10.3"),
    "TensorRT that begins alike": ({"tensorrt": "10.30.1"}, "TensorRT: 10.30.1"),
    "another CUDA": ({"cuda": "13.0"}, "CUDA: 13.0 is installed", "12.6"),
    "no headers": ({"without": ("/usr/include/aarch64-linux-gnu/NvInferVersion.h",)}, "libnvinfer-headers-dev"),
    "no nvcc": ({"without": ("nvcc",)}, "CUDA: no nvcc", "nvidia-jetpack"),
    "no cmake": ({"without": ("cmake",)}, "cmake: not found", "apt-get install cmake"),
    "no trtexec": ({"without": ("trtexec",)}, "trtexec: not found", "libnvinfer-bin"),
    "another device": ({"model": "NVIDIA Jetson AGX Thor Developer Kit"}, "AGX Thor", "--target"),
    "no Jetson": ({"without": ("/proc/device-tree/model",)}, "is no Jetson"),
    "trtexec without a flag": ({"faults": {"FAKE_UNKNOWN_FLAG": "--stronglyTyped"}}, "does not know --stronglyTyped"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_device_is_told_in_one_line_before_anything_is_built(name, unpacked, device, bare_bundle, monkeypatch):
    folder = unpacked("6.2")
    changes, *words = UNFIT[name]
    if "memory" in words[0]:  # as of a larger model
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["memory"] |= {"run_bytes": 700_000_000, "build_bytes": 4_000_000_000}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        archive.write_sums(folder)
    jetson_ = device(**changes)
    one_line(jetson_.run(folder), 2, *words)
    assert jetson_.built() == [] and not (folder / "engines").exists()


def test_memory_can_be_ignored_and_a_slow_power_mode_is_a_warning(unpacked, device):
    folder = unpacked("6.2")
    done = device(available_gb=0.1, swap_gb=0, mode="15W").run(folder, "--ignore-memory", "--no-bench")
    assert done.returncode == 0 and "power mode 15W is not the fastest" in done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["speed"] == {} and "15W" in report["warnings"][0]


def test_the_header_tells_the_version_where_no_package_does(unpacked, device):
    jetson_ = device(without=("libnvinfer-bin",))
    assert jetson_.run(unpacked("6.2"), "--dry-run").returncode == 0


def test_newer_headers_name_their_numbers_otherwise(unpacked, tmp_path):
    facts = load(unpacked("6.2"), "facts")
    (tmp_path / "h").write_text(
        "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 13\n#define TRT_PATCH_ENTERPRISE 3\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< x\n#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE\n"
    )
    assert facts.headers(tmp_path / "h") == "10.13.3"


@pytest.mark.parametrize(
    "name", ["onnx/decode.onnx", "onnx/weights.fp16.safetensors", "device/compare.py", "build_on_device.sh"]
)
@pytest.mark.parametrize("how", ["edited", "missing"])
def test_a_damaged_archive_is_refused_by_name(name, how, unpacked, device):
    folder = unpacked("6.2")
    if how == "edited":
        content = bytearray((folder / name).read_bytes())
        content += b"\n# edited\n"
        (folder / name).write_bytes(content)
    elif name != "build_on_device.sh":
        (folder / name).unlink()
    else:
        (folder / "SHA256SUMS").unlink()
        name = "SHA256SUMS"
    one_line(device().run(folder), 2, name, "unpack")


@pytest.mark.parametrize("option", [["--colour"], ["--root"], ["--workspace"], ["--workspace", "1GB"]], ids=" ".join)
def test_a_wrong_option_is_refused(option, unpacked, device):
    one_line(device().run(unpacked("6.2"), *option), 2, option[0])


FAILS = {
    "cmake": ({"FAKE_CMAKE_FAILS": "1"}, "plugin library: CMake Error at CMakeLists.txt:1", "work/plugins.log"),
    "trtexec": (
        {"FAKE_FAILS": "prefill"},
        "engine prefill: [E] Error[4]: the network has no such layer",
        "work/prefill.build.log",
    ),
    "killed": ({"FAKE_KILLED": "decode"}, "engine decode: killed, most likely for lack of memory", "add swap"),
    "no plugin layer": ({"FAKE_LOST": "ffn.0"}, "engine decode: no plugin layer for ffn.0", "build the engine again"),
    "no index input": ({"FAKE_LOST": "core_neurons"}, "engine decode: core_neurons is not at the engine's border"),
    "wrong logits": ({"FAKE_WRONG": "decode-core:logits"}, "parity of decode-core: logits: differs by", "limit 0.03"),
    "wrong cache": ({"FAKE_WRONG": "prefill-all:present.1.key"}, "parity of prefill-all: present.1.key: differs by"),
    "wrong tokens": ({"FAKE_WRONG": "prefill-core:kept_tokens"}, "parity of prefill-core: kept_tokens: agrees in only"),
    "NaN": ({"FAKE_NAN": "vision:image_embeds"}, "parity of vision: image_embeds: differs by nan"),
}


@pytest.mark.parametrize("name", [wide(n) if n == "wrong cache" else n for n in FAILS])
def test_failed_work_is_one_line_and_stands_in_the_report(name, unpacked, built, device):
    folder = unpacked("6.2") if name in ("cmake", "trtexec", "killed") else built()
    faults, *words = FAILS[name]
    done = device(faults=faults).run(folder)
    one_line(done, 1, *words)
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "failed" and words[0] in report["failure"]
    assert words[0] in (folder / "report.txt").read_text()


def test_a_second_run_builds_nothing_and_another_setting_builds_again(built, device):
    folder, jetson_ = built(), device()
    assert jetson_.run(folder, "--no-bench").returncode == 0
    assert jetson_.calls and jetson_.built() == [] and not [c for c in jetson_.calls if c.startswith("cmake")]
    assert jetson_.run(folder, "--no-bench", "--workspace", "512").returncode == 0
    assert jetson_.built() == ["vision", "prefill", "decode"]
    assert sum("--memPoolSize=workspace:512" in c for c in jetson_.calls) == 3
    (folder / "engines" / "prefill.plan").unlink()
    assert jetson_.run(folder, "--no-bench", "--workspace", "512").returncode == 0
    assert jetson_.built()[3:] == ["prefill"]
    with open(folder / "onnx" / "decode.onnx", "ab") as f:  # as of an archive that was packed anew
        f.write(b" ")
    archive.write_sums(folder)
    assert jetson_.run(folder, "--no-bench", "--workspace", "512").returncode == 0
    assert jetson_.built()[4:] == ["decode"]


def test_after_a_kill_only_the_unfinished_engines_are_built(unpacked, device):
    folder, jetson_ = unpacked("6.2"), device()
    with jetson_.building(folder, "prefill"):
        one_line(jetson_.run(folder), 2, "work/lock: another run is at work")
        assert jetson_.run(folder, "--dry-run").returncode == 0
    assert sorted(p.name for p in (folder / "engines").glob("*.plan*")) == [
        "prefill.plan.tmp",
        "vision.plan",
        "vision.plan.key",
    ]
    assert jetson_.run(folder, "--no-bench").returncode == 0
    assert jetson_.built() == ["vision", "prefill", "prefill", "decode"]
    assert json.loads((folder / "report.json").read_text())["status"] == "passed"


@pytest.mark.parametrize("version", ["same", "other"])
def test_cm_export_of_the_same_version_builds_where_it_is_installed(version, unpacked, device, tmp_path):
    folder = unpacked("6.2")
    tool = json.loads((folder / "manifest.json").read_text())["tool"]["version"]
    place = tmp_path / "site" / "cm_export"
    (place / "backends" / "tensorrt").mkdir(parents=True)
    (place / "__init__.py").write_text(f"__version__ = {tool if version == 'same' else '0'!r}\n")
    (place / "backends" / "__init__.py").touch()
    (place / "backends" / "tensorrt" / "__init__.py").touch()
    (place / "backends" / "tensorrt" / "builder.py").write_text(
        "import json, pathlib, sys\njob = json.load(open(sys.argv[1]))\n"
        "assert pathlib.Path(job['onnx']).is_file() and pathlib.Path(job['plugin_library']).is_file()\n"
        "assert job['expected']['inputs'] and job['typed_flag'] is True\n"
        "pathlib.Path(job['plan']).write_text(pathlib.Path(job['onnx']).stem)\n"
        "print(json.dumps({'step': 'build'}))\nprint(json.dumps({'result': {}}))\n"
    )
    (tmp_path / "site" / "tensorrt.py").touch()
    jetson_ = device(faults={"PYTHONPATH": str(tmp_path / "site")})
    done = jetson_.run(folder, "--no-bench")
    assert done.returncode == 0, done.stderr
    builders = {e["builder"] for e in json.loads((folder / "report.json").read_text())["engines"].values()}
    assert builders == ({"cm-export"} if version == "same" else {"trtexec"})
    assert jetson_.built() == ([] if version == "same" else ["vision", "prefill", "decode"])
