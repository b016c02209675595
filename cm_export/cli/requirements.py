"""What the installed distribution says it needs, beside what is here; read from its metadata, nothing is imported."""

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

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
        asked = re.search(r"python_version (<|>=) [\"']([\d.]+)[\"']", marker)
        if asked and (sys.version_info[:2] < _numbers(asked[2])[:2]) != (asked[1] == "<"):
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
    version = _installed(name) or (_installed(STANDS_IN[name]) if name in STANDS_IN else None)
    return {"name": name, "needs": limits, "version": version, "ok": version is not None and fits(version, limits)}


def misfits(libraries: Iterable[str]) -> list[dict[str, Any]]:
    """Pairs that do not go together: {library, version, needs, found}, `found` being what is installed of the other.

    libraries: distributions whose own requirements are looked at, those that are installed.
    """
    found = []
    for name in sorted(set(libraries)):
        try:
            version, lines = metadata.version(name), metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            try:
                need = Requirement(line)
            except InvalidRequirement:  # metadata older than the form that installers agreed on
                continue
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            other = _installed(need.name)
            if other is None or not need.specifier.contains(other, prereleases=True):
                needs = f"{need.name}{need.specifier}"
                found.append({"library": name, "version": version, "needs": needs, "found": other})
    if len(both := [n for pair in STANDS_IN.items() for n in pair if _installed(n)]) == 2:
        one, other = both
        needs = f"no {other} beside it: they overwrite each other's files, uninstall both and install one"
        found.append({"library": one, "version": _installed(one), "needs": needs, "found": _installed(other)})
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
