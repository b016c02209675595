"""Which neurons a real language model needs: every policy against the share of FFN bytes that decode reads per token.

    python benchmarks/neuron_quality.py --model DIR --out benchmarks/quality/NAME.json

The dense model answers held-out prompts greedily. Then the same answers are read again token by token (teacher forcing)
with sparse FFNs; the prompt was read densely, as a bundle's prefill does. Figures, over all answer tokens:

    agreement   how often the sparse model's first choice is the dense model's      KL    nats, dense against sparse
    perplexity  of the dense answer under the sparse model

A method scores neurons, from the prompt (one set per answer), from calibration text, or anew for every token; the K best
rows are read. Bytes: K rows of three matrices in 16 bits, plus what the predictor reads. Calibration text is what the
model answers to other prompts. Sources: CoreInfer (arXiv 2410.18311), GRIFFIN (2404.01365), GLASS (2508.14302),
CATS (2404.08763).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import neuron_thresholds
import numpy as np
import torch
from _page import rewrite, write_report
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cm_export.base import environment
from cm_export.bundle import predictor
from cm_export.policies.neurons import coreinfer, griffin, random
from cm_export.quant.rounding import least_squares

ANSWER = 64  # tokens of every answer
GROUP = 64  # weights that share a scale in a low-bit copy
ROW_BITS = 16
# score(layer, x [T,D], act(gate) [T,F], z [T,F]) -> [T,F] or [F]; the largest are kept
Score = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """How neurons are chosen: what a scorer is made of (prompt activations per layer), and what choosing costs."""

    name: str
    kind: str  # control | fixed set | per token | oracle
    scorer: Callable[[list[torch.Tensor]], Score] | None
    predictor_share: float = 0.0  # of the FFN's bytes, read for choosing alone
    gate_is_read: bool = False  # every gate row is read and used, so a kept neuron costs two rows more
    fill: bool = False  # dropped neurons contribute their mean over calibration text
    keeps: Callable[[float], Score] | None = None  # share -> z with what is left out at 0, where no scorer says it

    def kept(self, share: float, ffn: int) -> int:
        """K neurons within a share of the FFN's bytes; 0 if choosing alone costs more."""
        free = share - self.predictor_share
        return max(0, int((free - 1 / 3) * 1.5 * ffn) if self.gate_is_read else int(free * ffn))


class Model:
    """A Llama-like decoder whose FFNs can be made sparse."""

    def __init__(self, path: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.inputs: dict[int, torch.Tensor] = {}  # x [T,D] of every layer of the pass under way
        self._keep: Score | None = None
        self.adopt()

    def adopt(self) -> None:
        """Put our forward into every FFN."""
        self.ffns = [layer.mlp for layer in self.model.model.layers]
        self.ffn, self.hidden = self.ffns[0].up_proj.weight.shape
        self.norms = [m.down_proj.weight.norm(dim=0) for m in self.ffns]
        for i, module in enumerate(self.ffns):
            module.forward = lambda x, i=i: self._forward(i, x)

    def _forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        module = self.ffns[layer]
        self.inputs[layer] = x[0]
        active = F.silu(module.gate_proj(x))
        z = active * module.up_proj(x)
        if self._keep is None:
            self.seen[layer] = x[0], z[0]
        else:
            z = self._keep(layer, x[0], active[0], z[0])[None]
        return module.down_proj(z)

    def ids(self, prompt: str) -> torch.Tensor:
        chat = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    def answer(self, ids: torch.Tensor) -> torch.Tensor:
        """ANSWER greedy tokens [1,T]; an end token does not stop it, so that every answer counts alike."""
        self._keep = None
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False
        )
        return out[:, ids.shape[1] :]

    def read(self, ids: torch.Tensor, answer: torch.Tensor, keep: Score | None) -> torch.Tensor:
        """Logits [T,V] before each answer token, the prompt (but its last token) read densely."""
        self._keep = None
        past = self.model(ids[:, :-1], use_cache=True).past_key_values
        self._keep = keep
        logits = self.model(torch.cat([ids[:, -1:], answer[:, :-1]], 1), past_key_values=past).logits[0]
        self._keep = None
        return logits


@dataclass(frozen=True)
class Calibration:
    """Of the model's own answers to the calibration prompts, per layer: x [N,D], mean z [F], energy [F]."""

    x: list[torch.Tensor]
    mean: list[torch.Tensor]
    energy: list[torch.Tensor]
    up: list[torch.Tensor]  # mean |x Wu| [F]


