"""What each TensorRT version does by itself, as data: the lowering and the builder read this table and nothing else.

version      RMSNorm     attention   KV cache   a node that is also a function
10.3..10.6   decomposed  decomposed  copy       the function always wins: functions are stripped
10.7..10.13  decomposed  decomposed  copy       a registered plugin wins
10.14        decomposed  native      copy       "
10.15..      native      native      in place   the plugin wins if the node names its namespace and version
rtx          native      native      in place   no plugins: every function is written out
"""

import re
from dataclasses import dataclass, replace

from ...base.by_name import nearest
from ...base.errors import InputError


@dataclass(frozen=True)
class Target:
    """One version of one library. `kv`: "in_place" (present at the address of past) or "copy" (another buffer)."""

    module: str  # the Python module: tensorrt or tensorrt_rtx
    version: tuple[int, int]
    plugins: bool = True  # whether CoreFFN and CoreAttention are our plugin; else they are written out
    keep_functions: bool = False  # whether the plugin is taken although the node is also a local function
    native_attention: bool = False
    native_norm: bool = False
    kv: str = "copy"
    cards: tuple[str, ...] = ()  # that it can build for without having one; else only for the one in the machine
    strips: bool = True  # whether plans without weights can be built
    typed_flag: bool = True  # whether STRONGLY_TYPED must be asked for; from 11 there is nothing else

    @property
    def name(self) -> str:
        return f"{'rtx-' if self.module == 'tensorrt_rtx' else ''}{self.version[0]}.{self.version[1]}"


_OLDEST = Target("tensorrt", (10, 3))
_PLUGIN_WINS = replace(_OLDEST, version=(10, 7), keep_functions=True)
_ATTENTION = replace(_PLUGIN_WINS, version=(10, 14), native_attention=True)
_CACHE = replace(_ATTENTION, version=(10, 15), native_norm=True, kv="in_place")
_TYPED_ONLY = replace(_CACHE, version=(11, 0), typed_flag=False)
_RTX = Target(
    "tensorrt_rtx",
    (1, 4),
    plugins=False,
    native_attention=True,
    native_norm=True,
    kv="in_place",
    cards=("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    strips=False,
)

# Each row holds from its version on, until the next row of the same module.
TARGETS = (_OLDEST, _PLUGIN_WINS, _ATTENTION, _CACHE, _TYPED_ONLY, _RTX)


def target(version: str) -> Target:
    """The row for a version such as "10.13.3.9" or "rtx-1.7". Raises InputError for one that is too old or unreadable."""
    found = re.match(r"(rtx-)?(\d+)\.(\d+)", version)
    module = "tensorrt_rtx" if found and found[1] else "tensorrt"
    rows = [t for t in TARGETS if t.module == module]
    if not found:
        fix = nearest(version, [t.name for t in TARGETS])
        raise InputError(f"{version!r} is no TensorRT version", fix=fix)
    number = (int(found[2]), int(found[3]))
    known = [t for t in rows if t.version <= number]
    if not known:
        raise InputError(f"TensorRT {version} is too old", fix=f"the oldest supported one is {rows[0].name}")
    return replace(known[-1], version=number)
