"""A Jetson made of files and small programs: what build_on_device.sh reads and calls, without a device, CUDA or TensorRT.

The programs record how they were called. trtexec answers probes from the archive's own expected numbers, so it proves
the script and not the engines; planted faults come through FAKE_* variables. With a `workshop` (fake_workshop.py) trtexec
writes plans of fake_tensorrt, which ask.py then runs in a Python that has packages.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import shared
from fake_workshop import Workshop

# JetPack -> Jetson Linux line, device model, libnvinfer-bin, CUDA, as such devices report them
RELEASES = {
    "6.2": ("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic", "NVIDIA Jetson Orin Nano Developer Kit Super",
            "10.3.0.30-1+cuda12.5", "12.6"),
    "7.1": ("# R38 (release), REVISION: 4.0, GCID: 1, BOARD: generic", "NVIDIA Jetson AGX Thor Developer Kit",
            "10.13.3.9-1+cuda13.0", "13.0"),
    "7.2": ("# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic", "NVIDIA Jetson AGX Orin Developer Kit",
            "10.16.2.10-1+cuda13.2", "13.2"),
}  # fmt: skip

_RECORD = 'printf "%s\\n" "$(basename "$0") $*" >>"$FAKE_CALLS"\n'
_PROGRAMS = {
    "dpkg-query": 'case "${!#}" in {packages} *) exit 1 ;; esac\n',
    "nvcc": 'echo "Cuda compilation tools, release {cuda}, V{cuda}.68"\n',
    "nvpmodel": 'echo "NV Power Mode: {mode}"; echo 0\n',
    "df": 'printf "%s\\n%s\\n" "Filesystem 1024-blocks Used Available" "/dev/x 99999999 1 {disk_kb}"\n',
    "cmake": """{record}if [[ -n ${{FAKE_CMAKE_FAILS:-}} ]]; then echo "CMake Error at CMakeLists.txt:1: no compiler"; exit 1; fi
if [[ $1 == --build ]]; then mkdir -p "$2"; echo library >"$2/libcm_plugins.so"; fi
""",
    "trtexec": '{record}unset PYTHONPATH\nexec "{python}" "{script}" "$@"\n',
    # No site-packages: the scripts of an archive have the standard library only, or what `environment` puts on the path.
    "python3": 'exec "{python}" -S "$@"\n',
}

_MODULES = Path(__file__).parent / "device_modules"
_LIBCUDART = """
#include <stddef.h>
#include <stdlib.h>
int cudaMalloc(void** piece, size_t size) {
    const char* most = getenv("FAKE_LARGEST");
    if (most && size > strtoull(most, NULL, 10)) return 2;
    *piece = (void*)4096;
    return 0;
}
int cudaMemset(void* piece, int value, size_t size) { return piece != (void*)4096; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaFree(void* piece) { return piece != (void*)4096; }
const char* cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "invalid argument"; }
"""

_TRTEXEC = """
import array, json, os, sys, time
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
manifest = json.load(open("manifest.json"))
if "--help" in given:
    print("\\n".join(f for f in manifest["flags"] if f != os.environ.get("FAKE_UNKNOWN_FLAG")))
elif "--saveEngine" in given:
    graph = given["--onnx"][5:-5]
    if os.environ.get("FAKE_FAILS") == graph:
        print("[I] parsing"); sys.exit("[E] Error[4]: the network has no such layer")
    if os.environ.get("FAKE_KILLED") == graph:
        os.kill(os.getpid(), 9)
    if "FAKE_WORKSHOP" in os.environ:
        sys.path.insert(0, os.environ["FAKE_TESTS"])
        from fake_workshop import Client, KEY, ask
        paths = [os.path.abspath(given[w]) for w in ("--onnx", "--saveEngine")]
        given["--dynamicPlugins"] = os.path.abspath(given["--dynamicPlugins"])
        address, version = os.environ["FAKE_WORKSHOP"], os.environ["FAKE_TENSORRT"]
        ask(Client(address, authkey=KEY), "build", version, paths[0], given, paths[1])
    else:
        open(given["--saveEngine"], "w").write(graph)
    if os.environ.get("FAKE_HANGS") == graph:
        open(os.environ["FAKE_CALLS"] + ".hangs", "w").close(); time.sleep(60)
elif "--exportLayerInfo" in given:
    graph = manifest["graphs"][os.path.basename(given["--loadEngine"])[:-5]]
    layers = [{"Name": n, "LayerType": "PluginV3"} for n in graph["plugin_nodes"] if n != os.environ.get("FAKE_LOST")]
    names = [v["name"] for v in graph["inputs"] + graph["outputs"] if v["name"] != os.environ.get("FAKE_LOST")]
    json.dump({"Layers": [{"Name": "{ForeignNode[ffn.0 ... ffn.1]}", "LayerType": "Myelin"}, *layers], "Bindings": names},
              open(given["--exportLayerInfo"], "w"))
