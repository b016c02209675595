"""Build a bundle: checkpoint -> trace -> weights -> surgery -> gates -> `--out`, in resumable stages.

stage      reads                         writes
trace      configuration                 prefill, decode, and vision where there is one, traced (no weights needed)
weights    checkpoint                    weights.safetensors, processor files, PyTorch's answers to the probe
graphs     trace, weights, recipe        those, sparse prefill and decode, turn where a later question can be asked
gates      graphs, weights, reference    gate results; a failed gate ends the build
engines    graphs, weights               with a TensorRT backend: engines, proved before and checked after
"""

import os
import platform
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from .. import __version__, families, plugins
from ..backends.onnxruntime.backend import Backend
from ..base import by_name
from ..base.errors import InputError
from ..base.hashes import file_sha256, key_of
from ..bundle import bundle as bundles
from ..bundle import predictor, weights
from ..bundle.calibration import FILE as CALIBRATION
from ..bundle.calibration import Calibration, belongs
from ..bundle.calibration import read as read_calibration
from ..bundle.graph_facts import describe, links
from ..bundle.names import core_row_names
from ..calibrating import prune_layers
from ..families import Family, Shape
from ..plugins.core_ffn.op import ACTIVATIONS
from ..recipe.recipe import Recipe
from ..source import checkpoint, model
from ..source.probe import probe
from ..surgery import pipeline
from ..surgery.neuron_constants import neuron_constants
from . import engines, gates, quality
from .quality import Requirement
from .stages import Stages, source_key
from .workers import workers

Step = Callable[..., None]
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "numpy")
_PACKAGE = Path(__file__).parent.parent


def build(
    model: str,
    out: Path,
    recipe: Recipe,
    progress: Step = lambda what, done=None, total=None: None,
    force: bool = False,
    work_dir: Path | None = None,
    threads: int = 0,
    required: Requirement | None = None,
) -> dict[str, Any]:
    """Write the bundle `out` and return its manifest with `seconds`, `peak_memory_bytes` and `stages_reused`.

    Raises InputError for what the user can mend, GateFailed when the export is not right; `out` is untouched then.
    """
    started, out = time.perf_counter(), Path(os.path.abspath(out))
    bundles.check_out(out)
    progress("check the checkpoint")
    source = checkpoint.resolve(model, recipe.revision)
    family = families.find(source.model_type)
    stages = Stages(work_dir or out.with_name(f".{out.name}.stages"), force, out)
    with stages.lock():
        bundles.sweep(out)
        _check_disk(source, out)
        manifest = _run(source, family, recipe, out, stages, progress, threads, required)
    peak = max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    return manifest | {
        "path": str(out),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak,
        "stages_reused": stages.reused,
    }


