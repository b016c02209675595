"""One engine, built in a process of its own: parse, check, build, check again. A builder that aborts takes nobody along.

    python -m cm_export.backends.tensorrt.builder JOB.json     ->  one JSON object a line on stdout:
    {"step": "...", "done": 3, "total": 10}   progress        {"result": {...}}  or  {"error": what, "fix": ...}   the end

One code for tensorrt 10.3 and later, 11, and tensorrt_rtx: what differs is in the job (from targets.py).
"""

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...base.errors import CmExportError, InputError
from .check_engine import check_engine, check_network

Say = Callable[[dict[str, Any]], None]


def build(trt: Any, job: dict[str, Any], say: Say) -> dict[str, Any]:
    """Build job["onnx"] into job["plan"] with the library `trt`; returns {"bytes", "layers", "warnings", "inspected"}.

    Raises InputError for a job that this library cannot do, CmExportError when it refuses the graph or left something out.
    """
    logger, expected = _logger(trt), job["expected"]
    if job["plugin_library"]:
        _load_plugins(trt, job["plugin_library"])
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if job["typed_flag"] else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    say({"step": "parse"})
    if not parser.parse_from_file(job["onnx"]):
        told = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in told)
        raise CmExportError(f"the parser refuses it ({_short(errors)})", where=job["onnx"])
    _refuse(check_network(network, expected), job["onnx"])
    config = _config(trt, builder, network, job, say)
    say({"step": "build"})
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise CmExportError(f"the builder refuses it ({_short('; '.join(logger.errors))})", where=job["onnx"])
    unused = [w for w in logger.warnings if "is unused" in w and not _only_a_length(w, expected)]
    _refuse(unused, job["onnx"])
    plan = bytes(serialized)
    if job["inspect"]:
        layers = _inspect(trt, logger, plan, job)
    else:  # for another card than is here, so it cannot be opened; its border is written in it
        layers, wanted = None, expected["inputs"] + expected["outputs"]
        _refuse([f"{v['name']} is not in the plan" for v in wanted if v["name"].encode() not in plan], job["plan"])
    _write(Path(job["plan"]), plan)
    if job["timing_cache"]:
        _write(Path(job["timing_cache"]), bytes(config.get_timing_cache().serialize()))
    return {"bytes": len(plan), "layers": layers, "warnings": logger.warnings[:20], "inspected": job["inspect"]}


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif severity <= trt.ILogger.Severity.WARNING and "Int64 binding" not in message:
                self.warnings.append(message)

    return Logger()


def _load_plugins(trt: Any, library: str) -> None:
    if trt.get_plugin_registry().load_library(library) is None:
        fix = "build it on this machine with `make plugins`, for this GPU and this TensorRT's headers"
        raise InputError("TensorRT cannot load the plugin library", where=library, fix=fix)


def _config(trt: Any, builder: Any, network: Any, job: dict[str, Any], say: Say) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = job["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names for the inspector
    config.progress_monitor = _monitor(trt, say)
    if job["workspace_mb"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_mb"] << 20)
    if job["weight_streaming"]:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if job["strip_weights"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if job["timing_cache"]:
        file = Path(job["timing_cache"])
        config.set_timing_cache(config.create_timing_cache(file.read_bytes() if file.is_file() else b""), False)
    if job["architectures"]:
        config.num_compute_capabilities = len(job["architectures"])
        for i, name in enumerate(job["architectures"]):
            kind = getattr(trt.ComputeCapability, name.replace("_", "").upper(), None)
            if kind is None or not config.set_compute_capability(kind, i):
                raise InputError(
                    f"this version builds nothing for {name}", where="engine.architecture", fix="name another"
                )
    for shapes in job["expected"].get("profiles", [job["expected"]["profile"]]):
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            least, likely, most = (tuple(shape) for shape in shapes[tensor.name])
            if tensor.is_shape_tensor:
                raise CmExportError(f"{tensor.name} became a shape tensor", where=job["onnx"])
            if -1 in tuple(tensor.shape):
                profile.set_shape(tensor.name, least, likely, most)
        if config.add_optimization_profile(profile) < 0:
            raise CmExportError("the profile does not fit the network", where=job["onnx"])
    return config


def _monitor(trt: Any, say: Say) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            say({"step": phase_name, "done": step + 1, "total": self.steps.get(phase_name, 0)})
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _inspect(trt: Any, logger: Any, plan: bytes, job: dict[str, Any]) -> int:
    """Open the engine as a user will, and look for what we asked for; its layers go into a file beside the plan."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise CmExportError(f"the engine does not open ({_short('; '.join(logger.errors))})", where=job["plan"])
    information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    _write(Path(job["plan"]).with_suffix(".layers.json"), information.encode())
    _refuse(check_engine(names, information, job["expected"]), job["plan"])
    return engine.num_layers


def _only_a_length(warning: str, expected: dict[str, Any]) -> bool:
    """Slots are read for their length alone; the builder says so of nothing else that we ask for."""
    names = [v["name"] for v in expected["inputs"] if v["name"].startswith(("kept_slots", "core_slots"))]
    return any(f" {name} " in warning for name in names)


def _refuse(problems: list[str], where: str) -> None:
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        what = f"the engine is not what was asked for: {'; '.join(problems[:4])}{more}"
        raise CmExportError(what, where=where, fix="please report the graph and the TensorRT version")


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 600 else flat[:600] + " ..."


def _write(file: Path, content: bytes) -> None:
    """Whole or absent."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # until the other end closes
    os._exit(1)


def main(file: str) -> int:
    job = json.loads(Path(file).read_bytes())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library itself prints is no answer

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=told, flush=True)

    try:
        say({"result": build(importlib.import_module(job["module"]), job, say)})
    except OSError as e:  # such as a full disk
        say({"errno": e.errno, "error": e.strerror})
        return 1
    except CmExportError as e:
        say({"error": e.what, "where": e.where, "fix": e.fix, "input": e.exit_code == InputError.exit_code})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
