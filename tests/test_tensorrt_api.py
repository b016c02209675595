"""Every name of TensorRT and CUDA that our code used on the fakes exists in the real Python bindings, old and new.

The bindings are small and install anywhere; the libraries they need are compiled here as stubs, enough to import them.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import wide
from fake_engines import add_engines, machine
from test_tensorrt_sessions import IMAGES, QUESTION

from cm_export.host.images import open_image
from cm_export.host.loaded import load

# distribution, version, module, version of the fake
BINDINGS = {
    "10.3, the oldest supported": ("tensorrt-cu12-bindings", "10.3.0", "tensorrt_bindings", "10.3.0"),
    "10.16": ("tensorrt-cu12-bindings", "10.16.1.11", "tensorrt_bindings", "10.16.1.11"),
    "11.4": ("tensorrt-cu13-bindings", "11.4.0.106", "tensorrt_bindings", "11.4.0.106"),
    "RTX 1.7": ("tensorrt-rtx-cu13-bindings", "1.7.1.116", "tensorrt_rtx_bindings", "rtx-1.7.1"),
}
CUDA = {"12.8, the oldest supported": ("cuda-bindings", "12.8.0"), "13.5": ("cuda-bindings", "13.5.0")}
CACHE = Path(__file__).parent.parent / "artifacts" / "bindings"
# What a subclass of ours overrides or a comparison needs; no fake can record that.
OVERRIDDEN = [
    ("ILogger", "log", 2, ()),
    *(("ILogger.Severity", n, -1, ()) for n in ("INTERNAL_ERROR", "ERROR", "WARNING")),
    ("IProgressMonitor", "phase_start", 3, ()),
    ("IProgressMonitor", "step_complete", 2, ()),
    ("IProgressMonitor", "phase_finish", 1, ()),
    *(("Dims", n, -1, ()) for n in ("__len__", "__getitem__")),
    ("IHostMemory", "nbytes", -1, ()),
]


def installed(distribution: str, version: str) -> Path:
    """A folder with the package alone, downloaded once."""
    folder = CACHE / f"{distribution}-{version}"
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part)]
        done = subprocess.run([*command, f"{distribution}=={version}"], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(part, ignore_errors=True)
            pytest.skip(f"{distribution} {version} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        part.rename(folder)
    return folder


def stubbed(folder: Path, module: str) -> Path:
    """Compiled stand-ins for the libraries that a binding is linked against: every symbol it asks for, doing nothing."""
    out = folder / "stubs"
    if out.is_dir():
        return out
    if not all(map(shutil.which, ("gcc", "nm", "readelf"))):
        pytest.skip("no gcc, nm and readelf here to make stub libraries with")
    (binding,) = (folder / module).glob("*.so")
    told = subprocess.run(["readelf", "-d", str(binding)], capture_output=True, text=True, check=True).stdout
    needed = [n for n in re.findall(r"NEEDED.*\[(.+?)\]", told) if "nv" in n or "tensorrt" in n]
    told = subprocess.run(
        ["nm", "-D", "--undefined-only", str(binding)], capture_output=True, text=True, check=True
    ).stdout
    symbols = re.findall(r" U ((?:create|get|init)\w*(?:_INTERNAL|Plugin|Infer|Onnx)\w*)$", told, re.MULTILINE)
    assert needed and symbols
    part = out.with_name(f"stubs.{os.getpid()}.part")
    part.mkdir()
    (part / "stub.c").write_text("\n".join(f"void* {s}(void) {{ return 0; }}" for s in sorted(set(symbols))))
    for name in needed:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(part / name), str(part / "stub.c")], check=True)
    part.rename(out)
    return out


def problems(folder: Path, module: str, uses: list, libraries: Path | None = None) -> list[str]:
    """What the real module says to these uses."""
    script = Path(__file__).parent / "look_up_names.py"
    paths = os.environ | ({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})
    command = [sys.executable, str(script), str(folder), module]
    done = subprocess.run(command, input=json.dumps(uses), capture_output=True, text=True, env=paths, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def work(demo_bundle, tmp_path_factory):
    """version -> machines that have built and run engines in every way that we have; their libraries noted what was asked."""

    @functools.cache
    def done(version: str) -> list:
        once = {"engine__workspace_mb": 64}
        once |= {"engine__architecture": "sm_86"} if version.startswith("rtx") else {"engine__strip_weights": True}
        with pytest.MonkeyPatch.context() as patch:
            made = []
            for recipe in (once, {"engine__weight_streaming": True}):
                out = tmp_path_factory.mktemp("engines") / "demo.plan"
                recipe = {"engine__dense": False} | recipe
                made.append(add_engines(patch, demo_bundle, out, machine(version), **recipe))
            model = load(made[1].sit_at(patch).bundle, threads=1)
            assert model.generate(QUESTION, [open_image(IMAGES[0])], max_new_tokens=9).token_ids
        return made

    return done


def uses_of(machines, library: str) -> list:
    calls = set().union(*(getattr(at, library)._calls for at in machines))
    return sorted([{"Library": "", "FakeCuda": ""}.get(owner, owner), *rest] for owner, *rest in calls)


@pytest.mark.parametrize("name", [wide(n) if n == "10.16" else n for n in BINDINGS])
def test_every_name_we_use_is_in_the_bindings(work, name):
    distribution, version, module, fake = BINDINGS[name]
    folder = installed(distribution, version)
    uses = uses_of(work(fake), "trt")
    assert len(uses) > 60 and ["IExecutionContext", "execute_async_v3", 1, ()] in uses
    found = problems(folder, module, [*uses, *OVERRIDDEN], stubbed(folder, module))
    assert not found, f"{distribution} {version}: {found}"


@pytest.mark.parametrize("name", BINDINGS)
def test_the_fake_has_nothing_that_the_bindings_lack(name):
    """Otherwise code that works on it would not work there."""
    distribution, version, module, fake = BINDINGS[name]
    folder, trt = installed(distribution, version), machine(fake).trt
    names = [("", n, -1, ()) for n in (*trt._enums, "Builder", "OnnxParser", "Runtime", "ILogger", "Logger")]
    names += [(kind, member, -1, ()) for kind, holder in trt._enums.items() for member in holder.__members__]
    for kind, made in trt._classes.items():
        public = {n for base in made.__mro__ for n in vars(base) if not n.startswith("_")}
        names += [(kind, n, -2 if n in made._settable else -1, ()) for n in sorted(public | set(made._settable))]
    there = [n for n in names if n[:2] not in trt._absent]
    found = problems(folder, module, there, stubbed(folder, module))
    assert len(there) > 100 and not found, f"{distribution} {version}: {found}"


def test_a_wrong_name_in_our_code_would_be_told():
    """One of each kind: a class, a method, a number of arguments, a keyword, a flag of another version, a fixed property."""
    distribution, version, module, _ = BINDINGS["11.4"]
    folder = installed(distribution, version)
    wrong = [
        ("", "BuilderX", -1, ()),
        ("ICudaEngine", "num_bindings", -1, ()),
        ("IExecutionContext", "execute_v3", 1, ()),
        ("IExecutionContext", "execute_async_v3", 2, ()),
        ("OnnxParser", "parse_from_file", 0, ("path",)),
        ("BuilderFlag", "FP16", -1, ()),
        ("ICudaEngine", "num_layers", -2, ()),
    ]
    right = [("OnnxParser", "parse_from_file", 0, ("model",)), ("IExecutionContext", "execute_async_v3", 1, ())]
    found = problems(folder, module, [*wrong, *right], stubbed(folder, module))
    assert len(found) == len(wrong), found
    assert all(name in text for (_, name, *_), text in zip(wrong, found, strict=True))


@pytest.mark.parametrize("name", CUDA)
def test_every_cuda_function_we_call_is_in_its_bindings(work, name):
    folder = installed(*CUDA[name])
    machines = work("10.3.0")
    uses, kinds = uses_of(machines, "cuda"), machines[0].cuda
    assert ["", "cudaMemcpy2DAsync", 8, ()] in uses and ["", "cudaGraphInstantiate", 2, ()] in uses
    uses += [["cudaMemcpyKind", n, -1, ()] for n in type(kinds).cudaMemcpyKind.__members__]
    uses += [["cudaStreamCaptureMode", n, -1, ()] for n in type(kinds).cudaStreamCaptureMode.__members__]
    uses += [["cudaDeviceProp", n, -1, ()] for n in ("name", "major", "minor")]
    assert not problems(folder, "cuda.bindings.runtime", uses)
    wrong = [["", "cudaMemcpyAsync", 4, ()], ["", "cudaMallocAll", 1, ()]]
    assert len(problems(folder, "cuda.bindings.runtime", wrong)) == 2
