"""Reports of `eval` and `bench`, read and checked: a page must not show another bundle's figures.

eval JSON {task, seal, rows: [...]}  ->  [Point]      policies at one budget: their cost and how often they were right

Reports of several bundles of one checkpoint, which differ in the bits of their weights, go on one page: everything is a
share of what the first bundle's dense model gets right, so the dense models of the others are points as well.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base import by_name
from ..base.errors import InputError
from ..base.metrics import kept_of_dense, paired
from ..bundle.bundle import Bundle
from ..families import Shape
from ..recipe import recipe
from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class Figures:
    """Accuracy and what is kept of dense, each with its 95 % interval, of n questions."""

    accuracy: float
    ci: tuple[float, float]
    of_dense: float | None  # None: dense itself got nothing right
    of_dense_ci: tuple[float, float] | None  # there if `of_dense` is
    n: int

    @property
    def kept(self) -> tuple[float, float, float]:
        """Of dense: low end, share, high end. Only where dense got something right."""
        assert self.of_dense is not None and self.of_dense_ci is not None  # callers look at them first
        return self.of_dense_ci[0], self.of_dense, self.of_dense_ci[1]


@dataclass(frozen=True)
class Spread:
    """Milliseconds: median and quartiles of n."""

    median: float
    q1: float
    q3: float
    n: int


@dataclass(frozen=True)
class Point:
    """One row of an eval report."""

    task: str
    key: str
    policies: str
    role: str  # dense | random | attention (as a control) | policy
    neuron_share: float
    token_share: float
    figures: Figures
    kinds: dict[str, Figures]
    kl: float | None
    top1: float | None
    prefill: Spread | None
    gather: Spread | None
    decode: Spread | None  # per token
    image_tokens: float
    image_tokens_kept: float
    recipe: Recipe
    bits: float  # that a decoded token reads for each weight, scales and zeros included
    weight_bytes: int  # read per decoded token: of products, a predictor, the embedding
    exact: bool  # whether this was read; else it is what the policy needs, and the runtime read more
    image_kv_bytes: int  # keys and values of image tokens, read per decoded token
    # Answers right in both, lost, won, wrong in both; None: not in the report.
    beside_dense: tuple[int, ...] | None = None
    bundle: str = ""  # that answered, its path

    @property
    def memory(self) -> int:
        """Bytes that a decoded token reads of weights and image cache."""
        return self.weight_bytes + self.image_kv_bytes

    @property
    def deployable(self) -> bool:
        """Neither the dense model nor a random control."""
        return self.role in ("policy", "attention")


@dataclass(frozen=True)
class Reference:
    """The dense model that every point is a share of, where it is another bundle's: its report."""

    report: dict[str, Any]

    @property
    def right(self) -> list[bool]:
        """Which questions it got right."""
        return next(r["right"] for r in self.report["rows"] if r["policies"] == "dense")


def points_of(
    report: dict[str, Any], shape: Shape, where: str = "rows", beside: Reference | None = None, named: bool = False
) -> list[Point]:
    """The rows of an eval report. Raises InputError for a row that lacks what a page needs.

    `beside`: the report of the first bundle, where this one is another's. `named`: whether precisions are told apart.
    """
    try:
        rows = report["rows"]
        if any("bits_read_per_weight" not in r for r in rows):
            what = "does not say how many bits were read; an older version wrote it"
            raise InputError(what, where=where, fix="run it again")
        others = {r["tokens"] for r in rows if not r["is_random"]} - {"attention", "dense"}
        dense = next((r.get("right") for r in rows if r["policies"] == "dense"), None)
        if beside:
            _check_questions(report, beside.report, where)
            dense, kinds = beside.right, np.array(report["kinds"])
            rows = [_compared(r, np.array(dense), kinds) for r in rows]
        return [_point(str(report["task"]), r, bool(others), shape, dense, bool(beside), named) for r in rows]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as e:
        what = f"its rows are not those of an eval report ({type(e).__name__}: {e})"
        raise InputError(what, where=where, fix=_EVAL) from e


def _check_questions(report: dict[str, Any], first: dict[str, Any], where: str) -> None:
    """Raises InputError where the first bundle was asked something else."""
    if [report["task"], report["questions"]] != [first["task"], first["questions"]]:
        what = f"its questions are not those that {first['bundle']} was asked"
        raise InputError(what, where=where, fix="measure both with the same --task or --data, --limit and --seed")


def _compared(row: dict[str, Any], dense: np.ndarray, kinds: np.ndarray) -> dict[str, Any]:
    """The row with what it keeps of another bundle's dense answers."""
    right, of_kind = np.array(row["right"]), {}
    for kind, found in row["kinds"].items():
        of_dense, ci = kept_of_dense(dense[kinds == kind], right[kinds == kind])
        of_kind[kind] = found | {"of_dense": of_dense, "of_dense_ci": ci}
    of_dense, ci = kept_of_dense(dense, right)
    return row | {"of_dense": of_dense, "of_dense_ci": ci, "kinds": of_kind}


