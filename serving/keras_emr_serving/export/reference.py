"""What the source model says, on the backend it was trained on: the served one must agree."""

from __future__ import annotations

import numpy as np

from keras_emr.errors import UserError


def gate_images(data, n, epsilon, seed=0):
    """Clean images and labels for the parity gate: of the test set, then of the validation set.

    Where there are fewer than ``n`` the images come again, with uniform noise up to ``epsilon``.

    Args:
        data: :class:`keras_emr.data.Dataset`.
        n: how many.
        epsilon: radius of the noise.
        seed: of the noise.

    Returns:
        ``(x, y)``: float32 images (n, H, W, C) in [0, 1] and int32 labels (n,).
    """
    x = np.concatenate([data.x_test[:n], data.x_val[:n]])[:n]
    y = np.concatenate([data.y_test[:n], data.y_val[:n]])[:n]
    own = len(x)
    again = np.arange(n) % own
    x, y = x[again], y[again]
    noise = np.random.default_rng(seed).uniform(-epsilon, epsilon, x[own:].shape)
    x[own:] = np.clip(x[own:] + noise, 0, 1)
    return x.astype("float32"), y.astype("int32")


def reference(path, x, epsilon, norm, classes, *, steps=10, seed=0):
    """Logits of the source model on images and on adversarial ones, on this process's backend.

    The adversarial images are those of keras_emr's PGD against the model's own predictions, so
    that every image is attacked.

    Args:
        path: .keras file.
        x: (N, H, W, C) images in [0, 1].
        epsilon, norm: threat model.
        classes: number of classes in the data.
        steps: of PGD.
        seed: of its start.

    Returns:
        Dictionary: ``images`` (2N, H, W, C), clean ones first, ``logits`` (2N, K), ``changed``:
        how many adversarial images differ from their clean ones.

    Raises:
        UserError: the file cannot be loaded, is no classifier to logits, or does not fit the data.
    """
    from keras_emr.attacks.pgd import PGD
    from keras_emr.evaluation.inputs import require_finite, require_fit
    from keras_emr.evaluation.robust_accuracy import evaluate_attack
    from keras_emr.evaluation.target import KerasTarget, auto_batch_size
    from keras_emr.models.loading import load_model

    model = load_model(path)
    require_fit(model, x.shape[1:], classes)
    size = min(256, auto_batch_size(model, x.shape[1:]))
    target = KerasTarget(model, size)
    if target.network.seed_states and not _repeats(target, x[:2]):
        raise UserError(
            f"the model is random at inference. Received: {path.name!r}, which gives other logits "
            "for the same images. Expected a deterministic model."
        )
    clean = target.predict(x)
    require_finite(np.isfinite(clean).all(axis=1))
    attack = PGD(epsilon, norm, steps=steps)
    found = evaluate_attack(target, attack, x, clean.argmax(axis=1), batch_size=size, seed=seed)
    logits = np.concatenate([clean, target.predict(found.x_adv)])
    return {
        "images": np.concatenate([x, found.x_adv]).astype("float32"),
        "logits": logits,
        "changed": int((found.x_adv != x).any(axis=(1, 2, 3)).sum()),
    }


def _repeats(target, x):
    return np.array_equal(target.predict(x), target.predict(x))
