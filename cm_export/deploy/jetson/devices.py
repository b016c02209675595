"""Jetson devices and JetPack releases as data: what can be packed for what. The only place where these facts are written.

    device           sm    usable memory                       JetPack   L4T           CUDA   TensorRT   devices
    jetson-orin       87   AGX Orin 32 GB                      6.2       36.4, 36.5    12.6   10.3       Orin, Orin Nano
    jetson-orin-nano  87   8 GB, about 5.2 GB of it            7.1       38.2, 38.4    13.0   10.13      Thor
    jetson-thor      110   AGX Thor 128 GB                     7.2       39            13.2   10.16      all

Engines are bound to the GPU, the TensorRT version and the platform: what is carried is ONNX, plugin sources and a script.
The plugin is a C++ library on every one of them, the only form that TensorRT 10.3 takes. Usable memory: 5.2 GB is reported
for the Orin Nano, the others are the memory of the device minus a guess for the system. None of it was measured here.
"""

from dataclasses import dataclass

from ...base.by_name import nearest
from ...base.errors import InputError
from ...quant.precision import HALF
from ...quant.precision import PRECISIONS as KNOWN

# That `pack` offers, from the largest engines to the smallest.
PRECISIONS = tuple(name for name, known in KNOWN.items() if known.type == HALF)


@dataclass(frozen=True)
class JetPack:
    """One release. `l4t`: how its Jetson Linux versions begin, so that later fixes of a release match."""

    name: str
    l4t: tuple[str, ...]
    cuda: str
    tensorrt: str  # major.minor that the graphs are lowered for


@dataclass(frozen=True)
class Device:
    """One kind of device. `model`: words of /proc/device-tree/model; `usable_bytes`: of its memory, without a desktop."""

    name: str
    title: str
    model: tuple[str, ...]
    sm: int
    usable_bytes: int
    jetpacks: tuple[str, ...]  # the first one is the default
    fastest: tuple[str, ...]  # power modes that run every clock at its highest, as `nvpmodel -q` calls them


JETPACKS = (
    JetPack("6.2", ("36.4", "36.5"), "12.6", "10.3"),
    JetPack("7.1", ("38.2", "38.4"), "13.0", "10.13"),
    JetPack("7.2", ("39.",), "13.2", "10.16"),
)
_MAXIMUM = ("MAXN", "MAXN_SUPER")
DEVICES = (
    Device("jetson-orin", "Jetson AGX Orin (32 GB)", ("Orin",), 87, 28_000_000_000, ("6.2", "7.2"), _MAXIMUM),
    Device("jetson-orin-nano", "Jetson Orin Nano (8 GB)", ("Orin",), 87, 5_200_000_000, ("6.2", "7.2"), _MAXIMUM),
    Device("jetson-thor", "Jetson AGX Thor (128 GB)", ("Thor",), 110, 115_000_000_000, ("7.1", "7.2"), _MAXIMUM),
)


def find(target: str, jetpack: str | None = None) -> tuple[Device, JetPack]:
    """The device and its JetPack (None: the device's default). Raises InputError that names what goes together."""
    devices, releases = {d.name: d for d in DEVICES}, {j.name: j for j in JETPACKS}
    if target not in devices:
        raise InputError(f"unknown target {target!r}", where="--target", fix=nearest(target, list(devices)))
    device = devices[target]
    name = jetpack or device.jetpacks[0]
    if name not in releases:
        fix = f"for {target} give {' or '.join(device.jetpacks)}"
        raise InputError(f"unknown JetPack {name!r}", where="--jetpack", fix=fix)
    if name not in device.jetpacks:
        others = [d.name for d in DEVICES if name in d.jetpacks]
        fix = f"give {' or '.join(device.jetpacks)}; JetPack {name} is for {', '.join(others)}"
        raise InputError(f"JetPack {name} does not run on {target}", where="--jetpack", fix=fix)
    return device, releases[name]
