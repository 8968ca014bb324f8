"""Tests for a machine with a GPU; nothing of this folder runs unless it is asked for:

CUDA_VISIBLE_DEVICES=0 JAX_ENABLE_X64=0 XLA_PYTHON_CLIENT_PREALLOCATE=false \
    KERAS_BACKEND=jax python -m pytest -m gpu tests/gpu
"""

import keras
import pytest


def devices():
    """Kinds of the backend's devices: ``gpu``, ``cpu``."""
    name = keras.backend.backend()
    if name == "jax":
        import jax

        return {device.platform for device in jax.devices()}
    if name == "torch":
        import torch

        return {"gpu"} if torch.cuda.is_available() else {"cpu"}
    import tensorflow as tf

    return {device.device_type.lower() for device in tf.config.list_physical_devices()}


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """An error, no skip, where there is none: who asks for these tests wants them run."""
    if "gpu" not in devices():
        pytest.fail(
            f"{keras.backend.backend()} sees no GPU. Set CUDA_VISIBLE_DEVICES; the tests hide "
            "GPUs where it is not set.",
            pytrace=False,
        )
