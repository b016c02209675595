"""The installed command on the demo bundle, and on a checkpoint without a tokenizer, as a user would run it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from conftest import cm_export, here, wide
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from cm_export.cli import group, verb_names
from cm_export.recipe import aliases

ROOT = Path(__file__).parent.parent
IMAGES = aliases.DEMO.parent / "images"
QUESTIONS = json.loads((IMAGES / "questions.json").read_text())
SENTENCES = [q for q in QUESTIONS if q["question"].startswith("describe")]
DESCRIBED = ["--image", str(IMAGES / "teal-circle.png"), "--prompt", "describe : what color is the shape?"]


def succeed(*args: object) -> str:
    done = cm_export(*args, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(bundle: Path, *args: object) -> dict:
    """In this process: that the command starts and prints one object is tested once."""
    done = here("run", bundle, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------- run


@pytest.mark.parametrize("dense", [(), ("--dense",)], ids=["sparse", "dense"])
@pytest.mark.parametrize("question", [QUESTIONS[2], *map(wide, SENTENCES[::3])], ids=lambda q: q["question"])
def test_the_demo_answers_rightly_and_only_the_answer_is_on_stdout(demo_bundle, question, dense):
    image = IMAGES / question["image"]
    done = cm_export("run", demo_bundle, "--image", image, "--prompt", question["question"], *dense)
    assert (done.returncode, done.stdout) == (0, question["answer"] + "\n"), done.stderr
    summary = r"^cm-export: \d+ of 64 image tokens, \d+ of 1024 neurons per layer, \d+ tokens, first token after"
    assert re.search(summary, done.stderr, re.M)


def test_the_shipped_questions_are_all_answered_rightly_dense_and_all_but_one_at_the_recipes_budget(demo_bundle):
    """In one process, since starting one takes longer than answering."""
    from cm_export.host.images import open_image
    from cm_export.host.loaded import load

    engine, wrong = load(demo_bundle), {True: [], False: []}
    for q in QUESTIONS:
        for dense in wrong:
            answer = engine.generate(q["question"], [open_image(IMAGES / q["image"])], max_new_tokens=24, dense=dense)
            wrong[dense] += [] if answer.text == q["answer"] else [(q["question"], answer.text)]
            for what in ("neurons", "image_tokens"):
                kept, everything = answer.stats[f"{what}_kept"], answer.stats[what]
                assert kept == everything if dense else 0 < kept < everything
    assert wrong[True] == [] and len(wrong[False]) <= 1, wrong


def test_json_is_one_object_with_text_ids_counts_times_and_memory(demo_bundle):
    answer = json.loads(succeed("run", demo_bundle, *DESCRIBED, "--json"))
    assert answer["text"] == "the color of the circle is teal ."
    tokenizer = AutoTokenizer.from_pretrained(aliases.DEMO)
    assert tokenizer.decode(answer["token_ids"], skip_special_tokens=True) == answer["text"]
    assert answer["new_tokens"] == len(answer["token_ids"]) and answer["stopped"] == "stop token"
    assert answer["image_tokens"] == 64 and answer["image_tokens_kept"] == 32
    assert answer["kept_tokens"] == answer["prompt_tokens"] - 32
    assert answer["neurons"] == 1024 and answer["neurons_kept"] < 1024
    assert 0 < answer["ttft_s"] < 60 and answer["tokens_per_s"] > 0
    assert 50e6 < answer["peak_memory_bytes"] < 4e9
    assert answer["notes"] == [] and answer["overlays"] == []


def test_dense_token_ids_equal_those_of_stock_transformers(demo_bundle):
    questions = [("yellow-rectangle.png", "describe : is a yellow shape present?"), ("red-triangle.png", "nonsense ?")]
    model = Qwen2VLForConditionalGeneration.from_pretrained(aliases.DEMO, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(aliases.DEMO)
    processor = Qwen2VLImageProcessorPil.from_pretrained(aliases.DEMO)
    for name, question in questions:
        answer = asked(demo_bundle, "--image", IMAGES / name, "--prompt", question, "--dense", "--max-new-tokens", "24")
        pixels = processor(images=[Image.open(IMAGES / name)], return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad, count = "<|image_pad|>", int(pixels["image_grid_thw"].prod()) // 4
        ids = tokenizer(text.replace(pad, pad * count), return_tensors="pt").input_ids
        kinds = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            out = model.generate(ids, **pixels, mm_token_type_ids=kinds, max_new_tokens=24, do_sample=False)
        expected = [i for i in out[0, ids.shape[1] :].tolist() if i != model.generation_config.eos_token_id]
        assert answer["prompt_tokens"] == ids.shape[1]
        assert answer["token_ids"] == expected
        assert answer["kept_tokens"] == answer["prompt_tokens"] and answer["neurons_kept"] == answer["neurons"]


def test_the_budget_of_an_answer_is_chosen_when_asking_without_rebuilding(demo_bundle):
    before = (demo_bundle / "manifest.json").read_bytes()
    for share in ("0.25", "1"):
        answer = asked(demo_bundle, *DESCRIBED, "--neuron-share", share, "--token-share", share)
        assert answer["neurons_kept"] == 1024 * float(share)
        assert answer["image_tokens_kept"] == 64 * float(share)
    assert (demo_bundle / "manifest.json").read_bytes() == before


def test_two_pictures_are_both_seen_and_drawn(demo_bundle, tmp_path):
    images = ["--image", IMAGES / "teal-circle.png", "--image", IMAGES / "red-triangle.png"]
    options = ["--prompt", "what color is the shape?", "--overlay", tmp_path / "kept.png"]
    answer = asked(demo_bundle, *images, *options)
    assert answer["image_tokens"] == 128 and answer["image_tokens_kept"] == 64 and answer["text"]
    assert answer["overlays"] == [str(tmp_path / f"kept-{n}.png") for n in (1, 2)]
    for path in answer["overlays"]:
        with Image.open(path) as drawn:
            assert drawn.width >= 512 and len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 10


def test_a_picture_is_piped_in_and_a_remark_on_it_is_made_once(demo_bundle, tmp_path):
    Image.fromarray(np.full((64, 64), 2048, np.uint16)).save(tmp_path / "x.png")  # 12 bits
    two = ["--image", "-", "--prompt", "what color is the shape?", "--prompt", "is it red?", "--dense", "--json"]
    with open(tmp_path / "x.png", "rb") as picture:
        done = cm_export("run", demo_bundle, *two, stdin=picture)
    first, second = json.loads(done.stdout)["turns"]
    assert first["notes"] == [
        "standard input: its 16-bit values end at 2048 of 65535, so they are read as 12 bits",
        "standard input: shows one colour only, #808080",
    ]
    assert not any("standard input" in note for note in second["notes"])
    done = cm_export("run", demo_bundle, "--image", tmp_path / "x.png", *two[2:4])
    assert done.stderr.count("16-bit values") == 1 and done.stderr.count("one colour") == 1


def test_remarks_on_pictures_are_counted_in_an_evaluation(demo_bundle, tmp_path):
    lines = []
    for number in range(6):
        size = 64 if number else 8
        Image.new("RGB", (size, size), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "what ?", "answer": "red"}))
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    budget = ["--neuron-share", "0.5", "--token-share", "0.5", "--max-new-tokens", "1"]
    report = json.loads(here("eval", demo_bundle, "--data", tmp_path / "my.jsonl", *budget, "--json").stdout)
    one = f"pictures of one colour: 6 of 6, such as {tmp_path / '0.png'}: shows one colour only, #000000"
    small = f"{tmp_path / '0.png'}: 8x8 pixels are enlarged 8 times, to 64x64"
    assert report["picture_notes"] == [one, f"pictures enlarged 4 times or more: 1 of 6, such as {small}"]
    assert report["notes"][-2:] == report["picture_notes"]


def test_a_prompt_without_a_picture_is_answered(demo_bundle):
    answer = asked(demo_bundle, "--prompt", "what color is the shape?")
    assert answer["image_tokens"] == answer["image_tokens_kept"] == 0 and answer["new_tokens"] >= 1
    assert answer["kept_tokens"] == answer["prompt_tokens"]


def test_a_system_message_and_unknown_words_are_taken(demo_bundle):
    plain, longer = (asked(demo_bundle, *DESCRIBED, *more) for more in ((), ("--system", "describe the image")))
    assert longer["prompt_tokens"] > plain["prompt_tokens"]
    answer = asked(demo_bundle, "--prompt", "what zeppelin is there ?")
    assert "zeppelin" in answer["notes"][0]


# ---------------------------------------------------------------- the other verbs


def test_inspect_reports_graphs_gates_and_what_is_pruned(demo_bundle):
    found = json.loads(here("inspect", demo_bundle, "--json").stdout)
    assert {g["name"] for g in found["graphs"]} == {"vision", "prefill", "decode", "prefill_dense", "decode_dense"}
    assert found["gates"] and all(g["passed"] for g in found["gates"])
    assert "neurons per layer" in found["pruned"]["neurons"] and "image tokens stay" in found["pruned"]["tokens"]
    assert {"from": "prefill.core_scores", "to": "decode.core_neurons"} in found["links"]
    for g in found["graphs"]:
        assert g["inputs"] and g["outputs"] and g["nodes"] > 10 and g["bytes"] > 1000
    shown = succeed("inspect", demo_bundle)
    assert "griffin" in shown and "prefill_dense" in shown


def test_doctor_reports_this_machine():
    found = json.loads(succeed("doctor", "--json"))
    assert found["ok"] and found["demo_model"] and "CPUExecutionProvider" in found["onnxruntime_providers"]


def test_bench_reports_sparse_beside_dense(demo_bundle):
    sizes = ["--prompt-tokens", "8", "--image-tokens", "16", "--new-tokens", "3", "--repeats", "2"]
    report = json.loads(succeed("bench", demo_bundle, *sizes, "--threads", "1", "--json"))
    assert (report["prompt_tokens"], report["image_tokens"], report["repeats"]) == (24, 16, 2)
    modes = {(row["phase"], row["mode"]) for row in report["rows"]}
    assert {("prefill", "dense"), ("prefill", "sparse"), ("decode", "dense"), ("decode", "sparse")} <= modes
    assert all(row["median_ms"] > 0 and row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in report["rows"])
    assert report["kept"]["sparse"]["tokens"] < report["kept"]["dense"]["tokens"] == 24


def test_a_checkpoint_without_tokenizer_builds_and_benches_and_run_says_why_not(bare_bundle):
    sizes = ["--prompt-tokens", "8", "--image-tokens", "4", "--new-tokens", "2", "--repeats", "1"]
    assert json.loads(here("bench", bare_bundle, *sizes, "--json").stdout)["rows"]
    assert json.loads(here("inspect", bare_bundle, "--json").stdout)["gates"]
    done = here("run", bare_bundle, "--prompt", "what ?", "-q")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "has no tokenizer" in done.stderr and "tokenizer.json" in done.stderr


# ---------------------------------------------------------------- README


def commands(text: str) -> list[str]:
    """Every `cm-export ...` line of the console and bash blocks of a Markdown text, continued lines joined."""
    found = []
    for block in re.findall(r"^```(?:console|bash|sh|shell)[^\n]*\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("cm-export "):
                found.append(line)
    return found


def parse(line: str) -> None:
    """Through click's own parser, without starting the work. Raises click.ClickException for what does not exist."""
    words = shlex.split(line, comments=True)[1:]
    for end in ("|", ">", ">>", "2>", "&&", "&", ";"):
        words = words[: words.index(end)] if end in words else words
    asks_for_help = words[-1:] == ["--help"]
    if words == ["--version"] or asks_for_help:
        words = [w for w in words if w not in ("--version", "--help")]
    if not words:
        return
    context = group.make_context("cm-export", list(words), obj={})
    name, verb, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    inner = click.Context(verb, info_name=name, parent=context)
    values, left, _ = verb.make_parser(inner).parse_args(list(rest))
    assert not left, f"{line}: {left} is not taken"
    for param in verb.params:
        if (value := values.get(param.name)) is not None and param.name != "bundle" and not asks_for_help:
            param.type_cast_value(inner, value)


