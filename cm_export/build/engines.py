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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..backends.tensorrt.export import Source, write_graphs
from ..backends.tensorrt.lower import no_predictor
from ..backends.tensorrt.quantize import int8_needs_the_plugin
from ..backends.tensorrt.targets import Target, target
from ..base.by_name import nearest
from ..base.errors import CmExportError, InputError
from ..base.hashes import file_sha256
from ..families import Family
from ..recipe.engine import EngineSettings
from ..recipe.recipe import Recipe
from ..source.probe import Probe
from . import gates_lowered

FOLDER = "engines"
PLUGINS = "libcm_plugins.so"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> Python module
_INSTALL = {
    "tensorrt": "install TensorRT for this machine (pip install tensorrt, or its JetPack)",
    "tensorrt-rtx": "pip install 'cm-export[tensorrt-rtx]'",
}
_PLUGIN_PLACES = (Path("artifacts/plugins") / PLUGINS, Path(PLUGINS))
_CHILD = "cm_export.backends.tensorrt.builder"
Step = Callable[..., None]


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
    if recipe.neurons.in_decode:
        no_predictor(f"recipe: neurons.policy = {recipe.neurons.policy!r}")
    if recipe.engine.precision == "int8" and not what.plugins:
        int8_needs_the_plugin()


def build_engines(
    source: Source, family: Family, probe: Probe, folder: Path, aim: Aim, progress: Step, threads: int = 0
) -> dict[str, Any]:
    """Write `folder`/*.plan (and the plugin library); returns the manifest's `engines`, with `gates` of the lowering.

    Raises InputError for a graph that has no such form, GateFailed, CmExportError when a builder refuses or leaves
    something out.
    """
    engine, what = aim.engine, aim.target
    with _scratch(folder / "onnx") as lowered:
        progress(f"lower the graphs for {aim.backend} {aim.version}")
        written = write_graphs(source, lowered, what)
        progress("prove the lowered graphs")
        gates = gates_lowered.run_gates(source, what, family, source.tower, probe, lowered, threads)
        for name, graph in written["graphs"].items():
            progress(f"build the {name} engine")
            job = {
                "module": what.module,
                "onnx": str(lowered / f"{name}.onnx"),
                "plan": str(folder / f"{name}.plan"),
                "expected": graph,
                "typed_flag": what.typed_flag,
                "plugin_library": str(aim.library) if aim.library else None,
                "timing_cache": str(folder / "timing.cache") if what.module == "tensorrt" else None,
                "architectures": aim.architectures if aim.cross else (),
                "inspect": not aim.cross,
                "workspace_mb": engine.workspace_mb,
                "optimization_level": engine.optimization_level,
                "weight_streaming": engine.weight_streaming,
                "strip_weights": engine.strip_weights,
            }
            graph |= run_builder(job, lambda *step, n=name: progress(f"build the {n} engine", *step))
    (folder / "timing.cache").unlink(missing_ok=True)
    if aim.library:
        shutil.copyfile(aim.library, folder / PLUGINS)
    return {
        "backend": aim.backend,
        "version": aim.version,
        "architecture": ",".join(aim.architectures),
        "plugins": {"name": PLUGINS, "sha256": file_sha256(aim.library)} if aim.library else None,
        "capacity": engine.capacity,
        "kv": what.kv,
        "precision": engine.precision,
        "graphs": written["graphs"],
        "gates": [asdict(g) for g in gates],
    }


def installed(backend: str) -> str:
    """Version of the backend's library. Raises InputError when it is not there or does not load."""
    code = f"import {MODULES[backend]} as m; print(m.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise InputError(
            f"{MODULES[backend]} does not load ({last})", where=f"backend {backend}", fix=_INSTALL[backend]
        )
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
    if "error" in last:
        kind = InputError if last["input"] else CmExportError
        raise kind(last["error"], where=last["where"], fix=last["fix"])
    code = child.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    hint = f" ({told[-1][:300]})" if told else ""
    raise CmExportError(
        f"the builder {how}{hint}", where=job["onnx"], fix="free memory, or try a smaller engine.max_prompt"
    )


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plugin_library(given: str) -> Path:
    places = [Path(given)] if given else _PLUGIN_PLACES
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        fix = "build it with `make plugins` on this machine, or name it with --plugins"
        raise InputError("no plugin library", where=str(places[0]), fix=fix)
    return found.resolve()


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
