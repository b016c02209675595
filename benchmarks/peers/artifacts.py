"""Makes what the race needs, once: checkpoint, bundles, environments of the peers, their conversions of the checkpoint.

    artifacts/peers/mid/  mid-int4.plan/  openvino/ (environment)  mid-openvino-int4/  ...

Everything appears by a rename once it is finished, so what is there is whole. A peer that cannot be made is left out, with a
line that says why.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cm_export.base.errors import CmExportError, InputError

from . import checkpoint
from .contestants import HERE, OPENVINO, OURS, RECIPE, Contestant

ROOT = HERE.parent.parent
Say = Callable[[str], None]


class Failed(CmExportError):
    """A command of a peer ended badly."""


class Artifacts:
    """Everything under one folder, for a checkpoint of one size."""

    def __init__(self, folder: Path, sizes: str, threads: int, say: Say = print):
        self.folder, self.sizes, self.threads, self.say = folder.absolute(), sizes, threads, say
        self.environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        self.environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.environment |= {"XDG_CACHE_HOME": str(self.folder / "cache")}  # the native library of these sources

    @property
    def checkpoint(self) -> Path:
        return self.folder / self.sizes

    def of(self, contestant: Contestant) -> Path:
        return self.folder / f"{self.sizes}{contestant.artifact}"

    def python(self, maker: str) -> Path:
        """The interpreter of a maker's environment."""
        return Path(sys.executable) if maker == OURS else self.folder / _NAMES[maker] / "bin" / "python"

    def check(self, contestant: Contestant) -> None:
        """Raises InputError for something that was not made."""
        for path in (self.python(contestant.maker), self.of(contestant)):
            if not path.exists():
                raise InputError(f"{contestant.name}: not made yet", where=path, fix="leave --measure-only out")

    def make(self, contestants: list[Contestant], rebuild: bool = False) -> dict[str, str]:
        """Make what is missing; `rebuild`: also bundles that are there. Returns who is left out and why."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.exists():
            self.say(f"write the checkpoint {self.checkpoint}")
            _whole(self.checkpoint, lambda path: checkpoint.write(path, checkpoint.SIZES[self.sizes]))
        left_out: dict[str, str] = {}
        made: set[Path] = set()
        for contestant in contestants:
            out = self.of(contestant)
            try:
                if contestant.maker == OURS:
                    self._native()
                else:
                    self._environment(contestant.maker)
                if out not in made and (not out.exists() or (rebuild and contestant.maker == OURS)):
                    self.say(f"make {out.name}")
                    self._convert(contestant, out)
                made.add(out)
            except Failed as error:
                if contestant.maker == OURS:
                    raise
                left_out[contestant.name] = error.what
        return left_out

    def _native(self) -> None:
        """Compile the CPU ops of these sources, unless they are there."""
        code = "from cm_export.plugins.cpu import library; library.built()"
        self._run([sys.executable, "-c", code], "native library")

    def _environment(self, maker: str) -> None:
        """A virtual environment with exactly the versions of requirements/, made anew where those changed."""
        name = _NAMES[maker]
        folder, wanted = self.folder / name, HERE / "requirements" / f"{name}.txt"
        digest, stamp = hashlib.sha256(wanted.read_bytes()).hexdigest(), self.folder / name / "made-of.txt"
        if stamp.is_file() and stamp.read_text() == digest:
            return
        self.say(f"make the environment of {maker}")
        shutil.rmtree(folder, ignore_errors=True)
        self._run([sys.executable, "-m", "venv", str(folder)], name)
        # --no-deps: the file names every package, and optimum-intel would bring a torchvision that it does without here.
        install = [str(self.python(maker)), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(wanted)]
        self._run(install, name)
        stamp.write_text(digest)

    def _convert(self, contestant: Contestant, out: Path) -> None:
        bits = contestant.artifact.removesuffix(".plan").rpartition("-")[2]
        if contestant.maker == OURS:
            build = [sys.executable, "-m", "cm_export", "build", "--model", str(self.checkpoint), "--out", str(out)]
            self._run([*build, "--weights", bits, *RECIPE, "--threads", str(self.threads), "--quiet"], out.name)
            return
        start = [str(self.python(contestant.maker))]
        if contestant.maker == OPENVINO:
            start = [str(self.folder / _NAMES[OPENVINO] / "bin" / "optimum-cli"), "export", "openvino", "--model"]
            start += [str(self.checkpoint), "--task", "image-text-to-text", "--weight-format", bits]
        _whole(out, lambda path: self._run([*start, str(path)], out.name))

    def _run(self, command: list[str], what: str) -> None:
        """Raises Failed with the last line of what the command said; all of it is kept in a file."""
        log = self.folder / "log" / f"make-{what.replace(' ', '-')}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment, check=False)
        if done.returncode:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["nothing"]
            raise Failed(f"{what}: {said[-1].strip()}", where=log, fix="read that file")


_NAMES = {OPENVINO: "openvino"}


def _whole(out: Path, make: Callable[[Path], None]) -> None:
    """`make` writes a folder under another name, which becomes `out` once it is finished."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    make(part)
    part.rename(out)
