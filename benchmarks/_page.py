"""What the benches of this folder write: a JSON report that is whole or absent, and tables between marks of a page."""

import json
from pathlib import Path
from typing import Any

from cm_export.base import atomic


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Raises InputError when the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(report, indent=1) + "\n")


def between(page: str, mark: str, text: str) -> str:
    """The page with `text` between `<!-- mark -->` and `<!-- end mark -->`."""
    start, end = f"<!-- {mark} -->\n", f"<!-- end {mark} -->"
    before, rest = page.split(start)
    return before + start + text + end + rest.split(end)[1]
