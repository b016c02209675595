"""The hashes of a bundle's large files, compared while other things go on: tensor by tensor, several at once.

manifest: pieces = {file: {"": sha256 of its header, tensor: sha256, ...}}      a file without pieces is hashed as one

What nobody reads is not hashed: the tower while a question is about text, float32 weights in whose place low-bit ones stand.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ..base.errors import BundleError
from ..base.hashes import file_part_sha256
from ..base.jobs import Jobs
from .weights import HEADER, places


class FileChecks:
    """The hashes of one file."""

    def __init__(self, jobs: Jobs, file: Path, whole: str, pieces: Mapping[str, str], mend: str):
        """`whole`: sha256 of the file, `pieces`: of its parts, by name; `mend`: for errors. Raises BundleError."""
        self._jobs, self._file, self._whole, self._mend = jobs, file, whole, mend
        self._places = places(file) if pieces else {}
        self._pieces = pieces if pieces.keys() == self._places.keys() else {}

    @property
    def tensors(self) -> set[str]:
        """Names that `expect` knows."""
        return self._pieces.keys() - {HEADER}

    def expect(self, names: Iterable[str] | None = None) -> None:
        """These tensors (None: all) will be read. Whoever shows what was made of them waits for the jobs before."""
        if not self._pieces:
            self._jobs.put(self._file, partial(self._compare, (0, self._file.stat().st_size), self._whole))
            return
        wanted = {HEADER, *(self.tensors if names is None else names)}
        # The largest first: the threads then end together.
        for name in sorted(wanted, key=lambda n: -self._places[n][1]):
            self._jobs.put((self._file, name), partial(self._compare, self._places[name], self._pieces[name]))

    def before(self, name: str) -> None:
        """Called when a tensor is about to be read: one that nobody expected is compared first. Raises BundleError."""
        if self._file not in self._jobs and (self._file, name) not in self._jobs:
            self.expect([name])
            self._jobs.wait()

    def _compare(self, place: tuple[int, int], expected: str) -> None:
        try:
            with open(self._file, "rb", buffering=0) as file:
                found = file_part_sha256(file, *place)
        except OSError as e:
            raise BundleError(f"cannot be read ({e.strerror})", where=self._file) from e
        if found != expected:
            raise BundleError("its contents do not match the manifest (sha256)", where=self._file, fix=self._mend)
