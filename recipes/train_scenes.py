"""Train the model `scenes`: a 7.1 M parameter Qwen2-VL that counts, places, compares and describes up to four shapes.

Data: generated pictures (cm_export/evals/scene.py), split `train`; progress is watched on `validation`; `test` is
only read by `--eval-only` and by `cm-export eval`.

    python recipes/train_scenes.py --work WORK --out MODEL [--minutes 44]     # train, save, report
    python recipes/train_scenes.py --work WORK --eval-only MODEL              # only the report

Each picture is read once and followed by a question of every kind, each of which sees the picture and itself. The
answer loss alone does not learn to look things up, so the steps that lead to an answer are taught one by one:

    layers 0, 1    image tokens name their colour, shape and place in the words of the vocabulary (tied embedding)
    layer 2        "red circle" and "top left" attend to the image tokens they mean, every word to all things
    layer 3        a word of the answer attends to the word of the question, or of the answer so far, that it needs
    layer 4        a description attends to the thing that comes next

Attention is taught by the cross-entropy between a head's attention and a target over tokens (`Guide`), states by
linear read-outs (`Readouts`), which are dropped. What is saved is the running mean of the weights.
A run that was killed goes on from its last checkpoint in WORK (the moments of the optimizer start anew).
"""

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F
from train_demo import (
    PROCESSOR,
    TOKENS,
    Qwen2VL,
    build_model,
    build_tokenizer,
    forward,
    generate,
    pack,
    save,
    see,
    share,
)
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

import cm_export
from cm_export.evals import scene as _scene

