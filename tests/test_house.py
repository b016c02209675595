"""The rules of the house, read from the sources: the order of packages, no circles, what is private, what lies where.

base <- quant <- families <- recipe <- bundle <- ... <- cli          a package imports only from packages before it

Each rule is a function of a root folder that returns sentences about what breaks it. It is tried on small made-up trees
that break it, and must find nothing in this one.
"""

import ast
import itertools
import os
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import setuptools

from cm_export.build.sources import Import, imports

ROOT = Path(__file__).parent.parent
# The top-level folders plugins/ and recipes/ are installed as cm_export.plugins and cm_export.recipes.
TOPS = {"cm_export": "cm_export", "plugins": "cm_export.plugins", "recipes": "cm_export.recipes"}
ORDER = (
    "base", "quant", "families", "recipe", "bundle", "plugins", "policies", "surgery", "host", "backends",
    "serving", "source", "evals", "calibrating", "build", "parity", "tune", "report", "deploy", "cli",
    "__main__",
    "recipes",  # scripts that train the demo models, which nothing imports
)  # fmt: skip
REGISTRIES = {  # folder -> names of which each file or package in it exposes one of every group
    "families": [{"FAMILY"}],
    "policies.neurons": [{"WIRES"}],
    "policies.tokens": [{"WIRES"}],
    "backends": [{"open"}],
    "source.packings": [{"MARKS"}, {"PARTS"}, {"check"}, {"matrix"}],
    "evals.tasks": [{"KINDS"}, {"questions"}],
    "cli.verbs": [{"command"}],
    "deploy": [],
}
# Who runs a finished bundle does without these two.
TORCHLESS, HEAVY = ("host", "backends", "serving"), ("torch", "transformers")
# Scripts that are sent to a device as they are, and run there without this package.
SENT = ("cm_export/deploy/jetson/device",)


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its syntax tree and its imports."""

    name: str
    file: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def is_package(self) -> bool:
        return self.file.name == "__init__.py"


@cache
def modules(root: Path) -> dict[str, Module]:
    """Every module of cm_export below `root`, by its dotted name."""
    found = {}
    for top, dotted in TOPS.items():
        for file in python_files(root / top):
            parts = file.relative_to(root / top).with_suffix("").parts
            name = ".".join([dotted, *parts]).removesuffix(".__init__")
            tree = ast.parse(file.read_text(encoding="utf-8"))
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            found[name] = Module(name, file, tree, tuple(imports(tree, package)))
    return found


def python_files(folder: Path) -> Iterator[Path]:
    """Not through links: cm_export/plugins is one where the package is installed for editing."""
    for place, _, names in os.walk(folder):
        yield from (Path(place) / n for n in sorted(names) if n.endswith(".py"))


def arrows(root: Path) -> Iterator[tuple[Module, Import, str]]:
    """(module, import, name of the module of ours that it reaches) of every import."""
    known = modules(root)
    for module in known.values():
        for one in module.imports:
            if one.module.split(".")[0] == "cm_export":
                inner = f"{one.module}.{one.name}"
                yield module, one, inner if inner in known else one.module


def street(name: str) -> str:
    """The package directly below cm_export; of `cm_export` itself, its own name."""
    return name.split(".")[1] if "." in name else name


# ---------------------------------------------------------------- rules


def unknown_modules(root: Path) -> list[str]:
    """Imports, and strings in the form of a module's name, that name no module of ours."""
    known = modules(root)
    wrong = [f"{m.name}:{i.line} imports {to}" for m, i, to in arrows(root) if to not in known]
    for module in known.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = node.value.split(".")
                dotted = len(parts) > 2 and parts[0] == "cm_export" and all(p.isidentifier() for p in parts)
                if dotted and node.value not in known:
                    wrong.append(f"{module.name}:{node.lineno} names {node.value}")
    return wrong


def against_the_order(root: Path) -> list[str]:
    wrong = [f"cm_export/{s} has no place in the order" for s in streets(root) if s not in ORDER]
    for module, one, target in arrows(root):
        here, there = street(module.name), street(target)
        if "cm_export" in (here, there) or here not in ORDER or there not in ORDER:
            continue
        if ORDER.index(there) > ORDER.index(here):
            wrong.append(f"{module.name}:{one.line} imports {target}, but {here} comes before {there}")
    return wrong


