"""Which of our source files stand behind a module: its own, and those of every module that it imports or names.

    build/steps/trace.py -> source/model.py -> bundle/weights.py
                                            -> "cm_export.families" -> families/qwen2_vl.py, ...

So the key of a stage covers all the code that the stage executes, and nobody keeps a list of it.
"""

import ast
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "cm_export"
# Who names these asks which ones there are; a stage imports the backend that it runs, and none reads a shipped recipe.
NAMED_ONLY = ("cm_export.backends", "cm_export.recipes")
_DOTTED = re.compile(rf"{PACKAGE}(\.\w+)+")


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name`, or `import module` with name None. Relative names are resolved."""

    line: int
    module: str
    name: str | None
    typing: bool  # below `if TYPE_CHECKING`, so never executed


def imports(tree: ast.AST, package: str, typing: bool = False) -> Iterator[Import]:
    """Every import in `tree`, also those inside functions; `package` is where a module's relative imports start."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, None, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) + 1 - node.level] if node.level else []
            module = ".".join([*above, node.module] if node.module else above)
            yield from (Import(node.lineno, module, alias.name, typing) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports(ast.Module(node.body, []), package, typing=True)
            yield from imports(ast.Module(node.orelse, []), package, typing)
        else:
            yield from imports(node, package, typing)


@cache
def behind(module: str, named_only: tuple[str, ...] = NAMED_ONLY) -> tuple[str, ...]:
    """`module` and all modules of ours that it imports or names in a string, directly or not, sorted.

    named_only: packages that are not taken with all that lies in them where a string names them.
    """
    known, new = set(), {module}
    while new:
        known |= new
        new = {name for one in new for name in _next(one, named_only)} - known
    return tuple(sorted(known))


def digest(module: str) -> str:
    """A hash of the source files behind `module`, so that a changed program redoes what it would now do differently."""
    found = hashlib.sha256()
    for name in behind(module):
        found.update(f"{name}\n".encode() + content(_source(name)) + b"\n")
    return found.hexdigest()


def own_file(thing: object) -> str:
    """A hash of the file in which the class of `thing` stands, such as a family that another distribution brings."""
    return hashlib.sha256(content(Path(inspect.getfile(type(thing))))).hexdigest()


def libraries(module: str) -> dict[str, str]:
    """Versions of the distributions that the modules behind `module` import, by name."""
    tops = {one.module.split(".")[0] for name in behind(module) for one in _read(name)[0]}
    tops -= {PACKAGE, *sys.stdlib_module_names}
    names = {name for top in tops for name in _distributions(tuple(sys.path)).get(top, ())}
    return {name: found for name in sorted(names) if (found := version(name)) is not None}


def version(name: str) -> str | None:
    """Of an installed distribution; None where there is none.

    A folder of sys.path inside a package holds what that package brought for itself alone: setuptools puts its own there
    once it is imported, so the key of a stage would depend on what else this process has done.
    """
    places = [place for place in sys.path if not (Path(place).parent / "__init__.py").is_file()]
    found = next(iter(metadata.distributions(name=name, path=places)), None)
    return found.version if found else None


def content(file: Path) -> bytes:
    """The bytes of a source file."""
    return file.read_bytes()


@cache
def file_of(module: str) -> Path | None:
    """The source file of a module of ours (a package's is its __init__.py); None where there is no such module."""
    top, rest = module.split(".")[:2], module.split(".")[2:]
    spec = find_spec(".".join(top))  # imports nothing below cm_export; plugins/ and recipes/ may lie elsewhere
    if spec is None or spec.origin is None or not rest:
        return Path(spec.origin) if spec and spec.origin else None
    place = Path(spec.origin).parent.joinpath(*rest)
    return next((f for f in (place / "__init__.py", place.with_name(f"{place.name}.py")) if f.is_file()), None)


def _source(module: str) -> Path:
    file = file_of(module)
    assert file is not None, module  # only modules that exist stand behind another one
    return file


def _next(module: str, named_only: tuple[str, ...]) -> Iterator[str]:
    """What stands directly behind a module: the packages that it lies in, what it imports, what its strings name."""
    yield from (".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1))
    imported, named = _read(module)
    for one in imported:
        if one.module.split(".")[0] == PACKAGE:
            inner = f"{one.module}.{one.name}"
            yield inner if one.name and file_of(inner) else one.module
    for name in (n for n in named if n not in named_only):
        yield name
        if _source(name).name == "__init__.py":  # a registry: whatever lies in it may be asked for
            inside = (f"{name}.{p.stem}" for p in sorted(_source(name).parent.iterdir()))
            yield from (inner for inner in inside if file_of(inner) and not inner.endswith("__init__"))


@cache
def _read(module: str) -> tuple[tuple[Import, ...], tuple[str, ...]]:
    """The imports that a module executes, and the modules of ours that its strings name."""
    file = _source(module)
    tree = ast.parse(content(file))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    named = (s for s in sorted(strings) if _DOTTED.fullmatch(s) and file_of(s))
    return tuple(one for one in imports(tree, package) if not one.typing), tuple(named)


@cache
def _distributions(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """The distributions that bring each top-level package; `path` is sys.path, so that a longer one is read anew."""
    return metadata.packages_distributions()
