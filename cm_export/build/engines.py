"""TensorRT engines of a bundle: lower its graphs for the version at hand, prove them, build each in a process of its own.

source -> write_graphs -> gates (ONNX Runtime) -> one builder process a graph -> engines/*.plan + what the manifest says

Engines belong to the GPU architecture, the TensorRT version and the plugin library that they were built with.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..backends.tensorrt.export import Source, write_graphs
from ..backends.tensorrt.quantize import int8_needs_the_plugin
from ..backends.tensorrt.targets import Target, target
from ..base import disk
from ..base.by_name import nearest
from ..base.errors import CmExportError, InputError
from ..base.hashes import file_sha256
from ..base.install import pip_install
from ..families import Family
from ..plugins import places
from ..quant.precision import PRECISIONS
from ..recipe.engine import EngineSettings
from ..recipe.recipe import Recipe
from ..source.probe import Probe
from . import gates_lowered

FOLDER = "engines"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> Python module
_CHILD = "cm_export.backends.tensorrt.builder"
Step = Callable[..., None]
Piece = Callable[[str, Callable[[Path], dict[str, Any]]], tuple[Path, dict[str, Any]]]


@dataclass(frozen=True)
class Aim:
    """What engines are built for, found out before any work: library and version, cards, plugin library."""

    backend: str
    version: str
    target: Target
    architectures: tuple[str, ...]
    cross: bool  # for cards that are not in this machine
    library: Path | None
    engine: EngineSettings

    @property
    def key(self) -> dict[str, Any]:
        """Everything besides the graphs that an engine depends on."""
        plugins = file_sha256(self.library) if self.library else None
        return {"version": self.version, "cards": self.architectures, "plugins": plugins, "engine": asdict(self.engine)}


def aim(recipe: Recipe) -> Aim:
    """Raises InputError for a machine that cannot build what the recipe asks for."""
    backend, engine = recipe.backend, recipe.engine
    version = installed(backend)
    what = target(f"rtx-{version}" if backend == "tensorrt-rtx" else version)
    check_recipe(recipe, what)
    library = _plugin_library(engine.plugins) if what.plugins else None
    cards = _architectures(engine.architecture, what)
    return Aim(backend, version, what, cards, bool(engine.architecture), library, engine)


def check_recipe(recipe: Recipe, what: Target) -> None:
    """Raises InputError for what no engine of this version does; the lowering would find it after all other work."""
    if recipe.engine.precision == "int8" and not what.plugins:
        int8_needs_the_plugin()
    if recipe.engine.plugins and not what.plugins:
        fix = "leave it out: every op is written out there"
        raise InputError(f"engine.plugins (--plugins) with {what.module}, which takes none", where="recipe", fix=fix)
    if recipe.engine.strip_weights and not what.strips:
        fix = "leave it out, or build with --backend tensorrt"
        raise InputError(
            f"engine.strip_weights (--strip-weights) with {what.module}, whose builder refuses it",
            where="recipe",
            fix=fix,
        )


def lowered_bytes(weights: int, engine: EngineSettings) -> int:
    """The least that the lowered graphs of weights of so many bytes in float32 take on disk."""
    precision = PRECISIONS[engine.precision]
    return weights * (precision.bits or 8 * precision.products.itemsize) // 32


def build_engines(
    source: Source,
    family: Family,
    probe: Probe,
    folder: Path,
    aim: Aim,
    progress: Step,
    threads: int = 0,
    piece: Piece | None = None,
) -> dict[str, Any]:
    """Write `folder`/*.plan (and the plugin library); returns the manifest's `engines`, with `gates` of the lowering.

    piece: runs a named part of the work, or takes over what a build that was killed had finished of it; with None every
    part is done now. Raises InputError for a graph that has no such form, GateFailed, CmExportError when a builder refuses
    or leaves something out.
    """
    with contextlib.ExitStack() as stack:
        piece = piece or partial(_now, Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))))
        lowered, proved = piece("lowered", partial(_lower, source, family, probe, aim, progress, threads))
        room, known = {n: g["weight_bytes"] for n, g in proved["graphs"].items()}, dict[str, str]()
        for name, graph in proved["graphs"].items():
            plans = 0 if aim.engine.strip_weights else sum(room.values())  # a plan holds the weights that it reads
            disk.require(disk.Need(lowered, plans, "--work-dir"))
            built, told = piece(name, partial(_build, name, graph, lowered, aim, progress))
            del room[name]
            known |= told.pop("sha256", {})
            graph |= told
            for file in (p for p in built.iterdir() if p.name.startswith(f"{name}.")):
                disk.link_or_copy(file, folder / file.name)
    if aim.library:
        shutil.copyfile(aim.library, folder / places.NAME)
    return {
        "backend": aim.backend,
        "version": aim.version,
        "architecture": ",".join(aim.architectures),
        "plugins": {"name": places.NAME, "sha256": file_sha256(aim.library)} if aim.library else None,
        "capacity": aim.engine.capacity,
        "kv": aim.target.kv,
        "precision": aim.engine.precision,
        "block": proved["block"],
        "graphs": proved["graphs"],
        "gates": proved["gates"],
        "sha256": known,
    }


def _now(place: Path, name: str, work: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    (folder := place / name).mkdir()
    return folder, work(folder)


def _lower(
    source: Source, family: Family, probe: Probe, aim: Aim, progress: Step, threads: int, folder: Path
) -> dict[str, Any]:
    """Write the lowered graphs and prove them: {"graphs": what each is, "block", "gates": [...]}."""
    progress(f"lower the graphs for {aim.backend} {aim.version}")
    written = write_graphs(source, folder, aim.target)
    progress("prove the lowered graphs")
    gates = gates_lowered.run_gates(source, aim.target, family, source.tower, probe, folder, threads)
    return {"graphs": written["graphs"], "block": written["block"], "gates": [asdict(g) for g in gates]}


def _build(name: str, graph: dict[str, Any], lowered: Path, aim: Aim, progress: Step, folder: Path) -> dict[str, Any]:
    """Build one engine into `folder`; returns what its builder says of it."""
    progress(f"build the {name} engine")
    engine, what = aim.engine, aim.target
    job = {
        "module": what.module,
        "onnx": str(lowered / f"{name}.onnx"),
        "plan": str(folder / f"{name}.plan"),
        "expected": graph,
        "typed_flag": what.typed_flag,
        "plugin_library": str(aim.library) if aim.library else None,
        "timing_cache": str(lowered / "timing.cache") if what.module == "tensorrt" else None,
        "architectures": aim.architectures if aim.cross else (),
        "inspect": not aim.cross,
        "workspace_mb": engine.workspace_mb,
        "optimization_level": engine.optimization_level,
        "weight_streaming": engine.weight_streaming,
        "strip_weights": engine.strip_weights,
    }
    return run_builder(job, lambda *step: progress(f"build the {name} engine", *step))


def installed(backend: str) -> str:
    """Version of the backend's library. Raises InputError when it is not there or does not load."""
    code = f"import {MODULES[backend]} as m; print(m.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        fix = "install TensorRT for this machine (pip install tensorrt, or its JetPack)"
        fix = fix if backend == "tensorrt" else pip_install(backend)
        raise InputError(f"{MODULES[backend]} does not load ({last})", where=f"backend {backend}", fix=fix)
    return run.stdout.strip().splitlines()[-1]


def run_builder(job: dict[str, Any], progress: Step) -> dict[str, Any]:
    """Build one engine in a process of its own. Raises InputError, CmExportError; also when that process dies."""
    file = Path(job["plan"]).with_suffix(".job.json")
    file.write_text(json.dumps(job))
    command = [sys.executable, "-m", _CHILD, str(file)]
    last: dict[str, Any] = {}
    with open(file.with_suffix(".log"), "w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert child.stdout is not None  # a pipe, as asked above
            for line in child.stdout:
                last = json.loads(line)
                if "done" in last:
                    progress(last["done"], last["total"] or None)
            child.wait()
        finally:
            child.kill()
            child.wait()
        log.seek(0)
        told = log.read().strip().splitlines()
    file.unlink()
    file.with_suffix(".log").unlink()
    if "result" in last:
        return last["result"]
    if last.get("errno"):
        raise OSError(last["errno"], last["error"], job["plan"])
    if "error" in last:
        kind = InputError if last["input"] else CmExportError
        raise kind(last["error"], where=last["where"], fix=last["fix"])
    code = child.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    hint = f" ({told[-1][:300]})" if told else ""
    raise CmExportError(
        f"the builder {how}{hint}", where=job["onnx"], fix="free memory, or try a smaller engine.max_prompt"
    )


def _plugin_library(given: str) -> Path:
    found = places.find(given)
    if found is None:
        fix = "build it with `make plugins` on this machine, or name it with --plugins"
        raise InputError("no plugin library", where=str(places.candidates(given)[0]), fix=fix)
    return found


def _architectures(asked: str, what: Target) -> tuple[str, ...]:
    """What the engines are for: cards that are named, or the one in this machine. Raises InputError."""
    names = tuple(dict.fromkeys(a.strip() for a in asked.split(","))) if asked else ()
    if names and not what.cards:
        fix = "leave it out: TensorRT builds for the GPU of the machine it runs on"
        raise InputError(f"engine.architecture = {asked!r} with {what.module}", where="recipe", fix=fix)
    for name in names:
        if name not in what.cards:
            raise InputError(
                f"unknown architecture {name!r}", where="engine.architecture", fix=nearest(name, [*what.cards])
            )
    if names:
        return names
    from ..backends.tensorrt.cuda import architecture

    try:
        return (architecture(),)
    except CmExportError as e:
        fix = f"name cards with --architecture: {', '.join(what.cards)}" if what.cards else "run this where the GPU is"
        raise InputError(f"no GPU here ({e.what})", where=f"backend {what.module}", fix=fix) from e
