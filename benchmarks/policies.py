"""Policies of neurons and of tokens beside each other, at equal cost, with dense, random and attention as controls.

    neurons   every image token kept        share of the FFN's bytes per token (what `predicted` reads to choose included)
    tokens    every neuron computed         share of the image tokens
    joint     the recipe of the bundle at 25 % of the image tokens and at most 60 % of the FFN's bytes
    active    thresholds at two shares, all image tokens and a quarter of them

    python benchmarks/policies.py scenes.plan --out benchmarks/policies/scenes.json --docs docs/policies.md

The page has a set of marks for each model, such as `<!-- joint scenes -->`, and `<!-- beside -->` for both.

Every cell is `cm-export eval`: exact match of free-running greedy answers. A killed run goes on where it was. `--only active`
measures the rows of that neuron policy and puts them into the report that is there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from _page import rewrite, write_report

from cm_export.base import by_name
from cm_export.base.errors import InputError
from cm_export.bundle.bundle import Bundle
from cm_export.bundle.predictor import predictor_share
from cm_export.evals import task as _task
from cm_export.evals.compare import Sweep, compare
from cm_export.recipe import facts
from cm_export.recipe.recipe import from_dict

BYTES = (0.7, 0.6, 0.5, 0.4)
TOKENS = (0.5, 0.25, 0.11, 0.05)
ACTIVE = (0.53, 0.43)  # of the FFN's bytes, at which thresholds meet the token cut
MODELS = ("scenes", "scenes-llava")  # two architectures, shown beside each other
BESIDE = (  # what is shown of both: (what it is, part of the report, policies, share of the FFN's bytes, of the image tokens)
    ("the default: every neuron, `spread_keys` 50 %", "tokens", "dense + spread_keys", 1.0, 0.5),
    ("random tokens, as many", "tokens", "dense + random", 1.0, 0.5),
    ("`griffin` 60 %, `spread_keys` 25 %", "joint", "griffin + spread_keys", 0.6, 0.25),
    ("random choices, as many", "joint", "random + random", 0.6, 0.25),
    ("`griffin` 60 %, `attention` 25 %", "joint", "griffin + attention", 0.6, 0.25),
    ("`active` 53 %, `spread_keys` 25 %", "active", "active + spread_keys", 0.53, 0.25),
    ("`active` 43 %, `spread_keys` 25 %", "active", "active + spread_keys", 0.43, 0.25),
    ("`active` 43 %, every token", "active", "active + dense", 0.43, 1.0),
    ("`glass` 40 %, every token", "neurons", "glass + dense", 0.4, 1.0),
    ("`griffin` 40 %, every token", "neurons", "griffin + dense", 0.4, 1.0),
    ("`coreinfer` 40 %, every token", "neurons", "coreinfer + dense", 0.4, 1.0),
    ("random neurons 40 %, every token", "neurons", "random + dense", 0.4, 1.0),
)


def sweeps(bundle: Bundle, only: str | None = None) -> dict[str, list[Sweep]]:
    """What is compared, as sweeps of `eval`; policies that read a calibration only where the bundle has one.

    `only`: a neuron policy, of which everything that has no other policy of neurons beside it.
    """
    known = {part: by_name.names_in(f"cm_export.policies.{part}") for part in ("neurons", "tokens")}
    fixed, in_decode = [], []
    for name in known["neurons"]:
        policy = facts.neuron_policy(name)
        if name in ("dense", "random") or ("prior" in policy.wires and bundle.calibration is None):
            continue
        if (policy.by_threshold and bundle.thresholds is None) or name != (only or name):
            continue
        (in_decode if policy.in_decode else fixed).append(name)
    tokens = tuple(n for n in known["tokens"] if n not in ("dense", "random"))
    recipe = from_dict(bundle.manifest["recipe"])
    cost = predictor_share(bundle.shape.hidden)
    share = 0.6 - cost if recipe.neurons.in_decode else 0.6
    found = {
        "neurons": [
            Sweep(tuple(fixed), ("dense",), BYTES),
            Sweep(tuple(in_decode), ("dense",), tuple(round(b - cost, 6) for b in BYTES)),
        ],
        "tokens": [Sweep(("dense",), tokens, (), TOKENS)],
        "joint": [Sweep((recipe.neurons.policy,), (recipe.tokens.policy,), (share,), (0.25,))],
        "active": [Sweep(("active",), (t,), ACTIVE, (0.25,)) for t in ("dense", recipe.tokens.policy)],
    }
    if only:
        del found["tokens"], found["joint"]
    if only not in (None, "active") or bundle.thresholds is None:
        del found["active"]
    return {part: [s for s in several if s.neurons] for part, several in found.items()}


def measure(
    path: Path, task: _task.Task, threads: int, journal: Path, progress: Any, only: str | None
) -> dict[str, Any]:
    """One report per part, each from the reports of its sweeps; rows without the answers themselves."""
    found: dict[str, Any] = {}
    for part, several in sweeps(Bundle(path), only).items():
        rows: dict[str, dict] = {}
        for i, sweep in enumerate(several):
            report = compare(path, task, sweep, threads=threads, report=journal / f"{part}{i}.json", progress=progress)
            for row in report["rows"]:
                rows.setdefault(row["key"], {k: v for k, v in row.items() if k not in ("right", "key")})
        found[part] = list(rows.values())
        found["environment"], found["n"] = report["environment"], report["n"]
    return found


def merged(before: dict[str, Any], found: dict[str, Any], only: str) -> dict[str, Any]:
    """The report `before` with the rows of one neuron policy as `found` has them. Raises InputError for other questions."""
    exact = ("accuracy", "n")
    if [before["neurons"][0].get(k) for k in exact] != [found["neurons"][0].get(k) for k in exact]:
        what = "its dense model answers otherwise than this bundle's: rows would not compare"
        raise InputError(what, where="--out", fix="measure everything again, without --only")
    known = {(r["policies"], round(r["ffn_bytes_share"], 2)) for r in before["neurons"] if r["neurons"] != only}
    rows = [r for r in before["neurons"] if r["neurons"] != only]
    rows += [r for r in found["neurons"] if (r["policies"], round(r["ffn_bytes_share"], 2)) not in known]
    return before | {k: v for k, v in found.items() if k not in ("environment", "n")} | {"neurons": rows}


def of_dense(row: dict) -> str:
    return f"{row['of_dense']:.3f} [{row['of_dense_ci'][0]:.3f}, {row['of_dense_ci'][1]:.3f}]"


def table(rows: list[dict], column: str, columns: tuple[float, ...], name: str) -> str:
    """Markdown: one line per policy, accuracy as a share of dense with its paired 95 % interval, per budget."""
    lines = [f"| {name} | " + " | ".join(f"{c:.0%}" for c in columns) + " |", "|---|" + "---|" * len(columns)]
    dense = next(r for r in rows if r["policies"] == "dense")
    low, high = dense["ci"]
    lines.append(f"| dense | {dense['accuracy']:.4f} [{low:.3f}, {high:.3f}] exact match |" + " |" * (len(columns) - 1))
    cells: dict[str, dict[float, dict]] = {}
    for row in rows:
        if row is not dense:
            nearest = min(columns, key=lambda c: abs(c - row[column]))
            if abs(nearest - row[column]) < 0.02:
                cells.setdefault(row[name], {}).setdefault(nearest, row)

    for policy, found in sorted(cells.items(), key=lambda c: -sum(r["of_dense"] for r in c[1].values())):
        lines.append(f"| {policy} | " + " | ".join(of_dense(found[c]) if c in found else "" for c in columns) + " |")
    return "\n".join(lines) + "\n"


def joint_table(rows: list[dict]) -> str:
    """Markdown: the recipe and its controls, with accuracy, intervals, KL and top-1."""
    lines = ["| | neurons | FFN bytes | image tokens | exact match | of dense | KL | top-1 |", "|---|" + "---|" * 7]
    for r in rows:
        low, high = r["ci"]
        kept = f"{r['of_dense']:.4f} [{r['of_dense_ci'][0]:.3f}, {r['of_dense_ci'][1]:.3f}]"
        lines.append(
            f"| {r['policies']} | {r['neuron_share']:.1%} | {r['ffn_bytes_share']:.1%} | {r['token_share']:.1%} "
            f"| {r['accuracy']:.4f} [{low:.3f}, {high:.3f}] | {kept} | {r['kl']:.4f} | {r['top1']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def beside(reports: list[dict]) -> dict[str, str]:
    """The same of what both models keep of dense, beside each other."""
    lines = [
        "| share of dense | " + " | ".join(f"`{r['model']}`" for r in reports) + " |",
        "|---|" + "---|" * len(reports),
    ]
    for what, part, policies, ffn, tokens in BESIDE:
        found = []
        for report in reports:
            row = next(
                r
                for r in report[part]
                if r["policies"] == policies
                and abs(r["ffn_bytes_share"] - ffn) < 0.02
                and abs(r["token_share"] - tokens) < 0.02
            )
            found.append(of_dense(row))
        lines.append(f"| {what} | " + " | ".join(found) + " |")
    return {"beside": "\n".join(lines) + "\n"}


def tables(report: dict) -> dict[str, str]:
    """Mark on the page -> table, of one model."""
    found = {
        "neurons": table(report["neurons"], "ffn_bytes_share", BYTES, "neurons"),
        "tokens": table(report["tokens"], "token_share", TOKENS, "tokens"),
        "joint": joint_table(report["joint"]),
        "active": joint_table(report["active"]),
    }
    return {f"{mark} {report['model']}": text for mark, text in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="scenes")
    parser.add_argument("--limit", type=int, default=40, help="questions of each kind")
    parser.add_argument("--threads", type=int, default=1)
    folder = Path("artifacts/policies")
    parser.add_argument("--journal", type=Path, default=folder, help="answers so far of every bundle, to go on from")
    parser.add_argument("--only", help="a neuron policy, to measure its rows alone")
    parser.add_argument("--out", type=Path, required=True, help="the report (.json)")
    parser.add_argument("--docs", type=Path, help="a page whose tables are written anew (.md)")
    args = parser.parse_args()
    journal = args.journal / args.bundle.stem
    journal.mkdir(parents=True, exist_ok=True)

    def progress(what: str, done: int | None = None, total: int | None = None) -> None:
        if not done:
            print(what, flush=True)

    task = _task.load(args.task.replace("-", "_"), limit=args.limit)
    report = {
        "command": "make bench-policies",
        "task": task.name,
        "model": Bundle(args.bundle).manifest["model"]["source"],
    }
    found = measure(args.bundle, task, args.threads, journal, progress, args.only)
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.only else {}
    report |= merged(before, found, args.only) if args.only else found
    write_report(args.out, report)
    rewrite(args.docs, tables(report))
    known = [args.out.with_name(f"{name}.json") for name in MODELS]
    if all(file.exists() for file in known):
        rewrite(args.docs, beside([json.loads(file.read_text(encoding="utf-8")) for file in known]))


if __name__ == "__main__":
    main()
