"""Which Triton container has which TensorRT and which ONNX Runtime: what a repository can run in, as data.

engines of 10.13.3.9      nvcr.io/nvidia/tritonserver:25.09-py3     an engine runs on the version that built it, on no other
portable graphs           25.10 or newer                            from its ONNX Runtime 1.23.1 on
"""

from dataclasses import dataclass

IMAGE = "nvcr.io/nvidia/tritonserver"
MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"

# The first container with each TensorRT, as NVIDIA's release notes list them; read, not run.
TENSORRT = {
    "10.3.0": "24.08",
    "10.4.0": "24.09",
    "10.5.0": "24.10",
    "10.6.0": "24.11",
    "10.7.0": "24.12",
    "10.8.0": "25.01",
    "10.9.0": "25.03",
    "10.10.0": "25.05",
    "10.11.0": "25.06",
    "10.13.2": "25.08",
    "10.13.3": "25.09",
    "10.14.1": "25.11",
}

# From this one on the Python backend's stub reads arrays of numpy 2; older ones end at the first text (pybind11 before 2.12).
NUMPY_2 = "24.12"

# docs/introduction/compatibility.md of Triton's sources: 25.10 has ONNX Runtime 1.23.1, 1.23.0 computes attention wrongly.
ONNXRUNTIME = "25.10"


@dataclass(frozen=True)
class Container:
    """An image to run in, or what is known of it. `known`: whether a row of the table says so."""

    tag: str
    known: bool

    @property
    def image(self) -> str:
        return f"{IMAGE}:{self.tag}-py3"

    @property
    def takes_numpy_2(self) -> bool:
        """Whether a Python model in it may use numpy 2."""
        return not self.known or self.tag >= NUMPY_2


def of_engines(version: str) -> Container:
    """The container for engines of that TensorRT version, such as "10.13.3.9"."""
    tag = TENSORRT.get(".".join(version.split(".")[:3]))
    return Container(tag or "YY.MM", tag is not None)


def of_graphs() -> Container:
    """The oldest container for portable graphs."""
    return Container(ONNXRUNTIME, True)
