"""Neuron policies beside each other: what decode still answers when it computes a share of the FFN neurons.

    every question: dense greedy answer; then the same answer decoded again under each policy x fill x layers x block x share

    right  the whole answer is the dense one, and true      (a question that dense misses counts as missed)
    KL     KL(dense || sparse) per token along the dense answer, nats; mean over questions

Every image token is kept, so that only neurons differ. `random` is the control; dense is the first row.

    python benchmarks/neuron_policies.py scenes.plan --out benchmarks/policies/neurons.json --docs docs/neurons.md
    python benchmarks/neuron_policies.py my.plan --data my.jsonl --shares 0.5 --policies griffin+row glass --out my.json

The bundle needs a calibration.
"""

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _page import rewrite, write_report

from cm_export.base import by_name
from cm_export.base.metrics import divergences, wilson
from cm_export.bundle.bundle import Bundle
from cm_export.calibrating.answers import read_prompts
from cm_export.calibrating.calibrate import SENSITIVITY_TOKENS
from cm_export.evals import task as _task
from cm_export.evals.exam import write
from cm_export.evals.other_policies import with_policies
from cm_export.evals.task import Question
from cm_export.host.core_set import CoreSet, choose
from cm_export.host.decode import teacher_forced
from cm_export.host.images import open_image
from cm_export.host.request import Request
from cm_export.host.runner import Budget, Runner
from cm_export.recipe.recipe import Neurons, Recipe

# name -> the [neurons] that differ from the defaults
POLICIES = {
    "random": {"policy": "random"},
    "coreinfer": {"policy": "coreinfer"},
    "griffin": {"policy": "griffin"},
    "griffin+row": {"policy": "griffin", "row_norm": True},
    "griffin+row, image .5": {"policy": "griffin", "row_norm": True, "image_weight": 0.5},
    "griffin+row, image .25": {"policy": "griffin", "row_norm": True, "image_weight": 0.25},
    "griffin+row, image .1": {"policy": "griffin", "row_norm": True, "image_weight": 0.1},
    "griffin+row, text": {"policy": "griffin", "row_norm": True, "voters": "text"},
    "glass": {"policy": "glass"},
    "glass, mix .75": {"policy": "glass", "mix": 0.75},
    "glass, mix .25": {"policy": "glass", "mix": 0.25},
    "static": {"policy": "glass", "mix": 1.0},
    "glass_rank": {"policy": "glass_rank"},
}
BLOCKED = ("glass", "griffin+row", "random")  # policies whose blocks are measured as well, without fill or budgets
USUAL = ("random", "coreinfer", "griffin", "griffin+row", "glass", "glass_rank", "static")


@dataclass(frozen=True)
class Asked:
    """A question with the dense answer: token ids, logits [T,V] after each of them but the last, and whether it is true."""

    request: Request
    answer: np.ndarray
    logits: np.ndarray
    right: bool


@dataclass(frozen=True)
class Cell:
    """One way to choose: [neurons] and a share; `clustered`: blocks in the calibration's order, not as stored."""

    neurons: Neurons
    share: float
    clustered: bool = True

    def describe(self) -> dict[str, object]:
        n = self.neurons
        block = f"{n.block}{' clustered' if self.clustered else ' as stored'}" if n.block > 1 else "1"
        return {"share": self.share, "fill": n.fill, "layers": n.layers, "block": block}


