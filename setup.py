"""Finds the packages and compiles the CPU ops; everything else about the distribution is in pyproject.toml.

The top-level folders plugins/ and recipes/ are installed as cm_export.plugins and cm_export.recipes: packages called
`plugins` and `recipes` would pollute site-packages.

The CPU ops (plugins/cpu) are one shared library, no Python module. Without a C++ compiler there is none, and nothing
fails: portable graphs then run on ONNX Runtime's own ops, and `cm-export doctor` says what is missing.
"""

import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OUTSIDE = ("plugins", "recipes")
CPU_OPS = "cm_export.plugins.cpu"


@cache
def native() -> dict[str, Any]:
    """The functions of plugins/cpu/build.py."""
    sys.path.insert(0, str(ROOT))  # it imports cm_export.base.errors, and cm_export is not installed yet
    return runpy.run_path(str(ROOT / "plugins" / "cpu" / "build.py"))


class WithCompiler(Distribution):
    """Without one, there is nothing to compile, and the wheel is one for every machine."""

    def has_ext_modules(self) -> bool:
        return native()["compiler"]() is not None


class NativeLibrary(build_ext):
    """Puts the library, whose name carries a hash of its sources, beside those."""

    def run(self) -> None:
        folder = Path(self.build_lib, *CPU_OPS.split("."))
        if self.editable_mode:
            folder = ROOT / self.get_finalized_command("build_py").get_package_dir(CPU_OPS)
        try:
            self.library = native()["compile_library"](folder)
        except native()["CmExportError"] as error:
            self.library = None
            self.warn(f"the CPU ops of cm_export are left out: {error}")

    def get_outputs(self) -> list[str]:
        return [str(self.library)] if self.library else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """The library depends on the processor and the system, but on no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    distclass=WithCompiler,
    cmdclass={"build_ext": NativeLibrary, "bdist_wheel": AnyPythonWheel},
    ext_modules=[Extension(f"{CPU_OPS}.native", sources=[])],
    packages=[
        *find_packages(include=["cm_export", "cm_export.*"]),
        *(f"cm_export.{name}" for top in OUTSIDE for name in find_packages(include=[top, f"{top}.*"])),
    ],
    package_dir={"cm_export": "cm_export", **{f"cm_export.{top}": top for top in OUTSIDE}},
)
