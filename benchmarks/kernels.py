"""The plugins' kernels on this machine's GPU beside dense cuBLAS and torch.compile: one JSON file.

    make bench-kernels
    python benchmarks/kernels.py --library artifacts/plugins/libcm_plugins.so --out artifacts/kernels.json

Aims, on an H200 at the sizes of Qwen2-VL-7B: 40 % of the neurons in fp16 one by one at 80 % of the copy bandwidth and
2.2 times as fast as dense cuBLAS; int4 at 60 % of the copy bandwidth. Not measured yet: no GPU has run these kernels.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from cm_export.plugins.harness.bench import CudaMachine, measure
from cm_export.plugins.harness.library import Library

from cm_export.base import atomic, environment


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="libcm_plugins.so, with libcm_harness.so beside it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=50, help="replays of each graph")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "kernels: there is no CUDA device that this torch can use; run this on a machine with a GPU",
            file=sys.stderr,
        )
        sys.exit(2)
    machine, properties = CudaMachine(arguments.repeats), torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver()}
    page = {
        "command": shlex.join(["python", *sys.argv]),
        "gpu": {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
        },
        "environment": environment.describe(1, versions),
        "repeats": arguments.repeats,
        **measure(Library(arguments.library), machine),
    }
    atomic.write(arguments.out, json.dumps(page, indent=1) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