def streets(root: Path) -> list[str]:
    return sorted({street(name) for name in modules(root)} - {"cm_export"})


def circles(root: Path) -> list[str]:
    """Sets of modules that import each other, directly or not, whenever they do it."""
    after: dict[str, set[str]] = {name: set() for name in modules(root)}
    for module, _, target in arrows(root):
        after[module.name] |= {target} & set(after) - {module.name}
    while leaves := [name for name, targets in after.items() if not targets & set(after)]:
        for name in leaves:
            del after[name]
    # What is left imports a circle or lies in one: only the latter is reached from itself.
    return [f"{name} imports itself through others" for name in sorted(after) if name in _reached(name, after)]


def _reached(start: str, after: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    new = {start}
    while new := {t for name in new for t in after[name] if t in after} - seen:
        seen |= new
    return seen


def private_imports(root: Path) -> list[str]:
    """Imported modules and names with an underscore that belong to another package, and such names read as attributes."""
    known, wrong = modules(root), []
    for module, one, target in arrows(root):
        parts = target.split(".")
        hidden = [".".join(parts[: n + 1]) for n, part in enumerate(parts) if _private(part)]
        if one.name and _private(one.name) and not hidden:
            hidden, package = [one.name], owner(target, known)
        elif hidden:
            package = hidden[0].rpartition(".")[0]
        if hidden and not _inside(module, package):
            wrong.append(f"{module.name}:{one.line} imports {hidden[0]} of {target}, which is private to {package}")
    for module, line, target, name in private_attributes(root):
        if not _inside(module, owner(target, known)):
            wrong.append(f"{module.name}:{line} reads {name} of {target}, which is private to {owner(target, known)}")
    return wrong


def private_attributes(root: Path) -> Iterator[tuple[Module, int, str, str]]:
    """(module, line, module of ours, private name) where a file reads `other._name` of a module that it imports."""
    for module in modules(root).values():
        froms = [node for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom)]
        called = {alias.name: alias.asname or alias.name for node in froms for alias in node.names}
        bound = {
            called[i.name]: to for m, i, to in arrows(root) if m is module and i.name and to.endswith(f".{i.name}")
        }
        for node in ast.walk(module.tree):
            private = isinstance(node, ast.Attribute) and _private(node.attr) and isinstance(node.value, ast.Name)
            if private and node.value.id in bound:
                yield module, node.lineno, bound[node.value.id], node.attr


def owner(target: str, known: dict[str, Module]) -> str:
    """The package that a module belongs to; a package belongs to itself."""
    return target if target in known and known[target].is_package else target.rpartition(".")[0]


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _inside(module: Module, package: str) -> bool:
    return f"{module.name}.".startswith(f"{package}.")


def unregistered(root: Path) -> list[str]:
    """What lies in a registry folder and is not what the registry asks for."""
    known, wrong = modules(root), []
    for folder, groups in REGISTRIES.items():
        for name, module in known.items():
            if name.rpartition(".")[0] != f"cm_export.{folder}":
                continue
            if _private(name.rpartition(".")[2]):
                wrong.append(f"{name} is private, in a folder where every file is registered")
            exposed = names_exposed(module.tree)
            wrong += [f"{name} exposes no {' or '.join(sorted(g))}" for g in groups if not g & exposed]
    return wrong


