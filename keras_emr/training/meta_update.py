"""One update of a learned maximizer's weights phi, by its own optimizer."""

from keras import ops

from keras_emr import backend


def ascend(optimizer, gradients, variables):
    """Move ``variables`` up ``gradients``, unless one of them is not finite.

    A skipped update leaves the variables and every slot of the optimizer as they were.

    Args:
        optimizer: built Keras optimizer; it minimises, so it is handed the negative.
        gradients: list of tensors, of the objective to be raised.
        variables: list of Keras variables.

    Returns:
        Scalar, 1.0 if the update was skipped, else 0.0.
    """
    finite = ops.all(ops.stack([ops.all(ops.isfinite(g)) for g in gradients]))
    state = [*variables, *optimizer.variables]
    before = [ops.copy(v.value) for v in state]
    safe = [ops.where(finite, -g, ops.zeros_like(g)) for g in gradients]
    backend.update(optimizer, safe, variables)
    for variable, old in zip(state, before, strict=True):
        variable.assign(ops.where(finite, variable.value, old))
    return 1.0 - ops.cast(finite, "float32")
