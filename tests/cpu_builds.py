"""The CPU ops as a program of their own (cpu_ops/fake_runtime.cpp): for sanitizers, other processors and planted bugs."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import shared
from cpu_cases import TYPES, Call, names

from cm_export.plugins.cpu import build

HERE = Path(__file__).parent / "cpu_ops"

# Of the standard library, what the sources include.
PRELUDE = (
    "algorithm",
    "atomic",
    "cmath",
    "cstdint",
    "cstring",
    "functional",
    "limits",
    "memory",
    "mutex",
    "string",
    "type_traits",
    "vector",
)


@functools.cache
def folder() -> Path:
    """Of this test run."""
    made = tempfile.TemporaryDirectory(prefix="cm-cpu-")
    folder.kept = made  # removed when the process ends
    return Path(made.name)


CHOICE = """#include "kernels.h"
namespace cm::cpu {{
extern const Kernels {names};
const bool kSecondCache = false;
const Kernels* const* all_kernels() {{
    static const Kernels* const kernels[] = {{{pointers}, nullptr}};
    return kernels;
}}
}}
"""


def compiled(file: Path, flags: tuple[str, ...], out: Path, sources: Path = build.SOURCES) -> Path:
    """The object of one source file."""
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler: the CPU ops cannot be built here")
    common = ("-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", "-pthread", f"-I{sources}", f"-I{HERE}")
    command = [compiler, *common, *flags, "-c", str(file), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    return out


def linked(objects: Iterable[Path], out: Path, flags: tuple[str, ...] = ()) -> Path:
    subprocess.run([str(build.compiler()), *flags, *map(str, objects), "-o", str(out), "-pthread"], check=True)
    return out


@functools.cache
def objects(
    name: str, kernels: tuple[str, ...], flags: tuple[tuple[str, tuple[str, ...]], ...], but: str = ""
) -> dict[str, Path]:
    """{source file: object} of the fake runtime, of a choice among `kernels` (kPortable, ...) and of files with flags of each.

    What several programs have in common is compiled once in a run. `but`: a file that is left out.
    """
    out, of = folder() / name, dict(flags)
    out.mkdir(exist_ok=True)
    choice = out / "choice.cpp"
    choice.write_text(CHOICE.format(names=", ".join(kernels), pointers=", ".join(f"&{k}" for k in kernels)))
    files = {"choice.cpp": choice, "fake_runtime.cpp": HERE / "fake_runtime.cpp", **{f: build.SOURCES / f for f in of}}

    def one(file: str) -> tuple[str, Path]:
        source, its = files[file], of.get(file, of["ops.cpp"])
        key = hashlib.sha256(source.read_bytes() + repr((file, its)).encode()).hexdigest()[:16]
        made = shared.once(f"cpu_object_{key}", lambda here: compiled(source, its, here / "x.o"))
        return file, made / "x.o"

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(pool.map(one, [file for file in files if file != but]))


@functools.cache
def prelude() -> tuple[str, ...]:
    """Flags by which a file that is not optimised takes the headers of C++ from a compiled one."""
    header = folder() / "prelude.h"
    header.write_text("".join(f"#include <{name}>\n" for name in PRELUDE))
    compiled(header, ("-O0", "-x", "c++-header"), Path(f"{header}.gch"))
    return ("-include", str(header))


def changed(name: str, file: str, right: str, wrong: str) -> Path:
    """A copy of the sources in which one text of one file is replaced."""
    copy = folder() / f"{name}-sources" / "cpu"
    shutil.copytree(build.SOURCES, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.so"))
    for other in build.SHARED:
        (copy / other).parent.mkdir(exist_ok=True)
        shutil.copy(build.SOURCES / other, copy / other)
    text = (copy / file).read_text()
    assert text.count(right) == 1, f"{file} has {text.count(right)} times {right!r}"
    (copy / file).write_text(text.replace(right, wrong))
    return copy


def answers(
    run: Path,
    calls: Iterable[Call],
    *,
    threads: int = 1,
    at_once: int = 1,
    instructions: str = "",
    prefix: tuple[str, ...] = (),
) -> list[np.ndarray | str]:
    """y of each call, or the message of an error."""
    questions, replies = run.with_suffix(".calls"), run.with_suffix(".answers")
    with questions.open("wb") as file:
        for call in calls:
            inputs = [call.inputs.get(name) for name in names(call)]
            file.write(f"{call.op} {len(call.attributes)} {len(inputs)}\n".encode())
            file.write("".join(f"{n} {v}\n" for n, v in call.attributes.items()).encode())
            for values in inputs:
                if values is None:  # an optional one that is left out
                    file.write(b"0 0 \n")
                    continue
                file.write(f"{TYPES[str(values.dtype)]} {values.ndim} {' '.join(map(str, values.shape))}\n".encode())
                file.write(values.tobytes())
    command = [*prefix, run, questions, replies, threads, at_once, *([instructions] if instructions else [])]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    found: list[np.ndarray | str] = []
    with replies.open("rb") as file:
        while line := file.readline().decode():
            kind, _, rest = line.strip().partition(" ")
            shape = [int(size) for size in rest.split()] if kind == "ok" else []
            found.append(np.fromfile(file, np.float32, int(np.prod(shape))).reshape(shape) if shape else rest)
    return found
