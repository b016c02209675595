"""Who races: each is one process, one artifact of the same checkpoint and the options that it is asked with.

name                               made by              asked with
cm-export int4, active             mid-int4.plan        every image token
OpenVINO int4, 25 % of tokens      mid-openvino-int4    pruning_ratio 75
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# FFNs read .73 of their weights, the other products .8; a quarter of the image tokens is kept unless a question says else.
RECIPE = ("--neurons", "active", "--neuron-share", "0.73", "--rest-share", "0.8")
RECIPE += ("--tokens", "spread-keys", "--token-share", "0.25")
OURS, OPENVINO = "cm-export", "OpenVINO GenAI"


@dataclass(frozen=True)
class Contestant:
    """`artifact` follows the name of the checkpoint in the folder of artifacts; `options` go to the worker."""

    name: str
    maker: str
    artifact: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def worker(self) -> Path:
        return HERE / {OURS: "ours_worker.py", OPENVINO: "openvino_worker.py"}[self.maker]

    @property
    def file_name(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


_ALL, _DENSE, _PRUNED = {"token_share": 1.0}, {"dense": True}, {"pruning_ratio": 75}
CONTESTANTS = (
    Contestant("cm-export int4, dense", OURS, "-int4.plan", _DENSE),
    Contestant("cm-export int4, active", OURS, "-int4.plan", _ALL),
    Contestant("cm-export int4, active, 1/4 of image tokens", OURS, "-int4.plan"),
    Contestant("cm-export int4, dense, MatMulNBits", OURS, "-int4.plan", _DENSE | {"plain": True}),
    Contestant("cm-export int8, dense", OURS, "-int8.plan", _DENSE),
    Contestant("cm-export int8, active", OURS, "-int8.plan", _ALL),
    Contestant("cm-export int8, active, 1/4 of image tokens", OURS, "-int8.plan"),
    Contestant("OpenVINO int4", OPENVINO, "-openvino-int4"),
    Contestant("OpenVINO int4, 1/4 of image tokens", OPENVINO, "-openvino-int4", _PRUNED),
    Contestant("OpenVINO int8", OPENVINO, "-openvino-int8"),
    Contestant("OpenVINO int8, 1/4 of image tokens", OPENVINO, "-openvino-int8", _PRUNED),
)
# ours, and what it is measured against
PAIRS = (
    ("cm-export int4, dense", "OpenVINO int4"),
    ("cm-export int4, active", "OpenVINO int4"),
    ("cm-export int4, active, 1/4 of image tokens", "OpenVINO int4, 1/4 of image tokens"),
    ("cm-export int8, dense", "OpenVINO int8"),
    ("cm-export int8, active", "OpenVINO int8"),
    ("cm-export int8, active, 1/4 of image tokens", "OpenVINO int8, 1/4 of image tokens"),
    ("cm-export int4, active", "cm-export int4, dense"),
    ("cm-export int4, dense", "cm-export int4, dense, MatMulNBits"),
)


def order(names: list[str], turn: int) -> list[str]:
    """Who answers when in this round: everybody once, beginning one further each time, every other round backwards."""
    start = turn % len(names)
    turned = names[start:] + names[:start]
    return turned[::-1] if turn % 2 else turned
