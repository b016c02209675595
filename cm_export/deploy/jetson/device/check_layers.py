"""What trtexec says is in an engine: every plugin layer that was asked for, and the index tensors among its inputs.

python3 device/check_layers.py GRAPH LAYERS.json        exit code 1 and one line when something is missing
"""

import json
import sys
from pathlib import Path

from check_engine import check_engine  # cm_export/backends/tensorrt/check_engine.py, which `pack` puts beside this file

HERE = Path(__file__).resolve().parent.parent


def main(graph, file):
    expected = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))["graphs"][graph]
    fix = "build the engine again (delete it from engines/); if it stays, report the TensorRT version"
    try:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        names = json.loads(text)["Bindings"]
        problems = check_engine(names, text, expected)
    except (OSError, ValueError, KeyError) as e:
        problems, fix = [f"its list of layers is unreadable ({type(e).__name__}: {e})"], "see the log beside it"
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        print(f"{problems[0]}{more}; {fix}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
