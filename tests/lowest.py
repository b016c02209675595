"""The lowest versions that pyproject.toml admits, as constraints for pip: `make lowest` installs these and runs a bundle.

"pillow>=10.1" -> pillow==10.1           python tests/lowest.py [EXTRA ...] > lowest.txt
"""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def constraints(*extras: str) -> list[str]:
    """One line for each library that running needs, and for those of the extras."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found = (re.match(r"([\w.-]+)>=([\d.]+)[^;]*(;.*)?", line) for line in needs)
    return [f"{match[1]}=={match[2]}{match[3] or ''}" for match in found if match]


if __name__ == "__main__":
    print("\n".join(constraints(*sys.argv[1:])))
