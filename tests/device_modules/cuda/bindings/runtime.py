"""`import cuda.bindings.runtime` on a fake device. At the end it leaves a list of the modules that the program was made of."""

import atexit
import json
import os
import sys

from fake_cuda import FakeCuda


@atexit.register
def note() -> None:
    files = {n: getattr(m, "__file__", None) for n, m in sys.modules.items() if isinstance(n, str)}
    with open(os.environ["FAKE_CALLS"] + ".modules", "w") as f:
        json.dump({n: f for n, f in files.items() if f}, f)


major, minor = map(int, os.environ["FAKE_GPU"].split("."))
sys.modules[__name__] = FakeCuda(("Fake Orin", major, minor))
