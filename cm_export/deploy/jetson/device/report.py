"""Writes report.json and report.txt from what the steps left in work/: device, engines, parity, speed, warnings.

python3 device/report.py passed|failed
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
WORK = HERE / "work"


def left(file):
    """A step's JSON, or None where it did not get so far."""
    path = WORK / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def lines(file):
    path = WORK / file
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def milliseconds(log):
    """Medians and 90th percentiles that trtexec prints, by their names."""
    out = {}
    for name in ("Latency", "GPU Compute Time"):
        found = [line for line in log if f"{name}: min" in line]
        for key, pattern in (("median", r"median = ([0-9.]+)"), ("p90", r"percentile\(90%\) = ([0-9.]+)")):
            number = re.search(pattern, found[-1]) if found else None
            if number:
                out[f"{name.lower().replace(' ', '_')}_{key}_ms"] = float(number[1])
    return out


def collect(status):
    m = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    engines = {}
    for graph in m["graphs"]:
        plan = HERE / "engines" / f"{graph}.plan"
        if plan.is_file():
            engines[graph] = {"bytes": plan.stat().st_size, **(left(f"{graph}.build.json") or {})}
    speed = {n: milliseconds(lines(f"{n}.bench.log")) for n, p in m["probes"].items() if p["bench"]}
    return {
        "status": status,
        "failure": " ".join(lines("failure.txt")) or None,
        "archive": {k: m[k] for k in ("name", "target", "jetpack", "precision", "capacity", "source")},
        "device": left("device.json"),
        "predicted": m["memory"],
        "engines": engines,
        "parity": [p for n in m["probes"] for p in [left(f"{n}.parity.json")] if p],
        "speed": {n: {**m["probes"][n]["about"], **s} for n, s in speed.items() if s},
        "asking": {
            "ready": status == "passed" and not lines("asking.txt"),
            "needs": " ".join(lines("asking.txt")) or None,
        },
        "warnings": lines("warnings.txt"),
    }


def text(r):
    device, archive = r["device"] or {}, r["archive"]
    out = [f"{archive['name']} on {device.get('model')}: {r['status']}"]
    out += [f"  {r['failure']}"] if r["failure"] else []
    out.append(
        f"  JetPack {archive['jetpack']['name']} (Jetson Linux {device.get('l4t')}), TensorRT {device.get('tensorrt')}, "
        f"CUDA {device.get('cuda')}, power mode {device.get('power_mode') or 'unknown'}"
    )
    for name, e in r["engines"].items():
        built = f", built in {e['seconds']} s by {e['builder']}" if "seconds" in e else ""
        out.append(f"  engine  {name:<14}{e['bytes'] / 1e6:>10.1f} MB{built}")
    for p in r["parity"]:
        worst = [f"{n} {o['measure']:.2g}" for n, o in p["outputs"].items() if o["measure"] is not None][:1]
        out.append(f"  parity  {p['probe']:<14}{'passed' if p['passed'] else 'FAILED':>10}  {''.join(worst)}")
    for name, s in r["speed"].items():
        what = ", ".join(f"{k} {v}" for k, v in s.items() if not k.endswith("_ms"))
        out.append(
            f"  speed   {name:<14}{s.get('gpu_compute_time_median_ms', float('nan')):>10.3f} ms median GPU time  {what}"
        )
    if r["status"] == "passed":
        out.append(f"  ask     {r['asking']['needs'] or 'python3 ask.py --image PICTURE --prompt QUESTION'}")
    return "\n".join([*out, *(f"  warning: {w}" for w in r["warnings"])]) + "\n"


def main(status):
    report = collect(status)
    (HERE / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (HERE / "report.txt").write_text(text(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
