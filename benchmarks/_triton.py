"""A real Triton server over a repository that `cm-export deploy triton` wrote; tests/triton_setup.sh sets one up.

Server(home, repository, log=file).start()   ->   .http, .grpc, .metrics_port of 127.0.0.1, .metrics(), .memory()   ->   .stop()
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil


class Server:
    """One server process. `home`: a folder of tests/triton_setup.sh; `models`: those that are loaded; `log`: a file."""

    def __init__(self, home: Path, repository: Path, *models: str, log: Path):
        self.home, self.repository, self.models, self.log = home, repository, models or ("vlm",), log
        self.http, self.grpc, self.metrics_port = free_ports(3)
        self.process: subprocess.Popen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def start(self, **variables: str) -> "Server":
        """Returns once every model is ready and figures are shown. `variables`: of its environment, besides this one's."""
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics_port}
        words = ["--model-control-mode=explicit", *(f"--{name}-port={port}" for name, port in ports.items())]
        words += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"]
        words += [f"--model-repository={self.repository}", *(f"--load-model={m}" for m in self.models)]
        command, env = [self.home / "bin" / "tritonserver", *words], os.environ | variables
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        end = time.monotonic() + 240
        while not (self.ready() and self.counts()):  # it opens its port for metrics after the others
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.1)
        return self

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Also its children, whatever has become of it."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in self.processes():
            process.kill()
        self.process.wait(10)

    def ready(self, path: str = "/v2/health/ready") -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self._get(self.http, path)[0] == 200
        return False

    def counts(self) -> bool:
        """Whether it shows figures."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(self.metrics())
        return False

    def metrics(self) -> dict[str, float]:
        """Name with labels -> value."""
        lines = self._get(self.metrics_port, "/metrics")[1].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}

    def _get(self, port: int, path: str) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def processes(self) -> list[psutil.Process]:
        """The server and the processes of its models."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def memory(self) -> int:
        """Bytes that all of them hold."""
        return sum(p.memory_info().rss for p in self.processes())


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
