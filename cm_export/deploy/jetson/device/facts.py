"""What build_on_device.sh asks of manifest.json, answered in words that a shell can read, one a line. Standard library only.

python3 device/facts.py system | graphs | flags | build GRAPH | key GRAPH LIBRARY WORD.. | probes | probe NAME | ...
"""

import hashlib
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
MANIFEST = HERE / "manifest.json"


def read():
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def system(m):
    """name=value for everything that the checks of the device need; lists are joined by |."""
    device, jetpack, memory = m["target"], m["jetpack"], m["memory"]
    facts = {
        "target": device["name"],
        "title": device["title"],
        "model": "|".join(device["model"]),
        "sm": device["sm"],
        "fastest": "|".join(device["fastest"]),
        "jetpack": jetpack["name"],
        "l4t": "|".join(jetpack["l4t"]),
        "cuda": jetpack["cuda"],
        "tensorrt": jetpack["tensorrt"],
        "precision": m["precision"],
        "build_bytes": memory["build_bytes"],
        "run_bytes": memory["run_bytes"],
        "largest_bytes": memory["largest"]["bytes"],
        "largest_what": memory["largest"]["what"],
        "disk_bytes": int(1.2 * sum(g["weight_bytes"] for g in m["graphs"].values()))
        + sum(w["length"] for w in m["host_weights"])
        + 200_000_000,
        "plugins": int(any(g["plugin_nodes"] for g in m["graphs"].values())),
        "tool": m["tool"]["version"],
    }
    return [f"{name}={value}" for name, value in facts.items()]


def key(graph, *more):
    """Hash of everything that an engine depends on: its graph, the weights, the plugin library, the words of the call."""
    digest = hashlib.sha256(json.dumps([graph, *more[1:]]).encode())
    sums = (HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    files = {line[66:]: line[:64] for line in sums}
    for name in (f"onnx/{graph}.onnx", f"onnx/{read()['weights']}"):
        digest.update(files[name].encode())
    if more[0]:  # the plugin library
        digest.update((HERE / more[0]).read_bytes() if (HERE / more[0]).exists() else b"")
    return digest.hexdigest()


def plugin_key(*versions):
    """Hash of the plugin sources and of what they are compiled with."""
    sums = (HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sources = [line for line in sums if line[66:].startswith("plugins/")]
    return hashlib.sha256(json.dumps([sources, versions]).encode()).hexdigest()


def probe(m, name):
    """Words for trtexec: engine, shapes of the dynamic inputs, files of all of them."""
    p = m["probes"][name]
    words = [f"--loadEngine=engines/{p['graph']}.plan"]
    words += [f"--shapes={p['shapes']}"] if p["shapes"] else []
    return [*words, "--loadInputs=" + ",".join(f"{i}:{file}" for i, file in p["inputs"].items())]


def job(m, graph, library, plan, workspace):
    """What cm-export's own builder is told (cm_export/backends/tensorrt/builder.py)."""
    return {
        "module": "tensorrt",
        "onnx": str(HERE / "onnx" / f"{graph}.onnx"),
        "plan": str(HERE / plan),
        "expected": m["graphs"][graph],
        "typed_flag": m["typed_flag"],
        "plugin_library": str(HERE / library) if library else None,
        "timing_cache": None,
        "architectures": [],
        "inspect": False,  # the script does, for every engine
        "workspace_mb": int(workspace),
        "optimization_level": m["optimization_level"],
        "weight_streaming": False,
        "strip_weights": False,
    }


def headers(file):
    """TensorRT's version from NvInferVersion.h; newer ones name the numbers TRT_MAJOR_ENTERPRISE and so on."""
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    found = dict(re.findall(r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH|BUILD)(?:_ENTERPRISE)?\s+(\d+)", text))
    return ".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH", "BUILD") if part in found)


def cuda(file):
    """CUDA's version from version.json."""
    return ".".join(json.loads(Path(file).read_text())["cuda"]["version"].split(".")[:2])


def memory(file):
    """available, free, swap, CMA and what is free of it: in bytes, from /proc/meminfo."""
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    found = {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    names = {
        "available": "MemAvailable",
        "free": "MemFree",
        "swap": "SwapFree",
        "cma": "CmaTotal",
        "cma_free": "CmaFree",
    }
    return [f"{ours}={found.get(theirs, 0)}" for ours, theirs in names.items()]


def why(file):
    """The most telling line of a log: the first error of TensorRT, of CMake or of a compiler, else the last line."""
    lines = [
        line.strip() for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    telling = [line for line in lines if re.search(r"\[E\]|CMake Error|\berror\b|Error\[", line)]
    return " ".join((telling or lines[-1:] or ["it ended without a word"])[0].split())[:300]


def main(what, *rest):
    if what == "headers":
        return [headers(*rest)]
    if what == "cuda":
        return [cuda(*rest)]
    if what == "memory":
        return memory(*rest)
    if what == "why":
        return [why(*rest)]
    if what == "device":
        return [json.dumps(dict(pair.split("=", 1) for pair in rest))]
    if what == "key":
        return [key(*rest)]
    if what == "plugin-key":
        return [plugin_key(*rest)]
    m = read()
    return {
        "system": lambda: system(m),
        "graphs": lambda: list(m["graphs"]),
        "flags": lambda: m["flags"],
        "build": lambda: m["graphs"][rest[0]]["build"],
        "job": lambda: [json.dumps(job(m, *rest))],
        "once": lambda: m["once"],
        "benching": lambda: m["benching"],
        "probes": lambda: list(m["probes"]),
        "benched": lambda: [n for n, p in m["probes"].items() if p["bench"]],
        "probe": lambda: probe(m, *rest),
    }[what]()


if __name__ == "__main__":
    print("\n".join(map(str, main(*sys.argv[1:]))))
