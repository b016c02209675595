"""Device memory: copies, rows and recorded graphs do what numpy does, on the fake and, where there is a GPU, on the real one."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import OK, FakeCuda
from test_tensorrt_api import CUDA, installed

from cm_export.backends.tensorrt.cuda import Buffer, Buffers, Cuda, Pinned, Pool, laid_out, one_at_a_time, open_cuda
from cm_export.base.errors import CmExportError


def exercise(cuda: Cuda) -> None:
    """Everything that sessions do with memory, against numpy."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 3, 5, 4)).astype(np.float32)  # [B,Hk,T,d] into [B,Hk,C,d], C = 8
    source, target = Buffer(cuda, rows.nbytes), Buffer(cuda, 2 * 3 * 8 * 16)
    cuda.upload(source.address, rows)
    cuda.clear(target.address, target.size)
    cuda.copy_rows(target.address, 8 * 16, source.address, 5 * 16, 5 * 16, 6)
    found, expected = np.empty((2, 3, 8, 4), np.float32), np.zeros((2, 3, 8, 4), np.float32)
    expected[:, :, :5] = rows
    cuda.download(target.address, found)
    cuda.wait()
    np.testing.assert_array_equal(found, expected)

    pinned, device = Pinned(cuda, 1024), Buffer(cuda, 1024)
    pinned.array(256, (3, 4), np.int64)[...] = np.arange(12).reshape(3, 4)
    graph = cuda.record(lambda: cuda.upload_pinned(device.address, pinned, 1024) is None)
    pinned.array(256, (3, 4), np.int64)[0, 0] = 77  # read when it runs, not when it was recorded
    for _ in range(2):
        cuda.replay(graph)
        cuda.wait()
    found = np.empty((3, 4), np.int64)
    cuda.download(device.address + 256, found)
    cuda.wait()
    assert found.ravel().tolist() == [77, *range(1, 12)]
    del graph
    with pytest.raises(CmExportError, match="cannot be recorded"):
        cuda.record(lambda: False)

    buffers = Buffers(cuda)
    first = buffers.get("a", 1000).address
    assert buffers.get("a", 500).address == first and buffers.get("a", 10**6).size == 10**6
    with pytest.raises(CmExportError, match="CUDA: cudaMalloc"):
        Buffer(cuda, 1 << 50)
    cuda.wait()

    pool = Pool(cuda)
    one, other = pool.take(1000), pool.take(4000)
    addresses = one.address, other.address
    del one, other
    again = pool.take(3000)
    assert (again.address, again.size) == (addresses[1], 4000) and pool.take(1000).address == addresses[0]
    larger = pool.take(5000)
    assert larger.size == 5000 and not pool._spare, "what was spare is freed first"
    assert laid_out({"a": 1, "b": 257, "c": 256}) == ({"a": 0, "b": 256, "c": 768}, 1024)


def test_on_the_fake():
    exercise(Cuda(FakeCuda()))


def test_on_the_real_device_or_with_the_real_error():
    """In a process of its own: other tests put the fake in the bindings' place."""
    here, folder = Path(__file__).parent, installed(*CUDA["13.5"])
    code = f"import sys; sys.path[:0] = {[str(here), str(folder)]}; import test_cuda; test_cuda.on_this_machine()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("ran on ", "refused: CUDA: cuda")), done.stdout


def on_this_machine() -> None:
    """For the test above; prints what happened."""
    try:
        cuda = open_cuda()
    except CmExportError as e:
        print(f"refused: {e}")
        return
    exercise(cuda)
    print(f"ran on {cuda.gpu}")


def test_a_thread_that_uses_the_stream_has_it_alone_and_on_the_device_of_the_bundle(monkeypatch):
    """CUDA gives every new thread device 0, whatever the thread that opened the bundle had chosen."""
    fake, devices, inside, most = FakeCuda(), {}, [], []
    monkeypatch.setattr(FakeCuda, "cudaGetDevice", lambda self: (OK, 1))
    monkeypatch.setattr(
        FakeCuda, "cudaSetDevice", lambda self, device: (devices.update({threading.get_ident(): device}), (OK,))[1]
    )

    class User:
        def __init__(self):
            self._cuda = Cuda(fake)

        @one_at_a_time
        def use(self, again: bool = True) -> None:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.002)
            if again:  # one call may make another
                self.use(False)
            inside.pop()

    user = User()
    threads = [threading.Thread(target=user.use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 2 and len(devices) == 4 and set(devices.values()) == {1}
