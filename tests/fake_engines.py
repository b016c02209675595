"""Bundles with engines on a machine without TensorRT: built by our own builder code, with the library of fake_tensorrt."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fake_cuda import FakeCuda
from fake_tensorrt import library

from cm_export import engines
from cm_export.backends import _build_tensorrt
from cm_export.backends._export_tensorrt import Source
from cm_export.bundle import MANIFEST, Bundle, read_manifest, write_manifest
from cm_export.probe import probe

ROWS = 256  # of the cache
PROMPT = 192


def machine(monkeypatch: Any, version: str, rtx: bool = False, gpu: tuple = ("Fake GPU", 8, 7)) -> tuple[Any, FakeCuda]:
    """(trt, cuda) of a machine with that TensorRT (or RTX library) and that GPU, as `import` finds them."""
    cuda = FakeCuda(gpu)
    trt = library(version, cuda, rtx)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx" if rtx else "tensorrt", trt)
    return trt, cuda


def add_engines(monkeypatch: Any, bundle: Path, out: Path, trt: Any, **recipe: Any) -> Path:
    """`out`: the bundle with engines beside its graphs; `recipe`: overrides such as engine__precision="fp32"."""
    backend = "tensorrt-rtx" if trt._rtx else "tensorrt"
    shutil.copytree(bundle, out, copy_function=lambda a, b: Path(b).hardlink_to(a))
    opened = Bundle(bundle)
    opened.wait_verified()
    (plugins := out.parent / "libcm_plugins.so").write_text("not a library")
    chosen = {"engine__capacity": ROWS, "engine__max_prompt": PROMPT, "engine__max_patches": 1024} | recipe
    chosen = opened.recipe.replace(backend=backend, engine__plugins=str(plugins), **chosen)
    source = replace(Source.of(opened), recipe=chosen)
    monkeypatch.setattr(engines, "installed", lambda backend: trt.__version__)
    monkeypatch.setattr(engines, "run_builder", lambda job, step: _build_tensorrt.build(trt, job, lambda message: None))
    inputs = probe(opened.shape, opened.config)
    (out / "engines").mkdir()
    aim = engines.aim(chosen)
    about = engines.build_engines(source, opened.family, inputs, out / "engines", aim, lambda *_: None, threads=1)
    manifest = read_manifest(bundle)
    known = {n: e["sha256"] for n, e in manifest.pop("files").items()}
    (out / MANIFEST).unlink()
    (out / "weights.safetensors").unlink()  # one name: readers of external data refuse files with several
    shutil.copyfile(bundle / "weights.safetensors", out / "weights.safetensors")
    manifest["recipe"] = chosen.to_dict() | {"calibration": manifest["recipe"]["calibration"], "model": None}
    write_manifest(out, {**manifest, "engines": about, "known_sha256": known})
    return out
