"""Asks CUDA for one piece of memory as large as the engines will ask for, touches it, gives it back.

python3 device/largest.py BYTES [ROOT]      exit code 0: there is one; 1 and one line: CUDA refuses; 3: no library to ask

Memory that is free is not always given in one piece, and what limits a piece differs between releases of Jetson Linux: so
it is tried. Standard library only.
"""

import ctypes
import sys

PLACES = ("usr/local/cuda/lib64/libcudart.so", "usr/local/cuda/targets/aarch64-linux/lib/libcudart.so")
NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


def library(root):
    """The CUDA runtime of the device, or None."""
    for name in [f"{root}/{place}" for place in PLACES] + ([] if root else list(NAMES)):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def refused(cuda, size):
    """What CUDA says against a piece of that size, or None."""
    cuda.cudaGetErrorString.restype = ctypes.c_char_p
    cuda.cudaMalloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t]
    cuda.cudaMemset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    cuda.cudaFree.argtypes = [ctypes.c_void_p]
    piece = ctypes.c_void_p()
    for name, arguments in (
        ("cudaMalloc", (ctypes.byref(piece), size)),
        ("cudaMemset", (piece, 0, size)),
        ("cudaDeviceSynchronize", ()),
        ("cudaFree", (piece,)),
    ):
        code = getattr(cuda, name)(*arguments)
        if code:
            return f"{name}: {cuda.cudaGetErrorString(code).decode()} (code {code})"
    return None


def main(size, root=""):
    cuda = library(root)
    if cuda is None:
        return 3
    problem = refused(cuda, int(size))
    if problem:
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
