"""All proofs of one family on several configurations, drawn from seeds one after the other.

check("qwen2_vl", [0, 1])  ->  {"family", "proved", "lacks", "notes", "proofs", "configurations": [{"seed", "model", "proofs"}]}
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import families
from ..base import disk
from ..base.errors import InputError
from ..families import Family, Shape
from ..source import random_weights
from . import answers, cuts, file, lowered, shapes
from .proof import MISSING, NOT_REACHED, Found, Proof, Result
from .subject import Subject

Step = Callable[..., None]


def _traced(of: Subject) -> Found:
    return Found(0, 0, f"{', '.join(of.dense)}: {sum(len(g.graph.node) for g in of.dense.values())} nodes")


# Without these nothing else can be asked.
FIRST = (
    Proof("file", "what the file says fits together, and transformers' model", file.holds),
    Proof("trace", "every graph is traced", _traced),
)
PROOFS = (
    Proof("vision", "the vision graph and stock transformers' tower", answers.vision, sees=True),
    Proof("prefill", "padded batches of shapes that were not traced", shapes.prefill),
    Proof("decode", "several tokens at once after any cache", shapes.decode),
    Proof("answers", "eight greedy tokens after prompts with pictures", answers.answers, sees=True),
    Proof("two pictures", "the same after two unequal pictures in one prompt", answers.two_pictures, sees=True),
    Proof("text only", "the same after words alone", answers.text_only),
    Proof("batch", "three unequal requests together, and each alone", answers.batch),
    Proof("full budget", "every token and neuron kept, and the dense graphs", cuts.full_budget),
    Proof("cut", "tokens cut, and stock transformers with these tokens masked", cuts.cut, sees=True),
    Proof("positions", "eight tokens after a cut: those that stay keep their positions", cuts.positions, sees=True),
    Proof("later", "a second question over the cache of the first", answers.later),
    Proof("lowered", "graphs lowered for every version of TensorRT, and the portable ones", lowered.lowered),
)


def check(name: str, seeds: Sequence[int], progress: Step = lambda what, done=None, total=None: None) -> dict[str, Any]:
    """A report of plain values. Raises InputError for an unknown family, and for one that draws no configurations."""
    family = families.find(name)
    configurations = [_configuration(name, family, seed, progress) for seed in seeds]
    every = [p for c in configurations for p in c["proofs"]]
    lacks = dict.fromkeys(f"{p['proof']}: {p['detail']}" for p in every if p["state"] == MISSING)
    notes = dict.fromkeys(note for c in configurations for note in c.pop("notes"))
    found: dict[str, Any] = {"family": name, "proved": all(Result(**p).holds for p in every)}
    found |= {"lacks": [*lacks], "notes": [*notes], "proofs": {p.name: p.what for p in (*FIRST, *PROOFS)}}
    return found | {"configurations": configurations}


def _configuration(name: str, family: Family, seed: int, progress: Step) -> dict[str, Any]:
    try:
        config = {"model_type": name, **family.sample(seed)}
    except InputError as e:
        raise InputError(e.what, where=f"family {name}", fix=e.fix) from e
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=disk.TEMPORARY) as folder:
        subject = Subject(Path(folder) / "model", Path(folder) / "graphs", family, number=seed)
        results = prove(subject, config, seed, lambda proof: progress(f"configuration of seed {seed}: {proof}"))
        read = results[0].holds
        found = {"seed": seed, "model": described(subject.shape) if read else ""}
        found["notes"] = file.left_to_defaults(subject) if read else []
    seconds = time.perf_counter() - started
    return found | {"seconds": seconds, "proofs": [r.to_dict() for r in results], "config": config}


def prove(subject: Subject, config: dict[str, Any], seed: int, progress: Callable[[str], None]) -> list[Result]:
    """Every proof on a new checkpoint of this configuration, its weights drawn from `seed`; `subject` says where it lies."""
    subject.folder.mkdir(exist_ok=True)

    def made(of: Subject) -> Found:
        random_weights.write(config, of.family, of.path, seed)
        return file.holds(of)

    first = (Proof("file", "", made), *FIRST[1:])
    results: list[Result] = []
    for proof in (*first, *PROOFS):
        if all(r.holds for r in results[: len(first)]):
            progress(proof.name)
            results.append(proof.on(subject))
        else:
            results.append(Result(proof.name, NOT_REACHED, None, None, "an earlier proof does not hold"))
    return results


def described(shape: Shape) -> str:
    """A model in a few words."""
    sees = f", {shape.position_axes} axes of positions" if shape.position_axes > 1 else ""
    heads = f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}"
    return f"{shape.layers} layers of {shape.hidden}, {heads}, {shape.ffn} neurons, {shape.activation}{sees}"