def _run(
    source, family: Family, recipe: Recipe, out: Path, stages: Stages, progress: Step, threads: int, required
) -> dict:
    config = model.read_config(source.path)
    family.check_config(config)
    shape, tower = family.shape(config), family.tower(config)
    recipe = recipe.for_model(shape)
    # Cheap, and before the calibration is read, which may know the layer that 0 stands for.
    pipeline.check_recipe(recipe if recipe.tokens.prune_layer else recipe.replace(tokens__prune_layer=1), shape)
    if shape.activation not in ACTIVATIONS:
        fix = by_name.nearest(shape.activation, [*ACTIVATIONS])
        raise InputError(f"unknown hidden_act {shape.activation!r}", where=source.path / "config.json", fix=fix)
    model.check_processor(source.path)
    if tower:
        tower.rule(model.read_picture_rule(source.path))
    # Refuses at once what cannot end well.
    aim = engines.aim(recipe) if recipe.backend in engines.MODULES else None
    calibration, order = _calibration(recipe, source)
    recipe = prune_layers.resolve(recipe, calibration)
    pipeline.check_recipe(recipe, shape)
    versions = {n: version(n) for n in _LIBRARIES}
    sources = sorted(p for root in (_PACKAGE, *plugins.__path__) for p in Path(root).rglob("*.py"))
    program = source_key(*(p for p in sources if "cli" not in p.parts))
    trace_key = key_of(config=config, versions=versions, program=program)
    measured = file_sha256(Path(recipe.calibration)) if calibration else None
    # Only what the weights stage reads: without an order it is the same for every recipe.
    reorder = {"order": measured} if order is not None else {}
    weights_key = key_of(files=source.files, versions=versions, program=program, **reorder)
    inputs = probe(shape, tower, config)  # not the recipe's seed: the weights stage keeps PyTorch's answers to it

    staging = stages.folder / f"trace-{os.getpid()}.tmp"
    with workers(2, staging) as submit:
        # Tracing needs no weights, so it runs beside the loading of them, in processes of its own.
        tracing: list[Future] = []
        traced_done = not stages.force and stages.finished("trace", trace_key) is not None
        if not traced_done:
            tracing = [submit(model.trace_graph, source.path, n, staging / f"{n}.onnx") for n in shape.traced]

        def load_weights(folder: Path) -> dict[str, Any]:
            progress("load the checkpoint")
            return model.write_weights(source.path, family, folder, tower, inputs, progress, order)

        weight_dir, weight_state = stages.run("weights", weights_key, load_weights)

        def collect(folder: Path) -> None:
            for i, (name, future) in enumerate(zip(shape.traced, tracing, strict=True)):
                progress("trace the graphs", i, len(tracing))
                future.result()
                (staging / f"{name}.onnx").rename(folder / f"{name}.onnx")

        trace_dir, _ = stages.run("trace", trace_key, collect)

    weight_file = stages.file("weights", weights.FILE)
    index = weights.index(weight_file)

    def rewrite(folder: Path) -> dict[str, Any]:
        progress("rewrite the graphs")
        constants = neuron_constants(recipe, weights.WeightFile(weight_file), family, shape, calibration)
        copies = None
        if recipe.neurons.in_decode:
            progress("fit the predictor")
            predictor.write(folder / predictor.FILE, weights.WeightFile(weight_file), family, shape)
            copies = weights.index(folder / predictor.FILE)
        return _rewrite(trace_dir, folder, index, family, shape, recipe, constants, copies)

    resolved = recipe.to_dict() | {"calibration": CALIBRATION if calibration else None}
    portable = {k: v for k, v in resolved.items() if k not in ("engine", "backend")}
    graphs_key = key_of(trace=trace_key, weights=weights_key, recipe=portable, calibration=measured)
    graph_dir, graph_state = stages.run("graphs", graphs_key, rewrite)

    def prove(folder: Path) -> dict[str, Any]:
        progress("prove the graphs against PyTorch")
        copies = weights.WeightFile(graph_dir / predictor.FILE) if recipe.neurons.in_decode else None
        rows = core_row_names(family, shape.layers)
        backend = Backend(lambda n: graph_dir / f"{n}.onnx", weights.WeightFile(weight_file), threads, copies, rows)
        reference = model.read_reference(weight_dir)
        subject = gates.Subject(backend, family, shape, tower, recipe, inputs, reference, calibration)
        results = gates.run_gates(subject)
        return {"gates": [g.to_dict() for g in results]}

    _, gate_state = stages.run("gates", key_of(graphs=graphs_key, threads=threads), prove)

    def compile_engines(folder: Path) -> dict[str, Any]:
        names = tuple(graph_state["graphs"])
        files = engines.Source(
            lambda n: graph_dir / f"{n}.onnx", names, weights.WeightFile(weight_file), shape, recipe, tower
        )
        return engines.build_engines(files, family, inputs, folder, aim, progress, threads)

    built: dict[str, Any] = {}
    if aim:
        engine_dir, built = stages.run("engines", key_of(graphs=graphs_key, **aim.key), compile_engines)

    progress("assemble the bundle")
    manifest = {
        "tool": {"name": "cm-export", "version": __version__},
        "model": {
            "source": source.source if not Path(source.source).exists() else source.path.name,
            "type": source.model_type,
            "revision": source.revision,
            "files": source.files,
            "config": config,
            "embedding": family.embedding,  # the host looks token embeddings up in the weight file
        },
        "recipe": resolved | {"model": None},
        "versions": versions | {"python": platform.python_version(), "platform": platform.machine()},
        "graphs": graph_state["graphs"],
        "passes": graph_state["passes"],
        "gates": gate_state["gates"] + built.pop("gates", []),
        "engines": {k: v for k, v in built.items() if k != "sha256"} or None,
        "links": links(shape.layers, graph_state["graphs"]),
        "stages": {"trace": trace_key, "weights": weights_key, "graphs": graphs_key},
    }
    with bundles.assemble(out) as folder:
        known = {}
        for name in graph_state["graphs"]:
            shutil.copyfile(graph_dir / f"{name}.onnx", folder / f"{name}.onnx")
            known[f"{name}.onnx"] = graph_state["sha256"][f"{name}.onnx"]
        _link(weight_file, folder / weights.FILE)
        known[weights.FILE] = weight_state["sha256"][weights.FILE]
        shutil.copytree(weight_dir / "processor", folder / "processor")
        if recipe.neurons.in_decode:
            shutil.copyfile(graph_dir / predictor.FILE, folder / predictor.FILE)
            known[predictor.FILE] = graph_state["sha256"][predictor.FILE]
        for name, digest in built.get("sha256", {}).items():
            (folder / engines.FOLDER).mkdir(exist_ok=True)
            _link(engine_dir / name, folder / engines.FOLDER / name)
            known[f"{engines.FOLDER}/{name}"] = digest
        if calibration:
            shutil.copyfile(recipe.calibration, folder / CALIBRATION)
            known[CALIBRATION] = measured
        bundles.write_manifest(folder, manifest | {"known_sha256": known})
        if required:
            manifest["gates"] = manifest["gates"] + quality.check(folder, required, recipe, threads, progress)
            (folder / bundles.MANIFEST).unlink()
            bundles.write_manifest(folder, manifest | {"known_sha256": known})
    # One name is left for the weights: readers of external data refuse files with several hard links.
    (weight_dir / weights.FILE).unlink(missing_ok=True)
    return bundles.read_manifest(out)


