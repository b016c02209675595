"""The sources of the CPU ops in a program of their own: sanitizers, threads, and the files for other processors.

The program (cpu_ops/fake_runtime.cpp) hands every tensor over in a block of exactly its size. ARM's file runs here with its
intrinsics written in plain C++ (cpu_ops/neon_in_plain_cpp.h): its logic is tested, its instructions are not.
"""

import functools
import platform
import subprocess

import numpy as np
import pytest
from cpu_attention_cases import CASES
from cpu_attention_cases import attention as attention_of
from cpu_builds import answers, folder, linked, objects
from cpu_cases import Head, Sizes, ffn, matmul, refine, residual_norm
from cpu_prompt_cases import CASES as PROMPTS
from cpu_prompt_cases import prompt

from cm_export.plugins.cpu import build, library

CALLS = [
    *(matmul(sizes, seed) for seed, sizes in enumerate([
        Sizes(), Sizes(K=1, N=1, S=2), Sizes(K=33, N=127, bits=8, zeros=True), Sizes(K=200, N=257, group=64, zeros=True, S=3),
        Sizes(K=130, N=130, group=128, S=17), Sizes(K=70, N=200, bits=8, group=64, B=2, S=9), Sizes(bits=32),
        Sizes(K=200, N=257, bits=8, zeros=True, x_bytes=2), Sizes(K=70, N=130, bits=8, S=3, x_bytes=2),
        Sizes(bits=32, S=19), Sizes(share=0, S=2), Sizes(share=1), Sizes(share=1, S=19, zeros=True), Sizes(S=0),
        Sizes(K=600, N=140, share=1, S=19, x_bytes=0, zeros=True), Sizes(K=70, N=129, share=1, x_bytes=0, bits=8, group=64),
        # enough short rows of W for several windows of them (product.h)
        Sizes(K=1700, N=100, zeros=True), Sizes(K=1700, N=300, share=1, bits=8, x_bytes=2), Sizes(K=2600, N=100, group=128, S=3),
    ])),
    ffn(Sizes(B=2, zeros=True, N=300, group=64), bits_out=8, group_out=64),
    ffn(Sizes(S=19, K=40, bits=8), bits_out=32, seed=1),
    ffn(Sizes(S=1, K=40, bits=32), "gelu", bits_out=4, seed=2),
    ffn(Sizes(K=520, N=1300, zeros=True), seed=3), ffn(Sizes(B=2, S=3, K=520, N=1100, bits=8, x_bytes=2), bits_out=8, seed=4),
    residual_norm(1, 33), residual_norm(3, 16, seed=1),
    *(refine(head, seed) for seed, head in enumerate([
        Head(), Head(K=33, N=65, S=2), Head(K=530, N=131, B=2, share=0.5), Head(left_out=0.6), Head(K=33, N=8300), Head(S=0),
    ])),
    *(attention_of(sizes, seed) for seed, sizes in enumerate(CASES)),
    *(prompt(sizes, seed) for seed, sizes in enumerate(PROMPTS) if not sizes.pad),
]  # fmt: skip
OPS = ("ops.cpp", "attention.cpp", "prompt.cpp", "norm.cpp", "refine.cpp")
ALL_OPS = tuple((file, ("-O0",)) for file in OPS)
# Not optimised, and checks as calls: compiling takes longer than the calls.
QUICKLY = ("-O0", "-g1", "--param", "asan-instrumentation-with-call-threshold=0")
SANITIZERS = (*QUICKLY, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
ADDRESS = (*QUICKLY, "-fsanitize=address")


def checked(run, **how) -> list:
    found = answers(run, CALLS, **how)
    assert len(found) == len(CALLS)
    for call, y in zip(CALLS, found, strict=True):
        assert isinstance(y, np.ndarray), y
        call.check(y, how.get("instructions", ""))
    return found


@functools.cache
def sanitized():
    flags = dict.fromkeys((*OPS, "portable.cpp"), SANITIZERS)
    if platform.machine() == "x86_64":
        flags |= dict.fromkeys(("amx.cpp", "avx512.cpp", "avx2.cpp"), ADDRESS)
    kernels = ("kAmx", "kAvx512", "kAvxVnni", "kAvx2")[: 4 if "avx2.cpp" in flags else 0]
    made = objects("sanitized", (*kernels, "kPortable"), tuple(flags.items()))
    return linked(made.values(), folder() / "sanitized" / "run", SANITIZERS)


PLAIN = (*ALL_OPS, ("portable.cpp", ("-O0",)))
ARM = (*ALL_OPS, ("neon.cpp", ("-O0", "-DCM_NEON_IN_PLAIN_CPP")))


@functools.cache
def arm():
    made = objects("arm", ("kNeonDot", "kNeon"), ARM)
    return linked(made.values(), folder() / "arm" / "run")


@pytest.mark.parametrize("instructions", ["amx-bf16", "avx512-vnni", "avx-vnni", "avx2", "portable"])
def test_sanitizers_find_nothing_and_calls_at_once_do_not_disturb_each_other(instructions):
    if build.compiler() and instructions not in usable():
        pytest.skip(f"this processor has no {instructions}")
    one = checked(sanitized(), instructions=instructions)
    several = checked(sanitized(), instructions=instructions, threads=3, at_once=3)
    assert all(np.array_equal(a, b) for a, b in zip(one, several, strict=True))


@functools.cache
def usable() -> list[str]:
    library.built()
    return library.info()["usable"]


@pytest.mark.parametrize("instructions", ["neon", "neon-dot"])
def test_the_file_for_arm_is_right_in_plain_cpp(instructions):
    one = checked(arm(), instructions=instructions)
    two = checked(arm(), instructions=instructions, threads=2, at_once=2)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_runtime_that_is_too_old_is_refused_with_its_version(tmp_path):
    old = tmp_path / "old.cpp"
    old.write_text("""
        #include <cstdio>
        #include "ort.h"
        extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions*, const ort::ApiBase*);
        static ort::Status* create(int, const char* text) { return std::puts(text), reinterpret_cast<ort::Status*>(1); }
        static void* table[1] = {reinterpret_cast<void*>(create)};
        int main() {
            const ort::ApiBase base{[](uint32_t v) -> const void* { return v > 13 ? nullptr : table; }, [] { return "1.13.1"; }};
            return RegisterCustomOps(nullptr, &base) == nullptr;
        }""")
    made = [o for f, o in objects("plain", ("kPortable",), PLAIN).items() if f != "fake_runtime.cpp"]
    command = [build.compiler(), "-std=c++17", f"-I{build.SOURCES}", old, *made, "-o", tmp_path / "old", "-pthread"]
    subprocess.run([*map(str, command)], check=True)
    done = subprocess.run([tmp_path / "old"], capture_output=True, text=True, check=True)
    assert done.stdout == "the CPU ops of cm_export need ONNX Runtime 1.20 or newer, this one is 1.13.1\n"
