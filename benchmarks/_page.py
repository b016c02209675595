"""What the benches of this folder write: a JSON report that is whole or absent, and tables between marks of a page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm_export.base import atomic


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Raises InputError when the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(report, indent=1) + "\n")


def rewrite(page: Path | None, tables: Mapping[str, str]) -> None:
    """Write a page anew with these tables; None: no page is."""
    if page:
        page.write_text(into(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def into(page: str, tables: Mapping[str, str]) -> str:
    """The page with each text between `<!-- mark -->` and `<!-- end mark -->`; tables: mark -> text."""
    for mark, text in tables.items():
        start, end = f"<!-- {mark} -->\n", f"<!-- end {mark} -->"
        before, rest = page.split(start)
        page = before + start + text + end + rest.split(end)[1]
    return page