def _calibration(recipe: Recipe, source: Any) -> tuple[Calibration | None, Any]:
    """The recipe's calibration, ids in the order of the weight file, and that order [L,F] if it is another. Raises InputError."""
    if recipe.calibration is None:
        return None, None
    found = read_calibration(Path(recipe.calibration))
    belongs(found, source.files, recipe.calibration)
    return (found.reordered(), found.order) if recipe.neurons.block > 1 else (found, None)


def _rewrite(
    trace_dir: Path,
    folder: Path,
    index: dict,
    family: Family,
    shape: Shape,
    recipe: Recipe,
    constants: dict,
    copies: dict | None,
) -> dict:
    """Every graph into `folder`; returns their description and the log of passes."""
    passes, models = [], {}
    for name in shape.traced:
        bound, log = pipeline.dense(name, onnx.load(trace_dir / f"{name}.onnx"), index, family)
        models["vision" if name == "vision" else f"{name}_dense"] = bound
        passes += log
    models["prefill"], log = pipeline.sparse_prefill(models["prefill_dense"], family, shape, recipe, constants)
    passes += log
    models["decode"], log = pipeline.sparse_decode(models["decode_dense"], family, shape, recipe, copies)
    passes += log
    if recipe.has_turn:
        models["turn"], log = pipeline.turn(models["decode_dense"], family, shape, recipe, constants)
        passes += log
    for name, proto in models.items():
        onnx.save(proto, folder / f"{name}.onnx")
    return {
        "graphs": {name: describe(proto) for name, proto in models.items()},
        "passes": [p.__dict__ for p in passes],
    }


def _link(source: Path, target: Path) -> None:
    """Hard-link a large file, or copy it across file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_disk(source, out: Path) -> None:
    """Refuse early when the weights cannot fit: float32 takes up to twice the bytes of a half-precision checkpoint."""
    size = 2 * sum((source.path / n).stat().st_size for n in source.files if n.endswith(".safetensors"))
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise InputError(
            f"needs about {size / 1e9:.1f} GB on disk, {free / 1e9:.1f} GB are free", where=out.parent, fix="free some"
        )