def names_exposed(tree: ast.Module) -> set[str]:
    """Names that the body of a module binds."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def heavy_imports(root: Path) -> list[str]:
    return [
        f"{module.name}:{one.line} imports {one.module}"
        for module in modules(root).values()
        for one in module.imports
        if street(module.name) in TORCHLESS and one.module.split(".")[0] in HEAVY
    ]


def crowded_root(root: Path) -> list[str]:
    files = [f.name for f in sorted((root / "cm_export").glob("*.py")) if f.name != "__init__.py"]
    return [f"{len(files)} modules in cm_export/: {', '.join(files)}"] if len(files) > 3 else []


def no_packages(root: Path) -> list[str]:
    """Folders of source files without an __init__.py."""
    folders = {file.parent for top in TOPS for file in python_files(root / top)} - {root / name for name in SENT}
    return [f"{f.relative_to(root)} is no package" for f in sorted(folders) if not (f / "__init__.py").is_file()]


def left_out_of_setup(root: Path) -> list[str]:
    """Packages that setup.py does not find, or finds in another folder."""
    told, here = {}, os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **values: told.update(values))
        os.chdir(root)
        try:
            runpy.run_path(str(root / "setup.py"))
        finally:
            os.chdir(here)
    expected = {name: module.file.parent for name, module in modules(root).items() if module.is_package}
    places = sorted(told["package_dir"].items(), key=lambda pair: len(pair[0]))
    wrong = [f"setup.py does not find {name}" for name in sorted(set(expected) - set(told["packages"]))]
    for name, folder in sorted(expected.items()):
        package, place = next((p for p in reversed(places) if f"{name}.".startswith(f"{p[0]}.")), ("", "."))
        found = root.joinpath(place, *name.removeprefix(package).strip(".").split("."))
        if found.resolve() != folder.resolve():
            wrong.append(f"setup.py takes {name} from {found.relative_to(root)}")
    return wrong


RULES = (
    unknown_modules, against_the_order, circles, private_imports, unregistered, heavy_imports, crowded_root, no_packages,
    left_out_of_setup,
)  # fmt: skip


# ---------------------------------------------------------------- this tree


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_tree_keeps_the_rule(rule):
    assert rule(ROOT) == []


def test_every_registry_folder_is_there_and_holds_something():
    for folder in REGISTRIES:
        assert any(name.startswith(f"cm_export.{folder}.") for name in modules(ROOT)), folder


# ---------------------------------------------------------------- trees that break a rule


GOOD = {
    "setup.py": (ROOT / "setup.py").read_text(),
    "cm_export/__init__.py": "__version__ = '0'",
    "cm_export/base/__init__.py": "",
    "cm_export/base/errors.py": "def _line(): ...",
    "cm_export/base/names.py": "from .errors import _line\nfrom .. import __version__",
    "cm_export/policies/__init__.py": "",
    "cm_export/policies/_count.py": "from ..base import errors\nLIMIT = 1",
    "cm_export/policies/neurons/__init__.py": "",
    "cm_export/policies/neurons/dense.py": "from .._count import LIMIT\nWIRES = ()",
    "cm_export/host/__init__.py": "",
    "cm_export/host/loop.py": "def run():\n    from ..policies.neurons import dense",
    "cm_export/backends/__init__.py": "",
    "cm_export/backends/cpu/__init__.py": "from .backend import open",
    "cm_export/backends/cpu/backend.py": "from ...host import loop\ndef open(): ...",
    "cm_export/evals/__init__.py": "import torch",
    "cm_export/evals/tasks/__init__.py": "",
    "cm_export/evals/tasks/scenes.py": "KINDS: dict = {}\ndef questions(kind): ...",
    "cm_export/demo/read.txt": "",
    "plugins/__init__.py": "",
    "plugins/core_ffn/__init__.py": "",
    "plugins/core_ffn/op.py": "from ...base import errors",
}


def tree(folder: Path, **changes: str | None) -> Path:
    """A small house in `folder`; changes: other files by path, or None for one that is not there."""
    for name, text in (GOOD | changes).items():
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_small_tree_that_keeps_the_rules_passes(rule, tmp_path):
    assert rule(tree(tmp_path)) == []


LATE = "def f():\n    from ..host import loop"
TYPED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..host.loop import run"
CPU = "cm_export/backends/cpu/backend.py"
BREAKS = [
    # order
    (against_the_order, {"cm_export/base/errors.py": "from ..host import loop"}, "base comes before host"),
    (against_the_order, {"cm_export/base/errors.py": LATE}, "cm_export.base.errors:2 imports cm_export.host.loop"),
    (against_the_order, {"cm_export/base/errors.py": TYPED}, "cm_export.base.errors:3 imports cm_export.host.loop"),
    (against_the_order, {"cm_export/base/errors.py": "import cm_export.host.loop"}, "base comes before host"),
    (against_the_order, {"cm_export/base/errors.py": "class A:\n  try:\n    from ..host import loop\n  except: ..."}, ":3"),
    (against_the_order, {"plugins/core_ffn/op.py": "from ...policies import neurons"}, "plugins comes before policies"),
    (against_the_order, {"cm_export/utils/__init__.py": ""}, "cm_export/utils has no place"),
    # circles
    (circles, {"cm_export/base/errors.py": "from . import names"}, "cm_export.base.errors imports itself"),
    (circles, {"cm_export/base/errors.py": "def f():\n    from .names import x"}, "cm_export.base.names imports itself"),
    (circles, {"cm_export/base/errors.py": TYPED.replace("..host.loop", ".names")}, "cm_export.base.errors imports"),
    (circles, {"cm_export/host/__init__.py": "from .loop import run", "cm_export/host/loop.py": "from . import run"}, "host"),
    # private
    (private_imports, {"cm_export/host/loop.py": "from ..policies._count import LIMIT"}, "private to cm_export.policies"),
    (private_imports, {"cm_export/host/loop.py": "from ..policies import _count"}, "private to cm_export.policies"),
    (private_imports, {"cm_export/host/loop.py": "import cm_export.policies._count"}, "private to cm_export.policies"),
    (private_imports, {"cm_export/host/loop.py": "from ..base.errors import _line"}, "imports _line of"),
    (private_imports, {"cm_export/host/loop.py": "from ..base import errors as e\ne._line()"}, "loop:2 reads"),
    (private_imports, {"plugins/core_ffn/body.py": "_F = 1", "plugins/op.py": "from .core_ffn.body import _F"}, "_F"),
    # registries
    (unregistered, {"cm_export/policies/neurons/_count.py": "WIRES = ()"}, "neurons._count is private"),
    (unregistered, {"cm_export/policies/neurons/helper.py": "def f():\n    WIRES = 1"}, "helper exposes no WIRES"),
    (unregistered, {"cm_export/evals/tasks/scenes.py": "KINDS = {}"}, "scenes exposes no questions"),
    (unregistered, {"cm_export/backends/cpu/__init__.py": ""}, "backends.cpu exposes no open"),
    (unregistered, {"cm_export/families/llama.py": "A = 1"}, "llama exposes no FAMILY"),
    (unregistered, {"cm_export/cli/verbs/run.py": "A = 1"}, "run exposes no command"),
    (unregistered, {"cm_export/deploy/_archive.py": "A = 1"}, "deploy._archive is private"),
    # the rest
    (heavy_imports, {"cm_export/host/loop.py": "def f():\n    import torch.nn"}, "loop:2 imports torch.nn"),
    (heavy_imports, {CPU: "from transformers import AutoConfig"}, "cpu.backend:1 imports transformers"),
    (unknown_modules, {"cm_export/host/loop.py": "from ..base import gone"}, ""),
    (unknown_modules, {"cm_export/host/loop.py": "from ..base.gone import x"}, "loop:1 imports cm_export.base.gone"),
    (unknown_modules, {"cm_export/host/loop.py": "A = 'cm_export.base.gone'"}, "loop:1 names cm_export.base.gone"),
    (crowded_root, {f"cm_export/{n}.py": "" for n in "abcd"}, "4 modules in cm_export/"),
    (no_packages, {"cm_export/host/more/loop.py": ""}, "cm_export/host/more is no package"),
    (no_packages, {"plugins/core_ffn/__init__.py": None}, "plugins/core_ffn is no package"),
    (left_out_of_setup, {"cm_export/host/__init__.py": None, "cm_export/host/inner/__init__.py": ""}, "host.inner"),
    (left_out_of_setup, {"setup.py": GOOD["setup.py"].replace('"plugins", ', "")}, "does not find cm_export.plugins"),
    (left_out_of_setup, {"setup.py": GOOD["setup.py"].replace(": top for", ': "x" for')}, "takes cm_export.plugins from x"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes", "words"), BREAKS, ids=itertools.count())
def test_a_tree_that_breaks_a_rule_is_found_out(rule, changes, words, tmp_path):
    if not words:  # a name that is no module may be a value of the package
        assert rule(tree(tmp_path, **changes)) == []
        return
    found = rule(tree(tmp_path, **changes))
    assert any(words in sentence for sentence in found), found


def test_every_rule_is_broken_by_one_of_the_trees():
    assert {rule for rule, _, words in BREAKS if words} == set(RULES)
