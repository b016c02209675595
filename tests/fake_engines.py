"""Bundles with engines on a machine without TensorRT: built by our own builder code, with the library of fake_tensorrt."""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from fake_cuda import FakeCuda
from fake_tensorrt import library

from cm_export.backends.tensorrt import builder
from cm_export.backends.tensorrt.export import Source
from cm_export.build import engines
from cm_export.bundle.bundle import MANIFEST, Bundle, read_manifest, write_manifest
from cm_export.evals.other_policies import with_policies
from cm_export.host.loaded import LoadedBundle
from cm_export.source.probe import probe

ROWS = 256  # of the cache
PROMPT = 192


@dataclass(frozen=True)
class Machine:
    """A machine with that TensorRT (or RTX library) and that GPU, and a bundle built on it."""

    trt: Any
    cuda: FakeCuda
    bundle: Path | None = None
    made_of: Path | None = None  # the bundle without engines that it was made of

    @property
    def backend(self) -> str:
        return "tensorrt-rtx" if self.trt._rtx else "tensorrt"

    def sit_at(self, monkeypatch: Any) -> "Machine":
        """From now on `import` finds its libraries."""
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        monkeypatch.setitem(sys.modules, self.backend.replace("-", "_"), self.trt)
        return self


def machine(version: str, gpu: tuple[str, int, int] = ("Fake GPU", 8, 6), **how: Any) -> Machine:
    """`version`: such as "10.3.0", or "rtx-1.7"; `how`: of fake_tensorrt.library."""
    cuda = FakeCuda(gpu)
    return Machine(library(version.removeprefix("rtx-"), cuda, version.startswith("rtx-"), **how), cuda)


def add_engines(monkeypatch: Any, bundle: Path, out: Path, at: Machine, measured: Any = None, **recipe: Any) -> Machine:
    """`out`: the bundle with engines beside its graphs; `recipe`: overrides, such as engine__precision="fp32".

    `measured`: a calibration. The proofs of the lowering are test_lowered.py's, and left out here.
    Engines of other policies than the bundle's are built from graphs made in memory; its own graphs stay.
    """
    shutil.copytree(bundle, out, copy_function=lambda a, b: Path(b).hardlink_to(a))
    opened = Bundle(bundle)
    opened.wait_verified()
    (plugins := out.parent / "libcm_plugins.so").write_text("not a library")
    chosen = {"engine__capacity": ROWS, "engine__max_prompt": PROMPT, "engine__max_patches": 1024} | recipe
    if at.backend == "tensorrt":
        chosen["engine__plugins"] = str(plugins)
    chosen = opened.recipe.replace(backend=at.backend, **chosen)
    source = replace(Source.of(opened), recipe=chosen)
    if not all(key.startswith("engine__") for key in recipe):
        source = replace(source, graph=_in_files(opened, chosen, measured, out.with_suffix(".graphs")))
    at.sit_at(monkeypatch)
    monkeypatch.setattr(engines, "installed", lambda backend: at.trt.__version__)
    monkeypatch.setattr(engines.gates_lowered, "run_gates", lambda *args: [])
    say = lambda message: None  # noqa: E731
    monkeypatch.setattr(engines, "run_builder", lambda job, step: builder.build(at.trt, job, say))
    inputs, folder = probe(opened.shape, opened.tower, opened.config), out / "engines"
    folder.mkdir()
    aim = engines.aim(chosen)
    about = engines.build_engines(source, opened.family, inputs, folder, aim, lambda *_: None, threads=1)
    manifest = read_manifest(bundle)
    known = {n: e["sha256"] for n, e in manifest.pop("files").items()}
    (out / MANIFEST).unlink()
    (out / "weights.safetensors").unlink()  # one name: readers of external data refuse files with several
    shutil.copyfile(bundle / "weights.safetensors", out / "weights.safetensors")
    manifest["recipe"] = chosen.to_dict() | {"model": None}
    write_manifest(out, {**manifest, "engines": about, "known_sha256": known})
    return replace(at, bundle=out, made_of=bundle)


def policies_in_memory(bundle: Bundle, recipe: Any, calibration: Any) -> LoadedBundle:
    """The bundle under other policies, on ONNX Runtime."""
    bundle.__dict__["calibration"] = calibration
    return with_policies(LoadedBundle(bundle, 1, backend="onnxruntime"), recipe)


def _in_files(bundle: Bundle, recipe: Any, calibration: Any, folder: Path) -> Any:
    graph = policies_in_memory(bundle, recipe, calibration).backend._graph
    folder.mkdir()

    def written(name: str) -> Path:
        found = graph(name)
        if isinstance(found, Path):
            return found
        onnx.save(found, folder / f"{name}.onnx")
        return folder / f"{name}.onnx"

    return written


def reseal(bundle: Path, **changes: Any) -> None:
    """Put values into the manifest's engines and seal it again."""
    manifest = read_manifest(bundle)
    del manifest["files"]
    manifest["engines"] |= changes
    (bundle / MANIFEST).unlink()
    write_manifest(bundle, manifest)
