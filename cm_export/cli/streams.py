"""stdin, stdout and stderr as they may be: closed, or a pipe whose reader has gone.

A file that is opened while number 1 is closed gets that number, and what a library prints is written into the file.
"""

import os
import sys

from ..base.errors import InputError


def open_all() -> None:
    """Let no file get the number of a closed stream. Raises InputError where stdout is closed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stderr is None:  # print(file=None) would write to stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the program
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise InputError("is closed, so there is no place for the result", where="stdout", fix="send it to /dev/null")


def drop_stdout() -> None:
    """What is still in its buffer cannot be written: the interpreter must not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
