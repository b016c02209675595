"""What thresholds and low bits cost a real language model: bundles of one checkpoint, read along the dense model's own answers.

    python benchmarks/active.py --out benchmarks/quality/active.json --docs docs/active.md FP32.plan INT8.plan INT4.plan

The first bundle's dense model (float32) answers held-out prompts greedily, 64 tokens each. Then every bundle reads those answers,
dense and sparse at several shares (teacher forcing; the prompt was read densely).

    agreement   how often the first choice is the same      KL   nats, dense against sparse      both over all answer tokens

"own": against the same bundle without pruning; "float32": against the first bundle without pruning. Bits read per weight: of
the decoder's products and head, scales and zeros included, as the native library counted them in single steps.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _page import between, write_report
from cm_export.plugins.cpu import library

from cm_export.base import environment
from cm_export.base.metrics import divergences, wilson
from cm_export.families import Pictures
from cm_export.host.decode import Reader, decode, greedy
from cm_export.host.loaded import load
from cm_export.host.runner import Budget, Prefilled, Runner

ANSWER = 64
POINTS = (  # shares of the weights of FFNs and of the other products
    (1.0, 1.0),
    (0.88, 0.95),
    (0.83, 1.0),
    (0.83, 0.95),
    (0.83, 0.9),
    (0.73, 1.0),
    (0.73, 0.9),
    (0.73, 0.8),
    (0.63, 1.0),
    (0.63, 0.8),
    (0.53, 1.0),
)
Logits = list[np.ndarray]


@dataclass(frozen=True)
class Answered:
    """A prompt after its dense prefill, and the 64 tokens that the dense model wrote to it."""

    prefilled: Prefilled
    ids: list[int]
    logits: np.ndarray  # [64,V], before each of them


def answered(runner: Runner, prompts: list[str]) -> list[Answered]:
    """An end token does not stop an answer, so that every one counts alike."""
    out = []
    for text in prompts:
        prefilled = runner.prefill(runner.ask(text, Pictures()), Budget(dense=True))
        row = prefilled.row(choose=greedy(), limit=ANSWER)
        for _ in decode(runner.backend, [row]):
            pass
        out.append(Answered(prefilled, row.ids, read(runner, prefilled, row.ids, None)))
    return out


def read(runner: Runner, prefilled: Prefilled, ids: list[int], shares: tuple[float, float] | None) -> np.ndarray:
    """[T,V]: logits before each token, all read in one pass; shares None: dense."""
    row = prefilled.row(graph="decode_dense")
    if shares is not None:
        table = runner.bundle.thresholds
        assert table is not None
        core = prefilled.core_of(None)
        at = table.at(table.shares(*shares))
        row = prefilled.row(type(core)(None, core.counts, core.ffn, thresholds=at), graph="decode")
    Reader(runner.backend).read([row], [ids[:-1]])
    return np.concatenate([prefilled.logits, np.atleast_2d(row.logits)])


def compared(expected: Logits, found: Logits) -> dict[str, Any]:
    """Agreement with its 95 % interval, and mean KL."""
    same = np.concatenate([(e.argmax(-1) == f.argmax(-1))[1:] for e, f in zip(expected, found, strict=True)])
    kl = np.concatenate([divergences(e[1:], f[1:]) for e, f in zip(expected, found, strict=True)])
    return {
        "agreement": float(same.mean()),
        "ci": wilson(int(same.sum()), len(same)),
        "kl": float(kl.mean()),
        "tokens": len(same),
    }


def measure(path: Path, threads: int, prompts: list[str], reference: list[Answered]) -> dict[str, Any]:
    """Rows of one bundle along what the float32 model answered; fills `reference` where it is empty."""
    runner = load(path, threads, lambda *a: None)
    if not reference:
        reference += answered(runner, prompts)
    ids, exact = [a.ids for a in reference], [a.logits for a in reference]
    begun = [runner.prefill(runner.ask(text, Pictures()), Budget(dense=True)) for text in prompts]
    dense = [read(runner, one, own, None) for one, own in zip(begun, ids, strict=True)]
    counted = library.find() is not None and runner.bundle.packed is not None
    rows = []
    for shares in POINTS:
        found = [read(runner, one, own, shares) for one, own in zip(begun, ids, strict=True)]
        row = {"ffn": shares[0], "rest": shares[1], "own": compared(dense, found), "float32": compared(exact, found)}
        if counted:
            row["bits_read_per_weight"] = _bits_read(runner, begun[:2], ids, shares)
        rows.append(row)
        print(path.name, json.dumps(row), flush=True)
    weights = runner.recipe.weights
    about = {"bundle": path.name, "precision": weights.precision, "stored": weights.storing()}
    return about | {"dense_against_float32": compared(exact, dense), "rows": rows}


def _bits_read(runner: Runner, begun: list[Prefilled], ids: list[list[int]], shares: tuple[float, float]) -> float:
    """Bits per weight of the decoder, in single steps: several tokens at once would read what any of them needs."""
    packed = runner.bundle.packed
    assert packed is not None
    entries = [e for name, e in packed.entries.items() if not name.startswith("vision.")]
    stored, steps = sum(e.inputs * sum(e.outputs) for e in entries), 0
    library.reset()
    for one, own in zip(begun, ids, strict=False):
        for token in own[:8]:
            read(runner, one, [token, token], shares)
            steps += 1
    return 8 * library.counts()[0] / (steps * stored)


def table(report: dict[str, Any]) -> str:
    """The table of the page."""
    lines = ["| weights | FFN | rest | bits read per weight | agreement with its own dense | KL | with float32 dense | KL |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for bundle in report["bundles"]:
        for row in bundle["rows"]:
            own, other = row["own"], row["float32"]
            bits = f"{row['bits_read_per_weight']:.2f}" if "bits_read_per_weight" in row else "-"
            cells = [bundle["precision"], f"{row['ffn']:.2f}", f"{row['rest']:.2f}", bits]
            cells += [f"{own['agreement']:.3f} [{own['ci'][0]:.3f}, {own['ci'][1]:.3f}]", f"{own['kl']:.4f}"]
            cells += [f"{other['agreement']:.3f}", f"{other['kl']:.4f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()
    texts = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    prompts = [*texts["short"], *texts["long"]][: args.prompts]
    reference: list[Answered] = []
    bundles = [measure(path, args.threads, prompts, reference) for path in args.bundles]
    report = {
        "bundles": bundles,
        "prompts": len(prompts),
        "answer_tokens": ANSWER,
        "environment": environment.describe(args.threads, {}),
        "command": "python benchmarks/active.py " + " ".join(p.name for p in args.bundles),
    }
    write_report(args.out, report)
    if args.docs:
        args.docs.write_text(between(args.docs.read_text(encoding="utf-8"), "table", table(report)), encoding="utf-8")


if __name__ == "__main__":
    main()
