"""A bundle becomes one archive for a Jetson without network: graphs, plugin sources, probes and the script that builds.

bundle -> predict memory -> lower for the JetPack's TensorRT -> answers of ONNX Runtime -> manifest, script -> NAME.tar.gz

Everything is assembled in a folder beside the archive, which appears whole or not at all.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from ... import __version__
from ...backends.tensorrt import check_engine as _check_engine
from ...backends.tensorrt.export import Source, write_graphs
from ...backends.tensorrt.targets import Target
from ...backends.tensorrt.targets import target as tensorrt_target
from ...base import disk
from ...base.errors import CmExportError, InputError
from ...base.install import pip_install
from ...build.engines import check_recipe
from ...bundle.bundle import MEASURED, Bundle
from ...bundle.calibration import FILE as CALIBRATION
from ...recipe import text as recipe_text
from ...recipe.engine import EngineSettings
from . import archive, carried, memory, probes, trtexec
from .devices import Device, JetPack

FORMAT = 1
GRAPHS = ("vision", "prefill", "decode")
Step = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Order:
    """What to pack, and for which device. `capacity` and `max_patches`: None for the recipe's."""

    device: Device
    jetpack: JetPack
    precision: str
    capacity: int | None = None
    max_patches: int | None = None
    force: bool = False  # write an archive that does not fit all the same


def pack(path: Path, out: Path, order: Order, progress: Step = lambda *_: None) -> dict[str, Any]:
    """Write the archive; returns what it is (path, bytes, prediction). Raises InputError, BundleError, CmExportError."""
    name = archive.check_out(out)
    progress("open the bundle")
    bundle, target = Bundle(path), tensorrt_target(order.jetpack.tensorrt)
    source = _source(bundle, order)
    check_recipe(source.recipe, target)
    engine = source.recipe.engine
    names = [g for g in GRAPHS if g in bundle.manifest["graphs"]]
    _check_memory(bundle, memory.estimated_weights(bundle, names, order.precision), order, engine, target)
    plugin_sources(plugins_folder())  # raises before the long part
    with _folder(out) as folder:
        progress(f"lower the graphs for TensorRT {order.jetpack.tensorrt}")
        (folder / "onnx").mkdir()
        written = write_graphs(source, folder / "onnx", target, names)
        sizes = {n: g["weight_bytes"] for n, g in written["graphs"].items()}
        prediction = _check_memory(bundle, sizes, order, engine, target)
        manifest = _manifest(bundle, source, order, target, written, prediction, name)
        for probe, made in probes.make(bundle, source, target, folder / "onnx"):
            progress(f"expected answers of {probe}")
            dynamic = {v["name"] for v in written["graphs"][made.graph]["inputs"] if not _static(v)}
            manifest["probes"][probe] = probes.write(made, dynamic, folder)
        _small_files(bundle, source, folder)
        host = carried.host_weights(bundle, folder / "onnx", written["weights"], written["graphs"])
        manifest |= {"embedding": host[0], "host_weights": host}
        (folder / "manifest.json").write_text(_json(manifest), encoding="utf-8")
        (folder / "README.txt").write_text(_readme(manifest), encoding="utf-8")
        progress("verify the bundle's weights")
        bundle.wait_verified()
        progress("hash the files")
        archive.write_sums(folder)
        size = archive.write(folder, out, progress)
    return {
        "path": str(out),
        "bytes": size,
        "target": order.device.name,
        "jetpack": order.jetpack.name,
        "tensorrt": order.jetpack.tensorrt,
        "precision": order.precision,
        "capacity": engine.capacity,
        "max_patches": engine.max_patches,
        "graphs": {
            n: {"weight_bytes": g["weight_bytes"], "plugins": g["plugins"]} for n, g in written["graphs"].items()
        },
        "memory": prediction.to_dict(),
        "cannot_ask": manifest["cannot_ask"],
        "notes": bundle.notes,
    }


def plugins_folder() -> Path:
    """Where this installation keeps the plugins, sources among them."""
    return Path(str(files("cm_export.plugins")))