GRID = _scene.SIZE // 8  # image tokens along one side
PREFIX = 3  # tokens before the picture; the last of them, <|vision_start|>, is attended where nothing is meant
LAYERS = 6
# Most frequency pairs of a head turn slowly and belong to the columns: what a word means can be matched with what an
# image token shows wherever both stand. The sections of the demo model, or a small base, turn all of them.
ROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 4, 26])
COLORS, SHAPES = list(_scene.COLORS), list(_scene.SHAPES)
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = {*ROWS, *COLUMNS}
# The heads whose attention is taught, by (layer, head). Heads 0, 1 and 2, 3 share their keys.
HEADS = dict(
    find=(2, 0), place=(2, 2), pool=(2, 3), source=(3, 0), other=(3, 1), copy=(3, 2), next=(4, 0), compare=(4, 2)
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What differs between models that learn this task; the decoder has six layers, four heads that share two keys."""

    model_class: Any
    processor_class: Any
    processor: dict  # its files: name -> content
    new: Callable  # command line -> untrained model
    see: Callable  # model, pictures [B,H,W,3] uint8 -> image tokens [B,n,D]
    towers: tuple[str, ...]  # what of the model sees
    flat: bool  # whether positions are one number a token

    def vision_parameters(self, model) -> list:
        return [p for name in self.towers for p in getattr(model.model, name).parameters()]


class Guide:
    """Targets of one batch: attention of words by head, and facts to be read from the state of a word."""

    def __init__(self):
        self.attention = defaultdict(list)  # head name -> (row, position, attended positions, their weights)
        self.facts = defaultdict(list)  # read-out name -> (row, position, target)

    def add(self, row: int, scene, kind: str, words: list[str], start: int):
        """One question with its answer, `words`, that begins at position `start` of a row."""
        reply = words.index("assistant") + 1
        shown = tokens_of(scene)
        cells = {t.cell: t for t in scene.things}
        names = {(t.color, t.shape): t for t in scene.things}

        def attend(head, at, things):
            """To the tokens of some things, as much to each; to <|vision_start|> if there are none."""
            where = [shown[t] for t in things] or [np.array([PREFIX - 1])]
            weights = np.concatenate([np.full(len(w), 1 / len(w) / len(where)) for w in where])
            self.attention[head].append((row, start + at, np.concatenate(where), weights))

        def attend_word(head, at, word):
            self.attention[head].append((row, start + at, np.array([start + word]), np.ones(1)))

        def fact(name, at, target):
            self.facts[name].append((row, start + at, target))

        spoken = [at for at in range(1, len(words)) if (words[at - 1], words[at]) in names]  # names of things
        asked = [at for at in spoken if at < reply]
        for at in spoken:
            thing = names[words[at - 1], words[at]]
            attend("find", at, [thing])
            fact("cell", at, 3 * thing.cell[0] + thing.cell[1])
        mark = words.index("?") if "?" in words else None
        if kind == "count_some":
            counted = 3 if words[2] in COLORS else 2
            same = [t for t in scene.things if words[2] in (t.color, t.shape + "s")]
            attend("find", counted, same)
            fact("count", counted, len(same))
            for at in range(reply - 1, len(words) - 3):
                attend_word("source", at, counted)
        for at in range(2, len(words) - 1):  # the last word of the name of a place
            if words[at] in PLACES and words[at - 1] in {*ROWS, "the"} and words[at + 1] not in PLACES:
                cell = place_cell(words[at - 1 : at + 1])
                if cell in cells:
                    attend("place", at, [cells[cell]])
                else:
                    axis = np.arange(GRID) * 3 // GRID
                    empty = np.flatnonzero(((axis == cell[0])[:, None] & (axis == cell[1])).ravel())
                    self.attention["place"].append(
                        (row, start + at, PREFIX + empty, np.full(len(empty), 1 / len(empty)))
                    )
                fact("thing", at, thing_class(cells[cell]) if cell in cells else 0)
        if kind in ("describe", "count_all", "colors"):
            for at in range(reply - 1, len(words) - 1):
                attend("pool", at, scene.things)
                fact("board", at, [float((r, c) in cells) for r in range(3) for c in range(3)])
                fact("palette", at, [float(any(t.color == c for t in scene.things)) for c in COLORS])
        if kind == "relation":
            attend_word("other", asked[1], asked[0])
            fact("relation", asked[1], relation_class(names, words, asked))
        told = 0  # things described so far
        for at in range(reply - 1, len(words) - 1):
            word, after = words[at], words[at + 1]
            last = max((s for s in spoken if reply <= s <= at), default=None)
            # Where it is: look at the name that was just said.
            if kind in ("where", "describe") and after in PLACES:
                attend_word("source", at, last)
            if kind == "what_at":
                if after in ("a", "nothing", *COLORS, *SHAPES):
                    attend_word("source", at, mark - 1)
                if after in PLACES:
                    attend_word("copy", at, mark - 1 if word != "the" or words[mark - 2] == "the" else mark - 2)
            if kind == "describe" and (word == "a" or word in COLORS):
                thing = scene.things[told]
                attend_word("source", at, at - 1 if last is None else last)
                attend("next", at, [thing])
                fact("next_cell", at, 3 * thing.cell[0] + thing.cell[1])
                told += word in COLORS
            if kind == "colors" and after in COLORS:
                attend("next", at, [t for t in scene.things if t.color == after])
                attend_word("source", at, max(i for i in range(at + 1) if words[i] in {*COLORS, "colors", "color"}))
                fact("next_color", at, COLORS.index(after))
            if kind == "relation" and (at == reply - 1 or word == "is"):
                attend_word("compare", at, asked[1])
            if kind in ("where", "relation") and (after in COLORS or after in SHAPES):
                name = asked[0] if last is None or kind == "where" else asked[1]
                attend_word("copy", at, name - (after in COLORS))
            if kind == "count_some" and after == words[2]:
                attend_word("copy", at, 2)


def place_cell(words: list[str]) -> tuple[int, int]:
    """The cell that the last two words before "?" name: "top left", or "the center"."""
    return (1, 1) if words[0] == "the" else (ROWS.index(words[0]), COLUMNS.index(words[1]))


def relation_class(names: dict, words: list[str], asked: list[int]) -> int:
    """Which axis a relation is about, how the two things lie on it, and whether that is what is asked: 0..7."""
    one, other = (names[words[at - 1], words[at]] for at in asked)
    said = words[asked[0] + 1]
    axis = int(said in ("left", "right"))
    first = one.cell[axis] < other.cell[axis]
    return 4 * axis + 2 * first + (first == (said in ("above", "left")))


def thing_class(thing) -> int:
    return 1 + COLORS.index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)


def tokens_of(scene) -> dict:
    """The positions of the image tokens of each thing."""
    seen = _scene.labels(scene, GRID).ravel()
    return {t: PREFIX + np.flatnonzero(seen == thing_class(t)) for t in scene.things}


def rms(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


# Facts of words: name -> (layer after which it is read, number of classes).
FACTS = dict(
    cell=(2, 9), thing=(2, 25), count=(2, 5), board=(2, 9), palette=(2, 8), relation=(3, 8), next_cell=(3, 9),
    next_color=(3, 8),
)  # fmt: skip


class Readouts(nn.Module):
    """Linear read-outs of hidden states; they only shape training."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, (_, n) in FACTS.items()})
        self.gain = nn.Parameter(torch.ones(()))
        self.spot = nn.Linear(width, 9)

    def facts(self, states, guide: Guide) -> dict[str, torch.Tensor]:
        losses = {}
        for name, entries in guide.facts.items():
            rows, at, target = (torch.tensor(x) for x in zip(*entries, strict=True))
            logits = self.heads[name](rms(states[FACTS[name][0] + 1][rows, at]))
            if target.ndim > 1:  # the sum over yes/no facts, halved
                losses[name] = F.binary_cross_entropy_with_logits(logits, target) * target.shape[1] / 2
            else:
                losses[name] = F.cross_entropy(logits, target)
        return losses

    def seen(self, states, words: torch.Tensor, scenes: list) -> dict[str, torch.Tensor]:
        """Image tokens after layer 1 score the words for what they show, through the word embedding."""
        x = rms(states[2][:, PREFIX : PREFIX + GRID * GRID]).flatten(0, 1)

        def logits(names, rows):
            return self.gain * F.linear(x[rows], words[[TOKENS.index(n) for n in names]])

        seen = torch.tensor(np.stack([_scene.labels(s, GRID) for s in scenes])).flatten()
        shown, every = seen > 0, torch.ones_like(seen, dtype=torch.bool)
        axis = torch.arange(GRID) * 3 // GRID
        row, column = (a.flatten().repeat(len(scenes)) for a in torch.meshgrid(axis, axis, indexing="ij"))
        color = torch.where(shown, (seen - 1) // 3 + 1, 0)
        weight = torch.tensor([0.2] + [1.0] * len(COLORS))
        # Which cell, as 9 numbers of which a thing's tokens have one: squared error, because the mean over all things
        # must still say which cells are taken, and the means of rows and of columns do not.
        taken = F.one_hot(3 * row + column, 9) * shown[:, None]
        error = (self.spot(x) - taken).square().sum(-1)
        return dict(
            spot=20 * (error * torch.where(shown, 1.0, 0.2)).sum() / (shown + 0.2 * ~shown).sum(),
            color=F.cross_entropy(logits(["nothing", *COLORS], every), color, weight=weight),
            shape=F.cross_entropy(logits(SHAPES, shown), (seen[shown] - 1) % 3),
            row=F.cross_entropy(logits(ROWS, every), row),
            column=F.cross_entropy(logits(COLUMNS, every), column),
        )


def attention_losses(decoder, states, batch: dict, guide: Guide) -> dict[str, torch.Tensor]:
    """Cross-entropy of each taught head's attention with its target, less the target's own entropy."""
    losses, length = {}, batch["ids"].shape[1]
    with torch.autocast("cpu", torch.bfloat16):
        turn = decoder.rotary_emb(states[0], batch["positions"])
        for layer in sorted({HEADS[name][0] for name in guide.attention}):
            x, block = decoder.layers[layer].input_layernorm(states[layer]), decoder.layers[layer].self_attn
            q = block.q_proj(x).unflatten(-1, (-1, block.head_dim)).transpose(1, 2)
            k = block.k_proj(x).unflatten(-1, (-1, block.head_dim)).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, *turn)
            for name in [n for n in guide.attention if HEADS[n][0] == layer]:
                head, entries = HEADS[name][1], guide.attention[name]
                scores = q[:, head] @ k[:, head // block.num_key_value_groups].transpose(1, 2) * block.scaling
                rows, at = (torch.tensor(x) for x in list(zip(*entries, strict=True))[:2])
                target = np.zeros((len(entries), length), np.float32)
                for i, (_, _, where, weights) in enumerate(entries):
                    target[i, where] = weights
                target = torch.from_numpy(target)
                log_share = F.log_softmax(scores[rows, at].float() + batch["mask"][rows, 0, at], -1)
                losses[name] = (torch.special.xlogy(target, target) - target * log_share).sum(-1).mean()
    return losses


def questions(scene, salt: int) -> list[tuple[str, str, str]]:
    """(kind, question, answer): every kind once, those that are hard and about a part of the picture more often."""
    asked = {}
    for kind in _scene.KINDS:
        for i in range(dict(count_some=3, what_at=3, relation=2).get(kind, 1)):
            pair = _scene.ask(scene, kind, salt + i)
            if pair:
                asked.setdefault(pair, kind)
    return [(kind, *pair) for pair, kind in asked.items()]


def batch_of(kind: Architecture, tok, split: str, numbers: list[int], salt: int):
    """Pictures [B,H,W,3] uint8, their scenes, the packed questions, the questions and their Guide."""
    scenes = [_scene.scene(split, n) for n in numbers]
    asked = [questions(s, salt) for s in scenes]
    batch = pack(tok, [(("", ""), [(q, a) for _, q, a in qs]) for qs in asked], GRID, kind.flat)
    guide = Guide()
    for row, (scene, qs) in enumerate(zip(scenes, asked, strict=True)):
        for number, (asks, *_) in enumerate(qs, 1):
            where = (batch["segment"][row] == number).nonzero().flatten()
            words = [TOKENS[i] for i in batch["ids"][row, where].tolist()]
            guide.add(row, scene, asks, words, where[0].item())
    return np.stack([np.asarray(_scene.draw(s)) for s in scenes]), scenes, batch, asked, guide


@torch.no_grad()
def validate(kind: Architecture, model, tok, pictures: int) -> dict[str, float]:
    """Share of answers with every token right (teacher forcing), by kind, and over all questions."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, pictures, 8):
        images, _, batch, asked, _ = batch_of(kind, tok, "validation", list(range(start, start + 8)), 0)
        logits, target, _ = forward(model, images, batch, kind.see)
        chosen = batch["labels"][:, 1:] != -100
        owner = (torch.arange(8)[:, None] * 1000 + batch["segment"][:, 1:])[chosen]
        wrong = set(owner[logits.argmax(-1) != target].tolist())
        for row, qs in enumerate(asked):
            for number, (asks, *_) in enumerate(qs, 1):
                right[asks].append(row * 1000 + number not in wrong)
    every = [x for values in right.values() for x in values]
    return {k: sum(v) / len(v) for k, v in right.items()} | {"all": sum(every) / len(every)}


def new_model(_args):
    """A Qwen2-VL with the vision tower of the demo model."""
    demo = Qwen2VL.from_pretrained(Path(cm_export.__file__).parent / "demo" / "model", dtype=torch.float32)
    model = build_model(num_hidden_layers=LAYERS, rope_parameters=ROPE)
    model.model.visual.load_state_dict(demo.model.visual.state_dict())
    return model


QWEN2_VL = Architecture(Qwen2VL, Qwen2VLImageProcessorPil, PROCESSOR, new_model, see, ("visual",), False)


def train(kind: Architecture, args, tok):
    """Train for `--minutes`, those of earlier runs in `--work` included, or `--steps`; returns the mean model."""
    torch.manual_seed(args.seed)
    model = kind.new(args)
    model.set_attn_implementation("eager")  # in bf16 on a CPU, torch's own attention is the slower one
    mean, readouts = copy.deepcopy(model), Readouts(model.config.get_text_config().hidden_size)
    parts, saved = nn.ModuleDict(dict(model=model, readouts=readouts, mean=mean)), args.work / "scenes.safetensors"
    step, spent = 0, 0.0
    if saved.exists():
        load_model(parts, saved)
        with safe_open(saved, "pt") as f:
            step, spent = int(f.metadata()["step"]), float(f.metadata()["seconds"])
    trained = [*model.parameters(), *readouts.parameters()]
    groups = [
        dict(params=kind.vision_parameters(model), scale=args.vision_lr),
        dict(params=[p for p in model.model.language_model.parameters() if p.ndim > 1], scale=1.0),
        dict(params=[p for p in model.model.language_model.parameters() if p.ndim == 1], scale=1.0, weight_decay=0.0),
        dict(params=list(readouts.parameters()), scale=1.0, weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    began, history, first = time.time() - spent, [], step
    while True:
        elapsed = time.time() - began
        done = step / args.steps if args.steps else elapsed / 60 / args.minutes
        if done >= 1:
            break
        rate = args.lr * min(1, (step - first + 1) / 50, 0.01 + 2.5 * (1 - done))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        for weight in groups[0]["params"]:
            weight.requires_grad_(step % 3 == 0)  # the tower hardly needs training, and its gradient is dear
        numbers = list(range(step * args.batch, (step + 1) * args.batch))
        images, scenes, batch, _, guide = batch_of(kind, tok, "train", numbers, 7)
        logits, target, states = forward(model, images, batch, kind.see)
        decoder = model.model.language_model
        losses = dict(answer=F.cross_entropy(logits, target))
        seen = readouts.seen(states, decoder.embed_tokens.weight, scenes)
        taught = attention_losses(decoder, states, batch, guide)
        facts = readouts.facts(states, guide)
        optimizer.zero_grad()
        total = losses["answer"] + args.seen * sum(seen.values()) + args.attend * sum(taught.values())
        (total + args.facts * sum(facts.values())).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            keep = min(0.995, 1 - 1 / step)
            for slow, fast in zip(mean.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
        history.append({k: v.item() for k, v in (losses | seen | taught | facts).items()})
        if step % 25 == 0:
            means = {k: f"{np.mean([h[k] for h in history[-25:] if k in h]):.3f}" for k in history[-1]}
            print(f"step {step} {elapsed:.0f} s", *(f"{k} {v}" for k, v in means.items()), flush=True)
        if step % 200 == 0:
            print({k: round(v, 3) for k, v in validate(kind, mean, tok, 24).items()}, flush=True)
            facts_of_run = {"step": str(step), "seconds": str(time.time() - began)}
            save_model(parts, str(saved) + ".part", metadata=facts_of_run)
            Path(str(saved) + ".part").replace(saved)
    return mean


def report(kind: Architecture, directory: Path, work: Path, pictures: int):
    """Exact match of free-running greedy answers about test pictures, by kind; a tenth also without the picture."""
    tok = AutoTokenizer.from_pretrained(directory)
    processor = kind.processor_class.from_pretrained(directory)
    model = kind.model_class.from_pretrained(directory, dtype=torch.float32).eval()
    scenes = [_scene.scene("test", n) for n in range(pictures)]
    drawn = [np.asarray(_scene.draw(s)) for s in scenes]
    result, wrong = {}, []
    for control in ("", ", image zeroed", ", another picture"):
        rows = [(i, k, *p) for k in _scene.KINDS for i, s in enumerate(scenes) if (p := _scene.ask(s, k))]
        rows = rows[::10] if control else rows
        shown = drawn[1:] + drawn[:1] if "another" in control else drawn
        asked = [(i, q) for i, _, q, _ in rows]
        said = generate(model, tok, processor, shown, asked, "zeroed" in control, grid=GRID, longest=48)
        for asks in (*_scene.KINDS, "all"):
            right = [a == s for (_, k, _, a), s in zip(rows, said, strict=True) if asks in (k, "all")]
            if right:
                result[asks + control] = share(sum(right), len(right))
        wrong += [] if control else [(*row, s) for row, s in zip(rows, said, strict=True) if row[-1] != s]
    for asks, found in result.items():
        right, n, *shares = found["right"], found["n"], *(100 * found[k] for k in ("share", "low", "high"))
        print("| {} | {} / {} | {:.2f} % | {:.2f} to {:.2f} % |".format(asks, right, n, *shares))
    (work / "report.json").write_text(json.dumps(dict(result=result, wrong=wrong), indent=1) + "\n")


def main(kind: Architecture, about: str):
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", type=Path, help="train, and write the model to this directory")
    goal.add_argument("--eval-only", type=Path, help="train nothing, report on this model")
    parser.add_argument("--pictures", type=int, default=500, help="test pictures of the report")
    parser.add_argument("--minutes", type=float, default=44, help="of training, earlier runs in --work included")
    parser.add_argument("--steps", type=int, help="of training, in place of --minutes: the same on every machine")
    parser.add_argument("--batch", type=int, default=6, help="pictures of one step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vision-lr", type=float, default=0.3, help="share of the learning rate for the vision tower")
    parser.add_argument("--seen", type=float, default=0.2, help="weight of what image tokens say")
    parser.add_argument("--attend", type=float, default=0.2, help="weight of the taught attention")
    parser.add_argument("--facts", type=float, default=0.2, help="weight of the read-outs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.eval_only:
        tok = build_tokenizer()
        model = train(kind, args, tok)
        print({k: round(v, 4) for k, v in validate(kind, model, tok, 200).items()}, flush=True)
        save(model, tok, args.out, kind.processor)
    report(kind, args.eval_only or args.out, args.work, args.pictures)


if __name__ == "__main__":
    main(QWEN2_VL, __doc__)
