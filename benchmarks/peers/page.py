"""The page of the race: every sentence and figure of it comes from the report.

contestants   who, what they took by phase         against   ours / peer by phase, and which of them are lost
"""

import statistics
from typing import Any

from .contestants import PAIRS

PHASES = {
    "picture_ms": "picture",
    "prompt_ms": "prompt",
    "first_ms": "first token",
    "decode_ms": "decode",
    "answer_ms": "answer",
}
IDLE = 0.1  # cores that other work may use on a machine that counts as idle
Report = dict[str, Any]


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of one value, that value."""
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": mid, "q1": low, "q3": high}


def text(report: Report) -> str:
    """Everything between the marks of the page."""
    parts = [_how(report), _times(report), _against(report), _lost(report), _versions(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(report: Report) -> str:
    where, (sizes,) = report["environment"], report["sizes"].values()
    one = report["contestants"][0]
    busy = report["others_cores"]
    state = (
        "otherwise idle" if busy <= IDLE else "**busy**, so times are too long and vary: only rough ratios can be read"
    )
    shape = f"hidden {sizes['hidden']}, FFN {sizes['ffn']}, {sizes['layers']} layers, vocabulary {sizes['vocab']}"
    return (
        f"Qwen2-VL of random weights ({shape}); picture of {report['pixels']} x {report['pixels']} pixels, prompt of "
        f"{one['prompt_tokens']} tokens with it; answers of {report['tokens']} tokens, n = {one['n']} after one that is not "
        f"counted. {where['processor']}, {where['threads']} threads of {where['cores']} cores, {where['date'][:10]}. The machine "
        f"was {state} (other work used {busy:.2f} cores, load average {report['load_average_before']:.1f} before)."
    )


def _times(report: Report) -> str:
    head = ["contestant", *(f"{name}, ms" + (" a token" if name == "decode" else "") for name in PHASES.values())]
    head += ["weights read a token, MB", "peak memory, MB", "load, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["contestants"]:
        cells = [row["name"], *(_cell(row.get(name), name == "decode_ms") for name in PHASES)]
        read = f"{row['read_mb']['median']:.0f} ({row['read_share']['median']:.2f})" if "read_mb" in row else ""
        cells += [read, f"{row['peak_memory_mb']:.0f}", f"{row['load_s']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | left out: {why} |" + " |" * (len(head) - 2) for name, why in report["left_out"].items()]
    return "\n".join(lines)


def _cell(value: dict[str, float] | None, fine: bool) -> str:
    if value is None:
        return ""
    low, mid, high = (f"{value[k]:.1f}" if fine else f"{value[k]:.0f}" for k in ("q1", "median", "q3"))
    return f"{mid} [{low}, {high}]"


def ratios(report: Report) -> list[dict[str, Any]]:
    """For each pair of which both raced: ours / peer by phase (below 1: ours takes less), and whether the quartiles are apart."""
    rows = {row["name"]: row for row in report["contestants"]}
    out = []
    for ours, peer in ((rows[a], rows[b]) for a, b in PAIRS if a in rows and b in rows):
        of = {"ours": ours["name"], "peer": peer["name"], "ratios": {}, "apart": {}}
        for phase in PHASES:
            if phase in ours and phase in peer:
                one, other = ours[phase], peer[phase]
                of["ratios"][phase] = one["median"] / other["median"]
                of["apart"][phase] = one["q1"] > other["q3"] or one["q3"] < other["q1"]
        of["ratios"]["peak_memory_mb"] = ours["peak_memory_mb"] / peer["peak_memory_mb"]
        of["apart"]["peak_memory_mb"] = True
        out.append(of)
    return out


def _against(report: Report) -> str:
    columns = {**PHASES, "peak_memory_mb": "peak memory"}
    lines = [
        "**One against another**: time of the first / time of the second; below 1 the first takes less. ~: quartiles overlap.",
        "",
    ]
    lines += ["| first | second | " + " | ".join(columns.values()) + " |", "|" + "---|" * (len(columns) + 2)]
    for of in ratios(report):
        cells = [_ratio(of, phase) for phase in columns]
        lines.append(f"| {of['ours']} | {of['peer']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _ratio(of: dict[str, Any], phase: str) -> str:
    if phase not in of["ratios"]:
        return ""
    return f"{'' if of['apart'][phase] else '~ '}{of['ratios'][phase]:.2f}"


def _lost(report: Report) -> str:
    """What this project loses against peers, the worst first, and which phase the whole answer is lost in.

    Nothing is said of a busy machine: there quartiles overlap whoever is faster.
    """
    if report["others_cores"] > IDLE:
        return ""
    rows = {row["name"]: row for row in report["contestants"]}
    lines = []
    for of in ratios(report):
        if of["peer"].startswith("cm-export"):
            continue
        columns = {**PHASES, "peak_memory_mb": "peak memory"}
        lost = {p: r for p, r in of["ratios"].items() if r > 1 and of["apart"][p]}
        if not lost:
            lines.append(f"- {of['ours']} against {of['peer']}: nothing (where quartiles are apart).")
            continue
        worst = sorted(lost, key=lambda p: -lost[p])
        said = ", ".join(f"{columns[p]} x{lost[p]:.2f}" for p in worst)
        lines.append(
            f"- {of['ours']} against {of['peer']}: {said}.{_where(rows[of['ours']], rows[of['peer']], report['tokens'])}"
        )
    return "\n".join(["**Lost**, and where the time goes:", "", *lines]) if lines else ""


def _where(ours: Report, peer: Report, tokens: int) -> str:
    """How the difference of two whole answers divides into phases, in ms."""
    if not all("prompt_ms" in row for row in (ours, peer)):
        return ""
    each = {
        name: ours[p]["median"] - peer[p]["median"] for p, name in (("picture_ms", "picture"), ("prompt_ms", "prompt"))
    }
    each["decode"] = (tokens - 1) * (ours["decode_ms"]["median"] - peer["decode_ms"]["median"])
    said = ", ".join(f"{name} {ms:+.0f} ms" for name, ms in each.items())
    return f" Of the answer: {said}."


def _versions(report: Report) -> str:
    seen: dict[str, str] = {}
    for row in report["contestants"]:
        seen |= row["versions"]
        seen |= {"native kernel": row["kernel"]} if row.get("kernel") else {}
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in seen.items()) + f". `{report['command']}`"
