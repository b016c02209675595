"""Finds the packages and compiles the CPU ops; everything else about the distribution is in pyproject.toml.

The top-level folders plugins/ and recipes/ are installed as cm_export.plugins and cm_export.recipes: packages called
`plugins` and `recipes` would pollute site-packages.

The CPU ops (plugins/cpu) are one shared library, no Python module. Without a C++ compiler there is none, and nothing
fails: portable graphs then run on ONNX Runtime's own ops, and `cm-export doctor` says what is missing.
"""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

OUTSIDE = ("plugins", "recipes")


class NativeLibrary(build_ext):
    """Runs plugins/cpu/build.py, which names the file by a hash of the sources."""

    def build_extension(self, ext: Extension) -> None:
        sys.path.insert(0, str(ROOT))  # build.py imports cm_export.base.errors, and cm_export is not installed yet
        build = runpy.run_path(str(ROOT / "plugins" / "cpu" / "build.py"))
        if build["compiler"]() is None:
            self.warn("no C++ compiler: the CPU ops of cm_export are left out")
            return
        build["compile_library"](Path(self.get_ext_fullpath(ext.name)).parent)

    def get_outputs(self) -> list[str]:
        folder = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        return [str(file) for file in folder.glob("libcm_native-*")]

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: the library goes to the sources themselves."""


setup(
    cmdclass={"build_ext": NativeLibrary},
    ext_modules=[Extension("cm_export.plugins.cpu.native", sources=[], optional=True)],
    packages=[
        *find_packages(include=["cm_export", "cm_export.*"]),
        *(f"cm_export.{name}" for top in OUTSIDE for name in find_packages(include=[top, f"{top}.*"])),
    ],
    package_dir={"cm_export": "cm_export", **{f"cm_export.{top}": top for top in OUTSIDE}},
)