else:
    files = dict(word.split(":") for word in given["--loadInputs"].split(","))
    assert all(os.path.getsize(f) for f in files.values())
    name, probe = next((n, p) for n, p in manifest["probes"].items() if p["inputs"] == files and n not in seen(n))
    if "--exportOutput" not in given:
        ms = probe["about"]["neurons"] / 1000
        print(f"[I] Latency: min = 1 ms, max = 9 ms, mean = 2 ms, median = {ms + .1} ms, percentile(90%) = 3 ms")
        print(f"[I] GPU Compute Time: min = 1 ms, max = 9 ms, mean = 2 ms, median = {ms} ms, percentile(90%) = 3 ms")
        sys.exit()
    with open(given["--exportOutput"], "w") as f:
        f.write("[\\n")
        for i, (tensor, entry) in enumerate(probe["outputs"].items()):
            kept = array.array({"float32": "f", "int64": "q"}[entry["stored"]], open(entry["file"], "rb").read())
            if os.environ.get("FAKE_WRONG") == f"{name}:{tensor}":
                kept = [v + 1 for v in kept]
            if os.environ.get("FAKE_NAN") == f"{name}:{tensor}":
                kept = ["nan", *kept[1:]]
            size = 1
            for d in entry["shape"]:
                size *= d
            values = ", ".join(f"{kept[k // entry['every']]}" for k in range(size))
            dims = "x".join(map(str, entry["shape"]))
            f.write(f'{", " if i else "  "}{{ "name" : "{tensor}"\\n  , "dimensions" : "{dims}"\\n')
            f.write(f'  , "values" : [ {values} ]\\n  }}\\n')
        f.write("]\\n")
