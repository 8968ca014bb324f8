"""Penalties added to any defense's loss, one per file.

A regularizer is a callable ``(network, x, x_adv, y, sampler) -> (N,)`` with ``name``, ``weight``,
``scale(epoch, batch_size)``, ``check(model, attacked)`` and ``get_config``. One that asks
``network.vjp`` of images as they are may say so by ``slopes_at(attacked)``: a pass is saved then.
"""
