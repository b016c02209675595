"""The rule by which the tokens of an answer are chosen: greedy or drawn, in the order and arithmetic of transformers.

logits [V] -> repetition penalty -> no stop id before the minimum -> the largest                                greedy
              (prompt and answer)                                 -> temperature -> top-k -> top-p -> min-p -> drawn

What is drawn depends on the logits, the seed and the place in the text alone, so an answer can be repeated, each row of
a batch draws for itself, and the guard can check a draft of drawn tokens.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..base.errors import CmExportError, InputError

TOP_K = 50  # where sampling is asked for and nobody says how many: transformers' default
_SMALLEST = 1e-30  # logits over a smaller temperature leave the range of float32
_DRAWS = ("temperature", "top_k", "top_p", "min_p")  # settings that only a drawn answer has


@dataclass(frozen=True)
class Sampling:
    """What is asked of an answer's tokens; None: what the checkpoint's generation_config.json says, else neutral.

    `sample` None draws where temperature (above 0), top_k, top_p or min_p is given. Raises InputError for values that
    mean nothing.
    """

    sample: bool | None = None
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # 0: all
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None  # of tokens in the prompt, too
    seed: int | None = None  # None: another one for every answer
    stop: tuple[str, ...] | None = None  # strings that end the answer and are not part of its text
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None  # goes before the argument of the same name

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif self.stop is not None:
            object.__setattr__(self, "stop", tuple(self.stop))
        for field in fields(self):
            value = getattr(self, field.name)
            wrong = None if value is None else fault(field.name, value)
            if wrong:
                raise InputError(f"{value!r} {wrong}", where=f"sampling: {field.name}", fix=_FIX.get(field.name))
        given = [name for name in _DRAWS[1:] if getattr(self, name) is not None]
        if self.temperature == 0 and (self.sample or given):
            what = "is greedy, which draws from nothing"
            fix = f"leave {' and '.join(given) or 'sample'} out, or give a temperature above 0"
            raise InputError(what, where="sampling: temperature = 0", fix=fix)
        if self.sample is False and (given or self.temperature):
            what = f"sample = False leaves {(given or ['temperature'])[0]} without a meaning"
            raise InputError(what, where="sampling", fix="leave one of the two out")
        if self.max_new_tokens is not None:
            check_minimum(self.min_new_tokens or 0, self.max_new_tokens)


_FIX = {"temperature": "give 0 for greedy answers, or a number such as 0.7", "stop": "give text, such as '\\n'"}


def fault(name: str, value: Any) -> str | None:
    """What is wrong with the value of a setting, as the end of a sentence; None where nothing is."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    whole = number and isinstance(value, Integral)  # numpy's are such, too
    if name == "sample":
        return None if isinstance(value, bool) else "is neither True nor False"
    if name == "temperature":
        if number and 0 < value < _SMALLEST:
            return "is too small to divide by"
        return None if number and value >= 0 else "is not a number from 0 up"
    if name in ("top_p", "min_p"):
        return None if number and 0 <= value <= 1 else "is not a number from 0 to 1"
    if name == "repetition_penalty":
        return None if number and value > 0 else "is not a number above 0"
    if name == "stop":
        good = all(isinstance(text, str) and text for text in value)
        return None if good else "holds something else than text, or an empty text"
    low = 1 if name == "max_new_tokens" else 0  # top_k, seed, min_new_tokens
    return None if whole and value >= low else f"is not a whole number from {low} up"


def check_minimum(low: int, high: int) -> None:
    """Raises InputError where an answer would have to be longer than it may be."""
    if low > high:
        what = f"at least {low} tokens are asked for, and at most {high}"
        raise InputError(what, where="sampling: min_new_tokens", fix="lower it, or raise max_new_tokens")


