"""The plugin library as TensorRT will load it: compiled by nvcc, its exports, its interface. No GPU is needed."""

import re
import subprocess
from pathlib import Path

import plugin_builds
import pytest
import tomllib
from conftest import wide
from setuptools import find_packages

from cm_export.base.errors import InputError
from cm_export.plugins import places
from cm_export.plugins.build import SOURCES, compile_library
from cm_export.plugins.core_ffn.body import ACTIVATIONS
from cm_export.plugins.harness.cases import OPS
from cm_export.plugins.harness.interface import problems
from cm_export.plugins.harness.library import Library

ROOT = Path(__file__).parent.parent


def symbols(library: Path, *options: str) -> set[str]:
    text = subprocess.run(["nm", "-D", *options, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines()}


# nvcc takes more than a minute for the whole library, which `make test-wide` compiles.
BUILDS = [
    wide(plugin_builds.real, id="nvcc"),
    pytest.param(plugin_builds.emulated, id="emulated"),
]


@pytest.mark.parametrize("build", BUILDS)
def test_the_library_exports_what_tensorrt_and_onnxruntime_look_for_and_nothing_else(build):
    emulators = {"cm_emulator_reverse"} if build is plugin_builds.emulated else set()
    exported = {"getCreators", "setLoggerFinder", "RegisterCustomOps"}
    assert symbols(build(), "--defined-only") == exported | emulators


@pytest.mark.parametrize("file", ["core_attention/run_half.cu"])
def test_nvcc_compiles_the_kernels_and_warns_of_nothing(tmp_path, file):
    command = [plugin_builds.nvcc(), "-std=c++17", "-arch=sm_90", "-c", SOURCES / file, "-o", tmp_path / "x.o"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.wide
def test_the_library_needs_neither_tensorrt_nor_a_cuda_runtime_to_be_loaded():
    text = subprocess.run(
        ["readelf", "-d", str(plugin_builds.real())], capture_output=True, text=True, check=True
    ).stdout
    needed = {name.split(".")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", text)}
    assert needed <= {"libc", "libm", "libstdc++", "libgcc_s", "libdl", "libpthread", "librt", "ld-linux-x86-64"}
    foreign = re.compile(r"nvinfer|^cuda|^cu[A-Z]", re.IGNORECASE)
    assert not [s for s in symbols(plugin_builds.real(), "--undefined-only") if foreign.search(s)]


@pytest.mark.parametrize("build", BUILDS)
def test_onnxruntime_takes_the_ops_for_the_provider_that_the_library_is_for(build, monkeypatch):
    """Its CPU provider runs no op of CUDA's: only that it is registered shows here."""
    monkeypatch.setattr(places, "trusted", build)
    assert places.why_unusable() is None
    found = {p for p in (b"CPUExecutionProvider", b"CUDAExecutionProvider") if p in build().read_bytes()}
    assert found == {b"CPUExecutionProvider" if build is plugin_builds.emulated else b"CUDAExecutionProvider"}


@pytest.mark.parametrize("build", BUILDS)
def test_interface_keeps_every_promise(build):
    library = Library(build())
    assert [str(p) for p in problems(library)] == []


def test_plugins_are_named_as_the_nodes_are():
    creators = Library(plugin_builds.emulated()).creators
    assert {(c.name, c.version, tuple(c.fields)) for c in creators.values()} == {
        (op.name, op.version, op.attributes) for op in OPS
    }


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_of_the_op_is_one_of_the_plugin(name):
    attributes = {"activation": name, "block": 1, "bits": 0, "group": 0}
    creator = Library(plugin_builds.emulated()).creators["CoreFFN"]
    assert creator.create(attributes) is not None
    # TensorRT's ONNX parser counts the zero byte behind a text, others do not
    assert creator.create(attributes | {"activation": f"{name}\0"}) is not None


def test_an_unknown_activation_is_refused_with_those_that_exist():
    library = Library(plugin_builds.emulated())
    library.log()
    attributes = {"activation": "silo", "block": 1, "bits": 0, "group": 0}
    assert library.creators["CoreFFN"].create(attributes) is None
    assert re.search(r'unknown activation "silo"; known: silu, .*mish', library.log())


def test_a_missing_header_directory_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(InputError, match=r"NvInferRuntime.h .*CM_TENSORRT_INCLUDE"):
        compile_library(tmp_path, tmp_path, plugins=False, harness=True)


def test_only_the_interface_of_tensorrt_10_3_is_used():
    newer = re.compile(r"V3OneBuildV2|V3QuickBuild|getAliasedInput|kFP4|kE8M0|kINT64|IStreamReaderV2|IPluginV2")
    for file in SOURCES.rglob("*"):
        if file.suffix in (".h", ".cpp", ".cu", ".cuh"):
            assert not newer.search(file.read_text()), file


def test_a_wheel_carries_the_sources_that_a_device_compiles():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed, data = set(), tool["package-data"]
    for package in find_packages(str(ROOT), include=["plugins", "plugins.*"]):
        home = ROOT.joinpath(*package.split("."))
        for pattern in ("*.py", *data["*"], *data.get(f"cm_export.{package}", ())):
            packed |= {f for f in home.glob(pattern) if f.is_file()}
    ours = {".h", ".cpp", ".cu", ".cuh", ".map", ".txt", ".py", ".md"}
    assert {f for f in SOURCES.rglob("*") if f.suffix in ours} == packed
