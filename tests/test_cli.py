"""The command as a user meets it: bad input is one line on stderr, --help is instant, Ctrl-C is quiet."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cm_export import __version__
from cm_export.base.by_name import names_in
from cm_export.base.errors import BundleError, InputError
from cm_export.cli import main, verb_names
from cm_export.cli import tables as _tables
from cm_export.cli.console import emit_json, progress, write_json
from cm_export.cli.requirements import fits, misfits, requirements

VERBS = verb_names()
COMMAND = (sys.executable, "-c", "import sys; from cm_export.cli import main; sys.exit(main())")
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "PIL", "rich", "huggingface_hub")


def cm_export(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "x.plan"
    path.mkdir()
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "x.png")
    return tmp_path / "x.png"


@pytest.fixture
def stub(monkeypatch):
    """Puts a module of the given functions in the place of the real one, so that only the verb itself is tested."""

    def put(name: str, **functions: object) -> None:
        module = ModuleType(f"cm_export.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"cm_export.{name}", module)

    return put


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_purpose_options_and_examples(verb):
    done = cm_export(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: cm-export {verb}" in done.stdout and "--debug" in done.stdout
    examples = done.stdout.split("Examples:")[1].strip().splitlines()
    assert examples and all(line.strip().startswith(f"cm-export {verb}") for line in examples)


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_in_help_parses(verb):
    """Each example line goes through the real parser; the work itself is not started."""
    import shlex

    import click

    from cm_export.base.by_name import load

    command = load("cm_export.cli.verbs", verb.replace("-", "_"), "verb").command
    for example in command.examples:
        values = shlex.split(example)[2:]
        with click.Context(command, obj={}) as ctx:
            parser = command.make_parser(ctx)
            _, rest, _ = parser.parse_args(values)
        assert rest == [], example
        for word in re.findall(r"--neurons (\S+)", example):
            assert set(word.split(",")) <= set(names_in("cm_export.policies.neurons"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy(verb):
    code = (
        "import sys; from cm_export.cli import main; code = main([sys.argv[1], '--help']);"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, verb], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("verb", VERBS)
def test_help_answers_within_a_third_of_a_second(verb):
    def seconds() -> float:
        start = time.perf_counter()
        cm_export(verb, "--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_without_arguments_the_verbs_are_listed():
    done = cm_export()
    assert done.returncode == 0
    assert all(re.search(rf"^  {verb} ", done.stdout, re.M) for verb in VERBS)


def test_version_is_the_packages():
    assert cm_export("--version").stdout.strip().endswith(__version__)


# ---------------------------------------------------------------- bad input

BAD = [
    (("biuld",), "did you mean 'build'?"),
    (("xyzzy",), "known: bench, build"),
    (("--colour", "build"), "--colour"),
    (("build", "--modle", "demo"), "--model"),
    (("build", "--out", "o.plan", "extra"), "extra"),
    (("build", "--model", "demo"), "--out"),
    (("build", "--out", "o.plan"), "no model named"),
    (("build", "--model", "qwen2vl", "--out", "o.plan"), "did you mean 'qwen2-vl'?"),
    (("build", "--model", "./none", "--out", "o.plan"), "no such directory"),
    (("build", "--model", ".", "--out", "o.plan"), "no config.json"),
    (("build", "--model", "demo", "--out", "o.plan", "--recipe", "none.toml"), "none.toml"),
    (("build", "--model", "demo", "--out", "o.plan", "--neurons", "grifin"), "did you mean 'griffin'?"),
    (("build", "--model", "demo", "--out", "o.plan", "--tokens", "overlapp"), "did you mean 'overlap'?"),
    (("build", "--model", "demo", "--out", "o.plan", "--backend", "onxruntime"), "did you mean 'onnxruntime'?"),
    (("build", "--model", "demo", "--out", "o.plan", "--token-budget", "half"), "'half'"),
    (("build", "--model", "demo", "--out", "o.plan", "--token-budget", "count"), "count"),
    (("build", "--model", "demo", "--out", "o.plan", "--token-budget", "knee", "--token-count", "3"), "--token-count"),
    (("build", "--model", "demo", "--out", "o.plan", "--token-count", "0"), "--token-count"),
    (("build", "--model", "demo", "--out", "o.plan", "--prune-layer", "-1"), "--prune-layer"),
    (("build", "--model", "demo", "--out", "o.plan", "--prune-layer", "0"), "calibration"),
    (("build", "--model", "demo", "--out", "o.plan", "--voters", "nobody"), "'nobody'"),
    (("build", "--model", "demo", "--out", "o.plan", "--seed", "-1"), "--seed"),
    (("run", "none.plan", "--prompt", "x"), "no such bundle"),
    (("run", "x.png", "--prompt", "x"), "is a file"),
    (("run", "b.plan"), "--prompt"),
    (("run", "b.plan", "--prompt", " "), "prompt is empty"),
    (("run", "b.plan", "--prompt", "x", "--image", "none.png"), "no such file"),
    (("run", "b.plan", "--prompt", "x", "--image", "https://example.org/x.png"), "not fetched"),
    (("run", "b.plan", "--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
    (("run", "b.plan", "--prompt", "x", "--max-new-tokens", "many"), "many"),
    (("run", "b.plan", "--prompt", "x", "--threads", "-1"), "--threads"),
    (("run", "b.plan", "--prompt", "x", "--dense", "--token-share", "0.5"), "--dense"),
    (("run", "b.plan", "--prompt", "x", "--overlay", "o.png"), "no picture"),
    (("run", "b.plan", "--prompt", "x", "--image", "x.png", "--overlay", "o.pdf"), "use .png"),
    (("run", "b.plan", "--prompt", "x", "--image", "x.png", "--overlay", "no/o.png"), "no directory"),
    (("run", "b.plan", "--prompt", "x", "--image"), "--image"),
    (("eval", "b.plan"), "--task"),
    (("eval", "b.plan", "--task", "easy-vqa", "--data", "x.jsonl"), "one of the two"),
    (("eval", "b.plan", "--data", "none.jsonl"), "cannot be read"),
    (("eval", "b.plan", "--task", "scenes", "--kinds", "wher"), "did you mean 'where'?"),
    (("eval", "b.plan", "--task", "scenes", "--neurons", "grifin"), "did you mean 'griffin'?"),
    (("eval", "b.plan", "--task", "scenes", "--token-share", "0.5,2"), "for 2 % write 0.02"),
    (("build", "--model", "demo", "--out", "o.plan", "--require-accuracy", "0.9"), "--task or --data"),
    (("build", "--model", "demo", "--out", "o.plan", "--task", "scenes"), "--require-accuracy"),
    (("eval", "b.plan", "--task", "nonsense"), "unknown task 'nonsense'"),
    (("bench", "none.plan"), "no such bundle"),
    (("bench", "b.plan", "--repeats", "0"), "--repeats"),
    (("bench", "b.plan", "--image-tokens", "-1"), "--image-tokens"),
    (("inspect",), "BUNDLE"),
    (("inspect", "none.plan"), "no such bundle"),
    (("doctor", "extra"), "extra"),
]
BAD += [
    (("run", "b.plan", "--prompt", "x", option, value), option)
    for option in ("--neuron-share", "--token-share")
    for value in ("0", "-0.1", "1.01", "40", "nan", "inf", "half", "")
]


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["", "debug"])
@pytest.mark.parametrize(("args", "word"), BAD, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(args, word, debug, bundle, picture, monkeypatch, capsys):
    monkeypatch.chdir(bundle.parent)
    bundle.rename("b.plan")
    code = main([*debug, *args])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("cm-export: error: ")]
    assert len(lines) == 1 and word in lines[0], err
    if not debug:
        # `build` may announce its first stage before it meets the mistake
        assert [line for line in err.splitlines() if not line.startswith("cm-export: [")] == lines
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "args", [("biuld",), ("run", "none.plan", "--prompt", "x"), ("build", "--model", "qwen2vl", "--out", "o", "-q")]
)
def test_the_real_command_fails_in_one_line(args, tmp_path):
    done = cm_export(*args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("cm-export: error: ")


def test_a_mistyped_model_is_told_before_torch_is_imported():
    code = (
        "import sys; from cm_export.cli import main; main(['build', '--model', 'qwen2vl', '--out', 'o']);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False" and "did you mean" in done.stderr


@pytest.mark.parametrize("args", [("--debug", "inspect", "x.plan"), ("inspect", "x.plan", "--debug")])
def test_debug_shows_the_traceback_before_and_after_the_verb(args, bundle, stub, monkeypatch, capsys):
    stub("bundle.inspect", describe=_raise(BundleError("no manifest", where="x.plan")))
    monkeypatch.chdir(bundle.parent)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1] == "cm-export: error: x.plan: no manifest"


# ---------------------------------------------------------------- failures


def _raise(error: BaseException):
    def fail(*_args, **_kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BundleError("edited", where="b", fix="build again"), 2, "cm-export: error: b: edited; build again"),
        (InputError("bad"), 2, "cm-export: error: bad"),
        (KeyboardInterrupt(), 130, "cm-export: interrupted"),
        (MemoryError(), 1, "cm-export: error: out of memory"),
        (OSError(28, "No space left on device", "w.bin"), 1, "cm-export: error: w.bin: no space left"),
        (ZeroDivisionError("a\nb"), 1, "cm-export: error: ZeroDivisionError: a b (this is a bug: run again with --d"),
    ],
)
def test_every_failure_has_its_exit_code_and_one_line(error, code, line, bundle, stub, capsys):
    stub("bundle.inspect", describe=_raise(error))
    assert main(["inspect", str(bundle)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


@pytest.mark.parametrize("size", [10, 10_000_000], ids=["still in the buffer", "larger than the pipe"])
def test_a_closed_pipe_is_quiet(size, bundle):
    code = (
        "import sys, types; from cm_export import cli;"
        f"stub = types.ModuleType('x'); stub.describe = lambda p: sys.stdin.read() or {{'a': 'x' * {size}}};"
        "sys.modules['cm_export.bundle.inspect'] = stub; sys.exit(cli.main(['inspect', sys.argv[1], '--json']))"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-c", code, str(bundle)], env=env, **pipes)
    process.stdout.close()
    process.stdin.close()  # only now it goes on and writes
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


def test_an_interrupt_is_quiet(bundle):
    code = (
        # a shell that starts the tests in the background lets its children ignore the signal
        "import signal, sys, time, types; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from cm_export import cli; stub = types.ModuleType('x');"
        "stub.describe = lambda p: (print('ready', flush=True), time.sleep(60));"
        "sys.modules['cm_export.bundle.inspect'] = stub; sys.exit(cli.main(['inspect', sys.argv[1]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "cm-export: interrupted\n"
    assert process.returncode == 130


# ---------------------------------------------------------------- verbs


NAMED = ("model", "out", "recipe")  # of build, in their order


def test_build_hands_over_the_recipe_that_the_options_describe(stub, capsys):
    calls = []
    stub(
        "build.build",
        build=lambda *args, **given: calls.append(dict(zip(NAMED, args, strict=True)) | given) or {"ok": True},
    )
    options = "--neurons griffin --neuron-share 0.4 --tokens random --token-count 7 --prune-layer 3 --voters last"
    more = "--token-cache index --seed 5 --threads 2 --force --json --revision abc"
    assert main(["build", "--model", "a/b", "--out", "o.plan", *options.split(), *more.split()]) == 0
    (given,) = calls
    recipe = given["recipe"]
    assert (given["model"], given["out"], given["force"], given["threads"]) == ("a/b", Path("o.plan"), True, 2)
    assert (recipe.model, recipe.revision, recipe.seed) == ("a/b", "abc", 5)
    assert (recipe.neurons.policy, recipe.neurons.share) == ("griffin", 0.4)
    tokens = recipe.tokens
    assert (tokens.policy, tokens.budget, tokens.count, tokens.prune_layer) == ("random", "count", 7, 3)
    assert (tokens.voters, tokens.cache) == ("last", "index")
    assert json.loads(capsys.readouterr().out) == {"ok": True}


def test_build_takes_the_model_of_the_recipe_and_drops_its_revision_for_another_model(stub, tmp_path, capsys):
    calls = []
    stub("build.build", build=lambda model, out, recipe, **given: calls.append(recipe) or {})
    (tmp_path / "r.toml").write_text('model = "a/b"\nrevision = "abc"\n[neurons]\nshare = 0.3\n')
    base = ["build", "--recipe", str(tmp_path / "r.toml"), "--out", "o", "--json"]
    assert main(base) == main([*base, "--model", "demo"]) == 0
    assert [(r.model, r.revision, r.neurons.share) for r in calls] == [("a/b", "abc", 0.3), ("demo", None, 0.3)]


@pytest.mark.parametrize("how", [(), ("--json",), ("--quiet",)])
def test_build_says_each_note_once(stub, capsys, how):
    told = {"path": "o.plan", "seconds": 1.0, "gates": [], "graphs": {}, "files": {}, "stages_reused": []}
    stub("build.build", build=lambda *_, **given: told | {"notes": ["a remark"]})
    assert main(["build", "--model", "a/b", "--out", "o.plan", "--capacity", "96", *how]) == 0
    said = "".join(capsys.readouterr())
    expected = 0 if how == ("--quiet",) else 1
    assert said.count("a remark") == said.count("--capacity: only recorded") == expected


STATS = {"prompt_tokens": 9, "image_tokens": 64, "image_tokens_kept": 16, "neurons": 1024, "neurons_kept": 410}
STATS |= {
    "new_tokens": 2,
    "ttft_s": 0.125,
    "tokens_per_s": 40.0,
    "stopped": "stop token",
    "sampling": {"rule": "greedy"},
}


@pytest.fixture
def engine(stub):
    """A stand-in for loaded.load(...): streams two pieces and keeps the upper half of an 8 x 8 grid per picture."""
    calls = []

    def generate(prompt, *, images, on_text, **options):
        calls.append({"prompt": prompt, "images": len(images), **options})
        for piece in ("a ", "circle") if on_text else ():
            on_text(piece)
        kept = np.arange(64).reshape(8, 8) < 32
        return SimpleNamespace(
            text="a circle", token_ids=[7, 8], stats=STATS, kept=[kept for _ in images], notes=["a remark"]
        )

    def load(bundle, *, threads, progress, backend, device):
        progress("load the graphs")
        return SimpleNamespace(generate=generate, tower=SimpleNamespace(min_side=28, max_ratio=200))

    stub("host.loaded", load=load)
    return calls


def test_run_streams_text_to_stdout_and_a_summary_to_stderr(engine, bundle, picture, capsys):
    assert main(["run", str(bundle), "--image", str(picture), "--prompt", "what ?", "--neuron-share", "0.4"]) == 0
    out, err = capsys.readouterr()
    assert out == "a circle\n"
    assert err.splitlines()[-2:] == [
        "cm-export: a remark",
        "cm-export: 16 of 64 image tokens, 410 of 1024 neurons per layer, 2 tokens, "
        "first token after 0.12 s, then 40.0 tokens/s",
    ]
    assert engine[0]["neuron_share"] == 0.4 and engine[0]["max_new_tokens"] == 128 and engine[0]["images"] == 1


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_run_is_silent_on_stderr_when_asked(engine, bundle, flag, capsys):
    assert main(["run", str(bundle), "--prompt", "what ?", flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out == "a circle\n" if flag == "--quiet" else json.loads(out)["text"] == "a circle"


def test_run_refuses_a_picture_without_a_single_token_and_names_it(engine, bundle, tmp_path, capsys):
    Image.new("RGB", (27, 64)).save(tmp_path / "thin.png")
    assert main(["run", str(bundle), "--prompt", "what ?", "--image", str(tmp_path / "thin.png")]) == 2
    assert re.search(r"thin\.png: 27x64 .* at least 28 pixels", capsys.readouterr().err)
    assert engine == []


def test_run_draws_one_overlay_per_picture(engine, bundle, picture, tmp_path, capsys):
    one = ["run", str(bundle), "--prompt", "what ?", "--image", str(picture), "--overlay", str(tmp_path / "kept.png")]
    assert main(one) == main([*one, "--image", str(picture)]) == 0
    assert sorted(p.name for p in tmp_path.glob("kept*")) == ["kept-1.png", "kept-2.png", "kept.png"]


def test_an_overlay_does_not_replace_the_picture_that_it_is_about(engine, bundle, picture, tmp_path, capsys):
    before = picture.read_bytes()
    (tmp_path / "kept-2.png").symlink_to(picture)
    ask = ["run", str(bundle), "--prompt", "what ?", "--image", str(picture)]
    for more in (["--overlay", str(picture)], ["--image", str(picture), "--overlay", str(tmp_path / "kept.png")]):
        assert main([*ask, *more]) == 2
        assert "is what this command reads" in capsys.readouterr().err
    assert main([*ask, "--overlay", ""]) == 2, "an empty name is refused, not ignored"
    assert picture.read_bytes() == before and engine == []


def test_a_name_that_is_no_utf8_is_escaped_in_json(engine, bundle, picture, tmp_path, capsys):
    odd = os.fsdecode(bytes(tmp_path) + b"/kept\xff.png")
    assert main(["run", str(bundle), "--prompt", "x", "--image", str(picture), "--overlay", odd, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.encode())["overlays"] == [odd] and Path(odd).exists()


def test_eval_does_not_write_its_report_over_its_questions(bundle, tmp_path, capsys):
    questions = tmp_path / "q.json"
    questions.write_text('{"question": "what ?", "answer": "x"}')
    assert main(["eval", str(bundle), "--data", str(questions), "--out", str(questions)]) == 2
    assert "is what this command reads" in capsys.readouterr().err and "what ?" in questions.read_text()


def test_standard_input_holds_one_picture_and_no_questions_beside_it(engine, bundle, capsys):
    ask = ["run", str(bundle), "--image", "-"]
    for more, word in ((["--image", "-", "--prompt", "x"], "holds one picture"), (["--chat"], "cannot hold")):
        assert main([*ask, *more]) == 2
        assert word in capsys.readouterr().err


def test_eval_hands_over_what_to_compare_and_writes_its_report(stub, bundle, tmp_path, capsys):
    calls, table = [], [{"answered by": "dense", "accuracy": 0.98}, {"answered by": "random", "accuracy": float("nan")}]
    report = {"task": "easy-vqa", "table": table, "notes": []}
    stub("evals.compare", compare=lambda *given: calls.append(given) or report, Sweep=lambda *given: given)
    stub("evals.task", load=lambda *given: given)
    out = tmp_path / "r.json"
    policies = ["--neurons", "griffin,coreinfer", "--neuron-share", "0.6, 0.4", "--tokens", "dense"]
    asked = ["--task", "easy-vqa", "--kinds", "word", "--limit", "7", "--seed", "3", *policies]
    assert main(["eval", str(bundle), *asked, "--out", str(out)]) == 0
    (given,) = calls
    assert given[:5] == (
        bundle,
        ("easy_vqa", ("word",), 7, 3),
        (("griffin", "coreinfer"), ("dense",), (0.6, 0.4), ()),
        3,
        0,
    )
    assert given[5] == out
    assert json.loads(out.read_text())["table"][1] == {"answered by": "random", "accuracy": None}
    assert re.search(r"dense\s+0\.98", capsys.readouterr().out)


def test_bench_hands_over_its_options_and_prints_the_rows(stub, bundle, capsys):
    calls = []
    stub(
        "evals.bench", measure=lambda bundle, **given: calls.append(given) or {"rows": [{"kind": "dense", "ms": 12.5}]}
    )
    assert main(["bench", str(bundle), "--repeats", "2", "--image-tokens", "0", "--token-share", "1"]) == 0
    assert (calls[0]["repeats"], calls[0]["image_tokens"], calls[0]["token_share"]) == (2, 0, 1.0)
    assert re.search(r"dense\s+12\.5", capsys.readouterr().out)


PORTS = [{"name": f"past.{n}.key", "dtype": "float", "shape": ["batch", 2, "past", 64]} for n in range(8)]
GRAPH = {"name": "decode", "bytes": 1_234_567, "nodes": 99, "ops": {"local::CoreFFN": 8, "Add": 50}}
PACKED = {"file": "packed.safetensors", "bytes": 9_100_000, "matrices": 41, "float32": False}
DESCRIBED = {
    "path": "x.plan",
    "model": "demo",
    "reads": "text and pictures, no clips",
    "recipe": {"seed": 0, "neurons": {"policy": "griffin"}},
    "graphs": [GRAPH | {"inputs": PORTS, "outputs": [{"name": "logits", "dtype": "float", "shape": ["batch", 96]}]}],
    "weights": {"file": "weights.safetensors", "bytes": 36_000_000, "tensors": 120, "packed": PACKED},
    "engines": {
        "backend": "tensorrt",
        "version": "10.13.3",
        "architecture": "sm_87",
        "precision": "int4",
        "capacity": 4096,
        "kv": "copy",
        "graphs": [
            {"name": "decode", "bytes": 7_700_000, "layers": 321, "plugins": {"CoreFFN": 28}, "index_inputs": 2},
            {"name": "prefill", "bytes": 5_500_000, "layers": None, "plugins": {}, "index_inputs": 0},
        ],
    },
    "gates": [{"name": "prefill equals PyTorch", "value": 1.2e-6, "limit": 1e-4, "passed": True, "detail": "[logits]"}],
    "passes": [{"graph": "decode", "name": "replace_ffn", "count": 8}],
    "pruned": {"tokens": "after layer 2", "neurons": "60 %"},
    "versions": {"onnx": "1.23"},
}


def test_inspect_renders_everything_that_describe_returns(stub, bundle, capsys):
    stub("bundle.inspect", describe=lambda path: DESCRIBED)
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    for word in (
        "griffin",
        "text and pictures, no clips",
        "past.*.key x8",
        "8 local::CoreFFN, 50 Add",
        "1.2 MB",
        "36.0 MB",
        "passed",
        "1.2e-06",
    ):
        assert word in out, word
    assert "41 matrices in few bits, 9.1 MB, without their float32 numbers" in out
    for word in ("[logits]", "replace_ffn", "after layer 2", "1.23"):
        assert word in out, word
    for word in ("tensorrt 10.13.3 for sm_87, int4, 4096 rows", "28 CoreFFN", "321", "not opened here", "7.7 MB"):
        assert word in out, word


def test_inspect_shows_a_bundle_without_engines(stub, bundle, capsys):
    stub("bundle.inspect", describe=lambda path: DESCRIBED | {"engines": None})
    assert main(["inspect", str(bundle)]) == 0
    assert "engine" not in capsys.readouterr().out


def test_inspect_shows_one_graph_or_names_the_nearest(stub, bundle, capsys):
    stub("bundle.inspect", describe=lambda path: DESCRIBED)
    assert main(["inspect", str(bundle), "--graph", "decode"]) == 0
    assert "past.7.key" in capsys.readouterr().out
    assert main(["inspect", str(bundle), "--graph", "decod", "--json"]) == 2
    assert "did you mean 'decode'?" in capsys.readouterr().err


def test_doctor_finds_this_machine_ready(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["demo_model"] and found["cores"] >= 1
    assert {"numpy", "onnx", "click"} <= {library["name"] for library in found["required"]}
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]
    assert main(["doctor"]) == 0
    assert "everything required is here" in capsys.readouterr().out


@pytest.mark.parametrize("needs", ["no-such-library>=1", "click>=99", "click<1"])
def test_doctor_fails_when_a_required_library_is_missing_or_does_not_fit(needs, monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: [needs])
    assert main(["doctor"]) == 1
    assert "NOT READY" in capsys.readouterr().out


def test_onnxruntime_gpu_stands_in_for_onnxruntime(monkeypatch):
    from importlib import metadata

    def version(name: str) -> str:
        if name != "onnxruntime-gpu":
            raise metadata.PackageNotFoundError(name)
        return "1.30"

    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["onnxruntime>=1.23"])
    monkeypatch.setattr("importlib.metadata.version", version)
    assert requirements("cm-export", {})[0][0]["ok"]


def test_a_requirement_of_another_python_is_left_out(monkeypatch):
    lines = [f"click>=9{n}; python_version {limit}" for n, limit in enumerate(("< '3.0'", ">= '99.0'", '>= "3.0"'))]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert [library["needs"] for library in requirements("cm-export", {})[0]] == [">=92"]


PAIRED = {
    "transformers": ("5.20.0", ["tokenizers<0.24,>=0.23.1", "torch>=2; extra == 'torch'", "absent; os_name == 'none'"]),
    "tokenizers": ("0.22.0", []),
    "onnxruntime": ("1.30", ["flatbuffers"]),
    "onnxruntime-gpu": ("1.30", []),
}


def test_doctor_names_pairs_that_do_not_go_together(monkeypatch, capsys):
    from importlib import metadata

    def version(name: str) -> str:
        if name not in PAIRED:
            raise metadata.PackageNotFoundError(name)
        return PAIRED[name][0]

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: PAIRED[name][1])
    found = misfits(["transformers", "onnxruntime", "numpy"])
    assert [(pair["library"], pair["found"]) for pair in found] == [
        ("onnxruntime", None),  # flatbuffers
        ("transformers", "0.22.0"),
        ("onnxruntime", "1.30"),  # beside onnxruntime-gpu
    ]
    assert "tokenizers" in found[1]["needs"] and "onnxruntime-gpu" in found[2]["needs"]
    monkeypatch.undo()
    monkeypatch.setattr("cm_export.cli.requirements.misfits", lambda names: [{**found[0], "library": "click"}])
    assert main(["doctor"]) == 1
    assert "DO NOT FIT: click 1.30 needs flatbuffers; none is installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "limits", "expected"),
    [("2.13.0+cpu", ">=2.11", True), ("2.9", ">=2.11", False), ("6.0", "<6,>=5.20", False), ("10", ">=10.0.0", True)],
)
def test_versions_are_compared_as_numbers(version, limits, expected):
    assert fits(version, limits) is expected


# ---------------------------------------------------------------- console


def test_json_holds_only_what_json_has_words_for(tmp_path, capsys):
    value = {"a": np.float32(0.5), "b": np.array([1, 2]), "c": Path("x"), "d": float("inf"), 3: (True, None)}
    emit_json(value)
    expected = {"a": 0.5, "b": [1, 2], "c": "x", "d": None, "3": [True, None]}
    assert json.loads(capsys.readouterr().out) == expected
    write_json(value, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == expected
    assert os.listdir(tmp_path) == ["x.json"]


def test_progress_is_plain_lines_when_stderr_is_no_terminal(capsys):
    with progress(silent=False) as step:
        step("load")
        step("trace", 1, 3)
        step("trace", 2, 3)
    out, err = capsys.readouterr()
    assert out == "" and [line.split("] ")[1] for line in err.splitlines()] == ["load", "trace"]


def test_progress_on_a_terminal_shows_each_step_once(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(silent=False) as step:
        step("load [weights]")
        step("trace", 1, 3)
    shown = terminal.getvalue()
    assert "load [weights]" in shown and "trace" in shown


def test_sizes_are_for_people():
    assert [_tables.size(n) for n in (12, 18_209_728, 4_400_000_000)] == ["12 B", "18.2 MB", "4.4 GB"]
