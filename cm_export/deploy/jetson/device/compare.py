"""The parity gate on the device: what trtexec's engine answered to a probe beside what ONNX Runtime had answered.

python3 device/compare.py PROBE OUTPUT.json RESULT.json        exit code 1 and one line when they differ too much

    values   max |ours - theirs| / max |theirs|  <=  limit
    ids      share of theirs that is among ours  >=  limit

Outputs come as text, hundreds of megabytes for a large cache: they are read in pieces, never as a whole.
Standard library only.
"""

import json
import math
import re
import sys
from array import array
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PIECE = 1 << 20
_HEAD = re.compile(r'"name"\s*:\s*"([^"]*)"\s*,\s*"dimensions"\s*:\s*"([^"]*)"\s*,\s*"values"\s*:\s*\[')


def tensors(file):
    """Of trtexec's --exportOutput file: (name, dims, pieces of numbers), in its order. Take each before the next.

    The file is no strict JSON: numbers that are none are written nan and inf.
    """
    with open(file, encoding="ascii", errors="replace") as f:
        text, ended = "", False

        def more():
            nonlocal text, ended
            piece = f.read(PIECE)
            ended = not piece
            text += piece

        def numbers():
            nonlocal text
            while True:
                stop = text.find("]")
                cut = stop if stop >= 0 else text.rfind(",")
                if cut > 0:
                    yield [float(word) for word in text[:cut].split(",") if word.strip()]
                    text = text[cut:].lstrip(",")
                if stop >= 0:
                    text = text.partition("]")[2]
                    return
                if ended:
                    raise ValueError("it is cut short")
                more()

        while True:
            found = _HEAD.search(text)
            if found:
                text = text[found.end() :]
                name, dims = found[1], [int(d) for d in found[2].split("x") if d]
                yield name, dims, numbers()
            elif ended:
                return
            else:
                more()


def sampled(pieces, every):
    """array of every `every`-th number, and how many there were."""
    out, count = array("d"), 0
    for piece in pieces:
        out.extend(piece[-count % every :: every])
        count += len(piece)
    return out, count


def expected(entry):
    values = array({"float32": "f", "int64": "q"}[entry["stored"]])
    values.frombytes((HERE / entry["file"]).read_bytes())
    if sys.byteorder == "big":
        values.byteswap()
    return values


def difference(ours, theirs, compare):
    """The measure that `compare` names; NaN is never within a limit."""
    if compare == "ids":
        there = {int(v) for v in ours if math.isfinite(v)}
        return sum(v in there for v in theirs) / max(1, len(theirs))
    largest = max((abs(v) for v in theirs), default=0.0)
    worst = 0.0
    for a, b in zip(ours, theirs):  # noqa: B905, Python 3.8 and 3.9 know no strict
        gap = abs(a - b)
        if not gap <= worst:  # also takes nan
            worst = gap
            if math.isnan(gap):
                break
    return worst / largest if largest else worst


def judge(probe, file):
    """{output: {"measure", "limit", "passed"}} and the line about the first that failed, or None."""
    results, problem, left = {}, None, dict(probe["outputs"])
    for name, dims, pieces in tensors(file):
        entry = left.pop(name, None)
        if entry is None:
            for _ in pieces:
                pass
            continue
        ours, count = sampled(pieces, entry["every"])
        theirs = expected(entry)
        if dims != entry["shape"] or len(ours) != len(theirs):
            problem = problem or f"{name}: shape {dims} ({count} numbers), expected {entry['shape']}"
            results[name] = {"measure": None, "limit": entry["limit"], "passed": False}
            continue
        measure = difference(ours, theirs, entry["compare"])
        passed = measure >= entry["limit"] if entry["compare"] == "ids" else measure <= entry["limit"]
        results[name] = {"measure": measure, "limit": entry["limit"], "passed": passed}
        if not passed and problem is None:
            how = "agrees in only" if entry["compare"] == "ids" else "differs by"
            problem = f"{name}: {how} {measure:.3g} (limit {entry['limit']:g})"
    if left:
        problem = problem or f"{next(iter(left))}: the engine did not answer it"
    return results, problem


def main(name, file, out):
    probe = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))["probes"][name]
    try:
        results, problem = judge(probe, file)
    except (OSError, ValueError) as e:
        results, problem = {}, f"trtexec's output is unreadable ({e})"
    finite = {n: r | {"measure": None} if r["measure"] != r["measure"] else r for n, r in results.items()}
    result = {"probe": name, "graph": probe["graph"], "passed": problem is None, "outputs": finite}
    Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if problem:
        fix = "the engine is not to be used; report the device, its TensorRT version and report.json"
        print(f"parity of {name}: {problem}; {fix}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