def calibrate(model: Model, prompts: list[str]) -> Calibration:
    layers = range(len(model.ffns))
    xs, means, energies, ups = ([[] for _ in layers] for _ in range(4))
    for prompt in prompts:
        ids = model.ids(prompt)
        answer = model.answer(ids)
        model.model(torch.cat([ids, answer], 1))
        for i in layers:
            x, z = (t[ids.shape[1] :] for t in model.seen[i])
            xs[i].append(x)
            means[i].append(z)
            energies[i].append(energy(z * model.norms[i]))
            ups[i].append(model.ffns[i].up_proj(x).abs().mean(0))
    return Calibration(
        [torch.cat(x) for x in xs],
        [torch.cat(z).mean(0) for z in means],
        [torch.stack(e).sum(0) for e in energies],
        [torch.stack(u).mean(0) for u in ups],
    )


def energy(z: torch.Tensor) -> torch.Tensor:
    """GRIFFIN's sum over tokens of (z / |z|)^2, [F]."""
    return griffin.score(z[None], torch.ones(1, len(z)), torch.ones(1))[0]


def low_bit(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """weight [F,D] on 2^bits levels, symmetric, one scale per GROUP values: the best of 24 scales in squared error."""
    groups = weight.reshape(-1, GROUP)
    top, levels = groups.abs().amax(1, keepdim=True), 2 ** (bits - 1) - 0.5
    best, error = torch.zeros_like(groups), torch.full((len(groups), 1), torch.inf)
    for factor in torch.linspace(0.25, 1.15, 24):
        step = (top * factor / levels).clamp_min(1e-12)
        tried = ((groups / step - 0.5).round() + 0.5).clamp(-levels, levels) * step
        off = (tried - groups).square().sum(1, keepdim=True)
        best, error = torch.where(off < error, tried, best), torch.minimum(off, error)
    return best.reshape(weight.shape)


def low_rank(weight: torch.Tensor, x: torch.Tensor, rank: int) -> torch.Tensor:
    """The best rank-r weight [F,D] for inputs like x [N,D]: truncated SVD under their covariance."""
    covariance = x.T @ x / len(x) + 1e-4 * torch.eye(x.shape[1])
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(1e-6).sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)


def thresholds(model: Model, calibration: Calibration, prompts: list[str]) -> list[Method]:
    """Those that leave out channels of x as well."""
    found = neuron_thresholds.methods(model, calibration.x, prompts)
    return [Method(name, kind, None, keeps=keeps) for name, (kind, keeps) in found.items()]


def methods(model: Model, calibration: Calibration) -> list[Method]:
    norms, prior = model.norms, calibration.energy

    def fixed(scores: Callable[[int, torch.Tensor], torch.Tensor]) -> Callable[[list[torch.Tensor]], Score]:
        def scorer(prompt: list[torch.Tensor]) -> Score:
            made = [scores(i, z) for i, z in enumerate(prompt)]
            return lambda layer, x, active, z: made[layer]

        return scorer

    def token(score: Score) -> Callable[[list[torch.Tensor]], Score]:
        return lambda prompt: score

    def fused(i: int, z: torch.Tensor) -> torch.Tensor:
        own = energy(z * norms[i])
        return own / own.sum() + prior[i] / prior[i].sum()

    def ranks(i: int, z: torch.Tensor) -> torch.Tensor:
        own = energy(z * norms[i])
        return own.argsort().argsort().float() + prior[i].argsort().argsort().float()

    def ones(z: torch.Tensor) -> torch.Tensor:
        return torch.ones(1, len(z))

    def copies(change: Callable[[int, torch.Tensor], torch.Tensor]) -> Score:
        pairs = [(change(i, m.gate_proj.weight), change(i, m.up_proj.weight)) for i, m in enumerate(model.ffns)]
        return lambda i, x, active, z: (F.silu(x @ pairs[i][0].T) * (x @ pairs[i][1].T)).abs() * norms[i]

    found = [
        Method("random", "control", fixed(lambda i, z: random.score(z[None], torch.tensor([7]), i)[0])),
        Method("coreinfer (paper)", "fixed set", fixed(lambda i, z: coreinfer.score(z[None], ones(z), 0.2)[0])),
        Method("griffin", "fixed set", fixed(lambda i, z: energy(z))),
        Method("griffin x row norm", "fixed set", fixed(lambda i, z: energy(z * norms[i]))),
        Method("calibration prior alone", "fixed set", fixed(lambda i, z: prior[i])),
        Method("glass (ranks)", "fixed set", fixed(ranks)),
        Method("glass (sum)", "fixed set", fixed(fused)),
        Method("glass (sum), mean added back", "fixed set", fixed(fused), fill=True),
        Method("oracle |z| x row norm", "oracle", token(lambda i, x, active, z: z.abs() * norms[i])),
        Method(
            "gate read, |act(gate)| x row norm",
            "per token",
            token(lambda i, x, active, z: active.abs() * norms[i] * calibration.up[i]),
            gate_is_read=True,
        ),
        Method(
            "gate read, mean added back",
            "per token",
            token(lambda i, x, active, z: active.abs() * norms[i] * calibration.up[i]),
            gate_is_read=True,
            fill=True,
        ),
    ]
    for bits in (1, 2, 3, 4):
        score = copies(lambda i, w, bits=bits: low_bit(w, bits))
        cost = 2 / 3 * (bits + 16 / GROUP) / ROW_BITS
        found.append(Method(f"{bits}-bit copy of gate and up", "per token", token(score), cost))
        if bits == 2:
            found.append(Method("2-bit copy, mean added back", "per token", token(score), cost, fill=True))
    stored = predictor.scheme(model.hidden)
    shipped = copies(lambda i, w: torch.from_numpy(least_squares(w.detach().numpy(), stored).numbers()))
    cost = predictor.predictor_share(model.hidden)
    found.append(Method("predicted (4-bit copy as a bundle stores it)", "per token", token(shipped), cost))
    ahead = Method("the same, asked one layer ahead", "per token", token(_ahead(shipped, model)), cost)
    found.append(ahead)
    for share in (0.7, 0.8, 0.9):
        # Only the prompt's candidates are predicted, so only their part of the copy is read.
        name = f"the same, of {share:.0%} candidates by glass (sum)"
        found.append(Method(name, "per token", _among(fused, share, shipped), cost * share))
    for part in (8, 4):
        rank = model.hidden // part
        cost = 2 * rank * (model.hidden + model.ffn) / (3 * model.hidden * model.ffn)
        score = copies(lambda i, w, rank=rank: low_rank(w, calibration.x[i], rank))
        found.append(Method(f"low rank {rank} of gate and up", "per token", token(score), cost))
    return found


