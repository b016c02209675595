"""Tokens a second of the guard beside dense decoding of the same bundle, at the same answer: one process, the two in turn.

    python benchmarks/lossless.py scenes-int4.plan smollm2-int4.plan --out benchmarks/lossless.json --docs docs/guard.md

Questions of the task scenes for its model, made-up prompts for one without pictures; for the latter also prompts that ask for a
text to be copied, a row of their own: there drafts can be looked up. Every prompt is answered by `--dense` and
with the guard, now the one first, now the other; only decode is timed. `identical`: answers that are equal, token for token.
gain = dense seconds / guarded seconds, of all prompts together and by prompt (median, quartiles). Beside it what host/drafting.py
knew at the end: cost of a sparse step and of checks (in dense steps), acceptance, and the gain that follows from them.

A run may be cut in pieces: after --seconds it writes what it has, and the same command goes on from there (drafts begin anew).
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from _page import rewrite, write_report

from cm_export.base import environment
from cm_export.evals.tasks import scenes
from cm_export.families import Pictures
from cm_export.host.drafting import best_length, steady
from cm_export.host.guard import EVERY, Report, guarded
from cm_export.host.loaded import load
from cm_export.host.request import Request
from cm_export.host.runner import Budget, Runner
from cm_export.host.sampling import PLAIN, Chooser

ASKED = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "List five facts about {}.",
    "What is the history of {}?",
    "Why do people care about {}?",
    "Give three tips for someone who wants to learn about {}.",
    "Write a short story in which {} matters.",
    "What would the world be like without {}?",
    "Describe {} in two sentences.",
    "Write a polite letter that asks for a book about {}.",
)
TOPICS = (
    "the moon", "bread", "bicycles", "rain", "libraries", "honey bees", "mountains", "the piano", "maps", "salt",
    "trains", "chess", "the ocean", "paper", "gardens", "clocks", "wool", "lighthouses", "tea", "rivers",
)  # fmt: skip
COPIED = (
    "Repeat the following text word for word: {}",
    "Copy this paragraph exactly as it is.\n\n{}",
    "Correct the spelling of this text, and change nothing else:\n\n{}",
    "Here is a note. {} Write the note again without any change.",
)
NOTES = (
    "The library near {0} opens at nine on weekdays. Visitors who bring a map of {0} may borrow two books for a week.",
    "Our club meets on Tuesday to talk about {0}. Bring a pencil, a notebook and one question about {0} for the group.",
)
ORDINARY, COPYING = "ordinary", "copying"
KEPT = ("drafted", "kept", "looked_up", "looked_up_kept", "phrases", "phrases_kept", "share", "gain")


def requests(runner: Runner, count: int, kind: str = ORDINARY) -> list[tuple[str, Any]]:
    """(name, how to make the request) of every prompt."""
    if runner.bundle.tower is None:
        texts = [asked.format(topic) for topic, asked in itertools.product(TOPICS, ASKED)]
        if kind == COPYING:
            made_up = (asked.format(note.format(topic)) for topic in TOPICS for note in NOTES for asked in COPIED)
            texts = list(made_up)
        return [(text, lambda text=text: runner.ask(text, Pictures())) for text in texts[:count]]
    each = -(-count // len(scenes.KINDS))
    asked = itertools.chain(*zip(*(scenes.questions(kind)[:each] for kind in scenes.KINDS), strict=True))

    def made(question: Any) -> Request:
        return runner.ask(question.text, runner.see([scenes.open_picture(question.pictures[0])]))

    return [(f"{q.pictures[0]}: {q.text}", lambda q=q: made(q)) for q in itertools.islice(asked, count)]


def dense(runner: Runner, request: Request, limit: int) -> tuple[list[int], float, None]:
    """Ids of the dense answer, and seconds of its decode."""
    prefilled = runner.prefill(request, Budget(dense=True))
    started = time.perf_counter()
    ids = list(runner.tokens(prefilled, limit, runner.chat.stop_ids))
    return ids, time.perf_counter() - started, None


def checked(runner: Runner, request: Request, limit: int) -> tuple[list[int], float, dict[str, Any]]:
    """The same with the guard, and its report. Greedy, as `tokens` is."""
    prefilled, report = runner.prefill(request, Budget()), Report(EVERY)
    choose = Chooser(PLAIN, request.ids, runner.chat.stop_ids)
    started = time.perf_counter()
    ids = list(guarded(runner, prefilled, limit, choose, report))
    return ids, time.perf_counter() - started, report.to_dict()


def known(runner: Runner) -> dict[str, Any]:
    """What drafts cost and how many are right, as the guard has measured it, and the best gain that follows."""
    habits = runner.habits
    cost = habits.costs.sparse(habits.share, lambda: float("nan"))
    checks = {str(rows): habits.costs.check(rows) for rows in (2, 5, 9, 17)}
    length, gain = best_length(steady(habits.accepted.rate, EVERY), cost, habits.costs.check)
    return {"share": habits.share, "sparse_step": cost, "checks": checks, "accepted": habits.accepted.rate} | {
        "best_length": length,
        "gain": gain,
    }


def measure(runner: Runner, path: Path, args: argparse.Namespace, before: dict[str, Any], kind: str) -> dict[str, Any]:
    """Adds a row for every prompt that has none yet, as long as there is time."""
    rows: list[dict[str, Any]] = before.get("rows", [])
    asked, done = requests(runner, args.prompts, kind), {row["prompt"] for row in rows}
    if before and len(done) == len(asked):
        return before
    started = time.perf_counter()
    for number, (name, make) in enumerate(asked):
        if name in done:
            continue
        request, first = make(), number % 2
        if not number or name == asked[len(done)][0]:  # sessions are made once
            for way in (dense, checked):
                way(runner, request, 4)
        found = {}
        for way in (dense, checked)[:: 1 if first else -1]:
            found[way.__name__] = way(runner, request, args.tokens)
        (ids, dense_s, _), (again, guarded_s, report) = found["dense"], found["checked"]
        assert report is not None
        row = {
            "prompt": name,
            "tokens": len(ids),
            "identical": ids == again,
            "dense_s": dense_s,
            "guarded_s": guarded_s,
        }
        rows.append(row | {k: report[k] for k in KEPT})
        if time.perf_counter() - started > args.seconds:
            break
    recipe = runner.recipe
    about = {"bundle": path.name, "weights": recipe.weights.precision, "neurons": recipe.neurons.policy}
    return about | {"prompts": kind, "of": len(asked), "known": known(runner), "rows": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table shows of one bundle."""

    def total(key: str) -> float:
        return sum(row[key] for row in rows)

    each = sorted(row["dense_s"] / row["guarded_s"] for row in rows if row["tokens"])
    sparse = total("drafted") - total("looked_up") - total("phrases")
    sparse_kept = total("kept") - total("looked_up_kept") - total("phrases_kept")
    return {
        "prompts": len(rows),
        "identical": sum(row["identical"] for row in rows),
        "tokens": total("tokens"),
        "dense_per_s": total("tokens") / total("dense_s"),
        "guarded_per_s": total("tokens") / total("guarded_s"),
        "gain": total("dense_s") / total("guarded_s"),
        "gain_quartiles": statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3,
        "sparse": [sparse_kept, sparse],
        "looked_up": [total("looked_up_kept"), total("looked_up")],
        "phrases": [total("phrases_kept"), total("phrases")],
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Of all bundles."""
    lines = [
        "| bundle, prompts | n | identical | tokens | dense, tokens/s | guard | gain | by prompt | sparse, kept "
        "| looked up, kept | phrases, kept | predicted |",
        "|" + "---|" * 12,
    ]
    for case in cases:
        s, of, name = summary(case["rows"]), case["known"], f"{case['bundle']}, {case['prompts']}"
        low, middle, high = s["gain_quartiles"]
        counts = (s["sparse"], s["looked_up"], s["phrases"])
        kept = " | ".join(f"{k:.0f} of {n:.0f}" + (f" ({k / n:.2f})" if n else "") for k, n in counts)
        lines.append(
            f"| {name} | {s['prompts']} | {s['identical']} | {s['tokens']:.0f} | {s['dense_per_s']:.0f} "
            f"| {s['guarded_per_s']:.0f} | {s['gain']:.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] | {kept} "
            f"| c {of['sparse_step']:.2f}, v(5) {of['checks']['5']:.2f}, a {of['accepted']:.2f}: {of['gain']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, help="with low-bit weights and policy `active`")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="for each bundle, after which it stops")
    parser.add_argument("--out", type=Path, required=True, help="rows that are there are kept")
    parser.add_argument("--docs", type=Path, help="a page whose table is written anew")
    args = parser.parse_args()
    before = json.loads(args.out.read_text()) if args.out.exists() else {"cases": []}
    cases = {(case["bundle"], case["prompts"]): case for case in before["cases"] if "prompts" in case}
    for path in args.bundles:
        runner = load(path, args.threads, lambda *a: None)
        for kind in (ORDINARY,) if runner.bundle.tower else (ORDINARY, COPYING):
            case = (path.name, kind)
            cases[case] = measure(runner, path, args, cases.get(case, {}), kind)
            cases[case]["summary"] = summary(cases[case]["rows"])
    report = {
        "command": "python benchmarks/lossless.py " + " ".join(p.name for p in args.bundles),
        "environment": environment.describe(args.threads, {}),
        "unit": "seconds of decode; gain = dense / guarded",
        "threads": args.threads,
        "cases": list(cases.values()),
    }
    write_report(args.out, report)
    print(table(report["cases"]))
    rewrite(args.docs, {"lossless": table(report["cases"])})


if __name__ == "__main__":
    main()
