"""Asks the model of this archive, on the engines that build_on_device.sh has built here.

python3 ask.py --image photo.jpg --prompt "What is in the picture?"

Takes the options of `cm-export run`, whose program (host/) runs it: --json, --token-share, --temperature and others.
"""

import hashlib
import json
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def damaged():
    """The first file of host/ that is not as it was packed, or None."""
    for line in (HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        if name.startswith("host/"):
            file = HERE / name
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                return name
    return None


def problem(asks):
    """What is in the way, in one line, or None; `asks`: a question, not for help."""
    try:
        manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
        wrong = damaged()
        if wrong:
            return f"{wrong}: missing or edited; unpack the archive again"
        sys.path.insert(0, str(HERE / "device"))
        import packages

        del sys.path[0]
        lacking = packages.problem(manifest)
        if lacking:
            return lacking
    except (OSError, ValueError, KeyError, ImportError) as e:
        return f"the archive cannot be read ({type(e).__name__}: {e}); unpack it again"
    made = HERE / "bundle" / "manifest.json"
    if asks and not made.is_file():
        return "there are no engines to ask yet; bash build_on_device.sh"
    return (
        None
        if not asks or of_this_archive(made, manifest)
        else f"{made.parent} is of another archive; bash build_on_device.sh"
    )


def of_this_archive(made, manifest):
    """Whether a bundle was made of what lies here now; where its manifest is damaged, `run` says so."""
    try:
        told = json.loads(made.read_text(encoding="utf-8"))
        return all(told[key] == manifest[key] for key in ("model", "recipe", "generation", "graphs", "links"))
    except (OSError, ValueError, KeyError, TypeError):
        return True


def main(arguments):
    asks = bool(arguments) and not {"--help", "-h"} & set(arguments)
    if not asks:
        print(__doc__.strip(), end="\n\n", flush=True)
        arguments = ["--help"]
    wanted = problem(asks)
    if wanted:
        print(f"ask: error: {wanted}", file=sys.stderr)
        if "--json" in arguments:
            print(json.dumps({"error": {"what": wanted, "where": None, "fix": None, "exit_code": 2}}, indent=2))
        return 2
    sys.path.insert(0, str(HERE / "host"))
    sys.argv = ["cm-export", "run", str(HERE / "bundle"), *arguments]
    runpy.run_module("cm_export", run_name="__main__", alter_sys=True)  # which ends the program
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
