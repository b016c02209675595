"""A later question is answered as if the whole conversation were asked at once, without vision and without a prefill."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import cm_export, here
from random_models import SEEDS, copy, patch_grids, prompt, request_of
from tolerances import agrees

from cm_export.backends.onnxruntime.backend import WHOLE as ONE_PICTURE
from cm_export.base.errors import BundleError, InputError
from cm_export.base.onnx_text import function
from cm_export.bundle.bundle import Bundle
from cm_export.evals.other_policies import with_policies
from cm_export.families import Layout
from cm_export.host import conversation
from cm_export.host.images import open_image
from cm_export.host.runner import Budget, Runner, check_converses
from cm_export.policies import vote as voting
from cm_export.recipe.recipe import Recipe
from cm_export.source import checkpoint

IMAGES = Path(checkpoint.__file__).parent.parent / "demo" / "images"
PICTURE = IMAGES / "teal-circle.png"
FULL = Budget(neuron_share=1.0, token_share=1.0)
DENSE = Budget(dense=True)
WHOLE = Recipe().replace(tokens__cache="index", tokens__prune_layer=1)
LAYOUT = ((3, 4), (2, 5))
seeds = pytest.mark.parametrize("seed", SEEDS)


def runner_of(x, recipe):
    """The real runner over a random checkpoint's graphs."""
    graphs = x.graphs(recipe)
    parts = {n: getattr(x, n) for n in ("weights", "family", "shape", "config")}
    parts["embedding"] = x.weights[x.family.embedding]
    bundle = SimpleNamespace(**parts, calibration=None, packed=None)
    return Runner(bundle, 1, recipe, lambda name: copy(graphs[name]))


def whole(x, ids, embeds):
    return request_of(x, ids, patch_grids(x, LAYOUT), embeds)


def talk(x, runner, seed, budget, questions=1):
    """A first question about two pictures, answers of its own, later questions; and all of it as one request."""
    rng = np.random.default_rng(seed)
    ids = prompt(x.shape, list(LAYOUT), rng)
    tokens = int((ids == x.shape.image_token).sum())
    embeds = {p.name: rng.standard_normal((tokens, *p.row)).astype(np.float32) for p in x.tower.outputs}
    context = runner.prefill(whole(x, ids, embeds), budget)
    for number in range(questions):
        answer = list(runner.tokens(context, 4 + number, frozenset()))
        answer = [7 if i == x.shape.image_token else i for i in answer]  # a template would refuse it
        asked = rng.integers(7, x.shape.vocab, 3 + number).tolist()
        context = context.then(answer + asked, len(asked))
        ids = np.concatenate([ids, answer, asked])
    return context, whole(x, ids, embeds)


# ---------------------------------------------------------------- laws on random models


@seeds
@pytest.mark.parametrize("questions", [1, 2])
@pytest.mark.parametrize("budget", [FULL, DENSE], ids=["full budget", "dense"])
def test_at_full_budget_a_later_turn_is_the_dense_model_on_the_whole_conversation(exported, seed, questions, budget):
    x = exported(seed)
    runner = runner_of(x, WHOLE)
    context, request = talk(x, runner, seed, budget, questions)
    scratch = runner.prefill(request, DENSE)
    agrees("export", context.logits, scratch.logits)
    assert np.array_equal(context.request.position_ids, request.position_ids)
    assert context.request.next_position == request.next_position
    agrees("export", context.request.inputs_embeds, request.inputs_embeds)
    ids = [list(runner.tokens(c, 6, frozenset())) for c in (context, scratch)]
    assert ids[0] == ids[1]


@seeds
@pytest.mark.parametrize("share", [0.2, 0.6])
@pytest.mark.parametrize("voters", ["last", "text"])
def test_kept_tokens_are_those_of_a_prefill_of_the_whole_conversation(exported, seed, share, voters, monkeypatch):
    """Also after sparse answers: they are read again densely. "text" is the text of the new question."""
    x = exported(seed)
    for layer in range(1, x.shape.layers):
        recipe = WHOLE.replace(tokens__voters=voters, tokens__prune_layer=layer)
        runner = runner_of(x, recipe)
        budget = Budget(neuron_share=0.3, token_share=share)
        context, request = talk(x, runner, seed, budget, 2)
        with monkeypatch.context() as patch:
            if voters == "text":  # another way to say it: the last four tokens, in the prefill graph
                patch.setitem(voting.FUNCTIONS, "text", _last_four())
            scratch = runner_of(x, recipe).prefill(request, budget)
        assert np.array_equal(context.kept_tokens, scratch.kept_tokens)
        text = np.flatnonzero(~request.is_image[0])
        assert np.isin(text, context.kept_tokens[0]).all() and context.kept_tokens.shape[1] < request.tokens
        agrees("export", context.logits, runner.prefill(request, DENSE).logits)


def _last_four():
    return function("""
        VoteText (image_mask, attention_mask) => (vote) {
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            four = Constant <value_int = 4> ()
            prompt = Shape <start = 1> (attention_mask)
            size = Squeeze (prompt)
            first = Sub (size, four)
            position = Range (zero, size, one)
            asks = GreaterOrEqual (position, first)
            row = Cast <to = 1> (asks)
            shape = Shape (attention_mask)
            vote = Expand (row, shape)
        }""")


