"""Short names of models: the three that are shipped with the tool, and hub ids at the commit it was written against.

demo, scenes, scenes-llava       directories in cm_export/demo
qwen2-vl                         Qwen/Qwen2-VL-2B-Instruct at one commit
"""

from dataclasses import dataclass
from pathlib import Path

_SHIPPED = Path(__file__).parent.parent / "demo"
DEMO = _SHIPPED / "model"
SCENES = _SHIPPED / "scenes"
SCENES_LLAVA = _SHIPPED / "scenes-llava"


@dataclass(frozen=True)
class Alias:
    """A short name for a directory or for a hub id at the commit this tool was written against."""

    hub_id: str | None = None
    revision: str | None = None
    path: Path | None = None


_QWEN2_VL_2B = Alias("Qwen/Qwen2-VL-2B-Instruct", "895c3a49bc3fa70a340399125c650a463535e71c")
ALIASES = {
    "demo": Alias(path=DEMO),
    "scenes": Alias(path=SCENES),
    "scenes-llava": Alias(path=SCENES_LLAVA),
    "qwen2-vl": _QWEN2_VL_2B,
    "qwen2-vl-2b": _QWEN2_VL_2B,
    "qwen2-vl-7b": Alias("Qwen/Qwen2-VL-7B-Instruct", "eed13092ef92e448dd6875b2a00151bd3f7db0ac"),
    "qwen2.5-vl-3b": Alias("Qwen/Qwen2.5-VL-3B-Instruct", "66285546d2b821cf421d4f5eb2576359d3770cd3"),
    "qwen2.5-vl-7b": Alias("Qwen/Qwen2.5-VL-7B-Instruct", "cc594898137f460bfe9f0759e9844b3ce807cfb5"),
    "qwen3-vl-2b": Alias("Qwen/Qwen3-VL-2B-Instruct", "89644892e4d85e24eaac8bacfd4f463576704203"),
    "qwen3-vl-4b": Alias("Qwen/Qwen3-VL-4B-Instruct", "ebb281ec70b05090aa6165b016eac8ec08e71b17"),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca"),
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf", "b234b804b114d9e37bb655e11cbbb5f5e971b7a9"),
    "llava-onevision-0.5b": Alias(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "74dd0bf867a4cda7950c17663794267c60cf4b40"
    ),
    "smolvlm2-2.2b": Alias("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "482adb537c021c86670beed01cd58990d01e72e4"),
    "smolvlm2-500m": Alias("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "7b375e1b73b11138ff12fe22c8f2822d8fe03467"),
    "internvl3-1b": Alias("OpenGVLab/InternVL3-1B-hf", "014c0583a0d4bedf29fbe2dbff4f865eb998e171"),
    "internvl3-2b": Alias("OpenGVLab/InternVL3-2B-hf", "cb57a075cb75a2e6d1b668b128d48bb00ae321d2"),
}
