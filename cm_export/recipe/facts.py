"""What a policy says about itself, read from the text of its file: the module, and so torch and onnx, is not imported.

    WIRES = ("z", "weight")      ATTRIBUTES = ("rho",)      ADDS = True             policies/neurons/coreinfer.py
    -> Facts(wires=("z", "weight"), attributes=("rho",), adds=True, scores=True, in_decode=False)

A recipe is checked wherever a bundle is opened, also on a device that can only run engines; there the policies' code
cannot be imported and need not be. So facts are literals at the top of the file, and anything else is refused.
"""

import ast
import importlib.abc
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..base import by_name
from ..base.errors import InputError

NEURONS, TOKENS = "cm_export.policies.neurons", "cm_export.policies.tokens"


@dataclass(frozen=True)
class Facts:
    """The literals of a policy's file, by their names in lower case; WIRES and ATTRIBUTES must be there."""

    wires: tuple[str, ...]  # inputs of the ONNX function, by the name of what a graph has to offer
    attributes: tuple[str, ...]  # its attributes, by the name of the value they take
    adds: bool = False  # whether scores of two texts add up to those of both
    scores: bool = True  # whether prefill scores; if not, FUNCTION is None
    in_decode: bool = False  # whether the decode graph itself lists neurons, anew for every token
    by_threshold: bool = False  # whether decode reads what is above a threshold, in every product


_TYPES = {"WIRES": tuple, "ATTRIBUTES": tuple, "ADDS": bool, "SCORES": bool, "IN_DECODE": bool, "BY_THRESHOLD": bool}


def neuron_policy(name: str) -> Facts:
    """Facts of policies/neurons/<name>.py. Raises InputError that names the nearest when there is no such file."""
    return _facts(NEURONS, name, "neuron policy")


def token_policy(name: str) -> Facts:
    """Facts of policies/tokens/<name>.py. Raises InputError that names the nearest when there is no such file."""
    return _facts(TOKENS, name, "token policy")


def parse(source: str, where: object) -> Facts:
    """The facts in the text of a policy. Raises InputError for one that is missing or not written as a literal."""
    found: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and target.id in _TYPES:
                found[target.id.lower()] = _value(target.id, node, where)
    if missing := [name for name in ("WIRES", "ATTRIBUTES") if name.lower() not in found]:
        raise InputError(f"says no {missing[0]}", where=where, fix=f"write {missing[0]} = (...) at the top of the file")
    return Facts(**found)


@cache
def _facts(package: str, name: str, what: str) -> Facts:
    by_name.check(package, name, what)
    module = f"{package}.{name}"
    spec = importlib.util.find_spec(module)  # imports the folder's __init__.py, not the module
    loader = spec and spec.loader
    assert spec and isinstance(loader, importlib.abc.InspectLoader)  # `check` has found the file
    return parse(loader.get_source(module) or "", spec.origin)


def _value(name: str, node: ast.Assign | ast.AnnAssign | ast.AugAssign, where: object) -> Any:
    where, wanted = f"{where}:{node.lineno}", _TYPES[name]
    try:
        if node.value is None or isinstance(node, ast.AugAssign):
            raise ValueError(ast.unparse(node))
        value = ast.literal_eval(node.value)
    except ValueError as e:  # a call, another name, an operator
        fix = "write the value itself: facts are read without running the file"
        raise InputError(f"{name} is not a literal", where=where, fix=fix) from e
    words = value if isinstance(value, tuple) else ()
    if type(value) is not wanted or not all(isinstance(word, str) for word in words):
        fix = 'give ("z", "vote"), a tuple of names' if wanted is tuple else "give True or False"
        raise InputError(f"{name} = {value!r}", where=where, fix=fix)
    return value