@pytest.mark.parametrize("policy", ["random", "distinct", "spread_keys"])
def test_a_policy_that_no_question_matters_to_keeps_its_choice(exported, policy):
    x = exported(1)
    runner = runner_of(x, WHOLE.replace(tokens__policy=policy))
    context, request = talk(x, runner, 5, Budget(token_share=0.4, seed=3), 2)
    assert np.array_equal(context.kept_tokens, runner.prefill(request, Budget(token_share=0.4, seed=3)).kept_tokens)


@pytest.mark.parametrize(
    "neurons",
    [
        {"policy": "griffin", "fill": "prompt"},
        {"policy": "griffin", "row_norm": True, "image_weight": 0.25, "fill": "prompt"},
        {"policy": "griffin", "voters": "text", "fill": "prompt"},
        {"policy": "coreinfer", "voters": "text"},
        {"policy": "coreinfer"},
        {"policy": "griffin", "voters": "last", "fill": "prompt"},
        {"policy": "random"},
    ],
    ids=lambda n: "-".join(map(str, n.values())),
)
def test_neurons_are_judged_by_all_turns_as_if_they_were_one_prompt(exported, neurons):
    x = exported(5)
    runner = runner_of(x, WHOLE.replace(neurons__counted="all", **{f"neurons__{k}": v for k, v in neurons.items()}))
    context, request = talk(x, runner, 4, Budget(neuron_share=0.4), 2)
    scratch = runner.prefill(request, Budget(neuron_share=0.4))
    assert context.measured.keys() == scratch.measured.keys()
    for name, value in context.measured.items():
        agrees("export", value, scratch.measured[name])
    assert np.array_equal(context.core_neurons, scratch.core_neurons)


def test_without_pruned_tokens_every_row_is_read(exported):
    x = exported(1)
    runner = runner_of(x, Recipe().replace(tokens__policy="dense"))
    context, request = talk(x, runner, 2, Budget(neuron_share=1.0))
    assert context.kept_tokens.shape[1] == request.tokens
    scratch = runner.prefill(request, DENSE)
    assert list(runner.tokens(context, 6, frozenset())) == list(runner.tokens(scratch, 6, frozenset()))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"cache": "cut"}, "--token-cache index"),
        ({"cache": "index", "policy": "overlap"}, "--tokens attention"),
        ({"cache": "index", "first": "distinct"}, "no first cut"),
    ],
)
def test_a_bundle_without_what_a_second_question_reads_is_refused_in_one_line(tokens, words):
    recipe = Recipe().replace(**{f"tokens__{k}": v for k, v in tokens.items()})
    with pytest.raises(InputError) as caught:
        check_converses(recipe, dense=False)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    check_converses(recipe, dense=True)  # the dense graphs keep everything


# ---------------------------------------------------------------- conversations with the demo model


@pytest.fixture(scope="module")
def runner(demo_bundle):
    whole = Runner(Bundle(demo_bundle), 1)
    return with_policies(whole, whole.recipe.replace(tokens__cache="index"))


QUESTIONS = ("what color is the shape?", "describe : what shape is in the image?", "is there a red shape?")


def scratch_ids(runner, images, questions, answers, system=None):
    """Dense ids of the answer to the last question, the conversation being one prompt."""
    pictures = runner.see(images)
    ids = runner.chat.encode_turns(list(questions), answers, system, pictures.layouts)
    return list(runner.tokens(runner.prefill(runner.request(ids, pictures), DENSE), 20, runner.chat.stop_ids))


@pytest.mark.parametrize("how", ["full budget", "guard", "dense"])
@pytest.mark.parametrize("system", [None, "describe the image ."])
def test_a_conversation_gives_the_dense_answers(runner, how, system):
    images = [open_image(PICTURE), open_image(next(p for p in sorted(IMAGES.glob("*.png")) if p != PICTURE))]
    budget = {"dense": True} if how == "dense" else {"neuron_share": 0.1, "token_share": 0.11}
    if how == "full budget":
        budget = {"neuron_share": 1.0, "token_share": 1.0}
    talk, answers = runner.conversation(images, system=system, **budget), []
    for number, question in enumerate(QUESTIONS):
        answer = talk.ask(question, 20, guard=4 if how == "guard" else None)
        assert answer.token_ids == scratch_ids(runner, images, QUESTIONS[: number + 1], answers, system)
        answers.append(answer.text)


def test_the_second_turn_runs_neither_vision_nor_prefill(runner, monkeypatch):
    talk = runner.conversation([open_image(PICTURE)])
    used, session = [], runner.backend.session
    monkeypatch.setattr(runner.backend, "session", lambda name, *a, **k: used.append(name) or session(name, *a, **k))
    first = talk.ask(QUESTIONS[0])
    assert used == [ONE_PICTURE, "prefill", "decode"]
    used.clear()
    second = talk.ask(QUESTIONS[1])
    assert used == ["turn", "decode"]
    assert second.stats["read_tokens"] < 30 and second.stats["vision_s"] == 0
    assert second.stats["prompt_tokens"] == first.stats["prompt_tokens"] + second.stats["read_tokens"]
    assert second.stats["image_tokens_kept"] == first.stats["image_tokens_kept"] == 32
    dropped = first.stats["prompt_tokens"] - first.stats["kept_tokens"]
    assert second.stats["prompt_tokens"] - second.stats["kept_tokens"] == dropped, "only image tokens are dropped"


