"""A training run on disk, from data to ``best.keras``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import keras

from keras_emr.data.batches import EvalBatches, TrainBatches
from keras_emr.data.stored import StoredImages
from keras_emr.errors import UserError
from keras_emr.part import whole
from keras_emr.training.callbacks import (
    EffectiveMarginLogger,
    Interrupted,
    OverfittingGuard,
    Recorder,
    StopAfter,
    StopEarly,
    StopOnNonFinite,
)
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
):
    """Train ``classifier`` and keep the run in ``folder``.

    ``best.keras`` is the epoch with the highest robust accuracy on the *validation* set (clean
    accuracy for a defense without attack); the test set is never looked at. Both it and
    ``last.keras`` are the plain inner model, with averaged weights where the classifier averages.
    The order of the examples is a function of (seed, epoch).

    Args:
        classifier: compiled :class:`RobustClassifier`; with ``resume`` it is replaced by the one
            in the checkpoint.
        data: :class:`keras_emr.data.Dataset`.
        folder: path of the run.
        epochs: epochs in all, >= 1.
        batch_size: full batches only; the remainder of an epoch is left out.
        seed: of the order of the examples.
        resume: continue after the last finished epoch found in ``folder``.
        stop: a :class:`StopOnSignal` that the caller can trip.
        callbacks: further Keras callbacks.
        maximizer_warmup: batches on which a learned maximizer is trained alone before the first
            epoch, against the untrained classifier.
        patience: end when so many epochs in a row were no better than the best; ``None``: never.
        overfitting_guard: largest fall of validation robust accuracy below its best, e.g. 0.2;
            ``None``: any.
        augment: augmentation of the training images, see :mod:`keras_emr.data.augment`.
        extra: :class:`keras_emr.data.extra.ExtraData` to mix into the training batches.
        mixing: :class:`keras_emr.data.mixing.Mixing` of the training batches.

    Returns:
        :class:`TrainedRun`.

    Raises:
        UserError: bad arguments, or the folder has no checkpoint to resume.
        TrainingDiverged: the loss became NaN or infinite, or robust accuracy fell by more than
            ``overfitting_guard`` (:class:`CatastrophicOverfitting`); the last good epoch is kept.
        Interrupted: ``stop`` was tripped; ``last.keras`` holds the weights of that moment.
    """
    whole("epochs", epochs, 1)
    folder = RunFolder(folder)
    folder.prepare()
    rows = []
    if resume and folder.state.exists():
        classifier = _load(folder.state)
        finished = int(classifier.epoch.value) + 1
        rows = folder.read_history()[:finished]
        if len(rows) < finished:
            raise UserError(
                f"history.jsonl does not match the checkpoint. Received: {len(rows)} epochs for a "
                f"checkpoint of {finished}. Start again with --overwrite."
            )
        folder.write_history(rows)
    attacked = classifier.defense.needs_adversarial
    monitor = "val_robust_accuracy" if attacked else "val_accuracy"
    recorder = Recorder(folder, monitor, rows)
    evaluation = classifier.eval_attack
    margins = (
        [EffectiveMarginLogger(data.x_val, data.y_val, evaluation.epsilon, evaluation.norm)]
        if evaluation
        else []
    )
    # Order matters: a diverged epoch is never saved, and margins are logged before the recorder.
    guards = [StopOnNonFinite()]
    if overfitting_guard is not None and attacked:
        guards.append(OverfittingGuard(overfitting_guard, rows))
    early = StopEarly(recorder, math.inf if patience is None else whole("patience", patience, 1))
    ordered = [*guards, *margins, recorder, early, *callbacks, *([stop] if stop else [])]
    classifier.optimizer.build(classifier.trainable_variables)
    if len(rows) < epochs and not early.due:
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
        )
        try:
            if maximizer_warmup and not rows:
                classifier.fit_maximizer(
                    batches,
                    epochs=-(-maximizer_warmup // len(batches)),
                    shuffle=False,
                    verbose=0,
                    callbacks=[StopAfter(maximizer_warmup), *([stop] if stop else [])],
                )
            classifier.fit(
                batches,
                **_validation(data.x_val, data.y_val),
                epochs=epochs,
                initial_epoch=len(rows),
                shuffle=False,
                verbose=0,
                callbacks=ordered,
            )
        except Interrupted:
            with classifier.averaged():
                folder.save_model(classifier.model, folder.last)
            raise
    return TrainedRun(folder, recorder.rows, recorder.best, monitor)


def _load(path):
    try:
        return keras.models.load_model(path)
    except Exception as error:  # a damaged archive can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"checkpoint cannot be loaded: {reason} Received: {str(path)!r}. Start again with "
            "--overwrite."
        ) from None


def _validation(x, y):
    """How ``fit`` takes validation images: as they are, or read batch by batch."""
    size = _even_batches(len(x))
    if isinstance(x, StoredImages):
        return {"validation_data": EvalBatches(x, y, size)}
    return {"validation_data": (x, y), "validation_batch_size": size}


def _even_batches(n, largest=256):
    """The batch size that splits ``n`` into equal batches, as far as it goes, up to ``largest``."""
    return -(-n // -(-n // largest))