""".replace(" and n not in seen(n)", "")


@dataclass
class Jetson:
    """A device of one JetPack. Change a field before `start`; `without`: programs and files that it lacks."""

    folder: Path
    jetpack: str
    model: str = ""
    release: str = ""
    tensorrt: str = ""
    cuda: str = ""
    mode: str = "MAXN_SUPER"
    available_gb: float = 6.0
    swap_gb: float = 4.0
    disk_gb: float = 50.0
    without: tuple[str, ...] = ()
    faults: dict[str, str] = field(default_factory=dict)  # variables that the programs read
    workshop: Workshop | None = None
    python: str = sys.executable
    largest_gb: float = 60.0  # piece of memory that CUDA gives
    module: str = ""  # version of the Python package tensorrt; that of trtexec where none is given
    bindings: str = ""  # version of the Python package cuda-bindings

    def __post_init__(self):
        release, model, tensorrt, cuda = RELEASES[self.jetpack]
        self.release, self.model = self.release or release, self.model or model
        self.tensorrt, self.cuda = self.tensorrt or tensorrt, self.cuda or cuda

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def built(self) -> list[str]:
        """Graphs whose engines trtexec was asked to build, in order."""
        return [c.split("--onnx=onnx/")[1].split(".onnx")[0] for c in self.calls if "--onnx=" in c]

    def _files(self) -> dict[str, str]:
        header = "/usr/include/aarch64-linux-gnu/NvInferVersion.h"
        major, minor, *_ = self.tensorrt.split(".")
        return {
            "/etc/nv_tegra_release": self.release + "\n",
            "/proc/device-tree/model": self.model + "\0",
            "/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {int(self.available_gb * 1e9 / 1024)} kB\n"
            f"SwapFree: {int(self.swap_gb * 1e9 / 1024)} kB\nMemFree: 1000 kB\nCmaTotal: 262144 kB\nCmaFree: 1024 kB\n",
            header: f"#define NV_TENSORRT_MAJOR {major} //!< x\n#define NV_TENSORRT_MINOR {minor}\n#define NV_TENSORRT_PATCH 0\n",
        }

    def start(self, archive: Path, *options: str, **more: object) -> subprocess.Popen:
        """The script of an unpacked archive, in a session of its own, on this device."""
        self._set_up()
        command = ["/bin/bash", str(archive / "build_on_device.sh"), "--root", str(self.folder / "root"), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment(), start_new_session=True, **pipes, **more)

    def ask(self, archive: Path, *options: object) -> subprocess.CompletedProcess:
        """ask.py of an archive, from another folder."""
        self._set_up()
        command = [str(self.folder / "bin" / "python3"), str(archive / "ask.py"), *map(str, options)]
        return subprocess.run(
            command, env=self.environment(), cwd=self.folder, capture_output=True, text=True, timeout=120
        )

    def environment(self) -> dict[str, str]:
        programs = self.folder / "bin"
        env = {"PATH": f"{programs}:/usr/bin:/bin", "FAKE_CALLS": str(self.folder / "calls"), "HOME": os.devnull}
        env["FAKE_LARGEST"] = str(int(self.largest_gb * 1e9))
        if {"cmake", "nvcc"} & set(self.without):  # this machine may have its own
            env["PATH"] = f"{programs}:{self._coreutils()}"
        if self.workshop:
            tests, sm = str(Path(__file__).parent), {"7.1": "11.0"}.get(self.jetpack, "8.7")
            env |= {"FAKE_WORKSHOP": self.workshop.address, "FAKE_TESTS": tests, "FAKE_GPU": sm, "OMP_NUM_THREADS": "1"}
            version = self.tensorrt.partition("-")[0].removesuffix(".30")  # of which JetPack 6.2 says 10.3.0 in Python
            env |= {"FAKE_TENSORRT": self.module or version}
            packages = next(Path(self.python).parent.parent.glob("lib/python3.*/site-packages"))
            # Without what only a .pth file names, such as this tree.
            env["PYTHONPATH"] = f"{self.folder / 'installed'}:{_MODULES}:{tests}:{packages}"
        return env | self.faults

    def _set_up(self) -> None:
        root, programs = self.folder / "root", self.folder / "bin"
        for name, text in self._files().items():
            path = root / name[1:]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if name not in self.without:
                path.write_text(text)
        library = root / "usr/local/cuda/lib64/libcudart.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        if "libcudart" not in self.without:
            shutil.copyfile(_libcudart(), library)
        programs.mkdir(exist_ok=True)
        version = self.bindings or ("12.9.0" if self.cuda.startswith("12.") else "13.0.1")
        told = self.folder / "installed" / "cuda_bindings.dist-info" / "METADATA"
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(f"Metadata-Version: 2.1\nName: cuda-bindings\nVersion: {version}\n")
        script = self.folder / "trtexec.py"
        script.write_text(_TRTEXEC)
        packages = f'libnvinfer-bin) printf "%s" "{self.tensorrt}" ;;'
        for name, text in _PROGRAMS.items():
            path = programs / name
            path.unlink(missing_ok=True)
            if name in self.without:
                continue
            if name == "dpkg-query":
                text = text.replace("{packages}", packages if "libnvinfer-bin" not in self.without else "")
            else:
                text = text.format(
                    record=_RECORD, cuda=self.cuda, mode=self.mode, script=script,
                    python=self.python if name == "python3" else sys.executable,
                    disk_kb=int(self.disk_gb * 1e9 / 1024),
                )  # fmt: skip
            path.write_text("#!/bin/bash\n" + text)
            path.chmod(0o755)

    def run(self, archive: Path, *options: str) -> subprocess.CompletedProcess:
        process = self.start(archive, *options)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @contextlib.contextmanager
    def building(self, archive: Path, graph: str) -> Iterator[None]:
        """A run that has come to the building of that engine; at the end everything of it is killed without warning."""
        self.faults = {"FAKE_HANGS": graph}
        process = self.start(archive)
        marker = self.folder / "calls.hangs"
        for _ in range(600):
            if marker.exists():
                break
            time.sleep(0.05)
        self.faults = {}
        yield
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def _coreutils(self) -> Path:
        """A folder with what every Ubuntu has, and nothing else."""
        folder = self.folder / "coreutils"
        folder.mkdir(exist_ok=True)
        for name in (
            "bash",
            "basename",
            "dirname",
            "sha256sum",
            "awk",
            "head",
            "tr",
            "mkdir",
            "rm",
            "mv",
            "cp",
            "cat",
            "find",
            "flock",
            "sort",
        ):
            link = folder / name
            if not link.exists():
                link.symlink_to(next(p / name for p in map(Path, ("/usr/bin", "/bin")) if (p / name).exists()))
        return folder


@functools.cache
def _libcudart() -> Path:
    """A CUDA runtime that gives pieces of memory up to FAKE_LARGEST bytes."""
    folder = shared.own("libcudart")
    (folder / "cudart.c").write_text(_LIBCUDART)
    command = ["cc", "-shared", "-fPIC", str(folder / "cudart.c"), "-o", str(folder / "libcudart.so")]
    subprocess.run(command, check=True)
    return folder / "libcudart.so"
