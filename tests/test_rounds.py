"""One bundle of every family through every verb that takes one, in this process: what a user does after `build`."""

import json
import shutil

import numpy as np
import pytest
import qwen_models
import test_llava_families
import test_qwen_families
import test_tile_families
from conftest import bundles_of
from PIL import Image
from test_serve import sent, serving
from test_serving_wire import uri

from cm_export.cli import main
from cm_export.host.loaded import load

QUESTION = "what shape is red ?"
OF = {
    "llava": test_llava_families.bundle_of,
    "llava_onevision": test_llava_families.bundle_of,
    "qwen2_5_vl": test_qwen_families.bundle_of,
    "qwen3_vl": test_qwen_families.bundle_of,
    "smolvlm": test_tile_families.bundle_of,
    "idefics3": test_tile_families.bundle_of,
    "internvl": test_tile_families.bundle_of,
    "qwen3": bundles_of(qwen_models.answering),
}
ASKED = 12


def questions(folder, model):
    """A file of questions whose right answers are the dense model's own, so that there is something to keep."""
    rng, lines = np.random.default_rng(3), []
    for i in range(ASKED):
        line = {"question": f"{QUESTION} {'a ' * i}"}
        if model.bundle.tower:
            Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), np.uint8)).save(folder / f"{i}.png")
            line["image"] = f"{i}.png"
        shown = [folder / line["image"]] if "image" in line else []
        said = model.generate(line["question"], shown, max_new_tokens=3, dense=True).text.strip()
        lines.append(line | {"answer": said or "nothing"})
    (folder / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "my.jsonl"


def done(capsys, *words, fine=(0,)):
    """What a verb prints on stdout; nothing but what was asked for on stderr."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    assert code in fine, f"{words}: {said.err}"
    assert "Traceback" not in said.err
    return said.out


@pytest.mark.wide
@pytest.mark.parametrize("name", OF)
def test_a_bundle_goes_through_every_verb(name, tmp_path, capsys):
    _, plan = OF[name](name)
    with load(plan, threads=1) as model:
        data, sees = questions(tmp_path, model), model.bundle.tower is not None
        answer = served(model, tmp_path, sees)
        shown = [tmp_path / "0.png"] if sees else []
        assert answer["choices"][0]["message"]["content"] == model.generate(QUESTION, shown, max_new_tokens=3).text
    reads = json.loads(done(capsys, "inspect", plan, "--json"))["reads"]
    films = name in ("qwen2_5_vl", "qwen3_vl")
    assert reads == ("text, pictures and clips" if films else "text and pictures, no clips" if sees else "text only")
    done(capsys, "pack", plan, "--target", "jetson-orin-nano", "--out", tmp_path / "x.tar.gz", "--quiet")
    done(capsys, "deploy", "triton", plan, "--out", tmp_path / "models", "--no-warm-up", "--quiet")
    assert (tmp_path / "models" / "vlm" / "config.pbtxt").is_file() and (tmp_path / "x.tar.gz").is_file()
    shutil.rmtree(tmp_path / "models")
    report = json.loads(done(capsys, "bench", plan, "--new-tokens", "2", "--repeats", "1", "--threads", "1", "--json"))
    assert {row["phase"] for row in report["rows"]} >= {"prefill", "decode"}
    asked = ["--data", data, "--max-new-tokens", "3", "--threads", "1"]
    found = json.loads(done(capsys, "eval", plan, *asked, "--out", tmp_path / "r.json", "--json"))
    assert found["n"] == ASKED and found["dense"]["accuracy"] > 0
    words = ["--floor", "0.2", "--trials", "2", "--out", tmp_path / "t.toml", "--json"]
    trials = json.loads(done(capsys, "tune", plan, *asked, *words, fine=(0, 1)))["trials"]
    assert len(trials) == 2
    words = ["--eval", tmp_path / "r.json", "--out", tmp_path / "page.html", "--examples", "2", "--quiet"]
    done(capsys, "report", plan, "--data", data, "--max-new-tokens", "3", *words)
    assert "<html" in (tmp_path / "page.html").read_text()


def served(model, folder, sees):
    """The answer of a server of the bundle."""
    parts = [{"type": "text", "text": QUESTION}]
    parts += [uri((folder / "0.png").read_bytes())] if sees else []
    with serving(model, warm_up=False) as (url, _):
        status, answer = sent(url, {"messages": [{"role": "user", "content": parts}], "max_tokens": 3})
    assert status == 200, answer
    return answer
