"""What `cm-export serve` adds to a step, and what it carries: 1 to 8 clients, beside the same answers in one process.

    python benchmarks/serve.py artifacts/demo.plan --out benchmarks/serve.json --docs docs/serve.md --users docs/scale.md

Every client asks about pictures of its own and gets answers of a set length, as events. Times are the client's, but for `step`,
which is the decode loop's own (`decode_s` of the answer). Clients run in this process, the server in another, on the same cores.
added = client's time a token - time a token of the same answer in one process, both alone; medians with quartiles.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from _page import between, write_report

import cm_export
from cm_export.base import environment
from cm_export.host.sampling import Sampling
from cm_export.recipe.aliases import DEMO
from cm_export.serving.client import Question, Server

QUESTION = "describe the image."
IMAGES = [DEMO.parent / "pictures" / "four-shapes.png", *sorted((DEMO.parent / "images").glob("*.png"))]


def spread(values):
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def in_process(model, tokens, repeats):
    """Milliseconds a token of `repeats` answers in this process, after one that warms up."""
    how = Sampling(min_new_tokens=tokens, max_new_tokens=tokens)
    answers = [model.generate(QUESTION, IMAGES[0], sampling=how).stats for _ in range(repeats + 1)]
    return [1000 * a["decode_s"] / (tokens - 1) for a in answers[1:]]


def asked(url, number, tokens):
    """One request: times of its pieces and what the server says about it."""
    fields = {"max_tokens": tokens, "min_tokens": tokens}
    started, times = time.perf_counter(), []
    pieces = Server(url, "demo").ask(Question(QUESTION, [IMAGES[number % len(IMAGES)].read_bytes()], fields=fields))
    while True:
        try:
            next(pieces)
            times.append(time.perf_counter())
        except StopIteration as end:
            stats = end.value
            break
    return {
        "first_ms": 1000 * (times[0] - started),
        "token_ms": 1000 * (times[-1] - times[0]) / (stats["new_tokens"] - 1),
        "step_ms": 1000 * stats["decode_s"] / (stats["new_tokens"] - 1),
        "tokens": stats["new_tokens"],
    }


def load(url, server, clients, tokens, rounds):
    """What `clients` clients get that each ask `rounds` times, one request after the other."""

    def one(number):
        return [asked(url, number, tokens) for _ in range(rounds)]

    spent, started = sum(server.cpu_times()[:2]), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(one, range(clients)) for answer in found]
    wall = time.perf_counter() - started
    return {
        "clients": clients,
        "tokens_per_s": sum(a["tokens"] for a in answers) / wall,
        "requests_per_s": len(answers) / wall,
        "server_processors": (sum(server.cpu_times()[:2]) - spent) / wall,
        **{name: spread([a[name] for a in answers]) for name in ("first_ms", "token_ms", "step_ms")},
    }


def rows_per_step(url):
    """(sum, count) of the rows of all steps so far."""
    connection = HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/metrics")
    lines = dict(
        line.split() for line in connection.getresponse().read().decode().splitlines() if " " in line and line[0] != "#"
    )
    connection.close()
    return float(lines["cm_export_batch_rows_sum"]), float(lines["cm_export_batch_rows_count"])


def measure(bundle, threads, lanes, tokens, rounds):
    """The whole report."""
    with cm_export.load(bundle, threads=threads) as model:
        alone = in_process(model, tokens, rounds)
        versions = model.bundle.manifest["versions"]
    command = [
        sys.executable,
        "-m",
        "cm_export",
        "serve",
        bundle,
        "--name",
        "demo",
        "--port",
        0,
        "--threads",
        threads,
        "--lanes",
        lanes,
        "--quiet",
    ]
    started = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url, rows = started.stdout.readline().strip(), []
        server = psutil.Process(started.pid)
        for number in range(8):
            asked(url, number, 8)  # warms up
        for clients in (1, 2, 4, 8):
            before = rows_per_step(url)
            row = load(url, server, clients, tokens, rounds)
            after = rows_per_step(url)
            rows.append(row | {"rows_per_step": (after[0] - before[0]) / (after[1] - before[1])})
    finally:
        started.terminate()
        started.wait()
    with cm_export.load(bundle, threads=threads) as model:
        alone += in_process(model, tokens, rounds)
    found = spread(alone)
    return {
        "in_process_ms": found,
        "added_ms": rows[0]["token_ms"]["median"] - found["median"],
        "gain_at_4": rows[2]["tokens_per_s"] / rows[0]["tokens_per_s"],
        "rows": rows,
        "tokens": tokens,
        "threads": threads,
        "lanes": lanes,
        "environment": environment.describe(threads, versions),
    }


def table(found):
    """The rows for a page."""
    text = lambda s: f"{s['median']:.1f} [{s['q1']:.1f}, {s['q3']:.1f}]"  # noqa: E731
    lines = [
        "| clients | tokens/s, all | answers/s | first token, ms | a token, ms | its step, ms | rows a step | processors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['clients']} | {row['tokens_per_s']:.0f} | {row['requests_per_s']:.2f} "
            f"| {text(row['first_ms'])} | {text(row['token_ms'])} | {text(row['step_ms'])} "
            f"| {row['rows_per_step']:.1f} | {row['server_processors']:.2f} |"
        )
    env = found["environment"]
    lines += [
        "",
        f"In one process a token takes {text(found['in_process_ms'])} ms (n = {found['in_process_ms']['n']}), so the server adds "
        f"{found['added_ms']:.2f} ms to each; four clients get {found['gain_at_4']:.2f} times the tokens of one.",
        f"Answers of {found['tokens']} tokens; `--threads {found['threads']} --lanes {found['lanes']}`; {env['processor']}, "
        f"{env['cores']} cores, {env['date'][:10]}.",
        "",
    ]
    return "\n".join(lines)


def users(found):
    """How many users the answers a second of 8 clients are enough for."""
    busiest = max(found["rows"], key=lambda row: row["requests_per_s"])
    best, processors = busiest["requests_per_s"], busiest["server_processors"]
    lines = ["| a user asks every | users, at .7 of the answers a second |", "|---|---|"]
    lines += [
        f"| {name} | {0.7 * best * seconds:.0f} |"
        for name, seconds in (("10 s", 10), ("minute", 60), ("5 minutes", 300))
    ]
    counts = f"{best:.2f} answers a second on {processors:.2f} processors: {best / processors:.2f} for each."
    return "\n".join([*lines, "", counts, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8, help="answers of each client")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="a page whose table, between two marks, is written anew")
    parser.add_argument("--users", type=Path, help="the same, for how many users that is")
    args = parser.parse_args()
    found = measure(args.bundle, args.threads, args.lanes, args.tokens, args.rounds)
    write_report(args.out, found)
    print(json.dumps({k: found[k] for k in ("in_process_ms", "added_ms", "gain_at_4")}), table(found), sep="\n")
    if args.users:
        args.users.write_text(between(args.users.read_text(), "users", users(found)))
    if args.docs:
        args.docs.write_text(between(args.docs.read_text(), "serve", table(found)))


if __name__ == "__main__":
    main()
