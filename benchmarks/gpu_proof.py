"""Proves the kernels on this machine's GPU and measures them: one JSON file, and a table at the end.

    make gpu-proof         on a CUDA machine: builds for its GPU, checks, measures (2 minutes on 16 cores and an H100)
    make gpu-rehearsal     without a GPU: the same parts on the emulator, and nvcc compiles what would run
    python benchmarks/gpu_proof.py --report benchmarks/gpu/h100.json --docs docs/gpu.md     writes that page's tables

Each part is a process of its own with a time limit, so that one that fails or hangs takes no other with it. Needs a
python with torch, numpy, onnx and onnxruntime; cm_export need not be installed. With onnxruntime-gpu, the ops also run on its
CUDA provider.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHOWN = (0.1, 0.4, 1.0)  # of the shares that were measured
# For the sanitizers, under which everything is slower: one call each of splits, low bits, groups of rows, unaligned rows.
WATCHED = ("D=520", "D=1056", "D=544", "D=133", "H=7", "d=33")


@dataclass(frozen=True)
class Part:
    """A step of the proof: its command, seconds after which it is stopped, and what its figures are read from."""

    name: str
    command: list[str]
    limit_s: int
    figures: Path | None = None


def parts(out: Path, architecture: str, rehearse: bool, include: str | None) -> Iterator[Part]:
    python, libraries = sys.executable, out / "plugins"
    build = [
        python,
        "-m",
        "cm_export.plugins.build",
        "--out",
        str(libraries),
        "--harness",
        "--jobs",
        str(os.cpu_count()),
    ]
    build += ["--tensorrt-include", include] if include else []
    yield Part("build", [*build, "--architectures", f"{architecture}-real"], 300)
    library = libraries / "libcm_plugins.so"
    if rehearse:
        yield Part("build, emulated", [*build, "--emulate"], 300)
        library = libraries / "libcm_plugins_emulated.so"
    device = "cpu" if rehearse else "cuda"
    check = [python, "-m", "cm_export.plugins.harness", "--library", str(library), "--device", device]
    yield Part("calls", check, 240)
    # On ONNX Runtime's CUDA provider, if this python has it; the last line says so if not.
    inside = [python, "-m", "cm_export.plugins.harness.in_onnxruntime", "--library", str(library)]
    yield Part("in ONNX Runtime", inside, 240)
    watched = [*check, *(f"--only={text}" for text in WATCHED)]
    for tool in ("memcheck", "racecheck"):
        watch = [] if rehearse else ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        yield Part(tool, [*watch, *watched], 120)
    figures = out / "kernels.json"
    measure = [python, str(ROOT / "benchmarks/kernels.py"), "--library", str(library), "--out", str(figures)]
    yield Part("kernels", [*measure, "--rehearse"] if rehearse else measure, 300, figures)


def run(part: Part, environment: dict[str, str], logs: Path) -> dict[str, Any]:
    """Run it in `logs`, since python -m would import the tree's cm_export from ROOT, which lacks plugins.

    What came of it: seconds, the exit status (None if it was stopped), the end of what it printed, its figures."""
    print(f"{part.name} ...", flush=True)
    started, log = time.monotonic(), logs / f"{part.name.replace(', ', '-')}.log"
    with open(log, "w", encoding="utf-8") as f:
        try:
            status = subprocess.run(
                part.command, env=environment, cwd=logs, stdout=f, stderr=subprocess.STDOUT, timeout=part.limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        except OSError as error:  # a tool that this machine does not have
            f.write(f"{error}\n")
            status = 127
    text = log.read_text(encoding="utf-8", errors="replace")
    found = {
        "command": plain(shlex.join(part.command), logs),
        "seconds": round(time.monotonic() - started, 1),
        "status": status,
    }
    found["says"] = plain(text, logs).strip().splitlines()[-4:]
    if status == 0 and part.figures is not None:
        found["figures"] = json.loads(plain(part.figures.read_text(), logs))
    print(f"  {'ok' if status == 0 else f'FAILED ({status})'}, {found['seconds']} s", flush=True)
    return found


def plain(text: str, out: Path) -> str:
    """Without the places of this machine: OUT for the folder of the proof, and paths of the tree as seen from it."""
    return text.replace(str(out), "OUT").replace(f"{ROOT}/", "").replace(sys.executable, "python")


def importable(folder: Path) -> Path:
    """A folder for PYTHONPATH from which the tree is imported as an installed cm_export would be."""
    package = folder / "cm_export"
    package.mkdir(parents=True, exist_ok=True)
    for entry in (*(ROOT / "cm_export").iterdir(), ROOT / "plugins", ROOT / "recipes"):
        if entry.name != "__pycache__" and not (package / entry.name).exists():
            (package / entry.name).symlink_to(entry)
    return folder


def machine(rehearse: bool) -> dict[str, Any]:
    """The card, and the versions that its figures depend on."""
    import torch

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    versions["nvcc"] = next((line.split("release ")[1] for line in told.splitlines() if "release " in line), None)
    if rehearse:
        return {"card": None, "versions": versions}
    card = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    versions["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    what = {"name": card.name, "architecture": f"sm_{card.major}{card.minor}", "memory_bytes": card.total_memory}
    return {
        "card": what | {"multiprocessors": card.multi_processor_count, "cache_bytes": card.L2_cache_size},
        "versions": versions,
    }


def table(page: dict[str, Any]) -> Iterator[str]:
    """What came of every part and, where something was measured, the figures that count."""
    for name, part in page["parts"].items():
        said = part["says"][-1] if part["says"] else ""
        yield f"{name:16} {'ok' if part['status'] == 0 else 'FAILED':7} {part['seconds']:6.1f} s  {said}"[:120]
    figures = page["parts"].get("kernels", {}).get("figures")
    if figures and page["rehearsal"]:
        yield "a rehearsal: its times mean nothing"
    elif figures:
        yield from (text for _, lines in tables(figures) for text in lines)


def tables(figures: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(mark on the page, lines) of every table of docs/gpu.md."""
    copy = figures["copy_gb_s"]["median"]
    lines = [
        f"Copy bandwidth: {copy:.0f} GB/s, bytes read and written.",
        "",
        "| model | FFN of one token | neurons | us (quartiles) | of the copy bandwidth | beside dense cuBLAS, fp16 | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["ffn"]:
        if row["kernel"] == "CoreFFN" and (row["share"] not in SHOWN or row["block"] != 1):
            continue
        name = f"`CoreFFN`, {row['bits']} bits" if "bits" in row else f"{row['kernel']}, 16 bits"
        error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
        lines.append(
            f"| {row['model']} | {name} | {row['share']:.0%} | {spread(row['us'])} | {row['share_of_copy']:.0%} "
            f"| {row['speedup']:.2f} x | {error} |"
        )
    yield "ffn", lines
    lines = ["| model | attention of one token over 4096 rows | rows | us (quartiles) |", "|---|---|---|---|"]
    for row in figures["attention"]:
        lines.append(f"| {row['model']} | {row['kernel']} | {row['share']:.0%} | {spread(row['us'])} |")
    yield "attention", lines
    lines = [
        "| model | a decode step, 28 layers | neurons | tokens | us (quartiles) | beside dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["step"]:
        shares = [f"{row.get(name, 1):.0%}" for name in ("neurons", "tokens")]
        lines.append(
            f"| {row['model']} | {row['kernel']} | {' | '.join(shares)} | {spread(row['us'])} | {row.get('speedup', 1):.2f} x |"
        )
    yield "step", lines


def spread(us: dict[str, float]) -> str:
    return f"{us['median']:.1f} ({us['q1']:.1f} to {us['q3']:.1f})"


def document(report: Path, docs: Path) -> None:
    """Raises KeyError if the report has no figures."""
    from _page import rewrite  # needs an installed cm_export, which the proof itself does not

    page = json.loads(report.read_text())
    parts = [f"| {name} | {part['seconds']} s | {part['says'][-1]} |" for name, part in page["parts"].items()]
    lines = ["| part | took | said |", "|---|---|---|", *(line.replace("=", "").replace("  ", " ") for line in parts)]
    found = (("parts", lines), *tables(page["parts"]["kernels"]["figures"]))
    rewrite(docs, {mark: "\n".join(rows) + "\n" for mark, rows in found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of logs, libraries and proof.json")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the emulator runs what the GPU would")
    parser.add_argument("--architecture", default="90", help="to compile for in a rehearsal")
    parser.add_argument("--tensorrt-include", help="directory of NvInferRuntime.h; without it, pip fetches headers")
    parser.add_argument("--report", type=Path, help="a proof.json, to be shown in --docs; nothing is run")
    parser.add_argument("--docs", type=Path, help="the page whose tables are written from --report")
    given = parser.parse_args()
    if given.report and given.docs:
        return document(given.report, given.docs)
    if not given.out:
        parser.error("give --out, or --report and --docs")
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    architecture = given.architecture
    if not given.rehearse:
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu_proof: there is no CUDA device that this torch can use; --rehearse runs without one")
        architecture = "".join(map(str, torch.cuda.get_device_capability(0)))
    environment = os.environ | {"PYTHONPATH": str(importable(out / "site")), "PYTHONUNBUFFERED": "1"}
    page: dict[str, Any] = {
        "command": plain(shlex.join(["python", *sys.argv]), out),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    page |= machine(given.rehearse) | {"rehearsal": given.rehearse, "parts": {}}
    for part in parts(out, architecture, given.rehearse, given.tensorrt_include):
        page["parts"][part.name] = run(part, environment, out)
        (out / "proof.json").write_text(json.dumps(page, indent=1) + "\n")
    print("\n".join(table(page)))
    sys.exit(0 if all(p["status"] == 0 for p in page["parts"].values()) else 1)


if __name__ == "__main__":
    main()