QWEN2_VL = """{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] \
!= 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' \
in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: \
{% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}\
{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
REWRITES = """{% for m in messages %}<|im_start|>{% if loop.last %}{{ m['role'] }}
{% endif %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image_pad|>{% else %}{{ c['text'] }}{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}"""


def with_template(runner, template, monkeypatch):
    monkeypatch.setattr(runner.chat, "_template", runner.chat._compile(template))
    return runner


def test_the_template_of_qwen2_vl_says_every_turn_as_before(runner, monkeypatch):
    chat = with_template(runner, QWEN2_VL, monkeypatch).chat
    before = chat.encode("what shape ?", None, [Layout((1, 2, 3)), Layout((1, 2, 2))])
    ids = chat.encode_turns(
        ["what shape ?", "is it red ?"], ["teal circle ."], None, [Layout((1, 2, 3)), Layout((1, 2, 2))]
    )
    new = conversation.added(before, ids, "x")
    start, end = (chat._tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    assert [i for i in new.tolist() if i in (start, end)] == [end, start, end, start]
    said = chat.encode_turns(["what shape ?"], ["teal circle ."], None, [Layout((1, 2, 3)), Layout((1, 2, 2))])
    assert conversation._alike(said, ids) == len(said), "the question begins where what was said ends"


def test_control_tokens_in_a_text_are_text_in_every_turn(runner):
    """Also those that an answer spells; `control_tokens` reads them as tokens."""
    talk, told = runner.conversation([open_image(PICTURE)], system="a <|im_start|> b"), runner.chat._control.ids
    talk.ask("what <|im_end|> ?", 1)
    talk._answers[-1] = "a <|im_end|> <|image_pad|> b"
    talk.ask("is <|image_pad|> it red ?", 1)
    ids = [i for i in talk._ids.tolist() if i in set(told.values()) - {told["<unk>"], told["<|image_pad|>"]}]
    names = [name for i in ids for name in told if told[name] == i]
    turn = ["<|im_start|>", "<|im_end|>"]
    pictures = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"]
    assert names == [*turn, *pictures, *turn, *turn, "<|im_start|>"]
    assert talk._ids.tolist().count(told["<|image_pad|>"]) == talk._pictures.counts[0]
    asked = runner.conversation(system="a <|im_start|> b", control_tokens=True)
    asked.ask("what ?", 1)
    assert asked._ids.tolist().count(told["<|im_start|>"]) == 4


def test_a_template_that_rewrites_history_is_refused(runner, monkeypatch):
    talk = with_template(runner, REWRITES, monkeypatch).conversation([open_image(PICTURE)])
    talk.ask("what shape ?")
    with pytest.raises(BundleError, match="a run of its own") as caught:
        talk.ask("is it red ?")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the command


def test_run_answers_several_prompts_one_after_the_other(whole_bundle, demo_bundle, tmp_path):
    asked = [w for q in QUESTIONS[:2] for w in ("--prompt", q)]
    run = ["run", whole_bundle, "--image", PICTURE, *asked]
    found = json.loads(here(*run, "--json", "--overlay", tmp_path / "kept.png").stdout)
    assert list(found) == ["turns"] and [t["prompt"] for t in found["turns"]] == list(QUESTIONS[:2])
    one, two = found["turns"]
    assert two["read_tokens"] and "read_tokens" not in one and two["ttft_s"] > 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["kept-q1.png", "kept-q2.png"]
    single = json.loads(here("run", whole_bundle, "--image", PICTURE, *asked[:2], "--json").stdout)
    assert single["text"] == one["text"] and "turns" not in single
    told = here(*run)
    assert told.stdout.splitlines() == [one["text"], two["text"]] and "(first question " in told.stderr
    refused = here("run", demo_bundle, "--image", PICTURE, *asked, "--quiet")
    assert (refused.returncode, refused.stdout) == (2, "") and refused.stderr.count("\n") == 1
    assert "--token-cache index" in refused.stderr
    assert here("run", demo_bundle, "--image", PICTURE, *asked, "--dense", "--quiet").returncode == 0


def test_run_chat_reads_questions_from_a_pipe(whole_bundle):
    command = [Path(sys.executable).parent / "cm-export", "run", whole_bundle, "--image", PICTURE, "--chat", "--guard"]
    done = subprocess.run(command, input="\n\n".join(QUESTIONS), capture_output=True, text=True, timeout=300)
    dense = cm_export(*command[1:4], PICTURE, *(w for q in QUESTIONS for w in ("-p", q)), "--dense", "--quiet")
    assert done.stdout == dense.stdout and len(done.stdout.splitlines()) == 3
    assert done.stderr.count("guard: ") == 3 and "> " not in done.stderr
