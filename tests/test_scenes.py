"""The generated task `scenes` and the models that are shipped for it: what is asked is true, and they see it."""

import json
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest

from cm_export.bundle.bundle import Bundle
from cm_export.evals import scene as _scene
from cm_export.evals.tasks import scenes
from cm_export.recipe import aliases

RIGHT_OF_40 = 37  # of 40 questions of the test split that follow one after the other


def _measured(picture: np.ndarray) -> dict[tuple[int, int], tuple[str, str]]:
    """cell -> (color, shape), from pixels alone: a shape fills 1, .79 or .5 of its box."""
    found, ground = {}, picture[0, 0].astype(float)
    for row in range(3):
        for column in range(3):
            patch = picture[32 * row : 32 * row + 32, 32 * column : 32 * column + 32].astype(float)
            pixels = patch.reshape(-1, 3)
            counts = {name: (pixels == rgb).all(1).sum() for name, rgb in _scene.COLORS.items()}
            color = max(counts, key=counts.get)
            if counts[color] == 0:
                continue
            fill = np.array(_scene.COLORS[color], float)
            cover = np.clip((patch - ground) @ (fill - ground) / ((fill - ground) ** 2).sum(), 0, 1)
            filled = cover.sum() / (cover.max(0).sum() * cover.max(1).sum())
            shape = "rectangle" if filled > 0.9 else "circle" if filled > 0.66 else "triangle"
            found[row, column] = (color, shape)
    return found


def _answer(seen: dict, kind: str, question: str) -> str:
    """What must be said about a measured picture: a second writing of the task, from its description."""
    words, number = question.split(), ["zero", "one", "two", "three", "four"]
    where = {cell: _scene.place(cell) for cell in seen}

    def counted(n: int, what: str) -> str:
        return f"there is {number[n]} {what}" if n == 1 else f"there are {number[n]} {what}s"

    def listed(parts: list[str]) -> str:
        return f" {' , '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else f" {parts[0]}"

    if kind == "describe":
        things = [f"a {c} {s} at the {where[cell]}" for cell, (c, s) in sorted(seen.items())]
        return counted(len(seen), "shape") + " :" + listed(things) + " ."
    if kind == "count_all":
        return counted(len(seen), "shape") + " ."
    if kind == "count_some":
        named = words[2].removesuffix("s")
        what = f"{named} shape" if named in _scene.COLORS else named
        return counted(sum(named in thing for thing in seen.values()), what) + " ."
    if kind == "where":
        (cell,) = [cell for cell, thing in seen.items() if " ".join(thing) in question]
        return f"the {' '.join(seen[cell])} is at the {where[cell]} ."
    if kind == "what_at":
        asked = question.removeprefix("what is at the ").removesuffix(" ?")
        thing = [" ".join(seen[cell]) for cell in seen if where[cell] == asked]
        return f"there is {'a ' + thing[0] if thing else 'nothing'} at the {asked} ."
    if kind == "relation":
        one, other = " ".join(words[2:4]), " ".join(words[-3:-1])
        (y, x), (v, u) = (next(cell for cell, t in seen.items() if " ".join(t) == name) for name in (one, other))
        asked = " ".join(words[4:-4])
        true = ("above" if y < v else "below") if asked in ("above", "below") else "left of" if x < u else "right of"
        return f"{'yes' if true == asked else 'no'} , the {one} is {true} the {other} ."
    colors = sorted({color for color, _ in seen.values()})
    return f"the color{' is' if len(colors) == 1 else 's are'}{listed(colors)} ."


@pytest.mark.parametrize("kind", _scene.KINDS)
def test_every_answer_is_what_the_pixels_say(kind):
    asked = [(n, pair) for n in range(150) if (pair := _scene.ask(_scene.scene("test", n), kind))]
    assert len(asked) > 100
    for number, (question, answer) in asked:
        assert answer == _answer(_measured(np.asarray(scenes.open_picture(f"test-{number}"))), kind, question)


def test_no_test_or_validation_picture_is_a_training_picture():
    """Of the first 30000 training pictures, more than the shipped model saw; equal shapes must differ in the ground."""
    trained = defaultdict(list)
    for number in range(30_000):
        trained[_scene.scene("train", number).things].append(number)
    for split, count in (("validation", 200), ("test", scenes.PICTURES)):
        for number in range(count):
            scene = _scene.scene(split, number)
            for other in trained.get(scene.things, ()):
                assert _scene.draw(scene).tobytes() != _scene.draw(_scene.scene("train", other)).tobytes(), number