def _point(
    task: str, row: dict[str, Any], attention_is_control: bool, shape: Shape, dense: list[bool] | None,
    of_another: bool, named: bool,
) -> Point:  # fmt: skip
    as_recipe, role = recipe.from_dict(row["recipe"], "recipe of a row"), "policy"
    if row["policies"] == "dense":
        # The dense model of another bundle has fewer bits: a way to answer like any other.
        role = "policy" if of_another else "dense"
        as_recipe = as_recipe.replace(neurons__policy="dense", tokens__policy="dense") if of_another else as_recipe
    elif row["is_random"]:
        role = "random"
    elif row["tokens"] == "attention" and attention_is_control:
        role = "attention"
    neurons, kept = float(row["neuron_share"]), float(row["image_tokens_kept"])
    right = row.get("right")
    return Point(
        task=task,
        key=str(row["key"]),
        policies=f"{row['policies']}, {as_recipe.weights.words}" if named else str(row["policies"]),
        role=role,
        neuron_share=neurons,
        token_share=float(row["token_share"]),
        figures=_figures(row),
        kinds={str(kind): _figures(values) for kind, values in row["kinds"].items()},
        kl=_number(row["kl"]),
        top1=_number(row["top1"]),
        prefill=_spread(row["prefill_ms"]),
        gather=_spread(row["gather_ms"]),
        decode=_spread(row["ms_per_token"]),
        image_tokens=float(row["image_tokens"]),
        image_tokens_kept=kept,
        recipe=as_recipe,
        bits=float(row["bits_read_per_weight"]),
        weight_bytes=round(row["weight_bytes_read"]),
        exact=bool(row["read_exact"]),
        image_kv_bytes=round(2 * shape.layers * shape.kv_heads * as_recipe.weights.row_of_cache(shape.head_dim) * kept),
        beside_dense=tuple(paired(np.array(dense), np.array(right)).tolist()) if dense and right else None,
    )


def _figures(row: dict[str, Any]) -> Figures:
    n = row["n"]
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n = {n!r}")
    of_dense, of_dense_ci = row["of_dense"], row["of_dense_ci"]
    if (of_dense is None) != (of_dense_ci is None):
        raise ValueError(f"of_dense = {of_dense!r}, of_dense_ci = {of_dense_ci!r}")
    kept = None if of_dense_ci is None else _pair(of_dense_ci)
    return Figures(float(row["accuracy"]), _pair(row["ci"]), _number(of_dense), kept, n)


def _pair(value: Any) -> tuple[float, float]:
    low, high = value
    return float(low), float(high)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _spread(value: Any) -> Spread | None:
    if not value:
        return None
    return Spread(float(value["median"]), float(value["q1"]), float(value["q3"]), int(value["n"]))


def distinct(points: Iterable[Point]) -> list[Point]:
    """Drops repeated rows, such as dense, that two sweeps over the same questions share."""
    seen: dict[Any, Point] = {}
    for p in points:
        seen.setdefault((p.task, p.key, p.figures), p)
    return list(seen.values())


_EVAL = "give a file that `cm-export eval ... --out` wrote"
_BENCH = "give what `cm-export bench ... --json` printed"


def read_eval(path: Path, bundles: Sequence[Bundle]) -> dict[str, Any]:
    """An eval report of one of these bundles. Raises InputError."""
    return _read(path, bundles, ("task", "rule", "n", "environment"), "an eval report", _EVAL)


def read_bench(path: Path, bundle: Bundle) -> dict[str, Any]:
    """A bench report of this bundle. Raises InputError."""
    found = _read(path, [bundle], ("prompt_tokens", "repeats", "environment"), "a bench report", _BENCH)
    try:
        for row in found["rows"]:
            for key in ("median_ms", "q1_ms", "q3_ms"):
                row[key] = float(row[key])
            row["phase"], row["mode"], row["n"] = str(row["phase"]), str(row["mode"]), int(row["n"])
            row["speedup"] = _number(row["speedup"])
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"its rows are not those of a bench report ({e})", where=path, fix=_BENCH) from e
    return found


def _read(path: Path, bundles: Sequence[Bundle], keys: tuple[str, ...], what: str, fix: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise InputError(f"cannot be read ({e.strerror})", where=path, fix=fix) from e
    except (ValueError, RecursionError) as e:
        raise InputError("is not JSON", where=path, fix=fix) from e
    missing = [k for k in ("bundle", "rows", *keys) if not isinstance(found, dict) or k not in found]
    if missing:
        raise InputError(f"is not {what} (no {missing[0]!r})", where=path, fix=fix)
    if not isinstance(found["rows"], list) or not found["rows"] or not isinstance(found["environment"], dict):
        raise InputError(f"is not {what} (no rows)", where=path, fix=fix)
    if "seal" not in found:
        raise InputError(
            "does not say which bundle it measured; an older version wrote it", where=path, fix="run it again"
        )
    if found["seal"] not in [b.seal for b in bundles]:
        other = f"{found['bundle']}, seal {str(found['seal'])[:12]}"
        fix = f"this one has the seal {bundles[0].seal[:12]}: measure it, or name the other with --beside"
        raise InputError(f"measured another bundle ({other})", where=path, fix=fix)
    return found


def known_task(name: str) -> bool:
    """Whether a report's task comes with the program, so that its questions can be asked again."""
    return name.replace("-", "_") in by_name.names_in("cm_export.evals.tasks")
