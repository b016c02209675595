"""What weights in few bits cost a model: every way to round them, in agreement, KL and right answers, beside bits per weight.

    python benchmarks/precision.py --smollm2 DIR --out benchmarks/quality/precision.json --docs docs/precision.md

A weight [K,N] becomes the numbers that its codes stand for, and the model runs in float32 with those. SmolLM2 reads its own
dense answers to held-out prompts again (teacher forcing, prompt and answer with the rounded weights), as in
neuron_quality.py; the demo models answer their tasks' questions.

    agreement  how often the first choice is the dense model's     KL  nats, dense against rounded     of dense  right answers

What a method knows of its inputs comes from the model's own answers to other prompts. SmolLM2's weights are those of a file
of 4 bits: asymmetric groups of 32 find that file's grid again. `off grid` is the same model with noise as wide as the file's
steps on its weights, and is compared with itself only: that is what choices are made by.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import neuron_quality as nq
import numpy as np
import torch
from _page import rewrite, write_report
from torch.nn import functional as F

from cm_export.base import environment
from cm_export.evals.tasks import easy_vqa, scenes
from cm_export.quant.choose import Inputs, by_inputs, quantise
from cm_export.quant.compensate import compensated
from cm_export.quant.rounding import Quantiser, least_squares, nearest, weighted
from cm_export.quant.scheme import Scheme

SOME = (0, 3, 6, 9, 12, 14)  # prompts that compare methods and groups; parts are compared on all 16
FILE_GROUP = 32  # of the 4-bit file that SmolLM2's weights come from
KINDS = {
    "gate": "ffn",
    "up": "ffn",
    "down": "ffn",
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "o": "attention",
}
EIGHT = {"ffn": 8, "attention": 8, "head": 8}


@dataclass(frozen=True)
class Product:
    """A weight [N,K] of torch, and where its inputs are seen."""

    name: str  # layers.3.down, head
    kind: str  # ffn, attention, head
    module: torch.nn.Linear


@dataclass(frozen=True)
class Way:
    """How every weight of a model is stored."""

    name: str
    bits: dict[str, int] = field(default_factory=dict)  # kind -> bits; kinds that are absent stay float32
    group: int = 32
    symmetric: bool = True
    method: str = "search"  # of METHODS
    eight: Callable[[str], bool] = lambda name: False  # products in 8 bits, whatever their kind has
    inputs: bool = False  # x is rounded to 8 bits as well, by token and group, as the kernel does
    also: tuple[str, ...] = ()  # columns beside `off_grid`

    def scheme(self, product: Product) -> Scheme | None:
        bits = self.bits.get(product.kind, 0)
        return by_inputs(8 if self.eight(product.name) else bits, self.group, self.symmetric) if bits else None


def products(layers: Any, head: torch.nn.Linear) -> list[Product]:
    """The products of a Llama-like decoder, by name."""
    found = []
    for i, layer in enumerate(layers):
        for name, kind in KINDS.items():
            module = getattr(layer.mlp if kind == "ffn" else layer.self_attn, f"{name}_proj")
            found.append(Product(f"layers.{i}.{name}", kind, module))
    return [*found, Product("head", "head", head)]


class Rounding:
    """A model whose weights are replaced: keeps the dense ones and what was seen of the inputs."""

    def __init__(self, found: list[Product]):
        self.products = found
        self.dense = {p.name: p.module.weight.data.clone() for p in found}
        self.grams: dict[str, torch.Tensor] = {}
        self.seen: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Whatever runs inside adds its inputs to `grams`. gate and up, and q, k and v, have the same."""

        def add(product: Product, x: torch.Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            own = self.grams.setdefault(product.name, torch.zeros(x.shape[-1], x.shape[-1]))
            own.addmm_(rows.T, rows)
            self.seen[product.name] = self.seen.get(product.name, 0) + len(rows)

        watched = [p for p in self.products if not p.name.endswith((".up", ".k", ".v"))]
        hooks = [p.module.register_forward_pre_hook(lambda m, a, p=p: add(p, a[0])) for p in watched]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def inputs(self, product: Product) -> Inputs:
        name = product.name
        for same, first in ((".up", ".gate"), (".k", ".q"), (".v", ".q")):
            name = name.removesuffix(same) + first if name.endswith(same) else name
        gram = self.grams[name].numpy() / self.seen[name]
        return Inputs(np.diagonal(gram).copy(), gram)

    @contextmanager
    def stored(self, way: Way) -> Iterator[float]:
        """Inside, every weight is what `way` stores of it. Yields the bits per weight of all rounded weights together."""
        bits = weights = 0.0
        hooks = []
        for product in self.products:
            if (scheme := way.scheme(product)) is None:
                continue
            weight = self.dense[product.name]
            product.module.weight.data.copy_(
                torch.from_numpy(rounded(weight.numpy(), scheme, way, self.inputs(product)))
            )
            bits, weights = bits + scheme.bits_per_weight * weight.numel(), weights + weight.numel()
            if way.inputs:
                hooks.append(product.module.register_forward_pre_hook(lambda m, a: (in_8_bits(a[0], way.group),)))
        try:
            yield bits / weights
        finally:
            for product in self.products:
                product.module.weight.data.copy_(self.dense[product.name])
            for hook in hooks:
                hook.remove()


def rounded(weight: np.ndarray, scheme: Scheme, way: Way, inputs: Inputs) -> np.ndarray:
    """[N,K] -> the numbers that are stored of it, [N,K]."""
    more = -weight.shape[1] % scheme.group
    filled = np.pad(weight.T, ((0, more), (0, 0)))
    seen = Inputs(np.pad(inputs.square, (0, more)), np.pad(inputs.gram, (0, more)))
    found = METHODS[way.method](filled, scheme, seen)
    return np.ascontiguousarray(found[: weight.shape[1]].T)


def in_8_bits(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [..,K] rounded by token and group of channels to 127 steps of its largest."""
    more = -x.shape[-1] % group
    groups = F.pad(x, (0, more)).unflatten(-1, (-1, group))
    step = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((groups / step).round() * step).flatten(-2)[..., : x.shape[-1]]


def _scaled(weight: np.ndarray, scheme: Scheme, inputs: Inputs) -> np.ndarray:
    """AWQ (arXiv 2306.00978): inputs that are large get weights of finer steps, x / s times W * s, s = (mean x^2)^(a/2).

    a is the best of four in squared error of the outputs.
    """
    best, least = None, np.inf
    for power in (0.0, 0.125, 0.25, 0.375):
        factor = np.maximum(inputs.square, inputs.square.mean() * 1e-4) ** power
        factor = (factor / np.exp(np.log(factor).mean())).astype(np.float32)[:, None]
        tried = weighted(inputs.square / factor[:, 0] ** 2)(weight * factor, scheme, "weight").numbers() / factor
        off = tried - weight
        error = float((off * (inputs.gram @ off)).sum())
        if error < least:
            best, least = tried, error
    return best


def _plain(make: Callable[[Inputs], Quantiser]) -> Callable[[np.ndarray, Scheme, Inputs], np.ndarray]:
    return lambda weight, scheme, inputs: make(inputs)(weight, scheme, "weight").numbers()


METHODS: dict[str, Callable[[np.ndarray, Scheme, Inputs], np.ndarray]] = {
    "nearest": _plain(lambda i: nearest),
    "search": _plain(lambda i: least_squares),
    "search, weighted": _plain(lambda i: weighted(i.square)),
    "AWQ": _scaled,
    "GPTQ": _plain(lambda i: compensated(i.gram)),
    "default": lambda weight, scheme, inputs: quantise(weight, scheme, "weight", inputs).numbers(),
}


# ---------------------------------------------------------------- SmolLM2
class Reader:
    """A language model that reads its own dense answers again."""

    def __init__(self, path: Path, prompts: dict[str, list[str]], off_grid: bool = False):
        self.model = nq.Model(path)
        if off_grid:
            blur(self.model.model)
            self.model.adopt()
        self.rounding = Rounding(products(self.model.model.model.layers, self.model.model.lm_head))
        with self.rounding.watching():
            for ids, answer in self._answers(prompts["calibration"]):
                self.model.model(torch.cat([ids, answer], 1))
        self.asked = self._answers(prompts["short"] + prompts["long"])
        self.dense = [self._logs(*a) for a in self.asked]

    def figures(self, way: Way, prompts: Sequence[int]) -> dict[str, Any]:
        with self.rounding.stored(way) as bits:
            rows = [nq.compare(self.dense[n], self._logs(*self.asked[n]), self.asked[n][1]) for n in prompts]
        agreement, kl, _ = np.mean(rows, 0)
        low, high = nq.interval([r[0] for r in rows])
        found = {"bits": round(bits, 3), "agreement": round(float(agreement), 4), "kl": round(float(kl), 5)}
        return found if len(prompts) < len(self.asked) else found | {"ci": [round(low, 4), round(high, 4)]}

    def _answers(self, prompts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(ids, self.model.answer(ids)) for ids in map(self.model.ids, prompts)]

    def _logs(self, ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        return self.model.read(ids, answer, None).log_softmax(-1)


def blur(model: torch.nn.Module) -> None:
    """Noise as wide as a step of the file on every matrix (4 bits; 5 for the embedding): none is on its grid any more."""
    generator = torch.Generator().manual_seed(0)
    for name, matrix in model.named_parameters():
        if matrix.dim() == 2:
            groups = matrix.data.view(-1, FILE_GROUP)
            step = (groups.amax(1) - groups.amin(1)) / (31 if "embed" in name else 15)
            groups += (torch.rand(groups.shape, generator=generator) - 0.5) * step[:, None]


# ---------------------------------------------------------------- demo models
class Answerer:
    """A demo model that answers its task's questions, greedily and with every image token."""

    def __init__(self, folder: Path, task: Any, each: int, calibration: int):
        from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.task = task
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.rounding = Rounding(products(self.model.model.language_model.layers, self.model.lm_head))
        with self.rounding.watching():
            for text, picture in task.calibration_prompts(calibration, seed=1):
                self._answer(picture, text, 48)
        kinds = {k: task.questions(k) for k in task.KINDS}
        self.asked = [q for k, some in kinds.items() for q in random.Random(3).sample(some, min(each, len(some)))]
        self.right = sum(self._is_right(q) for q in self.asked)

    def figures(self, way: Way, prompts: Sequence[int]) -> dict[str, Any]:
        with self.rounding.stored(way) as bits:
            right = sum(self._is_right(q) for q in self.asked)
        return {"bits": round(bits, 3), "right": right, "of_dense": round(right / self.right, 4)}

    def _is_right(self, question: Any) -> bool:
        found = self._answer(question.pictures[0], question.text, self.task.KINDS[question.kind])
        return found in question.answers

    def _answer(self, picture: str, text: str, tokens: int) -> str:
        pixels = self.images(images=[self.task.open_picture(picture)], return_tensors="pt")
        grid = pixels["image_grid_thw"]
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        pads = "<|image_pad|>" * int(grid.prod() // self.images.merge_size**2)
        ids = self.tokenizer(
            chat.replace("<|image_pad|>", pads), return_tensors="pt", add_special_tokens=False
        ).input_ids
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels["pixel_values"],
            image_grid_thw=grid,
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            max_new_tokens=tokens,
            do_sample=False,
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


# ---------------------------------------------------------------- what is measured
FILE, EVERYWHERE = ("smollm2",), ("smollm2", "scenes", "easy_vqa")
FFN, LAYERS, ALL = {"ffn": 4}, {"ffn": 4, "attention": 4}, {"ffn": 4, "attention": 4, "head": 8}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_k_or_v(name: str) -> bool:
    return _last(name) in ("k", "v")


def ways() -> dict[str, list[Way]]:
    """Title of a table -> its rows."""
    methods = ("nearest", "search", "search, weighted", "AWQ", "GPTQ")
    kinds = {True: "symmetric", False: "with zeros"}
    return {
        "methods": [
            Way(
                f"FFN, {kind}, {method}",
                FFN,
                32,
                symmetric,
                method,
                also=FILE if method in ("nearest", "search") else (),
            )
            for symmetric, kind in kinds.items()
            for method in methods
        ],
        "groups": [
            Way(f"FFN, {kind}, GPTQ, groups of {group}", FFN, group, symmetric, "GPTQ")
            for symmetric, kind in kinds.items()
            for group in (64, 128)
        ],
        "parts": [
            Way("8 bits: all, groups of 128, search", EIGHT, 128, also=FILE),
            Way("8 bits: all, groups of 128, search; x in 8 bits", EIGHT, 128, inputs=True, also=FILE),
            Way("8 bits: all, groups of 32, search", EIGHT, 32, also=EVERYWHERE),
            Way("8 bits: all, groups of 32, GPTQ", EIGHT, 32, True, "GPTQ", also=FILE),
            Way("8 bits: all, groups of 32, GPTQ; x in 8 bits", EIGHT, 32, True, "GPTQ", inputs=True, also=FILE),
            Way("8 bits: all, groups of 32, search; x in 8 bits", EIGHT, 32, inputs=True, also=EVERYWHERE),
            Way("4 bits: FFN, attention; GPTQ", LAYERS, 32, True, "GPTQ"),
            Way("4 bits: FFN, attention; 8: head", ALL, 32, True, "GPTQ"),
            Way(
                "4 bits: FFN, attention; 8: head; x in 8 bits",
                ALL,
                32,
                True,
                "GPTQ",
                inputs=True,
                also=("scenes", "easy_vqa"),
            ),
            Way(
                "4 bits: FFN, attention; 8: head; zeros, x in 8 bits",
                ALL,
                32,
                False,
                "GPTQ",
                inputs=True,
                also=EVERYWHERE,
            ),
            Way("4 bits: FFN, attention; 8: head; zeros, x in 8 bits; search", ALL, 32, False, "search", inputs=True),
            Way("4 bits: FFN, q, k, o; 8: v, head", ALL, 32, True, "GPTQ", lambda n: _last(n) == "v"),
            Way(
                "4 bits: FFN, q, k, o; 8: v, head; zeros, x in 8 bits",
                ALL,
                32,
                False,
                "GPTQ",
                lambda n: _last(n) == "v",
                True,
                FILE,
            ),
            Way("4 bits: FFN, q, o; 8: k, v, head; zeros, x in 8 bits", ALL, 32, False, "GPTQ", _is_k_or_v, True),
            Way("4 bits: FFN; 8: attention, head", {"ffn": 4, "attention": 8, "head": 8}, 32, True, "GPTQ"),
            Way("4 bits: gate, up, attention; 8: down, head", ALL, 32, True, "GPTQ", lambda n: _last(n) == "down"),
            Way("4 bits: all", {"ffn": 4, "attention": 4, "head": 4}, 32, True, "GPTQ"),
        ],
    }


def measure(smollm2: Path, prompts: dict[str, list[str]], only: str) -> dict[str, list[dict]]:
    """Title -> rows: a way, and its figures for each model."""
    chosen = {title: [w for w in rows if only in w.name] for title, rows in ways().items()}
    report: dict[str, list[dict]] = {t: [{"way": w.name} for w in rows] for t, rows in chosen.items()}
    readers = {"off_grid": lambda: Reader(smollm2, prompts, off_grid=True), "smollm2": lambda: Reader(smollm2, prompts)}
    for column, make in (readers | ANSWERERS).items():
        model = make()
        for title, rows in chosen.items():
            for way, row in zip(rows, report[title], strict=True):
                if column != "off_grid" and column not in way.also:
                    continue
                row[column] = model.figures(way, range(16) if title == "parts" else SOME)
                print(f"{column:9s} {way.name:52s} {row[column]}", file=sys.stderr, flush=True)
        if isinstance(model, Answerer):
            report[f"{column}_dense"] = [{"right": model.right, "asked": len(model.asked)}]
        del model
    return report


DEMO = Path(__file__).parent.parent / "cm_export" / "demo"
ANSWERERS = {
    "scenes": lambda: Answerer(DEMO / "scenes", scenes, each=12, calibration=28),
    "easy_vqa": lambda: Answerer(DEMO / "model", easy_vqa, each=40, calibration=28),
}


# ---------------------------------------------------------------- the page
def table(rows: list[dict]) -> str:
    """Markdown: one line per way; agreement with its interval / KL, and right answers of the demo models where asked."""
    demos = [c for c in ANSWERERS if any(c in row for row in rows)]
    heads = ["", "bits per weight", "off grid", "as fetched", *demos]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["way"], f"{row['off_grid']['bits']:.2f}"]
        for column in ("off_grid", "smollm2"):
            f = row.get(column)
            ci = f" [{f['ci'][0]:.2f}, {f['ci'][1]:.2f}]" if f and "ci" in f else ""
            cells.append(f"{f['agreement']:.3f}{ci} / {f['kl']:.4f}" if f else "")
        cells += [f"{row[c]['of_dense']:.3f}" if c in row else "" for c in demos]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables(report: dict) -> dict[str, str]:
    """Mark on the page -> table."""
    return {title: table(report[title]) for title in ways()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--smollm2", type=Path, required=True, help="the directory that recipes/fetch_smollm2.py writes"
    )
    parser.add_argument("--out", type=Path, required=True, help="the report (.json)")
    parser.add_argument("--docs", type=Path, help="a page whose tables are written anew (.md)")
    parser.add_argument("--only", default="", help="ways whose names hold this, for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    prompts = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    started = time.time()
    report = measure(args.smollm2, prompts, args.only)
    versions = {
        "torch": torch.__version__,
        "transformers": __import__("transformers").__version__,
        "numpy": np.__version__,
    }
    report = {
        "command": "make bench-precision",
        "prompts": {k: len(v) for k, v in prompts.items()},
        "answer_tokens": nq.ANSWER,
        "environment": environment.describe(args.threads, versions),
        "seconds": round(time.time() - started),
        **report,
    }
    write_report(args.out, report)
    rewrite(args.docs, tables(report))


if __name__ == "__main__":
    main()
