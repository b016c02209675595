"""What the guard costs where nothing is wrong: guarded decode beside sparse decode of the same answer, in one process.

    python benchmarks/guard.py artifacts/guard.plan --random artifacts/mid.plan --out benchmarks/guard.json --docs docs/guard.md

Bundles with a whole cache (`--token-cache index`). Two cases: the demo model's sentences whose sparse answer is the dense
one; and random weights, where no draft would agree: there each step does its full work and the *dense* id is put in the
place of the drafted one. Time is the process's own processor time on one thread, which other work on the machine hardly
moves; wall time is kept beside it. overhead = guarded / sparse - 1, answer by answer; medians with quartiles.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from _page import rewrite, write_report

from cm_export.base import environment
from cm_export.bundle.bundle import Bundle
from cm_export.evals.bench import made_up_request
from cm_export.evals.tasks import easy_vqa
from cm_export.host import guard
from cm_export.host.images import open_image
from cm_export.host.runner import Budget, Runner
from cm_export.host.sampling import PLAIN, Chooser

NEVER = frozenset({-1})


class Forced:
    """A backend whose sparse decoders work as they should and then say the id that the dense model says."""

    def __init__(self, backend, ids, prompt):
        self._backend, self._ids, self._prompt = backend, ids, prompt

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def decoder(self, graph, cores, few_rows=False):
        made = self._backend.decoder(graph, cores, few_rows)
        return Says(made, self._ids, self._prompt) if graph == "decode" else made


class Says:
    """A decoder of one request that reads and then says ids of its own."""

    def __init__(self, decoder, ids, prompt):
        self._decoder, self._ids, self._prompt = decoder, ids, prompt

    def read(self, tokens, cache):
        logits, cache = self._decoder.read(tokens, cache)
        out = np.zeros_like(logits)
        out[0, -1, self._ids[min(len(tokens.masks[0]) - self._prompt, len(self._ids) - 1)]] = 1
        return out, cache


def both(runner, prefilled, limit, stop, every):
    """Seconds of sparse and of guarded decode, (processor, wall) each, and whether both gave the same ids."""
    report = guard.Report(every)
    runs = (
        lambda: list(runner.tokens(prefilled, limit, stop)),
        lambda: list(guard.guarded(runner, prefilled, limit, Chooser(PLAIN, prefilled.request.ids, stop), report)),
    )
    spent, said = [], []
    for run in runs:
        started = time.process_time(), time.perf_counter()
        said.append(run())
        spent.append((time.process_time() - started[0], time.perf_counter() - started[1]))
    return spent, said[0] == said[1] and report.kept == report.drafted, len(said[0])


def row(case, every, rows):
    """Medians and quartiles of one case; rows: what `both` returned."""

    def quartiles(values):
        values = sorted(values)
        low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return {"median": mid, "q1": low, "q3": high}

    out = {"case": case, "every": every, "n": len(rows), "tokens": statistics.median(r[2] for r in rows)}
    for i, clock in enumerate(("processor", "wall")):
        out[f"sparse_ms_{clock}"] = quartiles([1000 * s[0][i] / n for s, _, n in rows])
        out[f"guarded_ms_{clock}"] = quartiles([1000 * s[1][i] / n for s, _, n in rows])
        out[f"overhead_{clock}"] = quartiles([s[1][i] / s[0][i] - 1 for s, _, n in rows])
    return out


def demo(path, every, limit):
    """Sentences of easy-VQA whose sparse answer, at the recipe's budget, is the dense one."""
    runner, rows = Runner(Bundle(path), 1), []
    stop, asked = runner.chat.stop_ids, easy_vqa.questions("sentence")
    for question in asked[:: max(1, len(asked) // limit)][:limit]:
        request = runner.ask(question.text, runner.see([open_image(question.pictures[0])]))
        prefilled = runner.prefill(request, Budget())
        if not rows:  # the sessions are made once
            both(runner, prefilled, 30, stop, every)
        found = both(runner, prefilled, 30, stop, every)
        if found[1]:
            rows.append(found)
    n = runner.recipe.neurons
    return row(f"{runner.bundle.manifest['model']['source']}, {n.share:.0%} neurons, natural drafts", every, rows)


def random(path, every, tokens, repeats, share):
    """An answer of `tokens` ids; dense ids put in the place of drafted ones."""
    runner = Runner(Bundle(path), 1)
    request = made_up_request(runner, 32, runner.tower.sized(256, np.random.default_rng(0)))
    dense = list(runner.tokens(runner.prefill(request, Budget(dense=True)), tokens, NEVER))
    prefilled = runner.prefill(request, Budget(neuron_share=share))
    runner.backend = Forced(runner.backend, dense, request.tokens)
    rows = []
    for _ in range(repeats + 1):
        found = both(runner, prefilled, tokens, NEVER, every)
        if not found[1]:
            raise SystemExit("forced drafts were not all kept: this measures nothing")
        rows.append(found)
    shape = runner.bundle.shape
    sizes = f"random weights, hidden {shape.hidden}, FFN {shape.ffn}, {shape.layers} layers, vocabulary {shape.vocab}"
    return row(f"{sizes}, {share:.0%} neurons, forced drafts", every, rows[1:])


def table(rows):
    lines = ["| case | draft | n | tokens | sparse, ms a token | guarded | overhead | by wall time |", "|" + "---|" * 8]
    for r in rows:
        s, g, o, w = (
            r[k] for k in ("sparse_ms_processor", "guarded_ms_processor", "overhead_processor", "overhead_wall")
        )
        spread = f"{100 * o['median']:.0f} % [{100 * o['q1']:.0f}, {100 * o['q3']:.0f}]"
        lines.append(
            f"| {r['case']} | {r['every']} | {r['n']} | {r['tokens']:.0f} | {s['median']:.2f} | {g['median']:.2f} | {spread} "
            f"| {100 * w['median']:.0f} % |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="of the demo model")
    parser.add_argument(
        "--random", type=Path, nargs="*", default=[], help="bundles of random weights (random_bundle.py)"
    )
    parser.add_argument("--every", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--neuron-share", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, help="a page whose table, between two marks, is written anew")
    args = parser.parse_args()
    rows = [demo(args.bundle, every, args.questions) for every in args.every]
    rows += [
        random(path, every, args.tokens, args.repeats, share)
        for path in args.random
        for share in args.neuron_share
        for every in args.every
    ]
    print(table(rows))
    if args.out:
        versions = Bundle(args.bundle).manifest["versions"]
        found = {"command": "python " + " ".join(sys.argv), "environment": environment.describe(1, versions)}
        found |= {"unit": "ms a token; overhead = guarded / sparse - 1 of the same answer", "rows": rows}
        found["clock"] = "processor: time.process_time of one thread; wall: time.perf_counter"
        write_report(args.out, found)
    rewrite(args.docs, {"table": table(rows) + "\n"})


if __name__ == "__main__":
    main()
