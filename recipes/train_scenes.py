"""Train the model of the task `scenes`: the demo model learns to count, to place and to describe up to four shapes.

Data: generated pictures (cm_export/evals/_scene.py), split `train`; progress is watched on `validation`; `test` is
left to `cm-export eval`.

    python recipes/train_scenes.py --work WORK --out MODEL [--minutes 60] [--init MODEL]

Each picture is read once and followed by a question of every kind, each of which sees the picture and itself. While
training, the image tokens of a middle layer also name the shape they show and its place on the board; a later layer says,
at the name of a shape, where that shape is, and at the name of a place, what is there. Without these steps looking
things up is hardly learnt; their heads are dropped. The rotary base is small (30): a picture is 12 image tokens wide, and
with the usual base the slow half of the frequencies, which Qwen2-VL gives to the columns, would hardly turn.
A run that was killed goes on from its last checkpoint.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F
from train_demo import TOKENS, Qwen2VL, build_model, build_tokenizer, forward, pack, save

import cm_export
from cm_export.evals import _scene

GRID = _scene.SIZE // 8  # image tokens along one side
ROPE_BASE = 30.0
SEEN_AFTER, FOUND_AFTER = 4, 6  # layers after which the auxiliary heads read


def rms(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def thing_class(thing) -> int:
    return 1 + list(_scene.COLORS).index(thing.color) * len(_scene.SHAPES) + _scene.SHAPES.index(thing.shape)


class Heads(nn.Module):
    """Read-outs that only shape training: things (0: ground) and cells of the board, of image tokens and of words."""

    def __init__(self, width: int = 256):
        super().__init__()
        things = 1 + len(_scene.COLORS) * len(_scene.SHAPES)
        self.thing, self.cell = nn.Linear(width, things), nn.Linear(width, 9)
        self.found_thing, self.found_cell = nn.Linear(width, things), nn.Linear(width, 9)

    def seen(self, states: torch.Tensor, scenes: list) -> torch.Tensor:
        """states [B,S,D] of one layer; the image tokens start at the third place of every row."""
        x = rms(states[:, 2 : 2 + GRID * GRID]).flatten(0, 1)
        seen = torch.tensor(np.stack([_scene.labels(s, GRID) for s in scenes])).flatten()
        row = torch.arange(GRID) * 3 // GRID
        cell = (row[:, None] * 3 + row).flatten().repeat(len(scenes))
        weight = torch.tensor([0.2] + [1.0] * (len(self.thing.bias) - 1))
        return F.cross_entropy(self.thing(x), seen, weight=weight) + F.cross_entropy(self.cell(x), cell)

    def found(self, states: torch.Tensor, scenes: list, batch: dict) -> torch.Tensor:
        """At "red circle": the cell of the red circle. At "top left", in a question: what is there."""
        cells, things = [], []  # (row, place, target)
        names = [(TOKENS.index(c), TOKENS.index(s), (c, s)) for c in _scene.COLORS for s in _scene.SHAPES]
        pairs = {(c, s): name for c, s, name in names}
        places = {
            tuple(TOKENS.index(w) for w in f"the {_scene.place((r, c))}".split()[-2:]): (r, c)
            for r in range(3)
            for c in range(3)
        }
        asks = (batch["labels"] == -100).tolist()
        for b, (scene, ids) in enumerate(zip(scenes, batch["ids"].tolist(), strict=True)):
            by_name = {(t.color, t.shape): t for t in scene.things}
            by_cell = {t.cell: t for t in scene.things}
            for at in range(1, len(ids)):
                two = ids[at - 1], ids[at]
                if two in pairs and pairs[two] in by_name:
                    row, column = by_name[pairs[two]].cell
                    cells.append((b, at, 3 * row + column))
                if two in places and asks[b][at]:
                    thing = by_cell.get(places[two])
                    things.append((b, at, thing_class(thing) if thing else 0))
        loss = 0.0
        for head, where in ((self.found_cell, cells), (self.found_thing, things)):
            rows, columns, targets = torch.tensor(where).unbind(1)
            loss = loss + F.cross_entropy(head(rms(states[rows, columns])), targets)
        return loss


def batch_of(tok, split: str, numbers: list[int], salt: int):
    """Pictures [B,H,W,3] uint8, their scenes, and the packed questions of every kind (counting and places twice)."""
    scenes = [_scene.scene(split, n) for n in numbers]
    items = []
    for s in scenes:
        kinds = [
            (k, salt + i)
            for i in (0, 1)
            for k in _scene.KINDS
            if i == 0 or k not in ("describe", "count_all", "colors")
        ]
        pairs = [pair for k, i in kinds if (pair := _scene.ask(s, k, i)) is not None]
        items.append((("", ""), list(dict.fromkeys(pairs))))
    return np.stack([np.asarray(_scene.draw(s)) for s in scenes]), scenes, pack(tok, items, GRID), items


@torch.no_grad()
def validate(model, tok, pictures: int = 40) -> dict[str, float]:
    """Share of answers with every token right (teacher forcing), by the first words of the question."""
    right: dict[str, list[bool]] = {}
    for start in range(0, pictures, 8):
        images, _, batch, items = batch_of(tok, "validation", list(range(start, start + 8)), 0)
        logits, target, _ = forward(model, images, batch)
        chosen = batch["labels"][:, 1:] != -100
        owner = (torch.arange(8)[:, None] * 1000 + batch["segment"][:, 1:])[chosen]
        wrong = set(owner[logits.argmax(-1) != target].tolist())
        for row, (_, pairs) in enumerate(items):
            for number, (question, _) in enumerate(pairs, 1):
                kind = " ".join(question.split()[:2])
                right.setdefault(kind, []).append(row * 1000 + number not in wrong)
    every = [x for values in right.values() for x in values]
    return {k: sum(v) / len(v) for k, v in sorted(right.items())} | {"all": sum(every) / len(every)}


def train(args, tok):
    """Train for `--minutes` of this run and earlier ones; returns the model."""
    torch.manual_seed(args.seed)
    model, heads = build_model(), Heads()
    model.load_state_dict(Qwen2VL.from_pretrained(args.init, dtype=torch.float32).state_dict())
    text = model.model.language_model
    text.config.rope_parameters["rope_theta"] = ROPE_BASE
    text.rotary_emb = type(text.rotary_emb)(text.config)
    model.config.text_config.rope_parameters["rope_theta"] = ROPE_BASE
    parts, saved = nn.ModuleDict(dict(model=model, heads=heads)), args.work / "scenes.safetensors"
    step, spent = 0, 0.0
    if saved.exists():
        load_model(parts, saved)
        with safe_open(saved, "pt") as f:
            step, spent = int(f.metadata()["step"]), float(f.metadata()["seconds"])
    decay = [p for p in parts.parameters() if p.ndim > 1]
    groups = [dict(params=decay, weight_decay=0.05), dict(params=[p for p in parts.parameters() if p.ndim == 1])]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    budget, began, losses = 60 * args.minutes, time.time() - spent, []
    first = step
    while (elapsed := time.time() - began) < budget:
        rate = args.lr * min(1, (step - first + 1) / 40) * (0.02 + 0.98 * min(1, 1.6 * (1 - elapsed / budget)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        numbers = list(range(step * args.batch, (step + 1) * args.batch))
        images, scenes, batch, _ = batch_of(tok, "train", numbers, 7)
        logits, target, states = forward(model, images, batch)
        answer = F.cross_entropy(logits, target)
        seen = heads.seen(states[SEEN_AFTER], scenes)
        found = heads.found(states[FOUND_AFTER], scenes, batch)
        optimizer.zero_grad()
        (answer + 0.2 * seen + 0.4 * found).backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append((answer.item(), seen.item(), found.item()))
        if step % 25 == 0:
            means = np.mean(losses[-25:], 0)
            print(
                f"step {step} {elapsed:.0f} s answers {means[0]:.4f} seen {means[1]:.4f} found {means[2]:.4f}",
                flush=True,
            )
        if step % 100 == 0:
            print({k: round(v, 3) for k, v in validate(model, tok).items()}, flush=True)
            facts = {"step": str(step), "seconds": str(time.time() - began)}
            save_model(parts, str(saved) + ".part", metadata=facts)
            Path(str(saved) + ".part").replace(saved)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--init", type=Path, default=Path(cm_export.__file__).parent / "demo" / "model")
    parser.add_argument("--minutes", type=float, default=60, help="of training, earlier runs in --work included")
    parser.add_argument("--batch", type=int, default=4, help="pictures of one step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    tok = build_tokenizer()
    unknown = tok.unk_token_id
    for number in range(50):
        for kind in _scene.KINDS:
            for text in _scene.ask(_scene.scene("train", number), kind) or ():
                if unknown in tok(text).input_ids:
                    raise SystemExit(f"a word of {text!r} is not in the vocabulary")
    model = train(args, tok)
    print(validate(model, tok, 200), flush=True)
    save(model, tok, args.out)


if __name__ == "__main__":
    main()