def plugin_sources(folder: Path) -> list[Path]:
    """Every file of the plugins but Python ones. Raises CmExportError if this installation has none."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc"))
    if folder / "CMakeLists.txt" not in found:
        fix = f"install cm-export with its plugin sources ({pip_install(options='--force-reinstall')})"
        raise CmExportError(
            "no CMakeLists.txt, so the device could not build the plugin library", where=folder, fix=fix
        )
    return found


def _source(bundle: Bundle, order: Order) -> Source:
    """The bundle's graphs with the engine settings of the order instead of the recipe's. Raises InputError."""
    source = Source.of(bundle)
    engine = source.recipe.engine
    engine = memory.at(engine, order.capacity or engine.capacity, order.max_patches or engine.max_patches)
    engine = dataclasses.replace(engine, precision=order.precision)
    return dataclasses.replace(source, recipe=source.recipe.replace(engine=engine))


# ------------------------------------------------------------------------------------------------- memory
def _check_memory(
    bundle: Bundle, sizes: memory.Weights, order: Order, engine: Any, target: Target
) -> memory.Prediction:
    """The prediction for weights of these sizes. Raises InputError if it does not fit, unless the order forces it."""
    rest = (target.kv, target.native_attention, order.device.usable_bytes)
    p = memory.predict(sizes, bundle, engine, *rest)
    if p.fits or order.force:
        return p
    fitting = memory.smaller(bundle, sizes, order.precision, engine, *rest)
    gb = {n: f"{v / 1e9:.1f} GB" for n, v in p.to_dict().items() if n.endswith("_bytes")}
    what = f"building is predicted to take {gb['build_bytes']} and running {gb['run_bytes']}, {gb['limit_bytes']} are usable"
    fix = f"give {fitting}, or --force" if fitting else "take a larger device or a smaller model, or give --force"
    raise InputError(what, where=f"{order.device.title}, {order.precision}, capacity {engine.capacity}", fix=fix)


# ------------------------------------------------------------------------------------------------- contents
def _manifest(
    bundle: Bundle, source: Source, order: Order, target: Target, written: dict, p: memory.Prediction, name: str
) -> dict[str, Any]:
    level, words = source.recipe.engine.optimization_level, []
    for graph in written["graphs"].values():
        graph.pop("profiles", None)  # the device builds one, which serves every call
        graph["build"] = trtexec.build_words(graph, target, level)
        words += graph["build"]
    m = bundle.manifest
    return {
        "format": FORMAT,
        "name": name,
        "tool": {"name": "cm-export", "version": __version__},
        "versions": {n: version(n) for n in ("numpy", "onnx", "onnxruntime")},
        "target": dataclasses.asdict(order.device),
        "jetpack": dataclasses.asdict(order.jetpack),
        "precision": order.precision,
        "capacity": written["capacity"],
        "max_prompt": source.recipe.engine.max_prompt,
        "max_patches": source.recipe.engine.max_patches,
        "kv": written["kv"],
        "block": written["block"],
        "typed_flag": target.typed_flag,
        "optimization_level": level,
        "weights": written["weights"],
        "graphs": written["graphs"],
        "flags": trtexec.flags(words),
        "once": list(trtexec.ONCE),
        "benching": list(trtexec.BENCH),
        "probes": {},
        "memory": p.to_dict(),
        "model": m["model"],
        "recipe": m["recipe"] | {"backend": "tensorrt", "engine": dataclasses.asdict(_engine(source))},
        "generation": m["generation"],
        "links": m["links"],
        "packages": carried.packages(bundle, order.jetpack),
        "cannot_ask": carried.cannot_ask(bundle),
        "source": {"seal": bundle.seal, "files": m["files"]},
    }


def _static(value: dict[str, Any]) -> bool:
    return all(isinstance(axis, int) for axis in value["shape"])


def _small_files(bundle: Bundle, source: Source, folder: Path) -> None:
    """Plugin sources, processor, recipe, and the scripts that run on the device."""
    plugins, scripts = plugins_folder(), Path(str(files("cm_export.deploy.jetson"))) / "device"
    copies = {p: folder / "plugins" / p.relative_to(plugins) for p in plugin_sources(plugins)}
    for name in bundle.manifest["files"]:
        if name.startswith("processor/") or name in MEASURED:
            copies[bundle.path / name] = folder / name
    called = ("build_on_device.sh", "ask.py")  # by the user
    for script in sorted(p for p in scripts.iterdir() if p.suffix in (".py", ".sh")):
        copies[script] = folder / script.name if script.name in called else folder / "device" / script.name
    copies[Path(_check_engine.__file__)] = folder / "device" / "check_engine.py"
    copies |= {file: folder / place for place, file in carried.modules().items()}
    for start, end in copies.items():
        end.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(start, end)
    r = source.recipe
    calibration = CALIBRATION if CALIBRATION in bundle.manifest["files"] else None
    model = bundle.manifest["model"]["source"]
    recipe = dataclasses.replace(r, model=model, engine=_engine(source), calibration=calibration)
    (folder / "recipe.toml").write_text(recipe_text.toml(recipe.replace(backend="tensorrt")), encoding="utf-8")


def _engine(source: Source) -> EngineSettings:
    """The engine settings of the order, without what belongs to this machine."""
    return dataclasses.replace(source.recipe.engine, plugins="", architecture="")


def _readme(m: dict[str, Any]) -> str:
    text = (Path(str(files("cm_export.deploy.jetson"))) / "device" / "README.txt").read_text(encoding="utf-8")
    gb = {f"{n}_gb": m["memory"][f"{n}_bytes"] / 1e9 for n in ("build", "run", "limit")}
    words = {
        "name": m["name"],
        "model": m["model"]["source"],
        "title": m["target"]["title"],
        "precision": m["precision"],
    }
    return text.format(**words, jetpack=m["jetpack"]["name"], tensorrt=m["jetpack"]["tensorrt"], **gb)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=False, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`; those that killed runs of the same `out` have left are removed first."""
    for old in out.parent.glob(f".{out.name}.*.tmp"):
        pid = old.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
    except OSError as e:
        raise InputError(f"cannot write beside it ({e.strerror})", where=out, fix="give another --out") from e
    try:
        with disk.writing(out.parent):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
