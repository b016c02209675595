"""The error tree: every error says what is wrong, where, and how to fix it, in one line.

GateFailed("prefill differs from PyTorch by 3e-2", where="prefill.onnx: logits", fix="report this checkpoint")
-> "prefill.onnx: logits: prefill differs from PyTorch by 3e-2; report this checkpoint"
"""


class CmExportError(Exception):
    """Base of all errors that a user may see; `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        text = f"{where}: {what}" if where is not None else what
        super().__init__(" ".join((f"{text}; {fix}" if fix else text).split()))


class InputError(CmExportError):
    """Something the user handed over is unusable: an option, a path, an image, a recipe, a checkpoint."""

    exit_code = 2


class BundleError(CmExportError):
    """A bundle is incomplete, edited or corrupted, or not one for this machine."""

    exit_code = 2  # it was handed over, as any other input


class SurgeryError(CmExportError):
    """A graph rewrite did not find what it must find, or found something it must not touch."""


class GateFailed(CmExportError):
    """A proof that the export is right did not hold; no bundle is written."""
