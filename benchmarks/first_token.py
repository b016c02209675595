"""What a question waits for: from the start of the process to its first token, part by part, and the memory of its answer.

    python benchmarks/first_token.py artifacts/2b-int4.plan --out benchmarks/first_token.json --docs docs/speed.md

Every run is a process of its own that does what `cm-export run` does: import, open the bundle, see a picture, read the prompt,
write an answer. The pages of the bundle lie in the page cache (the first run is not counted). Waiting is what is left when
the vision graph and prefill have computed: import, tokenizer, sessions, and what of the hashes was not yet compared.

memory: the most that the process has held / (bytes of weights that it maps + its cache)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTS = ("import", "open", "sessions", "vision", "prefill", "hashes", "rest")
COMPUTING = ("vision", "prefill")


class Clock:
    """Seconds by part; what happens within a part counts for the inner one only."""

    def __init__(self, started: float):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside, self._since = ["rest"], started

    def book(self) -> None:
        """Up to now."""
        now = time.time()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs in here."""
        self.book()
        self._inside.append(name)
        yield
        self.book()
        self._inside.pop()

    def timed(self, owner: Any, method: str, name: str) -> None:
        """From now on calls of a method count for a part."""
        real = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return real(*args, **kwargs)

        setattr(owner, method, call)


def child(path: Path, started: float, args: argparse.Namespace) -> dict[str, Any]:
    """One process: its parts up to the first token, and its memory after the answer."""
    clock = Clock(started)
    with clock.part("import"):
        import numpy as np

        from cm_export.backends.onnxruntime.backend import Backend
        from cm_export.base import environment
        from cm_export.bundle.bundle import Bundle
        from cm_export.host.decode import Reader
        from cm_export.host.loaded import LoadedBundle
    for owner, method, part in (
        (Bundle, "__init__", "open"), (Bundle, "wait_read_verified", "hashes"), (Backend, "_load", "sessions"),
        (Backend, "vision", "vision"), (Backend, "prefill", "prefill"),
    ):  # fmt: skip
        clock.timed(owner, method, part)
    model = LoadedBundle(Bundle(path), args.threads)
    side = args.picture
    images = [np.full((side, side, 3), 127, np.uint8)] if side and model.bundle.tower else []
    first: dict[str, Any] = {}
    real = Reader.read

    def read(*reading: Any, **more: Any) -> Any:
        clock.book()
        first.setdefault("parts", dict(clock.seconds))
        first.setdefault("total", time.time() - started)
        return real(*reading, **more)

    Reader.read = read  # the first token is what it reads first
    stream = model.stream("word " * args.words, images, max_new_tokens=args.tokens)
    for _ in stream:
        pass
    if not first:
        sys.exit(f"{path}: the answer has one token, so nothing says when it was there; ask for other --words")
    shape, stats = model.bundle.shape, stream.answer.stats
    files = model.bundle.manifest["files"]
    weights = sum(f["bytes"] for name, f in files.items() if name in ("packed.safetensors", "weights.safetensors"))
    rows = stats["prompt_tokens"] + len(stream.answer.token_ids)
    return {
        **first,
        "prompt_tokens": stats["prompt_tokens"],
        "peak": environment.peak_memory_bytes(),
        "weights": weights,
        "cache": 2 * shape.layers * shape.kv_heads * model.bundle.recipe.weights.row_of_cache(shape.head_dim) * rows,
        "disk": sum(f["bytes"] for f in files.values()),
    }


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Medians and quartiles of several processes."""
    runs = []
    for number in range(args.repeats + 1):
        command = [sys.executable, __file__, str(path), "--child", str(time.time())]
        for option in ("threads", "picture", "words", "tokens"):
            command += [f"--{option}", str(getattr(args, option))]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ)
        if number:
            runs.append(json.loads(done.stdout))
    waits = [run["total"] - sum(run["parts"][p] for p in COMPUTING) for run in runs]
    peaks = [run["peak"] / (run["weights"] + run["cache"]) for run in runs]
    series = {p: [run["parts"][p] for run in runs] for p in PARTS}
    series |= {"first token": [run["total"] for run in runs], "without computing": waits, "memory": peaks}
    spread = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in series.items()}
    about = {key: runs[0][key] for key in ("prompt_tokens", "peak", "weights", "cache", "disk")}
    return {"bundle": path.name, "runs": len(runs), **about, "spread": spread}


def table(cases: list[dict[str, Any]]) -> str:
    """Of all bundles: seconds, and memory as a multiple of weights and cache."""
    columns = [*PARTS, "first token", "without computing", "memory"]
    lines = [f"| bundle | disk, MB | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for case in cases:
        cells = [f"{m:.2f} [{low:.2f}, {high:.2f}]" for low, m, high in (case["spread"][c] for c in columns)]
        lines.append(f"| {case['bundle']} | {case['disk'] / 1e6:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=int, default=448, help="pixels of a side, 0: none")
    parser.add_argument("--words", type=int, default=400, help="of the prompt, a token each or a few")
    parser.add_argument("--tokens", type=int, default=16, help="of the answer")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, help="a page whose table is written anew")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.bundles[0], args.child, args)))
        return
    from _page import rewrite, write_report

    from cm_export.base import environment

    known = (
        {c["bundle"]: c for c in json.loads(args.out.read_text())["cases"]} if args.out and args.out.exists() else {}
    )
    cases = known | {path.name: measure(path, args) for path in args.bundles}
    print(table(list(cases.values())))
    if args.out:
        report = {
            "command": "python benchmarks/first_token.py " + " ".join(p.name for p in args.bundles),
            "environment": environment.describe(args.threads, {}),
            "unit": "seconds: [lower quartile, median, upper quartile]; memory: peak / (weights + cache)",
            "threads": args.threads,
            "cases": list(cases.values()),
        }
        write_report(args.out, report)
    rewrite(args.docs, {"first token": table(list(cases.values()))})


if __name__ == "__main__":
    main()
