"""`import tensorrt` on a fake device: the library of fake_tensorrt_runtime, whose engines compute in the test process."""

import os
import sys
from functools import partial

from cuda.bindings import runtime
from fake_tensorrt_runtime import Library
from fake_workshop import Remote

program = partial(Remote, os.environ["FAKE_WORKSHOP"])
sys.modules[__name__] = Library(os.environ["FAKE_TENSORRT"], runtime, False, program)
