"""Plugin libraries for tests: each compiled once, and copies of the emulated one with a source file changed.

Where nvcc or the CUDA headers are missing, tests that need them skip and say so; where they are there, whatever else
goes wrong is a failure.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import shared

from cm_export.plugins.build import SOURCES, compile_library, fetch_headers

CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@functools.cache
def folder() -> Path:
    """Of the changed libraries of this process."""
    return shared.own("plugins")


@functools.cache
def headers() -> Path:
    given = os.environ.get("TENSORRT_INCLUDE")
    return Path(given) if given else shared.once("plugin_headers", fetch_headers) / "tensorrt-headers"


def need_cuda_headers() -> None:
    if not (CUDA_HOME / "include/cuda_fp16.h").is_file():
        pytest.skip(f"no CUDA headers in {CUDA_HOME}/include: the plugins cannot be compiled here")


def nvcc() -> str:
    """Where it is; without it the test skips."""
    found = shutil.which("nvcc") or shutil.which(CUDA_HOME / "bin/nvcc")
    return found or pytest.skip("no nvcc: the plugins cannot be compiled for a GPU here")


@functools.cache
def emulated() -> Path:
    """libcm_plugins_emulated.so, with libcm_harness.so beside it."""
    need_cuda_headers()
    out = shared.once("plugins_emulated", lambda here: compile_library(here, headers(), emulate=True, harness=True))
    return out / "libcm_plugins_emulated.so"


@functools.cache
def real() -> Path:
    """libcm_plugins.so for one architecture, with libcm_harness.so beside it."""
    nvcc()

    def make(here: Path) -> None:
        compile_library(here, headers(), harness=True, architectures="90-real")

    return shared.once("plugins_real", make) / "libcm_plugins.so"


def changed(
    name: str, replaced: dict[str, list[tuple[str, str]]], rebuilt: list[str], flags: tuple[str, ...] = ()
) -> Path:
    """The emulated library with texts of source files replaced: {file: [(old, new)]}; `rebuilt` are compiled anew.

    Compiled without optimisation, unless flags say otherwise: most stop at the first call that sees the bug.
    The sources are a copy, so no macro for tests is in the real ones. All other objects are those of `emulated()`.
    """
    library = emulated()
    sources = folder() / name / "plugins"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    for file, texts in replaced.items():
        text = (sources / file).read_text()
        for old, new in texts:
            assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
            text = text.replace(old, new)
        (sources / file).write_text(text)
    objects = {
        p.relative_to(p.parents[1]).as_posix(): p
        for p in library.parent.glob("build/*/CMakeFiles/cm_plugins.dir/*/*.o")
    }
    for file in rebuilt:
        target = folder() / name / f"{file.replace('/', '_')}.o"
        _compile("c++", sources / file, target, (*flags, "-include", str(_prelude(flags))))
        objects[f"{file}.o"] = target
    out = folder() / name / library.name
    script = f"-Wl,--version-script={sources / 'native/exports.map'}"
    _run(["g++", "-shared", *flags, script, *map(str, objects.values()), "-o", str(out)])
    return out


def _compile(kind: str, source: Path, target: Path, flags: tuple[str, ...]) -> None:
    common = "g++ -std=c++17 -O0 -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -DCM_EMULATE"
    include = ["-isystem", str(headers()), "-isystem", str(CUDA_HOME / "include")]
    _run([*common.split(), *include, *flags, "-x", kind, "-c", str(source), "-o", str(target)])


@functools.cache
def _prelude(flags: tuple[str, ...]) -> Path:
    """A header, compiled once, with what the kernels take from CUDA and C++: of a changed file only our own lines are read."""
    header = folder() / f"prelude{len(list(folder().glob('*.h')))}.h"
    taken = ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime_api.h", "cmath", "cstdint", "cstring", "functional", "vector")
    header.write_text("".join(f"#include <{name}>\n" for name in taken))
    _compile("c++-header", header, Path(f"{header}.gch"), flags)
    return header


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
