"""What the command line sets up before keras is imported."""

import os
import sys

import pytest

from keras_emr_cli import session
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


@pytest.fixture
def chosen(monkeypatch):
    """``select_backend`` without the import, and the variables that it set."""
    for name in ("TF_ENABLE_ONEDNN_OPTS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session.importlib, "import_module", lambda name: None)

    def choose(backend, jaxlib="0.10.2", **given):
        monkeypatch.setattr(session.metadata, "version", lambda name: jaxlib)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        session.select_backend(backend)
        return os.environ.get("TF_ENABLE_ONEDNN_OPTS"), os.environ.get("XLA_FLAGS")

    return choose


def test_onednn_is_turned_on_for_tensorflow_unless_the_user_says_otherwise(chosen):
    assert chosen("tensorflow") == ("1", None)
    assert os.environ["KERAS_BACKEND"] == "tensorflow"
    assert chosen("tensorflow", TF_ENABLE_ONEDNN_OPTS="0") == ("0", None)


def test_onednn_is_turned_on_wherever_keras_loads_tensorflow_beside_another_backend(chosen):
    assert chosen("jax")[0] == "1"
    assert chosen("torch", TF_ENABLE_ONEDNN_OPTS="0")[0] == "0"


SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"
FUSION = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("", [f"{SCHEDULER}=false", f"{FUSION}="]),
        ("--mine=1", ["--mine=1", f"{SCHEDULER}=false", f"{FUSION}="]),
        (f"{SCHEDULER}=true", [f"{SCHEDULER}=true", f"{FUSION}="]),
        (f"{FUSION}=dot --mine=1", [f"{FUSION}=dot", "--mine=1", f"{SCHEDULER}=false"]),
    ],
)
def test_xla_gets_the_flags_that_the_user_did_not_give(chosen, given, flags):
    _, found = chosen("jax", XLA_FLAGS=given)
    assert found.split() == flags


@pytest.mark.parametrize("version", ["0.9.2", "0.11.0", "1.10.0"])
def test_xla_gets_no_flags_that_another_version_may_not_know(chosen, version):
    assert chosen("jax", version, XLA_FLAGS="--mine=1")[1] == "--mine=1"


def test_what_is_imported_is_not_collected():
    code = """
import gc
from keras_emr_cli.session import select_backend
before, counts = gc.get_stats()[0]["collections"], []
for _ in range(2):
    select_backend("tensorflow")
    counts.append(gc.get_freeze_count())
collections = gc.get_stats()[0]["collections"] - before
print(gc.isenabled(), counts[0] > 100_000, counts[0] == counts[1], collections < 10)
"""
    done = python("-c", code)
    assert done.out.split() == ["True"] * 4, (done.out, done.err)
