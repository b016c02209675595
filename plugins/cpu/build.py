"""Compiles the CPU ops with whatever C++ compiler is there: one call, no CMake, no headers but those beside this file.

    python -m cm_export.plugins.cpu.build --out DIR        DIR/libcm_native-0123456789ab.so

The name carries a hash of the sources, so a library is never taken for another version's. setup.py runs this file before
anything is installed: it needs the standard library and cm_export.base.errors alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cm_export.base.errors import CmExportError, InputError

SOURCES = Path(__file__).parent
SHARED = ("../core_ffn/activations.h",)  # sources of the GPU's plugins that are these ops' too
COMPILERS = ("g++", "clang++", "c++")
# No -march: each file says which instructions its own functions may use, and the library chooses when it is loaded.
# Nobody looks at floating-point exceptions or errno: without them, more loops become vectors. NaN and Inf keep their meaning.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
)
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def source_files(sources: Path = SOURCES) -> list[Path]:
    return [*sorted(sources.glob("*.cpp")), *sorted(sources.glob("*.h")), *(sources / name for name in SHARED)]


def library_name(sources: Path = SOURCES) -> str:
    """The file name of the library that these sources make."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in source_files(sources):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"libcm_native-{digest.hexdigest()[:12]}{SUFFIX}"


def compiler() -> str | None:
    """Path of a C++ compiler: that of the environment's CXX, or the first of g++, clang++ and c++."""
    named = os.environ.get("CXX", "")
    found = (shutil.which(name) for name in ((named,) if named else COMPILERS))
    return next(filter(None, found), None)


def compile_library(out: Path, sources: Path = SOURCES, flags: tuple[str, ...] = ()) -> Path:
    """Compiles into `out` unless it is there; whole or not there. Raises InputError without a compiler, CmExportError."""
    library = out / library_name(sources)
    if library.is_file() and not flags:
        return library
    program = compiler()
    if program is None:
        raise InputError(
            "there is no C++ compiler", where="the CPU ops", fix=f"install one of {', '.join(COMPILERS)}, or set CXX"
        )
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".{library.name}.{os.getpid()}.tmp"
    command = [program, *FLAGS, *flags, "-o", str(partial), *map(str, sorted(sources.glob("*.cpp")))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            what = f"{Path(program).name} failed: ...{done.stderr.strip()[-600:]}"
            raise CmExportError(what, where="the CPU ops", fix="set CXX to a compiler that knows C++17")
        partial.replace(library)
    finally:
        partial.unlink(missing_ok=True)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the library")
    print(compile_library(parser.parse_args().out))


if __name__ == "__main__":
    try:
        main()
    except CmExportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
