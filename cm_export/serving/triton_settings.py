"""What an operator sets in the parameters of vlm/config.pbtxt, as values; written by `deploy`, read when Triton loads it.

parameters { key: "at_once" value { string_value: "8" } }       ->      Settings(at_once=8)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..base.by_name import nearest
from ..base.errors import InputError
from .scheduler import QUEUED
from .wire import Bounds

IN_PROCESS, BLS = "in_process", "bls"
WHERE = "vlm/config.pbtxt: parameters"


@dataclass(frozen=True)
class Settings:
    """How `vlm` runs, and what one request may bring. Shares: of requests that ask for none; None: the bundle's own."""

    execution: str = IN_PROCESS  # bls: graphs are called as models of the server
    backend: str = "onnxruntime"  # what runs the graphs in this process
    threads: int = 0  # of the CPU, for one step; 0 takes all cores
    lanes: int = 0  # threads that decode side by side; where both are 0, cores.py divides the cores
    at_once: int = 8  # requests that are answered together
    queued: int = QUEUED  # that wait for a place; more are refused
    deadline: float = 300.0  # seconds of a request that names none
    max_tokens: int = Bounds().tokens  # of one answer
    pictures: int = Bounds().pictures  # of one request
    picture_bytes: int = Bounds().picture_bytes  # of one, encoded
    pixels: int = Bounds().pixels  # of all pictures of a request
    neuron_share: float | None = None
    token_share: float | None = None
    warm_up_pixels: int = 0  # side of the largest picture; 0: a question without picture; -1: no warm-up

    @property
    def bounds(self) -> Bounds:
        """What one request may bring."""
        return Bounds(
            self.max_tokens, pictures=self.pictures, picture_bytes=self.picture_bytes, pixels=self.pixels
        )  # fmt: skip

    def texts(self) -> dict[str, str]:
        """Values that are set, as the parameters have them."""
        return {f.name: str(v) for f in fields(self) if (v := getattr(self, f.name)) is not None}

    @classmethod
    def of(cls, parameters: Mapping[str, Mapping[str, Any]]) -> Settings:
        """Raises InputError for a name that is unknown, or a value of the wrong kind."""
        kinds = {f.name: str(f.type).split(" |")[0] for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, held in parameters.items():
            if name not in kinds:
                raise InputError(f"unknown parameter {name!r}", where=WHERE, fix=nearest(name, list(kinds)))
            try:
                values[name] = {"int": int, "float": float, "str": str}[kinds[name]](held["string_value"])
            except ValueError as e:
                text = f"{held['string_value']!r} is no {kinds[name]}"
                raise InputError(text, where=f"{WHERE}: {name}", fix="correct it, and load the model again") from e
        found = cls(**values)
        if found.execution not in (IN_PROCESS, BLS):
            fix = f"give {IN_PROCESS} or {BLS}"
            raise InputError(f"unknown value {found.execution!r}", where=f"{WHERE}: execution", fix=fix)
        return found
