"""Compiles the plugin library, its emulated twin and the harness: CMake with the right headers.

    python -m cm_export.plugins.build --out artifacts/plugins            libcm_plugins.so, all architectures
    python -m cm_export.plugins.build --out DIR --emulate --harness      no nvcc: the kernels run on the CPU

TensorRT's headers come from --tensorrt-include; without it, from a wheel that bundles them (10.14, Apache-2.0).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click

from cm_export.base.errors import CmExportError, InputError

SOURCES = Path(__file__).parent
HEADERS_PACKAGE = "kernel-lens==2.0.1"
HEADERS_SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
HEADERS_FOLDER = "kernel_lens/include/tensorrt/"


def fetch_headers(folder: Path) -> Path:
    """TensorRT 10.14's headers, unpacked once below `folder`. Raises InputError if they cannot be had."""
    include = folder / "tensorrt-headers"
    if (include / "NvInferRuntime.h").is_file():
        return include
    folder.mkdir(parents=True, exist_ok=True)
    # --no-deps: of the package only these headers are wanted, none of what it needs to run.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), HEADERS_PACKAGE], capture_output=True, text=True, check=False
    )
    wheel = next(iter(sorted(folder.glob("kernel_lens-*.whl"))), None)
    fix = "give --tensorrt-include (TENSORRT_INCLUDE= for make), the directory of NvInferRuntime.h"
    if done.returncode or wheel is None:
        raise InputError(
            f"pip could not fetch {HEADERS_PACKAGE}: {done.stderr.strip()[-300:]}", where="headers", fix=fix
        )
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != HEADERS_SHA256:
        raise InputError("the fetched wheel has another content", where=HEADERS_PACKAGE, fix=fix)
    partial = folder / f"tensorrt-headers.{os.getpid()}"
    partial.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(HEADERS_FOLDER) and name.endswith(".h"):
                (partial / Path(name).name).write_bytes(archive.read(name))
    partial.rename(include)
    return include


def compile_library(
    out: Path,
    include: Path,
    *,
    sources: Path = SOURCES,
    emulate: bool = False,
    harness: bool = False,
    plugins: bool = True,
    architectures: str | None = None,
    debug: bool = False,
    jobs: int = 2,
) -> Path:
    """Configures and builds in out/build; the libraries end up in `out`, which is returned. Raises InputError."""
    if shutil.which("cmake") is None:
        raise InputError("cmake is not installed", where="plugins", fix="install cmake 3.22 or newer")
    flags = {"CM_EMULATE": emulate, "CM_HARNESS": harness, "CM_PLUGINS": plugins}
    defines = {
        **{name: "ON" if on else "OFF" for name, on in flags.items()},
        "CM_TENSORRT_INCLUDE": include.resolve(),
        "CMAKE_BUILD_TYPE": "Debug" if debug else "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out.resolve(),
        **({"CMAKE_CUDA_ARCHITECTURES": architectures} if architectures else {}),
    }
    # a build folder per setting: CMake keeps what was once configured
    build = out / "build" / "-".join([name[3:].lower() for name, on in flags.items() if on] + ["debug"] * debug)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [f"-D{name}={value}" for name, value in defines.items()]
    for command in (
        ["cmake", "-S", str(sources), "-B", str(build), *generator, *options],
        ["cmake", "--build", str(build), "--parallel", str(jobs)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            (out / "build.log").write_text(done.stdout + done.stderr)
            what = f"{' '.join(command[:2])} failed: ...{(done.stdout + done.stderr)[-600:]}"
            raise InputError(what, where="plugins", fix=f"all of it is in {out / 'build.log'}")
    return out


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the libraries.")
@click.option("--tensorrt-include", type=click.Path(path_type=Path), help="Directory of NvInferRuntime.h.")
@click.option("--architectures", help="CUDA architectures, such as '87' or '89-real;90-real'. Default: all known.")
@click.option("--emulate", is_flag=True, help="libcm_plugins_emulated.so, which runs on the CPU.")
@click.option("--harness", is_flag=True, help="Also libcm_harness.so, which calls plugins without TensorRT.")
@click.option("--debug", is_flag=True, help="Check indices in the kernels.")
@click.option("--jobs", default=2, show_default=True, help="Compilers at once.")
def main(out: Path, tensorrt_include: Path | None, **options) -> None:
    include = tensorrt_include or fetch_headers(out / "headers")
    compile_library(out, include, **options)
    for library in sorted(out.glob("lib*.so")):
        click.echo(f"{library}  {library.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except CmExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
