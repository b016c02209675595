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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import gates_lowered
from .backends._export_tensorrt import Source, write_graphs
from .backends._targets import target
from .bundle import file_sha256
from .errors import CmExportError, InputError

FOLDER = "engines"
PLUGINS = "libcm_plugins.so"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> Python module
_INSTALL = {
    "tensorrt": "install TensorRT for this machine (pip install tensorrt, or its JetPack)",
    "tensorrt-rtx": "pip install 'cm-export[tensorrt-rtx]'",
}
_PLUGIN_PLACES = (Path("artifacts/plugins") / PLUGINS, Path(PLUGINS))
_CHILD = "cm_export.backends._build_tensorrt"
Step = Callable[..., None]


def build_engines(
    source: Source, family: Any, probe: dict, folder: Path, backend: str, progress: Step, threads: int = 0
) -> dict[str, Any]:
    """Write `folder`/*.plan (and the plugin library); returns the manifest's `engines`, with `gates` of the lowering.

    Raises InputError for a machine or recipe that cannot, GateFailed, CmExportError when a builder refuses or leaves
    something out.
    """
    engine = source.recipe.engine
    version = installed(backend)
    aim = target(f"rtx-{version}" if backend == "tensorrt-rtx" else version)
    library = _plugin_library(engine.plugins) if aim.plugins else None
    architectures = _architectures(engine.architecture, backend)
    with _scratch(folder / "onnx") as lowered:
        progress(f"lower the graphs for {aim.module} {aim.name.removeprefix('rtx-')}")
        written = write_graphs(source, lowered, aim)
        progress("prove the lowered graphs")
        gates = gates_lowered.run_gates(source, aim, family, probe, lowered, threads)
        for name, graph in written["graphs"].items():
            job = {
                "module": aim.module,
                "onnx": str(lowered / f"{name}.onnx"),
                "plan": str(folder / f"{name}.plan"),
                "expected": graph,
                "typed_flag": aim.typed_flag,
                "plugin_library": str(library) if library else None,
                "timing_cache": str(folder / "timing.cache") if aim.module == "tensorrt" else None,
                "architectures": architectures if engine.architecture else [],
                "inspect": not engine.architecture,
                "workspace_mb": engine.workspace_mb,
                "optimization_level": engine.optimization_level,
                "weight_streaming": engine.weight_streaming,
                "strip_weights": engine.strip_weights,
            }
            graph |= run_builder(job, lambda *step, n=name: progress(f"build the {n} engine", *step))
    (folder / "timing.cache").unlink(missing_ok=True)
    return {
        "backend": backend,
        "version": version,
        "architecture": ",".join(architectures),
        "plugins": _copied(library, folder),
        "capacity": engine.capacity,
        "kv": aim.kv,
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
        raise InputError(f"{MODULES[backend]} does not load ({last})", where=f"backend {backend}", fix=_INSTALL[backend])
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
    raise CmExportError(f"the builder {how}{hint}", where=job["onnx"], fix="free memory, or try a smaller engine.max_prompt")


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


def _copied(library: Path | None, folder: Path) -> dict[str, str] | None:
    if library is None:
        return None
    shutil.copyfile(library, folder / PLUGINS)
    return {"name": PLUGINS, "sha256": file_sha256(library)}


def _architectures(asked: str, backend: str) -> list[str]:
    """What the engines are for: cards that are named (tensorrt-rtx only), or the one in this machine."""
    if asked and backend != "tensorrt-rtx":
        fix = "leave it out: TensorRT builds for the GPU of the machine it runs on"
        raise InputError(f"engine.architecture = {asked!r} with {backend}", fix=fix)
    if asked:
        return [a.strip() for a in asked.split(",")]
    from .backends._cuda import architecture

    return [architecture()]


