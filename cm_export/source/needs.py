"""What making a bundle needs besides what running one does: the extra `export`, asked for before any work.

check_installed("building")  ->  InputError("building needs torch, which is not installed; pip install 'cm-export[export]'")
"""

import importlib.util

from ..base.errors import InputError
from ..base.install import pip_install

MODULES = ("torch", "transformers", "huggingface_hub", "onnxscript")  # of the extra `export` in pyproject.toml


def check_installed(what: str) -> None:
    """Raises InputError unless all of MODULES are there; none of them is imported."""
    missing = [name for name in MODULES if not _is_there(name)]
    if missing:
        which = f"{', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise InputError(f"{what} needs {which}", fix=pip_install("export"))


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a finder that refuses the name
        return False
