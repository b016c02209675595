"""Look names up in real bindings, in a process of its own: python look_up_names.py FOLDER MODULE < names.json > problems.json

names: [owner, name, arguments, keywords]; owner "" is the module, arguments -1 reads, -2 sets, else calls with that many.
What a function takes is in its docstring, where pybind11 and Cython write it.
"""

import importlib
import json
import re
import sys
from typing import Any


def problem(module: Any, owner: str, name: str, arguments: int, keywords: list[str]) -> str | None:
    """What is wrong with a use, or None."""
    holder, asked = module, f"{owner}.{name}".lstrip(".")
    for part in filter(None, owner.split(".")):
        holder = getattr(holder, part, None)
    if holder is None:
        return f"there is no {owner}"
    members = getattr(holder, "__members__", None)
    found = members.get(name) if members is not None else getattr(holder, name, None)
    if found is None:
        return f"there is no {asked}"
    if arguments == -2 and isinstance(found, property) and found.fset is None:
        return f"{asked} cannot be set"
    if arguments < 0 or isinstance(found, type):
        return None
    known = signatures(name, found.__doc__ or "")
    if known and not any(fits(one, arguments, keywords) for one in known):
        return f"{asked} does not take {arguments} arguments and {keywords}, but {known}"
    return None if known else f"{asked} says nothing about what it takes"


def signatures(name: str, doc: str) -> list[list[tuple[str, bool]]]:
    """Per overload the parameters without self: (name, whether it may be left out)."""
    out = []
    for line in doc.splitlines():
        match = re.match(rf"\s*(?:\d+\. )?{name}\((.*)\)(?: ->.*)?$", line)
        if match and "*args" not in line:
            given = [p.strip() for p in split(match[1])]
            given = [p for p in given if p and not p.startswith("self")]
            # pybind11: `flags: int = 0`; Cython: `size_t size`, `kind: cudaMemcpyKind`
            out.append([(p.split(":")[0].split("=")[0].strip().split()[-1], "=" in p) for p in given])
    return out


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[(<") - (c in "])>")
        if c == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def fits(parameters: list[tuple[str, bool]], arguments: int, keywords: list[str]) -> bool:
    """Whether a call of so many arguments and these keywords is one of that signature."""
    rest = parameters[arguments:]
    names = {name for name, _ in rest}
    return arguments <= len(parameters) and set(keywords) <= names and all(o or n in keywords for n, o in rest)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    library = importlib.import_module(sys.argv[2])
    severity = getattr(getattr(library, "ILogger", None), "Severity", None)
    found = [problem(library, *use) for use in json.load(sys.stdin)]
    if severity is not None and not severity.INTERNAL_ERROR <= severity.ERROR <= severity.WARNING <= severity.INFO:
        found.append("severities are in another order")
    print(json.dumps([p for p in found if p]))
