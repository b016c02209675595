"""A Python 3.10 of this machine, with and without the packages that running engines needs: JetPack 6 has no newer one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# With what they need themselves; of tokenizers' own only its part that reads from the hub needs more.
PACKAGES = [
    "click",
    "jinja2",
    "markdown-it-py",
    "markupsafe",
    "mdurl",
    "ml-dtypes",
    "numpy",
    "pillow",
    "psutil",
    "pygments",
]
PACKAGES += ["rich", "safetensors", "tokenizers", "tomli"]
IMPORTED = "click, jinja2, ml_dtypes, numpy, PIL.Image, psutil, rich.console, safetensors.numpy, tokenizers, tomli"


def find_python310() -> str | None:
    """A 3.10 interpreter: on PATH, or among pyenv's versions."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which("python3.10"), *sorted(map(str, pyenv.glob("3.10.*/bin/python3.10")))]
    for python in filter(None, found):  # pyenv's shim is on PATH even where no 3.10 is chosen
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


def make_python310(bare: str, folder: Path) -> None:
    """A virtual environment of it with PACKAGES in `folder`; skips the test where none can be made."""
    made = subprocess.run([bare, "-m", "venv", "--without-pip", folder / "venv"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"{bare} cannot make a virtual environment: install python3.10-venv")
    python = str(folder / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    command = [*pip, "--no-deps", "--no-compile", "--retries", "1", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"pip cannot install {', '.join(PACKAGES)} ({why}): a package index that is reached makes this run")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([python, "-c", f"import {IMPORTED}"], check=True, env=env)  # compiles what is read, and nothing else
