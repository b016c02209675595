"""Train the model of the task `scenes`: the demo model learns to count, to place and to describe up to four shapes.

Data: generated pictures (cm_export/evals/_scene.py), split `train`; progress is watched on `validation`; `test` is
left to `cm-export eval`.

    python recipes/train_scenes.py --work WORK --out MODEL [--minutes 60] [--init MODEL]

Each picture is read once and followed by a question of every kind, each of which sees the picture and itself. While
training, the image tokens of a middle layer also name the shape they show and its place on the board, which is what
later layers look up; those heads are dropped. The rotary base is small (30): a picture is 12 image tokens wide, and
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
from train_demo import Qwen2VL, build_model, build_tokenizer, forward, pack, save

import cm_export
from cm_export.evals import _scene

GRID = _scene.SIZE // 8  # image tokens along one side
ROPE_BASE = 30.0
AUXILIARY_LAYER = 4


class Heads(nn.Module):
    """What an image token shows (0: ground) and the cell it lies in; only shapes training."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.thing, self.cell = nn.Linear(width, 1 + len(_scene.COLORS) * len(_scene.SHAPES)), nn.Linear(width, 9)

    def loss(self, states: torch.Tensor, scenes: list) -> torch.Tensor:
        """states [B,S,D] of one layer; the image tokens start at the third place of every row."""
        x = states.float()
        x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).flatten(0, 1)
        seen = torch.tensor(np.stack([_scene.labels(s, GRID) for s in scenes])).flatten()
        row = torch.arange(GRID) * 3 // GRID
        cell = (row[:, None] * 3 + row).flatten().repeat(len(scenes))
        weight = torch.tensor([0.2] + [1.0] * (len(self.thing.bias) - 1))
        return F.cross_entropy(self.thing(x), seen, weight=weight) + F.cross_entropy(self.cell(x), cell)


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
    budget, began, seen = 60 * args.minutes, time.time() - spent, []
    first = step
    while (elapsed := time.time() - began) < budget:
        rate = args.lr * min(1, (step - first + 1) / 40) * (0.02 + 0.98 * min(1, 1.6 * (1 - elapsed / budget)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        numbers = list(range(step * args.batch, (step + 1) * args.batch))
        images, scenes, batch, _ = batch_of(tok, "train", numbers, 7)
        logits, target, states = forward(model, images, batch)
        answer = F.cross_entropy(logits, target)
        place = heads.loss(states[AUXILIARY_LAYER][:, 2 : 2 + GRID * GRID], scenes)
        optimizer.zero_grad()
        (answer + 0.3 * place).backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        step += 1
        seen.append((answer.item(), place.item()))
        if step % 25 == 0:
            means = np.mean(seen[-25:], 0)
            print(f"step {step} {elapsed:.0f} s answers {means[0]:.4f} image tokens {means[1]:.4f}", flush=True)
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
