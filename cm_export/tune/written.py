"""The winner as a TOML recipe that `cm-export build --recipe` reads, with the figures that it was chosen by as comments."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from ..base import atomic
from ..bundle.calibration import FILE as CALIBRATION
from ..recipe import recipe as recipes
from ..recipe.aliases import ALIASES
from ..recipe.recipe import Recipe
from ..recipe.text import findable, toml
from .space import needs_calibration


def write(out: Path, report: dict[str, Any], command: str, date: str) -> Recipe:
    """Write the recommended recipe of a report of `search.tune` to `out`, atomically, and return it as `load` reads it."""
    bundle, recipe = Path(report["bundle"]), recipes.from_dict(report["recipe"])
    calibration = None
    if needs_calibration(recipe):  # the bundle's copy; relative, as `recipe.load` reads it from the recipe's folder
        calibration = os.path.relpath(bundle.resolve() / CALIBRATION, out.resolve().parent)
    model, revision = (report["model"], report["revision"]) if findable(report["model"]) else (None, None)
    if model in ALIASES and ALIASES[model].path:
        revision = None  # it comes with the program
    recipe = dataclasses.replace(recipe, model=model, revision=revision, calibration=calibration)
    text = "".join(f"# {_plain(line)}\n" for line in comments(report, command, date)) + toml(recipe)
    atomic.write(out, text)
    return recipes.load(str(out))


def comments(report: dict[str, Any], command: str, date: str) -> list[str]:
    """What the recipe was chosen by: figures with n, interval, hardware, versions and the command."""
    winner, held, machine = report["recommended"], report["recommended"]["held_out"], report["environment"]
    looks, dense = report["looks"], report["dense"]["held_out"]
    out = [
        f"Found by: {command} ({date})",
        f"Task {report['task']}: {report['rule']}; {report['n_search']} questions for the search, "
        f"{report['n_held_out']} others for the verdict, of which the figures below are.",
        f"Keeps {held['of_dense']:.4f} [{held['of_dense_ci'][0]:.4f}, {held['of_dense_ci'][1]:.4f}] of the dense accuracy, "
        f"n = {held['n']}, paired; floor {report['floor']:g}.",
        f"The interval is at {100 * report['level']:.2f} %: {looks} point(s) were looked at on these questions, so together "
        "their intervals hold with 95 % (Bonferroni).",
        f"Accuracy {held['accuracy']:.4f} [{held['ci'][0]:.4f}, {held['ci'][1]:.4f}], "
        f"dense {dense['accuracy']:.4f} [{dense['ci'][0]:.4f}, {dense['ci'][1]:.4f}]{_random(report)}.",
        f"Weights and cache rows that a decoded token reads: {held['memory']['ratio']:.4f} of dense{_bits(held['memory'])}.",
    ]
    if held["latency"]:
        out.append(_speed(held["latency"]))
    running = ", ".join(f"{k} {v}" for k, v in machine["running"].items())
    out += [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {running}.",
        f"Trial {winner['trial']} of {len(report['trials'])}; bundle {report['settings']['bundle'][:16]}, "
        f"model {report['model']}. Other models and questions must be measured.",
    ]
    return out


def _plain(line: str) -> str:
    """One line without control characters: paths may hold what a TOML comment may not."""
    return "".join(c if c.isprintable() else " " for c in line)


def _random(report: dict[str, Any]) -> str:
    control = report["random"]
    return f", random choices of the same size {control['accuracy']:.4f}" if control else ""


def _bits(memory: dict[str, Any]) -> str:
    if "bits_read_per_weight" not in memory:  # of a trial that reads everything
        return ""
    bits, dense = memory["bits_read_per_weight"], memory["dense_bits_read_per_weight"]
    return f"; {bits:.2f} bits read for each weight, dense {dense:.2f}"


def _speed(found: dict[str, Any]) -> str:
    parts = []
    for name, words in (("prefill_ms", "prefill"), ("gather_ms", "gather"), ("step_ms", "per token")):
        dense, sparse = found["dense"].get(name), found["sparse"].get(name)
        if sparse:
            spread = f"{sparse['median']:.2f} [{sparse['q1']:.2f}, {sparse['q3']:.2f}]"
            # Dense takes the rows as they lie in the file: its gather is nothing to compare with.
            beside = f" (dense {dense['median']:.2f})" if dense and name != "gather_ms" else ""
            parts.append(f"{words} {spread} ms{beside}")
    return f"Latency {found['ratio']:.4f} of dense, n = {found['n']}, medians [quartiles]: {', '.join(parts)}."
