"""Does matching win? The paper ties core tokens and core neurons together; here they are tied, apart, and alone.

    token-only     image tokens dropped, every neuron         neuron-only   every token, neurons dropped
    independent    both; neurons counted on all tokens        matched       both; neurons counted on kept tokens only
    random         both, by chance, of the same sizes         dense         nothing dropped

With `overlap` the tokens are those that drive the sentence's core neurons, and matched neurons are those that the kept
tokens drive: CoreMatching (arXiv 2505.19235, section 3) in both directions. All arms with both decode the same number of
FFN rows and image tokens. Default cache: "index", since only there every layer has seen all tokens that may be counted.

    python benchmarks/matching.py scenes.plan --out benchmarks/policies/matching.json --docs docs/policies.md
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from _page import rewrite, write_report

from cm_export.base import by_name
from cm_export.base.hashes import key_of
from cm_export.bundle.bundle import Bundle
from cm_export.evals.compare import Comparison, Row
from cm_export.evals.exam import Exam
from cm_export.evals.journal import Journal
from cm_export.evals.other_policies import with_policies
from cm_export.evals.task import Task, load
from cm_export.host.runner import Budget, Runner
from cm_export.recipe.recipe import Recipe

# name -> the [tokens] that differ from the bundle's
TOKENS = {
    "overlap": {"policy": "overlap", "voters": "all"},  # the paper
    "overlap, text votes": {"policy": "overlap", "voters": "text"},
    "attention": {"policy": "attention", "voters": "all"},
    "value": {"policy": "value", "voters": "all"},
    "spread_keys": {"policy": "spread_keys"},
    "diverse": {"policy": "diverse", "voters": "all"},
}
USUAL = ("overlap", "overlap, text votes", "attention", "spread_keys")
FIGURES = ("accuracy", "ci", "of_dense", "of_dense_ci", "kl", "top1", "neuron_share", "token_share", "n", "right")


def arms(base: Recipe, neurons: list[str], tokens: list[str]) -> list[tuple[dict[str, str], Recipe]]:
    """What is compared, in the order of the table: (names for the reader, recipe)."""
    alone = base.replace(neurons__policy="dense"), base.replace(tokens__policy="dense")
    chance = base.replace(neurons__policy="random", tokens__policy="random")
    out = [({"arm": "random", "neurons": "random", "tokens": "random"}, chance)]
    for t in tokens:
        out.append(({"arm": "token-only", "neurons": "dense", "tokens": t}, _with(alone[0], t)))
    for n in neurons:
        out.append(({"arm": "neuron-only", "neurons": n, "tokens": "dense"}, alone[1].replace(neurons__policy=n)))
    for n in neurons:
        for t in tokens:
            for arm, counted in (("independent", "all"), ("matched", "kept")):
                recipe = _with(base, t).replace(neurons__policy=n, neurons__counted=counted)
                out.append(({"arm": arm, "neurons": n, "tokens": t}, recipe))
    return out


def _with(recipe: Recipe, tokens: str) -> Recipe:
    return recipe.replace(**{f"tokens__{k}": v for k, v in TOKENS[tokens].items()})


def paired(one: list[bool], other: list[bool]) -> dict[str, int]:
    """On how many questions only the first, and only the second, is right."""
    pairs = list(zip(one, other, strict=True))
    return {"only_matched": sum(a and not b for a, b in pairs), "only_independent": sum(b and not a for a, b in pairs)}


def run(runner: Runner, task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """The report; written to args.out after every arm."""
    started = time.perf_counter()
    base = Recipe().replace(
        neurons__share=args.neuron_share,
        tokens__share=args.token_share,
        tokens__prune_layer=args.prune_layer,
        tokens__cache=args.cache,
        seed=args.seed,
    )
    comparison = Comparison(Exam(runner, task, lambda *_: None))
    report: dict[str, Any] = {
        "bundle": runner.bundle.manifest["model"]["source"],
        "task": task.name,
        "command": " ".join(["python", *sys.argv]),
        "versions": runner.bundle.manifest["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s)",
        "rows": [],
    }
    with Journal(None, key_of(matching=report["command"])) as journal:
        dense = comparison.ask(Row(runner.recipe, Budget(dense=True)), runner, journal)
        rows = report["rows"]
        rows.append({"arm": "dense", "neurons": "dense", "tokens": "dense"} | {k: dense[k] for k in FIGURES})
        show(rows[-1])
        for names, recipe in arms(base, args.neurons, args.tokens):
            result = comparison.ask(Row(recipe, Budget(seed=args.seed)), with_policies(runner, recipe), journal, dense)
            rows.append(names | {k: result[k] for k in FIGURES})
            if names["arm"] == "matched":
                rows[-1] |= paired(rows[-1]["right"], rows[-2]["right"])
            show(rows[-1])
            report["seconds"] = time.perf_counter() - started
            if args.out:
                slim = [{k: v for k, v in r.items() if k != "right"} for r in rows]
                write_report(args.out, report | {"rows": slim})
    return report


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Mark on the page -> table."""
    lines = ["| arm | neurons | image tokens | exact match | of dense | KL | right where only the other arm is wrong |"]
    lines.append("|---|" + "---|" * 6)
    for r in report["rows"]:
        low, high = r["ci"]
        kept = f"{r['of_dense']:.3f} [{r['of_dense_ci'][0]:.3f}, {r['of_dense_ci'][1]:.3f}]"
        pairs = f"{r['only_matched']} matched, {r['only_independent']} independent" if "only_matched" in r else ""
        what = f"{r['neurons']} {r['neuron_share']:.0%} | {r['tokens']} {r['token_share']:.0%}"
        lines.append(
            f"| {r['arm']} | {what} | {r['accuracy']:.4f} [{low:.3f}, {high:.3f}] | {kept} | {r['kl']:.4f} | {pairs} |"
        )
    return {"matching": "\n".join(lines) + "\n"}


