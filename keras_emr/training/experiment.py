"""A training run on disk, from data to ``best.keras``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from keras_emr import distribution
from keras_emr.data.batches import EvalBatches, TrainBatches
from keras_emr.data.stored import StoredImages
from keras_emr.errors import UserError
from keras_emr.part import whole
from keras_emr.training import snapshot
from keras_emr.training.callbacks import (
    EffectiveMarginLogger,
    Interrupted,
    OverfittingGuard,
    Recorder,
    StopEarly,
    StopOnNonFinite,
)
from keras_emr.training.checkpointing import Checkpointer
from keras_emr.training.checkpoints import Checkpoints, Position, warn
from keras_emr.training.fitting import fit_from, warm_up
from keras_emr.training.intervals import Every
from keras_emr.training.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedRun:
    """What a run left: its folder, its history, the best epoch's row and the monitored log."""

    folder: RunFolder
    history: list[dict]
    best: dict
    monitor: str

    @property
    def seconds(self) -> float:
        """Time of all epochs: steps, validation, margins and saving, compilation included."""
        return sum(row["seconds"] for row in self.history)


def train(
    classifier,
    data,
    folder,
    *,
    epochs,
    batch_size=64,
    seed=0,
    resume=False,
    stop=None,
    callbacks=(),
    maximizer_warmup=0,
    patience=None,
    overfitting_guard=None,
    augment="none",
    extra=None,
    mixing=None,
    checkpoint_every="10m",
    notify=warn,
):
    """Train ``classifier`` and keep the run in ``folder``.

    ``best.keras`` is the epoch with the highest robust accuracy on the *validation* set (clean
    accuracy for a defense without attack); the test set is never looked at. Both it and
    ``last.keras`` are the plain inner model, with averaged weights where the classifier averages.
    The order of the examples is a function of (seed, epoch).

    ``checkpoints/`` holds the two newest checkpoints. A run that was killed at any moment, and is
    resumed, ends with the weights, optimizer state and history (but for ``seconds``) that it
    would have had, bit for bit on CPU.

    Args:
        classifier: compiled :class:`RobustClassifier`; with ``resume`` made as the run's was: it
            is given the checkpoint's state, learning rate included.
        data: :class:`keras_emr.data.Dataset`.
        folder: path of the run.
        epochs: epochs in all, >= 1.
        batch_size: full batches only; the remainder of an epoch is left out.
        seed: of the order of the examples.
        resume: continue at the step of the newest whole checkpoint in ``folder``; start where
            nothing was trained yet.
        stop: a :class:`StopOnSignal` that the caller can trip.
        callbacks: further Keras callbacks. What they remember is kept in checkpoints if they have
            ``get_state() -> what JSON can hold`` and ``set_state(state)``.
        maximizer_warmup: batches on which a learned maximizer is trained alone before the first
            epoch, against the untrained classifier.
        patience: end when so many epochs in a row were no better than the best; ``None``: never.
        overfitting_guard: largest fall of validation robust accuracy below its best, e.g. 0.2;
            ``None``: any.
        augment: augmentation of the training images, see :mod:`keras_emr.data.augment`.
        extra: :class:`keras_emr.data.extra.ExtraData` to mix into the training batches.
        mixing: :class:`keras_emr.data.mixing.Mixing` of the training batches.
        checkpoint_every: how often to write a checkpoint inside an epoch, beside those at each
            epoch's end and when interrupted: ``90s``, ``10m``, ``2h`` or ``500steps``.
        notify: told of every damaged checkpoint that is skipped, one line each.

    Returns:
        :class:`TrainedRun`.

    Raises:
        UserError: bad arguments; no checkpoint can be used though training had begun; the
            checkpoint is of another model or data set, or of a later version of keras_emr.
        NotWritten: a file could not be written, as on a full disk; the last checkpoint is whole.
        TrainingDiverged: the loss became NaN or infinite, or robust accuracy fell by more than
            ``overfitting_guard`` (:class:`CatastrophicOverfitting`); the last good epoch is kept.
        Interrupted: ``stop`` was tripped; the checkpoint and ``last.keras`` are of that moment.
    """
    whole("epochs", epochs, 1)
    every = Every.parse(checkpoint_every)
    if patience is not None:
        whole("patience", patience, 1)
    group = distribution.current()
    share = group.share if group else (0, 1)
    batches = TrainBatches(
        data.x_train,
        data.y_train,
        batch_size,
        seed,
        augment,
        extra,
        mixing,
        replays=classifier.defense.replays,
        numbered=classifier.defense.needs_margins,
        share=share,
    )
    if group:
        group.check_batch(batches.batch_size)
    classifier._build_for(batches)
    if not classifier.optimizer.built:  # a second time is not harmless with loss scaling
        classifier.optimizer.build(classifier.trainable_variables)
    folder = RunFolder(folder)
    folder.prepare()
    identity = snapshot.identity(
        classifier,
        data,
        batch_size=batch_size,
        data_seed=seed,
        augment=augment,
        extra_data=f"{len(extra.x)} at {extra.ratio}" if extra else None,
        mixing=mixing and repr(mixing),
        maximizer_warmup=maximizer_warmup,
    )
    checkpoints = Checkpoints(folder.checkpoints, notify)
    found = _take_up(classifier, checkpoints, identity, folder) if resume else None
    rows = found.state["history"] if found else []
    attacked = classifier.defense.needs_adversarial
    monitor = "val_robust_accuracy" if attacked else "val_accuracy"
    recorder = Recorder(folder, monitor, rows)
    keeper = Checkpointer(checkpoints, identity, recorder, len(batches), every, stop, callbacks)
    keeper.set_model(classifier)
    if not found:
        checkpoints.clear()
        keeper.save(Position(-1 if maximizer_warmup else 0, 0))
    evaluation = classifier.eval_attack
    validation = (data.x_val, data.y_val)
    margins = (
        [EffectiveMarginLogger(*validation, evaluation.epsilon, evaluation.norm, keeper.check)]
        if evaluation
        else []
    )
    # Order matters: a diverged epoch is never saved, and margins are logged before the recorder.
    guards = [StopOnNonFinite()]
    if overfitting_guard is not None and attacked:
        guards.append(OverfittingGuard(overfitting_guard, rows))
    early = StopEarly(recorder, math.inf if patience is None else patience)
    ordered = [*guards, *margins, recorder, early, *callbacks]
    if len(rows) < epochs and not early.due:
        try:
            if maximizer_warmup and (not found or found.position.epoch < 0):
                warm_up(classifier, batches, maximizer_warmup, keeper, found)
            fit_from(classifier, batches, _validation(*validation), epochs, ordered, keeper, found)
        except Interrupted:
            with classifier.averaged():
                folder.save_model(classifier.model, folder.last)
            raise
    return TrainedRun(folder, recorder.rows, recorder.best, monitor)


def _take_up(classifier, checkpoints, identity, folder):
    """Put ``classifier`` where the newest checkpoint stands, and the history beside it."""
    found = checkpoints.newest(identity)
    if found is None:
        if folder.has_results():
            raise UserError(
                f"no checkpoint to resume from. Received: {str(folder.path)!r}, whose training had "
                "begun. Start again with --overwrite, or in another folder."
            )
        return None
    snapshot.restore(classifier, found.arrays)
    if found.state["history"] or folder.history.exists():
        folder.write_history(found.state["history"])
    return replace(found, arrays=snapshot.passing(found.arrays))


def _validation(x, y):
    """What ``evaluate`` takes: images as they are with a batch size, or read batch by batch."""
    size = _even_batches(len(x))
    if distribution.current():
        return (distribution.even_batches(x, y, size),)
    return (EvalBatches(x, y, size),) if isinstance(x, StoredImages) else (x, y, size)


def _even_batches(n, largest=256):
    """The batch size that splits ``n`` into equal batches, as far as it goes, up to ``largest``."""
    return -(-n // -(-n // largest))
