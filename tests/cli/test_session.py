"""What the command line sets up before keras is imported."""

import sys

import pytest

from tests.cli.harness import python

FAULTS = """
import ctypes, resource, sys
from keras_emr_cli import session

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
if sys.argv[1] == "yes":
    session._keep_freed_memory()

def allocate(size=2**24):
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    libc.memset(block, 1, ctypes.c_size_t(size))
    libc.free(block)

allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    allocate()
    allocate(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library's own thresholds")
@pytest.mark.parametrize(
    "keep, environment, few",
    [
        ("yes", {}, True),
        ("no", {}, False),
        # The user's own wish stands.
        ("yes", {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "4096"}, False),
    ],
)
def test_freed_memory_is_kept(keep, environment, few):
    done = python("-c", FAULTS, keep, **environment)
    assert done.code == 0, done.err[-2000:]
    faults = int(done.out)
    assert faults < 100 if few else faults > 2000, faults
