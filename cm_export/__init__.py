"""cm-export: a vision-language checkpoint becomes ONNX graphs and engines that read only core neurons and core tokens.

    with cm_export.load("engine.plan") as model:                       # docs/python.md
        print(model.generate("What is this?", images="scene.png").text)

What is named here is imported when it is first used, so that `import cm_export` and `cm-export --help` wait for nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "BundleError",
    "CmExportError",
    "Conversation",
    "InputError",
    "LoadedBundle",
    "Sampling",
    "Stream",
    "load",
]
_PLACES = {
    ".base.errors": ("BundleError", "CmExportError", "InputError"),
    ".host.conversation": ("Answer", "Conversation", "Stream"),
    ".host.loaded": ("LoadedBundle", "load"),
    ".host.sampling": ("Sampling",),
}

if TYPE_CHECKING:
    from .base.errors import BundleError, CmExportError, InputError
    from .host.conversation import Answer, Conversation, Stream
    from .host.loaded import LoadedBundle, load
    from .host.sampling import Sampling
else:

    def __getattr__(name: str) -> Any:
        for place, names in _PLACES.items():
            if name in names:
                return getattr(importlib.import_module(place, __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
