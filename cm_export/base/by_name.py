"""Find a family, policy, backend, task or verb by the name of its file: the folder is the registry."""

import difflib
import importlib
import pkgutil
from types import ModuleType

from .errors import InputError


def names_in(package: str) -> list[str]:
    """Names that can be asked for in `package` (dotted), sorted; modules that start with an underscore are private."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def nearest(name: str, known: list[str]) -> str:
    """`did you mean ...?` and the list of what exists, for error messages."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def check(package: str, name: str, what: str) -> None:
    """Raises InputError that names the nearest when there is no file `name` in `package`. The module is not imported."""
    known = names_in(package)
    if name not in known:
        raise InputError(f"unknown {what} {name!r}", fix=nearest(name, known))


def load(package: str, name: str, what: str) -> ModuleType:
    """The module `package.name`. Raises InputError that names the nearest when there is no such file."""
    check(package, name, what)
    return importlib.import_module(f"{package}.{name}")
