"""What the environment of a test's process says."""

import os

# Half of JAX's time is XLA's, on functions that run once or twice: it need not try hard. The pinned
# jaxlib knows these flags; one that does not would abort.
PLAIN_XLA = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def environment(backend, **more):
    """Of a process on ``backend``."""
    found = {**os.environ, "KERAS_BACKEND": backend, **more}
    if backend == "jax":
        found.setdefault("XLA_FLAGS", PLAIN_XLA)
    return found