def test_pictures_and_questions_are_the_same_in_every_process():
    code = (
        "from cm_export.evals import scene as s; from cm_export.evals.tasks import scenes; import hashlib; h = hashlib.sha256()\n"
        "for n in range(20): h.update(s.draw(s.scene('test', n)).tobytes())\n"
        "for k in s.KINDS: h.update(repr(scenes.questions(k)[:20]).encode())\n"
        "print(h.hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


def qwen2_vl(folder, tokenizer):
    """A model in transformers, and (picture, prompt) -> what it is given."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def given(picture, text):
        image = processor([picture], return_tensors="pt")
        assert image["image_grid_thw"].tolist() == [[1, 24, 24]]  # 96x96 pixels as they are
        ids = torch.tensor([tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 144)).input_ids])
        return dict(image) | dict(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int())

    return model, given


def llava(folder, tokenizer):
    """The same of the second architecture; the prompt becomes tokens by transformers' own processor."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    del settings["processor_class"]
    processor = LlavaProcessor(CLIPImageProcessorPil.from_pretrained(folder), tokenizer, **settings)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def given(picture, text):
        found = processor(images=[picture], text=text, return_tensors="pt")
        assert (found["input_ids"] == model.config.image_token_id).sum() == 144
        assert found["pixel_values"].shape == (1, 3, 96, 96)
        return {name: found[name] for name in ("input_ids", "pixel_values")}

    return model, given


@pytest.mark.parametrize(("folder", "opened"), [(aliases.SCENES, qwen2_vl), (aliases.SCENES_LLAVA, llava)])
def test_a_shipped_model_answers_from_the_picture(folder, opened):
    """Greedy answers of the checkpoint in transformers to the first test pictures; the same with the picture blanked."""
    import torch
    from transformers import AutoTokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a model two are no faster, and on a busy machine far slower
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, given = opened(folder, tokenizer)
    asked = [q for kind in _scene.KINDS for q in scenes.questions(kind)[:6]][:40]

    def answer(question, blank: bool) -> str:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = given(scenes.open_picture(question.pictures[0]), text)
        prompt["pixel_values"] *= not blank
        out = model.generate(**prompt, max_new_tokens=scenes.KINDS[question.kind])
        return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    right = sum(answer(q, blank=False) in q.answers for q in asked)
    blind = sum(answer(q, blank=True) in q.answers for q in asked[::4])
    torch.set_num_threads(threads)
    assert right >= RIGHT_OF_40 and blind <= 3


@pytest.mark.wide
@pytest.mark.parametrize("model", ["scenes", "scenes-llava"])
def test_a_build_by_default_keeps_what_the_shipped_model_says(model, tmp_path):
    """docs/policies.md on a small sample: right where dense is; the guard, which needs a whole cache, says what dense says."""
    from conftest import built

    from cm_export.host.guard import Report, guarded
    from cm_export.host.runner import Budget, Runner
    from cm_export.host.sampling import PLAIN, Chooser

    bundle = built(tmp_path / "x.plan", "--model", model, "--token-cache", "index")
    runner = Runner(Bundle(bundle), 1)
    dense, default = [], []
    for question in [q for kind in _scene.KINDS for q in scenes.questions(kind)[:8]]:
        request = runner.ask(question.text, runner.see([scenes.open_picture(question.pictures[0])]))
        limit = scenes.KINDS[question.kind]

        def said(budget, request=request, limit=limit):
            return list(runner.tokens(runner.prefill(request, budget), limit, runner.chat.stop_ids))

        answers = {name: said(b) for name, b in (("dense", Budget(dense=True)), ("default", Budget()))}
        choose = Chooser(PLAIN, request.ids, runner.chat.stop_ids)
        assert answers["dense"] == list(guarded(runner, runner.prefill(request, Budget()), limit, choose, Report(16)))
        for name, right in (("dense", dense), ("default", default)):
            right.append(runner.chat.decode(answers[name]).strip() in question.answers)
    assert sum(dense) >= 54, "of 56"
    assert sum(default) >= sum(dense) - 1