def test_every_command_of_the_readme_exists_with_its_options():
    for file in [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *ROOT.glob("docs/**/*.md")]:
        for line in commands(file.read_text(encoding="utf-8")):
            try:
                parse(line)
            except click.ClickException as wrong:
                raise AssertionError(f"{file.name}: {line}: {wrong.format_message()}") from wrong


def test_a_readme_command_that_does_not_exist_is_found():
    good = (
        "```console\n$ cm-export run x.plan --image a.png \\\n  --prompt 'what ?' --token-share 0.3 > out\ntext\n```\n"
    )
    assert commands(good) == ["cm-export run x.plan --image a.png    --prompt 'what ?' --token-share 0.3 > out"]
    parse(commands(good)[0])
    for verb in verb_names():
        parse(f"cm-export {verb} --help")
    for wrong in ("cm-export rnu x.plan", "cm-export run x.plan --promt x", "cm-export build --neurons grifin --out x"):
        with pytest.raises(click.ClickException):
            parse(wrong)
    for wrong in ("cm-export run x.plan --prompt x --token-share 30", "cm-export eval x.plan --task easy-vqb"):
        with pytest.raises(click.ClickException):
            parse(wrong)


@pytest.fixture
def background():
    """Starts a server with these words and says its URL; ends it afterwards."""
    started = []

    def start(words: list[str]) -> str:
        command = [sys.executable, "-m", "cm_export", *words, "--port", "0"]
        started.append(
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
        return started[-1].stdout.readline().strip()

    yield start
    for process in started:
        process.terminate()
        assert process.wait(30) == 0


def test_the_commands_of_the_readme_work_as_written(first_look, tmp_path, request, monkeypatch):
    """Those on the bundle of `make demo`, and doctor. The others need a hub, or minutes; `first_look` did the build.

    Those that ask many questions, try recipes or measure do less here: one question of a kind to four, two recipes, 64 tokens.
    The first of them starts a process, as do the server and its client; that the program starts is the same for every verb.
    """
    fewer = {("--limit", "21"): "1", ("--limit", "12"): "4", ("--limit", "6"): "1"}
    fewer |= {("--trials", "4"): "2", ("--image-tokens", "256"): "64"}
    made = "artifacts/"
    lines = [*commands((ROOT / "README.md").read_text(encoding="utf-8")), *commands((ROOT / "docs/use.md").read_text())]
    runs = [line for line in lines if " build " not in line and (f"{made}demo.plan" in line or "doctor" in line)]
    assert len(runs) >= 5 and any("--recipe demo" in line for line in lines)
    (asks,) = {line for line in lines if line.startswith("cm-export client --image")}
    runs.append(asks)
    url = []
    monkeypatch.chdir(ROOT)
    for line in runs:
        words = shlex.split(line, comments=True)[1:]
        words = [str(first_look) if w == f"{made}demo.plan" else w for w in words]
        words = [str(tmp_path / w.removeprefix(made)) if w.startswith(made) else w for w in words]
        words = [fewer.get((words[i - 1], w), w) for i, w in enumerate(words)]
        if words[0] == "serve":
            url.append(request.getfixturevalue("background")(words[: words.index("&")]))
            continue
        own = line == runs[0] or words[0] == "client"
        done = (cm_export if own else here)(*words, *(["--url", url[0]] if words[0] == "client" else []))
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert words[0] != "client" or done.stdout.strip().endswith("."), line
    assert (tmp_path / "kept.png").stat().st_size > 0
    verbs = {line.split()[1] for line in runs}
    assert verbs == set(verb_names()) - {"build", "calibrate", "check-family"}
