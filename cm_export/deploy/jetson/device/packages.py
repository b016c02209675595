"""Whether this Python has what asking the model takes: one line on what is missing and how to get it, or nothing.

python3 device/packages.py        Standard library only; the list is in manifest.json.
"""

import json
import re
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
LEAST = (3, 10)
ENV = "python3 -m venv --system-site-packages ~/asking && . ~/asking/bin/activate && "


def lacks(module, requirement):
    """Whether a package is not there, or in a version that was not tried."""
    name, limits = re.match(r"([A-Za-z0-9._-]+)(.*)", requirement).groups()
    try:
        if util.find_spec(module) is None:
            return True
    except (ImportError, ValueError):  # of a module in a package that is not there
        return True
    try:
        version = numbers(metadata.version(name))
    except metadata.PackageNotFoundError:  # it came without metadata, which says nothing against it
        return False
    bounds = re.findall(r"(>=|<)([\d.]+)", limits)
    return any((version < numbers(bound)) == (sign == ">=") for sign, bound in bounds)


def numbers(version):
    found = [int(n) for n in re.findall(r"\d+", version)[:3]]
    return found + [0] * (3 - len(found))


def problem(m):
    """What keeps this Python from asking the model of manifest `m`, and how to mend it; None if nothing does."""
    if m["cannot_ask"]:
        return m["cannot_ask"] + "; ask the bundle that was packed, where it was built"
    if sys.version_info[:2] < LEAST:
        return "this is Python {}.{}, asking takes {}.{} or newer; use the python3 of JetPack 6 or 7".format(
            *sys.version_info[:2], *LEAST
        )
    if lacks("tensorrt", "tensorrt"):
        return "python3 has no package tensorrt, which comes with JetPack: sudo apt-get install python3-libnvinfer"
    missing = [r for module, r in m["packages"].items() if lacks(module, r)]
    if not missing:
        return None
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists() and sys.prefix == sys.base_prefix
    names = ", ".join(re.match(r"[A-Za-z0-9._-]+", r)[0] for r in missing)
    command = (ENV if managed else "") + "python3 -m pip install " + " ".join(f"'{r}'" for r in missing)
    return f"python3 lacks {names} (or has older ones); {command}"


if __name__ == "__main__":
    found = problem(json.loads((HERE / "manifest.json").read_text(encoding="utf-8")))
    if found:
        print(found)
