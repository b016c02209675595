"""What thresholds and low bits cost a real language model: bundles of one checkpoint, read along the dense model's own answers.

    python benchmarks/active.py --out benchmarks/quality/active.json --docs docs/active.md FP32.plan INT8.plan INT4.plan

The first bundle's dense model (float32) answers held-out prompts greedily, 64 tokens each. Then every bundle reads those answers,
dense and sparse at several shares (teacher forcing; the prompt was read densely).

    agreement   how often the first choice is the same      KL   nats, dense against sparse      both over all answer tokens

"own": against the same bundle without pruning; "float32": against the first bundle without pruning; "random": the same bundle
with as many channels and neurons of every product, drawn once and for all tokens, instead of those above thresholds. Bits read
per weight: scales and zeros included, in single steps (evals/weights_read.py); of float32 weights what the policy needs.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _page import rewrite, write_report

from cm_export.base import environment
from cm_export.base.metrics import divergences, wilson
from cm_export.bundle.bundle import Bundle
from cm_export.bundle.thresholds import SIDES
from cm_export.evals.weights_read import Steps, WeightsRead
from cm_export.families import Pictures
from cm_export.host.core_set import CoreSet
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
RANDOM = ((0.88, 0.95), (0.83, 0.95), (0.73, 0.8), (0.63, 0.8), (0.53, 1.0))  # those with a control
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


def core(runner: Runner, prefilled: Prefilled, shares: tuple[float, float]) -> CoreSet:
    """The thresholds of these shares."""
    table, whole = runner.bundle.thresholds, prefilled.core_of(None)
    assert table is not None
    of_site = table.shares(*shares)
    return CoreSet(None, whole.counts, whole.ffn, thresholds=table.at(of_site), shares=of_site)


def read(runner: Runner, prefilled: Prefilled, ids: list[int], chosen: CoreSet | None) -> np.ndarray:
    """[T,V]: logits before each token, all read in one pass; without thresholds: dense."""
    row = prefilled.row(chosen, graph="decode" if chosen else "decode_dense")
    Reader(runner.backend).read([row], [ids[:-1]])
    return np.concatenate([prefilled.logits, np.atleast_2d(row.logits)])


# ---------------------------------------------------------------- the random control
class AtRandom:
    """A bundle whose channels weigh what a lot says, so that thresholds keep a random set of the same size at every site.

    Channels of a site fall into classes by the sets of RANDOM that they belong to, each of which holds the next. Norms of
    neighbouring classes lie a factor 1e12 apart: whatever x is, its class decides. A channel of exactly 0 adds nothing.
    """

    def __init__(self, bundle: Bundle, threads: int):
        table = bundle.thresholds
        assert table is not None
        self._of_point = {point: table.shares(*point) for point in RANDOM}
        self._rng = np.random.default_rng(0)
        self._model = onnx.load(bundle.graph("decode"), load_external_data=False)
        self._replace_norms()
        self.runner = Runner(
            bundle, threads, graph=lambda name: self._model if name == "decode" else bundle.graph(name)
        )

    def core(self, prefilled: Prefilled, point: tuple[float, float]) -> CoreSet:
        """The random sets of a point."""
        whole, shares = prefilled.core_of(None), self._of_point[point]
        limits = [self._limit(site, share) for site, share in enumerate(shares)]
        return CoreSet(None, whole.counts, whole.ffn, thresholds=np.array(limits, np.float32), shares=shares)

    def _levels(self, site: int) -> list[float]:
        """The shares of a site, the largest first; at the first class everything is left out that none of them keeps."""
        return sorted({float(shares[site]) for shares in self._of_point.values()} | {1.0}, reverse=True)

    def _limit(self, site: int, share: float) -> float:
        return 0.0 if share == 1 else 10.0 ** (-36 + 12 * self._levels(site).index(float(share)))

    def _replace_norms(self) -> None:
        arrays = {t.name: t for t in self._model.graph.initializer}
        done: dict[str, int] = {}
        for node in self._model.graph.node:
            inputs = list(node.input)
            pairs = {"CoreLinear": [(2, 3)], "CoreFFN": [(4, 6), (5, 7)]}.get(node.op_type, [])
            for norm, limit in pairs:
                done[inputs[norm]] = int(inputs[limit].removeprefix("threshold."))
        assert set(done.values()) == set(range(max(done.values()) + 1)) and max(done.values()) % SIDES == 0
        for name, site in done.items():
            count = arrays[name].dims[0]
            rank, drawn = self._rng.permutation(count), np.full(count, -30.0)
            for level, share in enumerate(self._levels(site)):
                drawn[rank < round(share * count)] = -30 + 12 * level
            arrays[name].CopyFrom(onnx.numpy_helper.from_array((10.0**drawn).astype(np.float32), name))


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
    sparse = [runner.prefill(runner.ask(text, Pictures()), Budget()) for text in prompts[:2]]
    control = AtRandom(runner.bundle, threads)
    rows = []
    for shares in POINTS:
        found = [read(runner, one, own, core(runner, one, shares)) for one, own in zip(begun, ids, strict=True)]
        row: dict[str, Any] = {"ffn": shares[0], "rest": shares[1], "own": compared(dense, found)}
        row |= {"float32": compared(exact, found)}
        needs = bits_read(runner, sparse, ids, shares)
        row |= {"bits_read_per_weight": needs.bits, "read_exact": needs.exact}
        if shares in RANDOM:
            drawn = [
                read(control.runner, one, own, control.core(one, shares)) for one, own in zip(begun, ids, strict=True)
            ]
            row["random"] = compared(dense, drawn)
        rows.append(row)
        print(path.name, json.dumps(row), flush=True)
    weights = runner.recipe.weights
    about = {"bundle": path.name, "precision": weights.precision, "stored": weights.storing()}
    return about | {"dense_against_float32": compared(exact, dense), "rows": rows}


def bits_read(runner: Runner, begun: list[Prefilled], ids: list[list[int]], shares: tuple[float, float]) -> WeightsRead:
    """In single steps: several tokens at once would read what any of them needs."""
    for one in begun:
        one.core_set = core(runner, one, shares)
    steps, count = Steps(runner), 0
    with steps.counted():
        for one, own in zip(begun, ids, strict=False):
            for token in own[:8]:
                Reader(runner.backend).read([one.row(graph="decode")], [[token]])
                count += 1
    return steps.per_step(begun[0], count)


def table(report: dict[str, Any]) -> str:
    """The table of the page."""
    lines = ["| weights | FFN | rest | bits read per weight | agreement with its own dense | KL | random: agreement | KL "
             "| with float32 dense | KL |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for bundle in report["bundles"]:
        for row in bundle["rows"]:
            own, other, drawn = row["own"], row["float32"], row.get("random")
            cells = [
                bundle["precision"],
                f"{row['ffn']:.2f}",
                f"{row['rest']:.2f}",
                f"{row['bits_read_per_weight']:.2f}",
            ]
            cells += [f"{own['agreement']:.3f} [{own['ci'][0]:.3f}, {own['ci'][1]:.3f}]", f"{own['kl']:.4f}"]
            cells += [f"{drawn['agreement']:.3f}", f"{drawn['kl']:.2f}"] if drawn else ["", ""]
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
    rewrite(args.docs, {"table": table(report)})


if __name__ == "__main__":
    main()
