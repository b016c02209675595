"""One line about an answer: what was kept, how fast it came, what the guard did, how to draw it again.

72 of 144 image tokens, 614 of 1024 neurons per layer, 11 tokens, first token after 0.12 s, then 198.4 tokens/s
"""

from typing import Any


def summary(stats: dict[str, Any], first: dict[str, Any] | None = None) -> str:
    """The line of an answer's figures; `first`: those of the first question about the same pictures."""
    parts = [f"{stats['neurons_kept']} of {stats['neurons']} neurons per layer", f"{stats['new_tokens']} tokens"]
    if stats["image_tokens"]:
        parts.insert(0, f"{stats['image_tokens_kept']} of {stats['image_tokens']} image tokens")
    speed = f"first token after {stats['ttft_s']:.2f} s"
    if first is not None and stats is not first:
        speed += f" (first question {first['ttft_s']:.2f} s)"
    if stats["tokens_per_s"]:  # None after a single token
        speed += f", then {stats['tokens_per_s']:.1f} tokens/s"
    return ", ".join([*parts, speed]) + _guarded(stats.get("guard")) + _chosen(stats)


def _chosen(stats: dict[str, Any]) -> str:
    """How drawn tokens can be drawn again, and that an answer was cut."""
    rule, text = stats["sampling"], ""
    if rule["rule"] == "sampled":
        text = f"; sampled at temperature {rule['temperature']:g}, --seed {rule['seed']} repeats it"
    if stats["stopped"] == "max-new-tokens":
        text += f"; cut at {stats['new_tokens']} tokens (--max-new-tokens)"
    if stats["stopped"] == "context length":
        text += f"; cut: the model holds {stats['prompt_tokens'] + stats['new_tokens']} tokens of prompt and answer"
    return text


def _guarded(report: dict[str, Any] | None) -> str:
    if not report:
        return ""
    text = f"; guard: {report['checks']} checks, {report['kept']} of {report['drafted']} drafted tokens kept"
    spent = report["draft_s"] + report["check_s"]
    if spent:
        text += f", {report['check_s'] / spent:.0%} of the decode time".replace("%", " %")
    if report["overhead"] is not None:
        text += f", about {report['overhead']:+.0%} on sparse decode".replace("%", " %")
    return text + "".join(f", {action}" for action in report["actions"])
