"""What the installed distribution says it needs, beside what is here; read from its metadata, nothing is imported."""

import re
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

STANDS_IN = {"onnxruntime": "onnxruntime-gpu"}  # the same module from another distribution


def requirements(
    distribution: str, enables: Mapping[str, str]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """(required libraries, extras): each library as {name, needs, version, ok}; `enables` says what an extra is for."""
    required: list[dict[str, Any]] = []
    optional: dict[str, list[dict[str, Any]]] = {name: [] for name in enables}
    for line in metadata.requires(distribution) or ():
        needed, _, marker = line.partition(";")
        parts = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[.*?\])?\s*(.*?)\s*", needed)
        assert parts is not None  # the form in which every installer writes it
        name, limits = parts.groups()
        extra = re.search(r"extra == [\"']([\w-]+)[\"']", marker)
        older = re.search(r"python_version < [\"']([\d.]+)[\"']", marker)
        if older and sys.version_info[:2] >= _numbers(older[1])[:2]:
            continue
        if name == distribution:  # dev includes the extra `eval`
            continue
        target = optional[extra[1]] if extra else required
        target.append(_library(name, limits))
    extras = {
        name: {"enables": what, "libraries": optional[name], "ok": all(library["ok"] for library in optional[name])}
        for name, what in enables.items()
    }
    return required, extras


def _library(name: str, limits: str) -> dict[str, Any]:
    for candidate in (name, STANDS_IN.get(name)):
        try:
            version = metadata.version(candidate) if candidate else None
        except metadata.PackageNotFoundError:
            version = None
        if version:
            break
    return {"name": name, "needs": limits, "version": version, "ok": version is not None and fits(version, limits)}


def fits(version: str, limits: str) -> bool:
    """Whether `2.13.0+cpu` is within `>=2.11,<3`; only the two signs that pyproject.toml uses are known."""
    have = _numbers(version)
    for limit in filter(None, limits.split(",")):
        parts = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", limit)
        assert parts is not None, limit  # pyproject.toml uses no other sign
        sign, bound = parts.groups()
        if (sign == ">=" and have < _numbers(bound)) or (sign == "<" and have >= _numbers(bound)):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    assert found is not None, version  # a version begins with a number
    numbers = [int(part) for part in found[0].split(".")]
    return tuple([*numbers, 0, 0, 0][:3])
