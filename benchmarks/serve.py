"""What a server adds to a step, and what it carries: 1 to 8 clients of `cm-export serve`, and of Triton, beside one process.

    python benchmarks/serve.py artifacts/demo.plan --triton artifacts/triton --out benchmarks/serve.json --docs docs

Every client asks about pictures of its own and gets answers of a set length, as events. Times are the client's, but for `step`,
which is the decode loop's own (`decode_s` of the answer). Clients run in this process, the server in another, on the same cores.
added = client's time a token - time a token of the same answer in this process, asked right before; medians with quartiles.
"""

import argparse
import contextlib
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import _triton
import psutil
from _page import rewrite, write_report

import cm_export
from cm_export.base import environment
from cm_export.host.sampling import Sampling
from cm_export.recipe.aliases import DEMO
from cm_export.serving.client import Question, Server

QUESTION = "describe the image."
IMAGES = [DEMO.parent / "pictures" / "four-shapes.png", *sorted((DEMO.parent / "images").glob("*.png"))]
NAMES = {"serve": "`cm-export serve`", "triton": "Triton"}
CM_EXPORT = [sys.executable, "-m", "cm_export"]


def spread(values):
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


# ---------------------------------------------------------------- servers


@dataclass
class Running:
    """A server: where clients ask it, its processes, and all of its figures (name with labels -> value)."""

    url: str
    model: str
    processes: Callable[[], list[psutil.Process]]
    figures: Callable[[], dict[str, float]]

    def spent(self) -> float:
        """Seconds of processors so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def rows(self) -> tuple[float, float]:
        """(sum, count) of the rows of all steps so far."""
        found = {name.partition("{")[0]: value for name, value in self.figures().items()}
        return found["cm_export_batch_rows_sum"], found["cm_export_batch_rows_count"]


@contextlib.contextmanager
def serve(bundle: Path, options: list[str]) -> Iterator[Running]:
    """`cm-export serve`."""
    command = [*CM_EXPORT, "serve", str(bundle), "--name", "demo", "--port", "0", "--quiet", *options]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def figures() -> dict[str, float]:
        with contextlib.closing(HTTPConnection(urlsplit(url).netloc)) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}

    try:
        url = started.stdout.readline().strip()
        yield Running(url, "demo", lambda: [psutil.Process(started.pid)], figures)
    finally:
        started.terminate()
        started.wait()


@contextlib.contextmanager
def triton(bundle: Path, home: Path, options: list[str]) -> Iterator[Running]:
    """A real Triton server over a repository of the bundle, beside it so that its weights are links."""
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix=".models.") as folder:
        out = Path(folder) / "models"
        deploy = [*CM_EXPORT, "deploy", "triton", str(bundle), "--out", str(out), "--quiet", "--no-warm-up", *options]
        subprocess.run(deploy, check=True, stdout=subprocess.DEVNULL)
        server = _triton.Server(home, out, log=Path(folder) / "log")
        try:
            server.start()
            yield Running(server.url, "vlm", server.processes, server.metrics)
        finally:
            server.stop()


# ---------------------------------------------------------------- measuring


def in_process(model, tokens):
    """Milliseconds a token of an answer in this process."""
    how = Sampling(min_new_tokens=tokens, max_new_tokens=tokens)
    return 1000 * model.generate(QUESTION, IMAGES[0], sampling=how).stats["decode_s"] / (tokens - 1)


def asked(server, number, tokens):
    """One request: times of its pieces and what the server says about it."""
    fields = {"max_tokens": tokens, "min_tokens": tokens}
    started, times = time.perf_counter(), []
    question = Question(QUESTION, [IMAGES[number % len(IMAGES)].read_bytes()], fields=fields)
    pieces = Server(server.url, server.model).ask(question)
    while True:
        try:
            next(pieces)
            times.append(time.perf_counter())
        except StopIteration as end:
            stats = end.value
            break
    # A piece may hold several tokens, so the first token is there when the server says it was; what a request costs
    # besides, such as reading its picture, counts for the tokens after it.
    first_s = stats["queue_s"] + stats["ttft_s"]
    written = time.perf_counter() - started - first_s
    return {
        # Random weights may write tokens without a text.
        "first_ms": 1000 * (times[0] - started if times else first_s),
        "token_ms": 1000 * written / (stats["new_tokens"] - 1),
        "step_ms": 1000 * stats["decode_s"] / (stats["new_tokens"] - 1),
        "tokens": stats["new_tokens"],
    }


def load(server, clients, tokens, rounds):
    """What `clients` clients get that each ask `rounds` times, one request after the other."""

    def one(number):
        return [asked(server, number, tokens) for _ in range(rounds)]

    rows, spent, started = server.rows(), server.spent(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(one, range(clients)) for answer in found]
    wall, spent = time.perf_counter() - started, server.spent() - spent
    time.sleep(0.2)  # until Triton has heard of the last steps
    rows = [after - before for before, after in zip(rows, server.rows(), strict=True)]
    return {
        "clients": clients,
        "tokens_per_s": sum(a["tokens"] for a in answers) / wall,
        "requests_per_s": len(answers) / wall,
        "server_processors": spent / wall,
        "rows_per_step": rows[0] / rows[1],
        **{name: spread([a[name] for a in answers]) for name in ("first_ms", "token_ms", "step_ms")},
    }


def measure(bundle, home, threads, lanes, tokens, rounds, clients):
    """The whole report."""
    options = ["--threads", str(threads), "--lanes", str(lanes)]
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(cm_export.load(bundle, threads=threads))
        servers = {"serve": stack.enter_context(serve(bundle, options))}
        if home:
            servers["triton"] = stack.enter_context(triton(bundle, home, options))
        for number in range(max(clients)):  # warms up
            in_process(model, 8)
            for server in servers.values():
                asked(server, number, 8)
        alone, added = [], {name: [] for name in servers}
        for _ in range(rounds):  # each beside the same answer in this process
            for name, server in servers.items():
                alone.append(in_process(model, tokens))
                added[name].append(asked(server, 0, tokens)["token_ms"] - alone[-1])
        found = {}
        for name, server in servers.items():
            rows = [load(server, count, tokens, rounds) for count in clients]
            found[name] = {"added_ms": spread(added[name]), "rows": rows}
            speeds = {row["clients"]: row["tokens_per_s"] for row in rows}
            if {1, 4} <= set(speeds):
                found[name]["gain_at_4"] = speeds[4] / speeds[1]
        versions = model.bundle.manifest["versions"]
    return {
        "in_process_ms": spread(alone),
        "servers": found,
        "tokens": tokens,
        "threads": threads,
        "lanes": lanes,
        "environment": environment.describe(threads, versions),
    }


# ---------------------------------------------------------------- pages


def _text(found, digits=1):
    return f"{found['median']:.{digits}f} [{found['q1']:.{digits}f}, {found['q3']:.{digits}f}]"


def table(report, name):
    """The rows of one server for its page."""
    found, env, alone = report["servers"][name], report["environment"], report["in_process_ms"]
    lines = [
        "| clients | tokens/s, all | answers/s | first token, ms | a token, ms | its step, ms | rows a step | processors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['clients']} | {row['tokens_per_s']:.{0 if row['tokens_per_s'] > 99 else 1}f} | {row['requests_per_s']:.2f} "
            f"| {_text(row['first_ms'])} | {_text(row['token_ms'])} | {_text(row['step_ms'])} "
            f"| {row['rows_per_step']:.1f} | {row['server_processors']:.2f} |"
        )
    added, count = found["added_ms"], found["added_ms"]["n"]
    says = f"In one process a token takes {_text(alone, 2)} ms (n = {alone['n']}); {NAMES[name]} adds "
    says += f"{_text(added, 2)} ms (n = {count}), {100 * added['median'] / alone['median']:.0f} %."
    if "gain_at_4" in found:
        says += f" Four clients get {found['gain_at_4']:.2f} times the tokens of one."
    options = f"`--threads {report['threads']} --lanes {report['lanes']}`"
    where = f"Answers of {report['tokens']} tokens; {options}; {env['processor']}, {env['cores']} cores, {env['date'][:10]}."
    return "\n".join([*lines, "", says, where, ""])


def users(report):
    """How many users the answers a second of the most clients are enough for."""
    busiest = max(report["servers"]["serve"]["rows"], key=lambda row: row["requests_per_s"])
    best, processors = busiest["requests_per_s"], busiest["server_processors"]
    lines = ["| a user asks every | users, at .7 of the answers a second |", "|---|---|"]
    lines += [
        f"| {name} | {0.7 * best * seconds:.0f} |"
        for name, seconds in (("10 s", 10), ("minute", 60), ("5 minutes", 300))
    ]
    counts = f"{best:.2f} answers a second on {processors:.2f} processors: {best / processors:.2f} for each."
    return "\n".join([*lines, "", counts, ""])


def write_pages(docs: Path, part: str, report) -> None:
    """Tables between marks: of each server on its page; how many users that is."""
    texts = {name: (f"{name}{part}", table(report, name)) for name in report["servers"]}
    if not part:
        texts["scale"] = ("users", users(report))
    for page, (mark, text) in texts.items():
        rewrite(docs / f"{page}.md", {mark: text})


def missed(report, most_ms, most_share, least_gain):
    """What is not as fast as was asked for."""
    alone, out = report["in_process_ms"]["median"], []
    for name, found in report["servers"].items():
        added = found["added_ms"]["median"]
        if added > most_ms or added > most_share * alone:
            out.append(f"{name} adds {added:.2f} ms to a token of {alone:.2f} ms")
        if found.get("gain_at_4", least_gain) < least_gain:
            out.append(f"four clients of {name} get {found['gain_at_4']:.2f} times the tokens of one")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--triton", type=Path, help="a folder of tests/triton_setup.sh: measure Triton as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8, help="answers of each client")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--most-ms", type=float, default=math.inf, help="fail where a token costs more than so much more"
    )
    parser.add_argument(
        "--most-share", type=float, default=math.inf, help="the same, as a share of one in this process"
    )
    parser.add_argument(
        "--least-gain", type=float, default=0, help="fail where four clients get fewer times one's tokens"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--docs", type=Path, help="the folder of pages whose tables, between two marks, are written anew"
    )
    parser.add_argument("--part", default="", help="what is appended to the names of these marks")
    args = parser.parse_args()
    home = args.triton and args.triton.absolute()
    found = measure(args.bundle, home, args.threads, args.lanes, args.tokens, args.rounds, args.clients)
    write_report(args.out, found)
    for name in found["servers"]:
        print(NAMES[name], table(found, name), sep="\n")
    if args.docs:
        write_pages(args.docs, args.part, found)
    if said := missed(found, args.most_ms, args.most_share, args.least_gain):
        sys.exit("; ".join(said))


if __name__ == "__main__":
    main()
