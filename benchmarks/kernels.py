"""The plugins' kernels on this machine's GPU beside dense cuBLAS and torch.compile: one JSON file.

    make bench-kernels
    python benchmarks/kernels.py --library artifacts/plugins/libcm_plugins.so --out artifacts/kernels.json

Aims at the sizes of Qwen2-VL-7B: 40 % of the neurons in fp16 one by one at 85 % of the copy bandwidth and 2.2 times as
fast as dense cuBLAS; int4 at 70 % of the copy bandwidth. docs/gpu.md says what was reached.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _page import write_report

from cm_export.base import environment
from cm_export.plugins.harness.bench import CudaMachine, Sizes, measure
from cm_export.plugins.harness.library import Library
from cm_export.plugins.harness.timing import CpuMachine

TINY = Sizes("tiny", D=64, F=96, H=4, Hk=2, layers=2, d=16, P=40)


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def on_the_gpu(library: Library, repeats: int) -> dict[str, Any]:
    machine, properties = CudaMachine(repeats), torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver()}
    gpu = {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
    }
    return {"gpu": gpu, "environment": environment.describe(1, versions), **measure(library, machine)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="libcm_plugins.so, with libcm_harness.so beside it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=50, help="replays of each graph")
    parser.add_argument("--rehearse", action="store_true", help="the emulated library at tiny sizes, without a GPU")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print(
            "kernels: there is no CUDA device that this torch can use; run this on a machine with a GPU",
            file=sys.stderr,
        )
        sys.exit(2)
    library = Library(arguments.library)
    page = {"command": shlex.join(["python", *sys.argv]), "repeats": arguments.repeats}
    if arguments.rehearse:
        page |= {"rehearsal": True, **measure(library, CpuMachine(), (TINY,), (0.4, 1.0), compiled=False)}
    else:
        page |= on_the_gpu(library, arguments.repeats)
    write_report(arguments.out, page)
    print(arguments.out)


if __name__ == "__main__":
    main()
