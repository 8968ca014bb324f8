"""The finalists under a strong attack, on validation data; the final order; the Pareto front."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from keras_emr.training.run_folder import RunFolder


def finalists(results, k):
    """The ``k`` best trials: by score, the earlier one first; of a run only its last trial.

    Args:
        results: list of :class:`keras_emr.tuning.trials.Result`.
        k: how many.
    """
    return ranked(results)[:k]


def ranked(results, strong=None):
    """Trials that have a model, best first; of a run that others went on from only the last.

    Args:
        results: list of :class:`Result`.
        strong: ``{trial: score}`` of those that come first, by it.
    """
    strong = strong or {}
    further = {result.continues for result in results if result.ok}
    held = [r for r in results if r.ok and r.epoch is not None and r.trial not in further]
    return sorted(held, key=lambda r: (-strong.get(r.trial, -1.0), -r.score, r.trial))


def strong_score(path, attacks, x, y, *, progress=None, tick=None):
    """Accuracy of a trial's ``best.keras`` under ``attacks``, kept in its ``final.json``.

    What was interrupted goes on where it was; what is there already is not done again.

    Args:
        path: the trial's folder.
        attacks: :class:`keras_emr.evaluation.autoattack.AutoAttack`.
        x, y: validation images (N, H, W, C) and labels (N,): never the test set.
        progress: called with the attack's name, runs done (a fraction) and their number.
        tick: called after every step of an attack.

    Returns:
        Dictionary: ``clean``, ``robust``, ``n``, ``attack`` (its settings).
    """
    import keras

    path = Path(path)
    settings = json.loads(json.dumps(attacks.settings()))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file, state = path / "final.json", path / f"final-{digest[:8]}.npz"
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["attack"] == settings and kept["n"] == len(x):
            return kept
    model = keras.saving.load_model(path / "best.keras")
    result = attacks.run(model, x, y, state=state, progress=progress, tick=tick)
    found = {
        "clean": result.accuracy,
        "robust": result.robust_accuracy,
        "n": len(x),
        "attack": settings,
    }
    RunFolder.write_json(file, found)
    state.unlink(missing_ok=True)
    return found


def pareto(points):
    """Names of the points that none dominates in (clean, robust): no other is as good in both
    and better in one.

    Args:
        points: ``{name: (clean, robust)}``.
    """

    def dominated(a):
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in points.values())

    return [name for name, point in points.items() if not dominated(point)]