def questions(name: str, data: Path | None, limit: int, seed: int) -> tuple[list[Question], Callable[[str], Any]]:
    """Questions drawn at random with the seed, every kind alike, and how to open their pictures."""
    if data is not None:
        pool = [Question("own", tuple(map(str, p.images)), p.text, ()) for p in read_prompts(data)]
        return random.Random(seed).sample(pool, min(limit, len(pool))), open_image
    # One-word answers come from the prefill, which computes every neuron.
    kinds = tuple(k for k in by_name.load("cm_export.evals.tasks", name, "task").KINDS if k != "word")
    task = _task.load(name, kinds, max(1, limit // len(kinds)), seed)
    return task.questions, task.open_picture


def ask_dense(runner: Runner, asked: list[Question], opened: Callable[[str], Any], limit: int) -> list[Asked]:
    out = []
    for question in asked:
        request = runner.ask(question.text, runner.see([opened(p) for p in question.pictures]))
        written = write(runner, runner.prefill(request, Budget(dense=True)), limit)
        said = runner.chat.decode(written.ids).strip()
        right = not question.answers or said in question.answers
        # Greedy: every id, the stop among them, is the most likely one.
        out.append(Asked(request, written.logits.argmax(-1), written.logits[1:], right))
    return out


def core_of(cell: Cell, measured: dict, runner: Runner) -> CoreSet:
    """The cell's core set; clustered blocks are chosen in the calibration's order and named by stored ids again."""
    shape, calibration = runner.bundle.shape, runner.bundle.calibration
    if cell.neurons.block == 1 or not cell.clustered:
        return choose(measured, cell.neurons, shape, calibration, cell.share)
    order = calibration.order.astype(np.int64)[:, None]
    placed = {n: np.take_along_axis(a, order, 2) if n != "core_mean_y" else a for n, a in measured.items()}
    core = choose(placed, cell.neurons, shape, calibration.reordered(), cell.share)
    ids = np.where(core.neurons < 0, -1, np.take_along_axis(order, np.maximum(core.neurons, 0).astype(np.int64), 2))
    for layer, count in enumerate(core.counts):
        ids[layer, :, :count] = np.sort(ids[layer, :, :count], axis=-1)
    stored = {"none": None, "prompt": measured["core_mean_z"], "calibrated": calibration.mean_z[:, None]}
    return replace(core, neurons=ids.astype(np.int32), mean_z=stored[cell.neurons.fill])


def run(runner: Runner, policy: str, asked: list[Asked], cells: list[Cell], seed: int) -> list[dict]:
    """One row per cell."""
    recipe = Recipe().replace(
        tokens__policy="dense",
        calibration="the bundle's",
        neurons__fill="prompt",
        **{f"neurons__{k}": v for k, v in POLICIES[policy].items()},
    )
    sparse = with_policies(runner, recipe)
    same, kl, tokens, agree = (np.zeros((len(cells), len(asked))) for _ in range(4))
    for i, q in enumerate(asked):
        prefilled = sparse.prefill(q.request, Budget(seed=seed + i))
        for c, cell in enumerate(cells):
            row = prefilled.row(core_of(cell, prefilled.measured, runner))
            found = teacher_forced(sparse.backend, row, q.answer[:-1].tolist())[1:]
            kl[c, i] = divergences(q.logits, found).sum()
            agree[c, i] = (found.argmax(-1) == q.answer[1:]).sum()
            tokens[c, i] = len(q.logits)
            same[c, i] = agree[c, i] == tokens[c, i]
    rows, true = [], np.array([q.right for q in asked])
    for c, cell in enumerate(cells):
        right = int((same[c] * true).sum())
        low, high = wilson(right, len(asked))
        rows.append(
            {
                "policy": policy,
                **cell.describe(),
                "right": right / len(asked),
                "low": low,
                "high": high,
                "of_dense": right / max(1, int(true.sum())),
                "agreement": float(agree[c].sum() / max(1.0, tokens[c].sum())),
                "kl": float(kl[c].sum() / max(1.0, tokens[c].sum())),
                "n": len(asked),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="scenes", help="questions of this eval task, one-word ones left out")
    parser.add_argument("--data", type=Path, help="prompts of your own instead (.jsonl)")
    parser.add_argument("--limit", type=int, default=140)
    parser.add_argument("--max-new-tokens", type=int, default=SENSITIVITY_TOKENS)
    parser.add_argument("--policies", nargs="+", default=list(USUAL), choices=list(POLICIES), metavar="POLICY")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6, 0.4, 0.3])
    parser.add_argument("--fills", nargs="+", default=["none", "prompt", "calibrated"])
    parser.add_argument("--layers", nargs="+", default=["uniform", "calibrated"])
    parser.add_argument("--blocks", nargs="*", type=int, default=[8, 16, 32], help="besides single neurons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="rows are written here after every policy (.json)")
    parser.add_argument("--docs", type=Path, help="a page whose tables are written anew (.md)")
    args = parser.parse_args()

    bundle = Bundle(args.bundle)
    if bundle.calibration is None:
        sys.exit(f"{args.bundle} has no calibration: build it with `cm-export build --calibration FILE`")
    runner = Runner(bundle, args.threads)
    bundle.wait_verified()
    started = time.perf_counter()
    chosen = questions(args.task.replace("-", "_"), args.data, args.limit, args.seed)
    asked = ask_dense(runner, *chosen, args.max_new_tokens)
    right = sum(q.right for q in asked)
    low, high = wilson(right, len(asked))
    rows = [{"policy": "dense", "share": 1.0, "right": right / len(asked), "low": low, "high": high, "n": len(asked)}]
    report = {
        "bundle": bundle.manifest["model"]["source"],
        "calibration": bundle.calibration.about,
        "command": " ".join(["python", *sys.argv]),
        "versions": bundle.manifest["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s)",
        "rows": rows,
    }
    print(f"dense {right / len(asked):.4f} [{low:.3f}, {high:.3f}], {sum(len(q.logits) for q in asked)} tokens")
    for policy in args.policies:
        cells = [
            Cell(Neurons(fill=fill, layers=layers), share)
            for share in args.shares
            for fill in args.fills
            for layers in args.layers
        ]
        for block in args.blocks if policy in BLOCKED else ():
            blocks = Neurons(block=block)
            cells += [Cell(blocks, share, clustered) for share in args.shares for clustered in (True, False)]
        rows += run(runner, policy, asked, cells, args.seed)
        for row in rows[-len(cells) :]:
            what = f"{row['policy']:22} {row['share']:.0%} fill {row['fill']:10} {row['layers']:10} block {row['block']:12}"
            print(
                f"{what} right {row['right']:.4f} [{row['low']:.3f}, {row['high']:.3f}] of dense {row['of_dense']:.4f} "
                f"agree {row['agreement']:.4f} KL {row['kl']:.5f}",
                flush=True,
            )
        report["seconds"] = time.perf_counter() - started
        if args.out:
            write_report(args.out, report)
    rewrite(args.docs, tables(report))


def tables(report: dict) -> dict[str, str]:
    """Mark on the page -> table."""
    rows = [r for r in report["rows"] if r["policy"] != "dense"]
    shares = sorted({r["share"] for r in rows}, reverse=True)

    def table(head: str, lines: dict[str, list[dict]]) -> str:
        out = [f"| {head} | " + " | ".join(f"{s:.0%}" for s in shares) + " |", "|---|" + "---|" * len(shares)]
        for name, found in lines.items():
            cells = {
                r["share"]: f"{r['of_dense']:.3f} [{r['low']:.3f}, {r['high']:.3f}] KL {r['kl']:.4f}" for r in found
            }
            out.append(f"| {name} | " + " | ".join(cells.get(s, "") for s in shares) + " |")
        return "\n".join(out) + "\n"

    single: dict[str, list[dict]] = {}
    blocks: dict[str, list[dict]] = {}
    for r in rows:
        plain = r["fill"] == "none" and r["layers"] == "uniform"
        if r["block"] == "1":
            single.setdefault(f"{r['policy']}, {r['layers']} layers, fill {r['fill']}", []).append(r)
        if plain and r["policy"] in BLOCKED:
            blocks.setdefault(f"{r['policy']}, blocks of {r['block']}", []).append(r)
    return {"single": table("policy", single), "blocks": table("policy", blocks)}


if __name__ == "__main__":
    main()
