"""The race: bundles of this project beside OpenVINO GenAI, on the same checkpoint, pictures and questions.

    python benchmarks/bench_peers.py --out benchmarks/peers.json --docs docs/race.md
    python benchmarks/bench_peers.py --large --only int4 ...                # the sizes of Qwen2-VL-2B

One process a contestant, all alive; a round asks each of them the same new question about the same new picture, in an order that
changes with the round. Greedy answers of exactly 64 tokens. The first round warms up and is not counted.
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from _page import rewrite, write_report
from peers import page
from peers.artifacts import Artifacts
from peers.checkpoint import SIZES
from peers.contestants import CONTESTANTS, Contestant, order
from peers.process import Process

from cm_export.base import environment
from cm_export.base.errors import CmExportError, InputError

COUNTED = ("picture_ms", "prompt_ms", "first_ms", "decode_ms", "answer_ms", "read_mb", "read_share")


def question(turn: int, pixels: int, tokens: int) -> dict[str, Any]:
    """A new one each round: a repeated prompt is answered from a cache by some."""
    text = f"{turn} is the number of this question. What does picture {7 * turn + 3} show, and what is beside it?"
    return {"seed": turn, "pixels": pixels, "prompt": text, "tokens": tokens}


def parts(said: dict[str, Any]) -> dict[str, float]:
    """The times of one answer by phase: picture | prompt | first token | decode, a token."""
    out = {name: said[name] for name in COUNTED if name in said}
    if "picture_ms" in said:
        out["prompt_ms"] = said["first_ms"] - said["picture_ms"]
    out["decode_ms"] = (said["answer_ms"] - said["first_ms"]) / (said["tokens"] - 1)
    return out


def measure(racing: list[Contestant], artifacts: Artifacts, args: argparse.Namespace) -> dict[str, Any]:
    """{"contestants": rows, "left_out": who ended on the way and why, "others_cores": ...}"""
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as held:
        processes: dict[str, Process] = {}
        for contestant in racing:
            try:
                processes[contestant.name] = Process(contestant, artifacts, args.threads)
                held.callback(processes[contestant.name].close)
            except CmExportError as error:
                left_out[contestant.name] = error.what
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        busy = _Busy([p.pid for p in processes.values()])
        for turn in range(args.repeats + 1):
            for name in order(list(processes), turn):
                asked = question(turn, args.pixels, args.tokens)
                found[name].append(processes[name].ask(asked))
                print(f"round {turn} of {args.repeats}: {name}: {found[name][-1]['answer_ms']:.0f} ms", file=sys.stderr)
        rows = []
        for name, process in processes.items():
            counted = [parts(said) for said in found[name][1:]]
            row: dict[str, Any] = {"name": name, **process.about, "n": len(counted), "load_s": process.load_s}
            row |= {part: page.quartiles([c[part] for c in counted]) for part in COUNTED if part in counted[0]}
            last = found[name][-1]
            row |= {k: last[k] for k in ("prompt_tokens", "kept_tokens") if k in last}
            rows.append(row | {"peak_memory_mb": process.peak_memory() / 1e6})
        return {"contestants": rows, "left_out": left_out, "others_cores": busy.others()}


class _Busy:
    """How many cores other work on the machine used meanwhile: a figure measured beside it is worth less."""

    def __init__(self, pids: list[int]):
        self._own = [psutil.Process(pid) for pid in [os.getpid(), *pids]]
        self._at = time.perf_counter(), self._machine(), self._race()

    def others(self) -> float:
        started, machine, race = self._at
        spent = time.perf_counter() - started
        return max(0.0, (self._machine() - machine - (self._race() - race)) / spent)

    def _machine(self) -> float:
        t = psutil.cpu_times()
        return t.user + t.nice + t.system + getattr(t, "irq", 0) + getattr(t, "softirq", 0)

    def _race(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in self._own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("artifacts/peers"), help="where everything is made and kept"
    )
    parser.add_argument("--large", action="store_true", help="the sizes of Qwen2-VL-2B: some hours and 20 GB of memory")
    parser.add_argument("--only", nargs="+", default=[""], help="contestants whose name has one of these texts")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=448, help="side of a picture; 448: 256 image tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rebuild", action="store_true", help="make this project's bundles anew")
    parser.add_argument("--measure-only", action="store_true", help="make nothing; refuse where something is missing")
    parser.add_argument("--out", type=Path, help="the report, JSON")
    parser.add_argument("--docs", type=Path, help="a page whose part between two marks is written anew")
    args = parser.parse_args()
    try:
        report = race(args)
    except CmExportError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(page.text(report))
    if args.out:
        write_report(args.out, report)
    rewrite(args.docs, {"race": page.text(report)})


def race(args: argparse.Namespace) -> dict[str, Any]:
    """Make what is missing, then measure. Raises InputError."""
    if args.repeats < 1 or args.tokens < 2:
        raise InputError("measures nothing", where="--repeats, --tokens", fix="give at least 1 and 2")
    racing = [c for c in CONTESTANTS if any(text.lower() in c.name.lower() for text in args.only)]
    if not racing:
        names = ", ".join(c.name for c in CONTESTANTS)
        raise InputError("no contestant has such a name", where="--only", fix=f"give a part of one of: {names}")
    sizes = "2b" if args.large else "mid"
    artifacts = Artifacts(args.folder, sizes, args.threads, lambda what: print(what, file=sys.stderr))
    if args.measure_only:
        for contestant in racing:
            artifacts.check(contestant)
        left_out = {}
    else:
        left_out = artifacts.make(racing, args.rebuild)
    report: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "sizes": {sizes: vars(SIZES[sizes])}}
    report |= {"environment": environment.describe(args.threads, {}), "load_average_before": os.getloadavg()[0]}
    report |= {"pixels": args.pixels, "tokens": args.tokens, "repeats": args.repeats}
    found = measure([c for c in racing if c.name not in left_out], artifacts, args)
    return report | found | {"left_out": left_out | found["left_out"]}


if __name__ == "__main__":
    main()
