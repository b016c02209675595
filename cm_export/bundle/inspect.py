"""What is inside a bundle, as plain values: recipe, graphs, weights, gates, passes, and what is pruned and why."""

from pathlib import Path
from typing import Any

from ..base.core_index import neuron_count
from ..families import Shape
from ..recipe.recipe import Recipe, from_dict
from .bundle import Bundle
from .packed import FILE as PACKED
from .predictor import predictor_share
from .unpacked import Weights
from .weights import FILE as WEIGHTS


def describe(path: Path) -> dict[str, Any]:
    """Everything `cm-export inspect` shows. Raises InputError, BundleError; reads (and verifies) the whole bundle."""
    bundle = Bundle(path)
    bundle.check_portable()
    bundle.wait_verified()
    m, recipe = bundle.manifest, from_dict(bundle.manifest["recipe"], "manifest.json: recipe")
    graphs = [{"name": n, "bytes": m["files"][f"{n}.onnx"]["bytes"], **g} for n, g in m["graphs"].items()]
    source = m["model"]
    return {
        "path": str(path),
        "model": f"{source['source']}, {source['type']}" + (f", {source['revision']}" if source["revision"] else ""),
        "adapter": source.get("adapter"),  # None in a bundle of an earlier version, as is the next
        "codes": m.get("codes"),
        "reads": _reads(bundle.shape),
        "recipe": {k: v for k, v in m["recipe"].items() if v is not None},
        "graphs": graphs,
        "weights": _weights(bundle),
        "engines": _engines(m),
        "gates": m["gates"],
        "drift": m.get("drift"),  # None in a bundle of an earlier version
        "generation": m.get("generation") or {},
        "passes": m["passes"],
        "pruned": _pruned(recipe, bundle.shape),
        "links": m["links"],
        "versions": m["versions"],
    }


def _reads(shape: Shape) -> str:
    """What a question may be about."""
    if not shape.sees:
        return "text only"
    return "text, pictures and clips" if shape.clip_token >= 0 else "text and pictures, no clips"


def _weights(bundle: Bundle) -> dict[str, Any]:
    """The weight file, and matrices that are stored in few bits; `float32`: whether the weight file has those as well."""
    files, file = bundle.manifest["files"], bundle.weights
    made = file.made_of_codes if isinstance(file, Weights) else set()
    found = {"file": WEIGHTS, "bytes": files[WEIGHTS]["bytes"], "tensors": len(file.tensors.keys() - made)}
    if bundle.packed is None:
        return found
    packed = {
        "file": PACKED,
        "bytes": files[PACKED]["bytes"],
        "matrices": len(bundle.packed.entry_of),
        "float32": not made,
    }
    return {**found, "packed": packed}


def _engines(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What the engines are built for, and of each: bytes, layers (None where no GPU could open it), plugin layers."""
    found = manifest.get("engines")
    if not found:
        return None
    rows = [
        {
            "name": name,
            "bytes": graph["bytes"],
            "layers": graph["layers"],
            "plugins": graph["plugins"],
            "index_inputs": len(graph["index_inputs"]),
        }
        for name, graph in found["graphs"].items()
    ]
    what = ("backend", "version", "architecture", "precision", "capacity", "kv")
    return {k: found[k] for k in what} | {"graphs": rows}


def _pruned(recipe: Recipe, shape: Shape) -> dict[str, str]:
    """In words, which tokens and neurons leave the computation, where, and by whose vote."""
    n, t = recipe.neurons, recipe.tokens
    tokens = "none: every image token stays" if shape.sees else "none: this model takes no pictures"
    if t.policy != "dense":
        budget = {
            "share": f"{t.share:g} of the image tokens stay",
            "count": f"{t.count} image tokens stay",
            "knee": f"image tokens up to the knee of the score curve stay, {t.min_share:g} to {t.max_share:g} of them",
        }[t.budget]
        where = "leave the computation and the cache of all layers" if t.cache == "cut" else "are not read by decode"
        tokens = f"{budget}, by {t.policy} after layer {t.prune_layer} of {shape.layers} (votes: {t.voters}); the rest {where}"
        tokens += "; every picture has its own budget" if t.quota == "each" else ""
        tokens += "; scores of all layers before the cut are added" if t.layers == "all" else ""
        if t.first != "none":
            tokens = (
                f"{t.first_share:g} of the image tokens stay, by {t.first} before the first layer; of all, {tokens}"
            )
    neurons = "none: decode computes every neuron"
    if n.policy != "dense":
        kept = neuron_count(n.share, shape.ffn)
        each = "per layer" if n.layers == "uniform" else "per layer on average, more where a layer is sensitive"
        judge = f"by {n.policy} over the prompt (votes: {n.voters})"
        if n.in_decode:
            cost = f"{predictor_share(shape.hidden):.1%}".replace("%", " %")
            judge = (
                f"{n.policy} anew for every token by 4-bit copies of gate and up (which cost {cost} of the FFN bytes)"
            )
        if n.by_threshold:
            read = f"{n.share:.0%} of the FFNs' weights and {n.rest_share:.0%} of the others".replace("%", " %")
            return {
                "tokens": tokens,
                "neurons": f"decode reads {read}, anew for every token: channels and neurons above thresholds",
            }
        neurons = f"decode computes {kept} of {shape.ffn} neurons {each}, {judge}"
        neurons += f", in blocks of {n.block}" if n.block > 1 else ""
        mean = {"prompt": "their mean in the prompt", "calibrated": "their mean in generated text"}
        neurons += f"; {mean[n.fill]} stands in for the others" if n.fill != "none" else ""
    return {"tokens": tokens, "neurons": neurons}
