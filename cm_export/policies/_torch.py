"""torch for the policies, imported when the first torch meaning is computed and not before.

A graph is rewritten with a policy's ONNX function alone, so a bundle is evaluated under other policies without torch.

    from __future__ import annotations      # torch.Tensor in a signature stays a word
    from .._torch import torch
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _Later:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Later()

__all__ = ["torch"]