@dataclass(frozen=True)
class Rule:
    """How the tokens of one answer are chosen, with nothing left open."""

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0

    def scores(self, logits: np.ndarray, seen: np.ndarray, forbidden: Sequence[int] = ()) -> np.ndarray:
        """[V] float32 from logits [V]: what the largest is taken of, or what is drawn from; -inf is out of question.

        seen: ids that the penalty is for; forbidden: ids that may not come yet.
        """
        out = np.array(logits, np.float32)
        if self.repetition_penalty != 1:
            _penalise(out, seen, np.float32(self.repetition_penalty))
        out[list(forbidden)] = -np.inf
        if self.sample:
            if self.temperature != 1:
                out /= np.float32(self.temperature)
            if self.top_k:
                _keep_largest(out, self.top_k)
            if self.top_p < 1:
                _keep_mass(out, self.top_p)
            if self.min_p:
                out[_probabilities(out) < self.min_p * _probabilities(out).max()] = -np.inf
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that a greedy answer has no use for."""
        out: dict[str, Any] = {"rule": "sampled" if self.sample else "greedy"}
        if self.sample:
            out |= {name: getattr(self, name) for name in (*_DRAWS, "seed")}
        return out | {
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_new_tokens,
            "stop": list(self.stop),
        }

    def __str__(self) -> str:
        """In words: greedy, repetition penalty 1.05."""
        parts = ["greedy"]
        if self.sample:
            parts = [f"sampled at temperature {self.temperature:g}"]
            parts += [f"top-k {self.top_k}"] if self.top_k else []
            parts += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
            parts += [f"min-p {self.min_p:g}"] if self.min_p else []
            parts += [f"seed {self.seed}"]
        parts += [f"repetition penalty {self.repetition_penalty:g}"] if self.repetition_penalty != 1 else []
        parts += [f"at least {self.min_new_tokens} tokens"] if self.min_new_tokens else []
        parts += [f"ends at {' or '.join(map(repr, self.stop))}"] if self.stop else []
        return ", ".join(parts)


PLAIN = Rule()  # the most likely token, whatever the checkpoint says


def settle(asked: Sampling | None, checkpoint: Mapping[str, Any]) -> Rule:
    """The rule of one answer: what is asked, else the checkpoint's settings, else neutral ones. Raises InputError.

    checkpoint: `generation` of a bundle's manifest (source/generation.py writes it); {} for a bundle without it. Where
    nothing asks for sampling the answer is greedy, whatever the checkpoint does.
    """
    asked = asked or Sampling()

    def of(name: str, neutral: Any) -> Any:
        given = getattr(asked, name)
        return checkpoint.get(name, neutral) if given is None else given

    sample = asked.sample
    if sample is None:
        sample = bool(asked.temperature) or any(getattr(asked, name) is not None for name in _DRAWS[1:])
    rule = {
        "repetition_penalty": float(of("repetition_penalty", 1.0)),
        "min_new_tokens": of("min_new_tokens", 0),
        "stop": tuple(of("stop", ())),
    }
    if not sample:
        return Rule(**rule)
    temperature = float(of("temperature", 1.0))
    if not temperature:
        what = "the checkpoint's temperature is 0, which draws nothing"
        raise InputError(what, where="sampling", fix="give a temperature, such as --temperature 0.7")
    draws = {"top_k": of("top_k", TOP_K), "top_p": float(of("top_p", 1.0)), "min_p": float(of("min_p", 0.0))}
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    return Rule(True, temperature, seed=seed, **draws, **rule)


class Chooser:
    """Chooses the tokens of one answer by a rule; what a row of the decode loop asks (decode.Choose)."""

    def __init__(self, rule: Rule, prompt: np.ndarray, stop: frozenset[int]):
        """prompt: [S] ids, of image tokens too, which transformers' penalty counts as well; stop: ids that end it."""
        self.rule, self.stop = rule, stop
        self._tokens, self._prompt, self._ids = len(prompt), np.unique(prompt), list[int]()

    def __call__(self, logits: np.ndarray, chosen: int) -> int | None:
        """The next token, or None where the answer ends; `chosen`: how many this has given before."""
        del self._ids[chosen:]
        token = self.after(logits, self._ids)
        self._ids.append(token)
        return None if token in self.stop else token

    def after(self, logits: np.ndarray, ids: Sequence[int]) -> int:
        """The token after the answer's `ids`, a stop id included: always the same for the same logits and ids."""
        rule = self.rule
        if rule == PLAIN:
            return _checked(logits, int(logits.argmax()))
        # A prompt may hold ids beyond the head, as where a vocabulary was padded: those cannot come.
        seen = np.concatenate([self._prompt[self._prompt < len(logits)], np.asarray(ids, np.int64)])
        early = [i for i in self.stop if i < len(logits)] if len(ids) < rule.min_new_tokens else ()
        scores = rule.scores(logits, seen, early)
        token = drawn(scores, rule.seed, self._tokens + len(ids)) if rule.sample else int(scores.argmax())
        return _checked(scores, token)


def drawn(scores: np.ndarray, seed: int, place: int) -> int:
    """An id, drawn from the softmax of scores [V]: the first to arrive in a race whose speeds are the probabilities.

    Every id has an arrival time of its own, so that similar scores mostly give the same id (see guard.py).
    """
    kept = np.flatnonzero(scores != -np.inf)  # what is no number stays, so that it is seen
    times = np.random.default_rng((seed, place)).standard_exponential(len(scores))
    return int(kept[np.argmax(scores[kept] - np.log(times[kept]))]) if len(kept) else 0


def _checked(scores: np.ndarray, token: int) -> int:
    """Raises CmExportError where nothing can be chosen: argmax answers something for NaN, too."""
    if not np.isfinite(scores[token]):
        what = "the model's logits are not numbers, or every token is forbidden"
        raise CmExportError(what, where="decode", fix="check the bundle with `cm-export eval`, or build it again")
    return token


def _penalise(scores: np.ndarray, ids: np.ndarray, penalty: np.float32) -> None:
    """Divides positive scores of these ids and multiplies negative ones; once for an id that stands there twice."""
    old = scores[ids]
    scores[ids] = np.where(old < 0, old * penalty, old / penalty)


def _keep_largest(scores: np.ndarray, count: int) -> None:
    """-inf for all that are below the `count`-th largest: equal ones stay together."""
    if count < len(scores):
        scores[scores < np.partition(scores, -count)[-count]] = -np.inf


def _keep_mass(scores: np.ndarray, mass: float) -> None:
    """-inf for the least likely ids that together hold no more than 1 - mass; the most likely one stays."""
    kept = np.flatnonzero(scores > -np.inf)
    order = kept[np.argsort(scores[kept], kind="stable")]
    # In the types of transformers, so that sums that meet the bound exactly fall on the same side of it.
    mass_up_to = np.cumsum(_probabilities(scores[order]).astype(np.float32), dtype=np.float64).astype(np.float32)
    below = mass_up_to <= np.float32(1 - mass)
    scores[order[:-1][below[:-1]]] = -np.inf


def _probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax of scores [N], float64."""
    out: np.ndarray = np.exp(scores.astype(np.float64) - scores.max())
    out /= out.sum()
    return out