def show(row: dict[str, Any]) -> None:
    low, high = row["ci"]
    pairs = (
        f"  only it {row['only_matched']}, only independent {row['only_independent']}" if "only_matched" in row else ""
    )
    kl = "" if row["kl"] is None else f"  KL {row['kl']:.4f}"
    print(
        f"{row['arm']:12} {row['neurons']:10} {row['neuron_share']:4.0%} {row['tokens']:20} {row['token_share']:4.0%}  "
        f"{row['accuracy']:.4f} [{low:.3f}, {high:.3f}]{kl}{pairs}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="scenes")
    parser.add_argument("--kinds", nargs="+", default=[], help="kinds of question of the task; all")
    parser.add_argument("--limit", type=int, default=40, help="questions of each kind")
    parser.add_argument("--neurons", nargs="+", default=["griffin", "coreinfer"])
    parser.add_argument("--tokens", nargs="+", default=list(USUAL), choices=list(TOKENS), metavar="TOKENS")
    parser.add_argument("--neuron-share", type=float, default=0.6)
    parser.add_argument("--token-share", type=float, default=0.25)
    parser.add_argument("--prune-layer", type=int, default=2)
    parser.add_argument("--cache", choices=("index", "cut"), default="index")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the report is written here after every arm (.json)")
    parser.add_argument("--docs", type=Path, help="a page whose table is written anew (.md)")
    args = parser.parse_args()

    for name in args.neurons:
        by_name.load("cm_export.policies.neurons", name, "neuron policy")
    bundle = Bundle(args.bundle)
    bundle.wait_verified()
    task = load(args.task.replace("-", "_"), tuple(args.kinds), args.limit, args.seed)
    report = run(Runner(bundle, args.threads), task, args)
    rewrite(args.docs, tables(report))


if __name__ == "__main__":
    main()
