"""The figures of a process are its own."""

import subprocess
import sys

OWN = """
from cm_export.base.environment import peak_memory_bytes
before = peak_memory_bytes()
held = bytearray(b"x") * 2**27
print(before, peak_memory_bytes())
"""
LARGE = """
import subprocess, sys
held = bytearray(b"x") * 2**29
print(subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True, close_fds=True).stdout)
"""


def test_the_peak_of_memory_is_that_of_this_process_and_not_of_the_one_that_started_it():
    done = subprocess.run([sys.executable, "-c", LARGE, OWN], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 2**22 < before < 2**28
    assert 2**27 <= after - before < 2**28
