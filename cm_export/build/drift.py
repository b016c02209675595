"""Drift: what a recipe changes in the text that the model itself writes, measured at the end of every build.

prompt -> dense model writes t0 t1 t2 .. (greedy)      its logits   d0 d1 d2 ..
       -> sparse model reads the same t0 t1 t2 ..      its logits   s0 s1 s2 ..

agreement = share of places where d and s have the same first choice        KL = mean of KL(softmax d || softmax s), in nats

The prompts are plain ones, through the model's own chat template; of a model that sees, most are about made-up pictures.
It says how far the recipe moves this model, not how right its answers are: that takes questions (`cm-export eval`).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..base.errors import BundleError, GateFailed, InputError
from ..base.metrics import check_floor, divergences, wilson
from ..families import Config, Pictures
from ..host.decode import decode, greedy, recorded, teacher_forced
from ..host.request import Request
from ..host.runner import Budget, Runner
from ..recipe.recipe import Recipe
from ..source.probe import probe
from .gates import Gate

WARN_BELOW = 0.9
STEPS = 32  # tokens of one answer, at most
PLACES = 256  # places compared, after which no further prompt is asked
SECONDS = 30.0  # after which the dense model writes no more; the sparse one still reads the last answer
LEAST = 4  # tokens of an answer, however long they take
SIDES = (224, 112, 56, 28, 12)  # of a made-up picture, in pixels: the largest that becomes MOST image tokens or fewer
MOST = 100
TEXTS = (
    "What is the capital of Italy?",
    "Write three sentences about the sea.",
    "How do I boil an egg?",
    "Explain why the sky is blue.",
    "List five animals and where they live.",
    "Is eleven a prime number?",
    "Write a short letter to a friend who is ill.",
    "What does a carpenter do all day?",
)
ABOUT_PICTURES = (
    "describe : what shape is in the image?",
    "describe the image .",
    "what color is the shape?",
    "describe : what color is the shape?",
    "how many shapes are there ?",
    "describe : is there a red shape?",
)
_COLORS = ((200, 30, 30), (20, 120, 200), (0, 128, 128), (240, 200, 0), (30, 150, 60))


@dataclass(frozen=True)
class Drift:
    """What was measured: `agreement` with its 95 % Wilson interval over `places`, `kl` in nats; or why nothing was."""

    agreement: float | None
    ci: tuple[float, float] | None
    kl: float | None
    places: int
    prompts: int
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def gates(self, name: str = "drift", of: str = "dense", least: float = 0.0) -> list[Gate]:
        """The same as two rows among the gates. Raises GateFailed for an agreement below `least`; 0: without a limit."""
        if least and not (self.agreement is not None and self.agreement >= least):
            fix = "no bundle was written; give more bits ([weights] of the recipe), or a smaller --weight-group"
            found = f"{self.agreement:.3f} of {self.text}" if self.agreement is not None else self.text
            what = f"the next token is that of {of} at {found}, below the required {least:g}"
            raise GateFailed(what, where=f"gate {name!r}", fix=fix)
        if self.agreement is None or self.kl is None or self.ci is None:
            return []
        low, high = self.ci
        detail = f"95 % [{low:.3f}, {high:.3f}], {self.text}" if self.places else self.text
        return [
            Gate(f"{name}: top-1 agreement", self.agreement, least or None, True, detail),
            Gate(f"{name}: KL to {of}", self.kl, None, True, self.text),
        ]


def prunes(recipe: Recipe) -> bool:
    """Whether anything is left out: a share of 1 keeps everything, and the gates prove that it then equals dense."""
    n, t = recipe.neurons, recipe.tokens
    whole_tokens = t.policy == "dense" or (t.budget == "share" and t.share == 1)
    return not (whole_tokens and (n.policy == "dense" or n.share == 1))


def measure(runner: Runner, config: Config, progress: Callable[..., None], seconds: float = SECONDS) -> Drift:
    """`runner` on the portable graphs. Raises CmExportError where a model's logits are no numbers."""
    if not prunes(runner.recipe):
        return Drift(
            1.0, (1.0, 1.0), 0.0, 0, 0, "not measured: nothing is pruned, so the sparse graphs say what dense says"
        )
    return _compared(runner, runner, Budget(), config, progress, seconds)


def of_weights(reference: Runner, runner: Runner, config: Config, progress: Callable[..., None]) -> Drift:
    """The dense model with low-bit weights, `runner`, in the text that the one with float32 weights writes."""
    return _compared(reference, runner, Budget(dense=True), config, progress, SECONDS)


def _compared(
    writer: Runner, reader: Runner, budget: Budget, config: Config, progress: Callable[..., None], seconds: float
) -> Drift:
    """`reader` under a budget, in the text that the dense `writer` writes; the same prompts, each sees them by itself."""
    started, prompts = time.perf_counter(), 0
    same: list[bool] = []
    kl: list[float] = []
    about, stop, requests = _beginnings(writer, config)
    others = requests if reader is writer else _beginnings(reader, config)[2]
    asked = ((r, r) for r in requests) if reader is writer else zip(requests, others, strict=False)
    for i, (request, again) in enumerate(asked):
        if len(same) >= PLACES or (i and time.perf_counter() - started > seconds):
            break
        progress("compare with the dense model's own text: prompt", i + 1)
        ids, dense = _written(writer, request, stop, started + seconds)
        other = teacher_forced(reader.backend, reader.prefill(again, budget).row(), ids)
        same += (dense.argmax(-1) == other.argmax(-1)).tolist()
        kl += divergences(dense, other).tolist()
        prompts = i + 1
    for runner in (writer, reader):
        runner.backend.drop("vision", "prefill_dense", "decode_dense", "prefill", "decode")
    if not same:
        return Drift(None, None, None, 0, 0, "not measured: no prompt fits into this model")
    right, n = sum(same), len(same)
    text = f"{n} places in what the dense model wrote to {prompts} prompts ({about}), greedy"
    return Drift(right / n, wilson(right, n), float(np.mean(kl)), n, prompts, text)


