"""What a fake device asks of the test process, so that its own Python needs no ONNX Runtime: build a plan, run a plan.

    with Workshop() as shop:  ->  shop.address   ("build", version, onnx, words, plan)  ("load", graph, sum)  ("run", id, ...)

Arrays travel as (type, shape, bytes): the two Pythons may have different versions of numpy.
"""

import tempfile
import threading
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

KEY = b"fake device"


def packed(arrays: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {n: (a.dtype.str, a.shape, a.tobytes()) for n, a in arrays.items()}


def unpacked(values: dict[str, tuple]) -> dict[str, np.ndarray]:
    return {n: np.frombuffer(content, dtype).reshape(shape) for n, (dtype, shape, content) in values.items()}


class Remote:
    """fake_tensorrt.Program, computed by the workshop at `address`."""

    def __init__(self, address: str, content: memoryview, checksum: str):
        from fake_tensorrt_runtime import Port

        self._to = Client(address, authkey=KEY)
        inputs, outputs, self.sizes, self.layers, self.aliases = ask(self._to, "load", bytes(content), checksum)
        self.inputs, self.outputs = [Port(*v) for v in inputs], [Port(*v) for v in outputs]

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [*unpacked(ask(self._to, "run", names, packed(feeds))).values()]


def ask(to: Connection, *what: Any) -> Any:
    to.send(what)
    failed, answer = to.recv()
    if failed:
        raise RuntimeError(answer)
    return answer


class Workshop:
    """Answers devices, a thread each, until it is left."""

    def __enter__(self) -> "Workshop":
        self._folder = tempfile.TemporaryDirectory()
        self.address = str(Path(self._folder.name) / "socket")
        self._listener = Listener(self.address, authkey=KEY)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._folder.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                one = self._listener.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=_serve, args=(one,), daemon=True).start()


def _serve(one: Connection) -> None:
    from fake_tensorrt import Program, program

    loaded: Program | None = None
    while True:
        try:
            what, *args = one.recv()
        except EOFError:
            return
        try:
            if what == "load":
                loaded = program(*args)
                ports = [[(v.name, v.type, v.axes) for v in values] for values in (loaded.inputs, loaded.outputs)]
                answer: Any = (*ports, loaded.sizes, loaded.layers, loaded.aliases)
            elif what == "run":
                names, feeds = args
                answer = packed(dict(zip(names, loaded.run(names, unpacked(feeds)), strict=True)))
            else:
                answer = _build(*args)
            one.send((False, answer))
        except Exception as e:
            one.send((True, f"{type(e).__name__}: {e}"))


def _build(version: str, onnx: str, words: dict[str, str], plan: str) -> None:
    """What trtexec does with the words of its call. Raises RuntimeError for a graph that TensorRT would refuse."""
    from fake_cuda import FakeCuda
    from fake_tensorrt import library
    from fake_tensorrt_api import ILogger

    told: list[str] = []
    logger = type("Log", (ILogger,), {"log": lambda self, severity, msg: told.append(msg)})()
    trt = library(version, FakeCuda())
    if "--dynamicPlugins" in words:
        trt.get_plugin_registry().load_library(words["--dynamicPlugins"])
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    least, likely, most = (_shapes(words.get(f"--{w}Shapes", "")) for w in ("min", "opt", "max"))
    for name in least:
        profile.set_shape(name, least[name], likely[name], most[name])
    config.add_optimization_profile(profile)
    found = builder.build_serialized_network(network, config)
    if found is None:
        raise RuntimeError("; ".join(told))
    Path(plan).write_bytes(found)


def _shapes(word: str) -> dict[str, tuple[int, ...]]:
    pairs = (one.partition(":") for one in word.split(",") if one)
    return {name: tuple(int(n) for n in shape.split("x")) for name, _, shape in pairs}
