"""Packed rows and their inverse; where the compiled CPU ops are found, and what is said where they are missing."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import setuptools
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_export.base.errors import CmExportError, InputError
from cm_export.plugins.cpu import build, library
from cm_export.quant import rows

ROOT = Path(__file__).parent.parent


@settings(max_examples=60, deadline=None)
@given(
    K=st.integers(1, 140),
    N=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from(rows.GROUPS),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_back_what_was_packed(K, N, bits, group, zeros, seed):
    rng, shape = np.random.default_rng(seed), (-(-K // group), N)
    codes = rng.integers(0, 1 << bits, (K, N), dtype=np.uint8)
    scale = rng.standard_normal(shape).astype(np.float16)
    zero = rng.integers(0, 1 << bits, shape, dtype=np.uint8) if zeros else None
    packed = rows.pack(codes, scale, zero, bits, group)
    wide = -(-N // 128) * 128
    assert packed.codes.shape == (shape[0] * group, wide * bits // 8)
    assert packed.scale.shape == (shape[0], wide) and not packed.scale[:, N:].any()
    back, back_scale, back_zero = rows.unpack(packed)
    assert np.array_equal(back, codes) and np.array_equal(back_scale, scale)
    assert back_zero is None if zero is None else np.array_equal(back_zero, zero)
    for k, n in ((0, 0), (K - 1, N - 1), (K // 2, N // 2)):
        middle = 1 << (bits - 1) if zero is None else int(zero[k // group, n])
        assert rows.numbers(packed)[k, n] == np.float32(scale[k // group, n]) * (int(codes[k, n]) - middle)


def test_an_output_lies_where_the_kernels_look_for_it():
    codes = np.zeros((32, 256), np.uint8)
    codes[3, 128 + 64 + 16 + 8 + 1] = 5  # panel 1, h 1, q 1, l 2, w 1
    four = rows.pack(codes, np.ones((1, 256)), None, 4, 32).codes
    assert np.argwhere(four).tolist() == [[3, 64 + 2 * 16 + 4 + 1]] and four.max() == 5 << 4
    eight = rows.pack(codes, np.ones((1, 256)), None, 8, 32).codes
    assert np.argwhere(eight).tolist() == [[3, 128 + 64 + 2 * 16 + 4 + 1]]


def test_floats_keep_their_order():
    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    packed = rows.pack_float(weight)
    assert packed.codes.shape == (2, 128) and np.array_equal(rows.numbers(packed), weight)
    with pytest.raises(InputError, match="float32 rows have no codes"):
        rows.unpack(packed)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3}, "codes of 3 bits"),
        ({"group": 48}, "groups of 48 inputs"),
        ({"codes": np.zeros((32, 4))}, "codes are float64 [32, 4]"),
        ({"codes": np.zeros((0, 4), np.uint8)}, "codes are uint8 [0, 4]"),
        ({"codes": np.full((32, 4), 16, np.uint8)}, "a code of 16 does not fit into 4 bits"),
        ({"scale": np.ones((2, 4))}, "scale is [2, 4]; give [1, 4]"),
        ({"zero": np.ones((1, 3), np.uint8)}, "zero is [1, 3]; give [1, 4]"),
        ({"zero": np.ones((1, 4))}, "zero is float64"),
        ({"zero": np.full((1, 4), 16, np.uint8)}, "a zero of 16 does not fit into 4 bits"),
        ({"scale": np.full((1, 4), 1e5)}, "a scale does not fit into float16"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_reason(change, message):
    right = {"codes": np.zeros((32, 4), np.uint8), "scale": np.ones((1, 4)), "zero": None, "bits": 4, "group": 32}
    with pytest.raises(InputError) as raised:
        rows.pack(**right | change)
    assert message in str(raised.value)


# ---------------------------------------------------------------- the library


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Neither installed nor in the user's cache."""
    monkeypatch.setattr(library, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(build, "library_name", lambda sources=build.SOURCES: "libcm_native-0.so")


def test_a_library_that_was_not_built_says_how_to_build_it(nowhere, monkeypatch):
    assert library.find() is None
    assert "the CPU ops are not built; pip install " in library.why_missing()
    with pytest.raises(InputError, match="the CPU ops are not built"):
        library.counts()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "there is no C++ compiler; install one of g++, clang++, c++" in library.why_missing()
    with pytest.raises(InputError, match="there is no C\\+\\+ compiler"):
        library.built()


def test_a_file_that_is_no_library_is_named(nowhere):
    library.cache().mkdir()
    broken = library.cache() / build.library_name()
    broken.write_text("no library")
    assert f"{broken}: cannot be loaded" in library.why_missing()


def test_a_compiler_that_fails_leaves_nothing_behind(nowhere, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\necho "no such option" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CmExportError, match=r"c\+\+ failed: ...no such option; set CXX"):
        library.built()
    assert list(library.cache().iterdir()) == []


def test_the_name_of_the_library_follows_the_sources(tmp_path):
    sources = tmp_path / "cpu"
    sources.mkdir()
    (tmp_path / "core_ffn").mkdir()
    for name in ("cpu/a.cpp", "cpu/b.h", "core_ffn/activations.h"):
        (tmp_path / name).write_text("")
    names = {build.library_name(sources)}
    for name in ("cpu/a.cpp", "cpu/b.h", "core_ffn/activations.h"):
        (tmp_path / name).write_text("//")
        names.add(build.library_name(sources))
    assert len(names) == 4


def test_building_compiles_once_and_a_missing_compiler_is_said_in_one_line(tmp_path):
    if build.compiler() is None:
        pytest.skip("no C++ compiler: the CPU ops cannot be built here")
    made = build.compile_library(library.cache()) if library.find() is None else library.built()
    before = made.stat().st_mtime_ns
    assert library.built() == made and made.stat().st_mtime_ns == before
    command = [sys.executable, "-m", "cm_export.plugins.cpu.build", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"CXX": "/nowhere", "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: the CPU ops: there is no C++ compiler; install one of g++, clang++, c++, or set CXX\n"


def test_setup_compiles_the_library_into_the_wheel_and_leaves_it_out_without_a_compiler(monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(setuptools, "setup", lambda **values: told.update(values))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    distribution = told["distclass"]({"name": "x", "ext_modules": told["ext_modules"]})
    command = told["cmdclass"]["build_ext"](distribution)
    command.ensure_finalized()
    command.build_lib = str(tmp_path)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert not distribution.has_ext_modules()
    command.run()
    assert command.get_outputs() == []
    monkeypatch.delenv("CXX")
    if build.compiler():
        assert distribution.has_ext_modules()
        place = tmp_path / "cm_export" / "plugins" / "cpu"
        place.mkdir(parents=True)
        (place / build.library_name()).touch()  # built before: not compiled again
        command.run()
        assert command.get_outputs() == [str(place / build.library_name())]