def require(found: dict[str, Any], least: float | None) -> None:
    """Raises GateFailed where the agreement is below `least`, or was not measured. None: nothing is required."""
    check_floor(least, "required agreement")
    if least is None:
        return
    if found["agreement"] is None:
        raise GateFailed(f"agreement of at least {least:g} is required, and was {found['text']}", where="gate 'drift'")
    if not found["agreement"] >= least:
        fix = f"no bundle was written; {next_step()}"
        raise GateFailed(f"{_figure(found)}, below the required {least:g}", where="gate 'drift'", fix=fix)


def notes(found: dict[str, Any], recipe: Recipe) -> list[str]:
    """What somebody who only reads that the build has ended should know."""
    if not prunes(recipe):
        return ["nothing is pruned; policies to prune with: --neurons, --tokens (docs/policies.md, docs/quality.md)"]
    if found["agreement"] is None:
        return [f"warning: how far this recipe moves the model was {found['text']}"]
    if found["agreement"] < WARN_BELOW:
        return [f"warning: {_figure(found)}; {next_step()}"]
    return []


def next_step() -> str:
    """What to do about a low agreement."""
    return (
        "raise --neuron-share or --token-share, try --neurons predicted or another policy (docs/quality.md, "
        "docs/policies.md), or let `cm-export tune` find a recipe for your questions"
    )


def _figure(found: dict[str, Any]) -> str:
    low, high = found["ci"]
    agreement = f"{found['agreement']:.3f} [{low:.3f}, {high:.3f}]"
    return f"the pruned model's next token is the dense model's at {agreement} of {found['text']}"


def _written(
    runner: Runner, request: Request, stop: frozenset[int], deadline: float = math.inf
) -> tuple[list[int], np.ndarray]:
    """The dense model's answer, and its logits [T,V] before each of its tokens, a stop included."""
    logits: list[np.ndarray] = []
    row = runner.prefill(request, Budget(dense=True)).row(choose=recorded(greedy(stop), logits), limit=STEPS)
    for _ in decode(runner.backend, [row]):
        if len(row.ids) >= LEAST and time.perf_counter() > deadline:
            break
    # The last token of a row that met its limit was read by nobody; a stop was chosen from the last logits.
    return row.ids if row.ended == "stop" else row.ids[:-1], np.stack(logits)


def _beginnings(runner: Runner, config: Config) -> tuple[str, frozenset[int], Iterator[Request]]:
    """What the prompts are, where an answer ends, and the prompts."""
    why, asked = "no built-in prompt fits", _asked(runner)
    try:
        if (first := next(asked, None)) is not None:
            about = "plain ones, most about a made-up picture" if runner.bundle.tower else "plain ones"
            return about, runner.chat.stop_ids, itertools.chain([first], asked)
    except BundleError as e:  # no tokenizer, or no template that places pictures: `run` will say the same
        why = e.what
    return f"random words: {why}", frozenset(runner.bundle.shape.stop_ids), made_up(runner, config)


def _asked(runner: Runner) -> Iterator[Request]:
    """The built-in prompts; of a model that sees, three of four are about a picture. Raises BundleError without a tokenizer."""
    prompts = [(text, False) for text in TEXTS]
    if runner.bundle.tower:
        about = itertools.cycle(ABOUT_PICTURES)
        prompts = [p for text in TEXTS for p in (*((next(about), True) for _ in range(3)), (text, False))]
    rng = np.random.default_rng(0)
    for text, sees in prompts:
        seen = runner.see([_picture(runner, rng)]) if sees else Pictures()
        try:
            request = runner.ask(text, seen)
        except InputError:  # too long, or the tokenizer makes nothing of it, or ids that the model has no embedding for
            continue
        yield request


def made_up(runner: Runner, config: Config, seeds: Iterable[int] = range(1, 9)) -> Iterator[Request]:
    """Random words, with two pictures between them where the model sees: each another beginning."""
    bundle = runner.bundle
    for seed in seeds:
        asked = probe(bundle.shape, bundle.tower, config, seed)
        seen = Pictures()
        if bundle.tower:
            found = runner.backend.vision(bundle.tower.feeds(asked.pictures))
            seen = Pictures(found, tuple(picture.layout for picture in asked.pictures))
        try:
            request = runner.request(asked.ids, seen)
        except InputError:  # too long
            continue
        yield request


def _picture(runner: Runner, rng: np.random.Generator) -> Image.Image:
    """A coloured shape somewhere on a light ground, as large as makes few image tokens."""
    canvas = Image.new("RGB", (SIDES[0], SIDES[0]), tuple(rng.integers(225, 256, 3).tolist()))
    pen, color = ImageDraw.Draw(canvas), _COLORS[rng.integers(len(_COLORS))]
    size = int(rng.integers(60, 110))
    x, y = rng.integers(8, SIDES[0] - size - 8, 2).tolist()
    draw: Sequence[Callable[[], None]] = (
        lambda: pen.ellipse((x, y, x + size, y + size), fill=color),
        lambda: pen.rectangle((x, y, x + size, y + size), fill=color),
        lambda: pen.polygon(((x, y + size), (x + size // 2, y), (x + size, y + size)), fill=color),
    )
    draw[int(rng.integers(len(draw)))]()
    for side in SIDES:
        picture = canvas.resize((side, side))
        if runner.tower.picture(picture, runner.picture_rule).tokens <= MOST:
            break
    return picture