def _ahead(score: Score, model: Model) -> Score:
    """Layer l is predicted from the input of layer l-1's FFN, while that one still runs; the first from its own."""
    return lambda i, x, active, z: score(i, model.inputs[max(0, i - 1)], active, z)


def _among(prior: Callable[[int, torch.Tensor], torch.Tensor], share: float, score: Score) -> Callable:
    """The scorer restricted to the share of neurons that are best in the prompt: one candidate set per answer."""

    def scorer(prompt: list[torch.Tensor]) -> Score:
        outside = []
        for i, z in enumerate(prompt):
            first = prior(i, z)
            outside.append(first < first.topk(round(share * len(first))).values[-1])
        return lambda i, x, active, z: score(i, x, active, z).masked_fill(outside[i], -1.0)

    return scorer


def sparse(method: Method, score: Score, kept: int, mean: list[torch.Tensor]) -> Score:
    """What takes the place of z: kept neurons as they are, the others nothing or their mean."""

    def keep(layer: int, x: torch.Tensor, active: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        scores = score(layer, x, active, z).expand_as(z)
        chosen = torch.zeros_like(z).scatter_(-1, scores.topk(kept, -1).indices, 1.0)
        return z * chosen + ((1 - chosen) * mean[layer] if method.fill else 0.0)

    return keep


@torch.no_grad()
def measure(model: Model, prompts: dict[str, list[str]], shares: list[float], only: str = "") -> list[dict]:
    """`only`: part of the names of the methods that are measured; dense is among the rows in any case."""
    calibration = calibrate(model, prompts["calibration"])
    asked = []
    for length in ("short", "long"):
        for prompt in prompts[length]:
            ids = model.ids(prompt)
            answer = model.answer(ids)
            model.model(ids)
            asked.append((length, ids, answer, [model.seen[i][1] for i in range(len(model.ffns))]))
    dense = [model.read(ids, answer, None).log_softmax(-1) for _, ids, answer, _ in asked]
    rows = [
        _row(
            "dense",
            "control",
            1.0,
            model.ffn,
            model.ffn,
            0.0,
            [compare(d, d, a) for d, (_, _, a, _) in zip(dense, asked, strict=True)],
            asked,
        )
    ]
    found = thresholds(model, calibration, prompts["calibration"])
    if not (only and any(only in m.name for m in found)):
        found = [*methods(model, calibration), *found]
    for method in (m for m in found if only in m.name):
        for share in shares:
            kept = method.kept(share, model.ffn)
            if kept < 1:
                continue
            figures = []
            for reference, (_, ids, answer, prompt) in zip(dense, asked, strict=True):
                keep = (
                    method.keeps(share)
                    if method.keeps
                    else sparse(method, method.scorer(prompt), kept, calibration.mean)
                )
                figures.append(compare(reference, model.read(ids, answer, keep).log_softmax(-1), answer))
            rows.append(_row(method.name, method.kind, share, kept, model.ffn, method.predictor_share, figures, asked))
            print(
                f"{method.name:36s} {share:.0%} K {kept} agreement {rows[-1]['agreement']:.3f}",
                file=sys.stderr,
                flush=True,
            )
    return rows


def compare(reference: torch.Tensor, logs: torch.Tensor, answer: torch.Tensor) -> tuple[float, float, float]:
    """Agreement of the first choices, KL(reference || logs) in nats, and the answer's loss; logs of softmax [T,V]."""
    agree = (logs.argmax(-1) == reference.argmax(-1)).float().mean().item()
    kl = (reference.exp() * (reference - logs)).sum(-1).mean().item()
    return agree, kl, F.nll_loss(logs, answer[0]).item()


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over prompts."""
    draws = np.random.default_rng(0).integers(0, len(values), (4000, len(values)))
    low, high = np.quantile(np.asarray(values)[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _row(name: str, kind: str, share: float, kept: int, ffn: int, predictor: float, figures: list, asked: list) -> dict:
    """Means over prompts (all answers are equally long) with a 95 % bootstrap interval over prompts."""
    values, lengths = np.array(figures), np.array([a[0] for a in asked])
    low, high = interval(values[:, 0])
    agreement, kl, nll = values.mean(0)
    return {
        "method": name,
        "kind": kind,
        "bytes_share": share,
        "neurons": kept,
        "ffn": ffn,
        "predictor_share": round(predictor, 4),
        "agreement": round(float(agreement), 4),
        "ci": [round(low, 4), round(high, 4)],
        "kl": round(float(kl), 4),
        "perplexity": round(float(np.exp(nll)), 3),
        "agreement_short": round(float(values[lengths == "short", 0].mean()), 4),
        "agreement_long": round(float(values[lengths == "long", 0].mean()), 4),
    }


def table(report: dict) -> str:
    """The report as a Markdown table: one line per method, agreement and perplexity per share of the bytes."""
    shares = sorted({r["bytes_share"] for r in report["rows"] if r["method"] != "dense"})
    lines = ["| method | reads to choose | " + " | ".join(f"{s:.0%}" for s in shares) + " |"]
    lines.append("|---|---|" + "---|" * len(shares))
    for name in dict.fromkeys(r["method"] for r in report["rows"]):
        rows = {r["bytes_share"]: r for r in report["rows"] if r["method"] == name}
        some = next(iter(rows.values()))
        cells = [f"{rows[s]['agreement']:.3f} / {rows[s]['perplexity']:.2f}" if s in rows else "" for s in shares]
        if name == "dense":
            cells = [f"{some['agreement']:.3f} / {some['perplexity']:.2f}"] * len(shares)
        lines.append(
            f"| {name.replace(chr(124), chr(92) + chr(124))} | {some['predictor_share']:.1%} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def merged(before: list[dict], found: list[dict]) -> list[dict]:
    """Rows of an earlier run with those of `found` in their places, new ones after. The dense answers must be the same."""
    if before[0] != found[0]:
        raise SystemExit(f"the dense model answers otherwise than in the report: {before[0]} there, {found[0]} here")
    new = {(r["method"], r["bytes_share"]): r for r in found}
    kept = [new.pop((r["method"], r["bytes_share"]), r) for r in before]
    return [*kept, *new.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Llama-like checkpoint directory")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct (weights of a Q4_1 file)")
    parser.add_argument("--out", type=Path, required=True, help="the report (.json)")
    parser.add_argument("--docs", type=Path, help="a page whose table is written anew (.md)")
    parser.add_argument("--shares", default="0.4,0.5,0.6,0.7", help="shares of the FFN's bytes read per token")
    parser.add_argument(
        "--only", default="", help="measure methods whose names hold this, into the report that is there"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    started = time.time()
    rows = measure(Model(args.model), prompts, [float(s) for s in args.shares.split(",")], args.only)
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    report = {
        "model": args.name,
        "command": "make bench-quality",
        "prompts": {k: len(v) for k, v in prompts.items()},
        "answer_tokens": ANSWER,
        "row_bits": ROW_BITS,
        "environment": environment.describe(args.threads, versions),
        "seconds": round(time.time() - started),
        "rows": rows,
    }
    if args.only:
        before = json.loads(args.out.read_text(encoding="utf-8"))
        report = before | {"rows": merged(before["rows"], rows)}
    write_report(args.out, report)
    rewrite(args.docs, {"table": table(report)})
    print(table(report))


if __name__ == "__main__":
    main()
