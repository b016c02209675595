"""mypy, as pyproject.toml sets it up: a minute of one processor, while other tests use the other one."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def mypy(*words: object, **where) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mypy", *map(str, words)], capture_output=True, text=True, **where)


def test_types_hold():
    done = mypy(cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_type_is_found(tmp_path):
    """With the same settings, in a package that is checked strictly."""
    package = tmp_path / "cm_export" / "host"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "wrong.py").write_text(
        "def length(of: str) -> int:\n    return of\n\n\ndef untyped(of):\n    return of\n"
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = mypy(cwd=tmp_path)
    assert done.returncode == 1 and "Incompatible return value" in done.stdout, done.stdout + done.stderr
    assert "missing a type annotation" in done.stdout, done.stdout
