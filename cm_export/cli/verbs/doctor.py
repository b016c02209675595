"""`cm-export doctor`: whether this machine has what the tool needs, and what each missing extra would enable."""

import os
import platform
import shutil
import sys
from typing import Any

import click

from ...base.install import DISTRIBUTION, pip_install
from ..console import Verb, emit_json, json_option

EXTRAS = {
    "export": "makes bundles of checkpoints: `cm-export build`, `calibrate --model`",
    "gpu": "runs bundles on NVIDIA GPUs through ONNX Runtime: --device cuda (it takes the place of onnxruntime)",
    "tensorrt": "builds and runs engines on this machine's GPU: --backend tensorrt",
    "tensorrt-rtx": "builds and runs engines on RTX cards: --backend tensorrt-rtx",
    "eval": "brings the pictures and questions that `cm-export eval` asks",
    "bench": "measures neuron policies on a real language model: `make bench-quality`",
    "serve": "answers over HTTP as OpenAI's API does: `cm-export serve`",
    "video": "reads clips: `cm-export run --video`",
    "tune": "searches recipes: `cm-export tune`",
    "dev": "runs the tests and the linter",
}


@click.command(
    cls=Verb,
    short_help="Check this machine and its libraries.",
    examples=("cm-export doctor", "cm-export doctor --json"),
)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check this machine and its libraries; exit code 1 if one that running needs is missing, too old or at odds."""
    found = examine()
    if as_json:
        emit_json(found)
    else:
        _print(found)
    if not found["ok"]:
        ctx.exit(1)


def examine() -> dict[str, Any]:
    """Everything doctor reports, as plain values."""
    from importlib import metadata

    import psutil

    from ...base.environment import processors
    from ...recipe.aliases import DEMO
    from ..requirements import misfits, requirements

    required, extras = requirements(DISTRIBUTION, EXTRAS)
    optional = {library["name"] for extra in extras.values() for library in extra["libraries"]}
    pairs = misfits({*(library["name"] for library in required), *optional})
    running = {library["name"] for library in required}
    memory = psutil.virtual_memory()
    return {
        "ok": all(library["ok"] for library in required) and not any(pair["library"] in running for pair in pairs),
        "cm_export": metadata.version(DISTRIBUTION),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cores": processors(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(os.getcwd()).free,
        "required": required,
        "extras": extras,
        "misfits": pairs,
        "onnxruntime_providers": _providers(),
        "cuda": _cuda(),
        "kernels": _kernels(),
        "native": _native(),
        "demo_model": (DEMO / "config.json").is_file() and (DEMO / "model.safetensors").is_file(),
    }


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:  # absent or built for another machine; `required` says which
        return []
    return onnxruntime.get_available_providers()


def _cuda() -> dict[str, Any]:
    """Whether --device cuda works here, or what is missing and what mends it. Nothing needs it."""
    try:
        from ...backends.onnxruntime.place import place_for
        from ...base.errors import InputError
    except ImportError as e:
        return {"ok": False, "missing": str(e), "fix": ""}
    try:
        place_for("cuda")
    except InputError as e:
        return {"ok": False, "missing": e.what, "fix": (e.fix or "").removesuffix("; or --device cpu")}
    return {"ok": True, "missing": None, "fix": None}


def _kernels() -> dict[str, Any]:
    """The plugin library, from which --device cuda takes our kernels, or why it cannot. Nothing needs it."""
    try:
        from ...plugins import places

        missing = places.why_unusable()
    except ImportError as e:
        return {"library": None, "missing": str(e)}
    return {"library": None if missing else str(places.trusted()), "missing": missing}


def _native() -> dict[str, Any]:
    """The library of low-bit products: what it runs on here, or why it is missing. Nothing needs it; without, they are slower."""
    from ...plugins.cpu import library

    missing = library.why_missing()
    return {"ok": missing is None, "missing": missing, **({} if missing else library.info())}


def _print(found: dict[str, Any]) -> None:
    from ...base.units import size
    from ..tables import print_pairs

    print_pairs(
        "machine",
        [
            ("python", f"{found['python']}  {found['executable']}"),
            ("platform", found["platform"]),
            ("cores", found["cores"]),
            ("memory", f"{size(found['memory_bytes'])}, {size(found['memory_available_bytes'])} available"),
            ("free disk", f"{size(found['disk_free_bytes'])} in the current directory"),
            ("ONNX Runtime", ", ".join(found["onnxruntime_providers"]) or "does not load"),
            (
                "--device cuda",
                "works" if found["cuda"]["ok"] else f"no: {found['cuda']['missing']}; {found['cuda']['fix']}",
            ),
            ("CUDA kernels", found["kernels"]["missing"] or found["kernels"]["library"]),
            ("low-bit products", found["native"]["missing"] or f"native, {found['native']['instructions']}"),
            ("demo model", "present" if found["demo_model"] else "MISSING: install cm-export again"),
        ],
    )
    print_pairs("library", [(one["name"], _state(one)) for one in found["required"]])
    print_pairs("extra", [(name, _extra_state(name, extra)) for name, extra in found["extras"].items()])
    for pair in found["misfits"]:
        there = pair["found"] or "none"
        print(f"DO NOT FIT: {pair['library']} {pair['version']} needs {pair['needs']}; {there} is installed")
    print("everything required is here" if found["ok"] else f"NOT READY: {pip_install(options='--upgrade')}")


def _state(library: dict[str, Any]) -> str:
    if library["ok"]:
        return library["version"]
    found = f"{library['version']} DOES NOT FIT" if library["version"] else "MISSING"
    return f"{found}, needs {library['needs'] or 'any version'}"


def _extra_state(name: str, extra: dict[str, Any]) -> str:
    if extra["ok"]:
        return f"installed: {extra['enables']}"
    missing = ", ".join(library["name"] for library in extra["libraries"] if not library["ok"])
    return f"without {missing}; {pip_install(name)} {extra['enables']}"
