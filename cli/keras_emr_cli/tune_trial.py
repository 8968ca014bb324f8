"""From a trial's values to a trained run. Imports keras: call it after ``select_backend``."""

from __future__ import annotations

from keras_emr_cli.settings import Merged
from keras_emr_cli.train_settings import TRAIN

_SETTINGS = {setting.name: setting for setting in TRAIN}


def trial_settings(settings, values):
    """The settings of ``train`` for a trial: the fixed ones and its ``values``."""
    merged = {name: settings.values[name] for name in _SETTINGS if name != "out"}
    for name, value in values.items():
        merged[name] = _SETTINGS[name].parse(value, f"space: {name}")
    merged |= {"val_steps": settings.prune_steps, "baseline": False, "out": None}
    return Merged(merged, settings.origins)


def first_values(space):
    """Values of a trial: the first of every list, the low end of every range."""
    values = {}
    for parameter in space:
        if all(values.get(name) in allowed for name, allowed in parameter.when.items()):
            low = getattr(parameter, "low", None)
            values[parameter.name] = parameter.values[0] if low is None else low
    return values


def referee(settings):
    """The cheap attack: PGD in the ball in which all trials are judged."""
    from keras_emr.attacks.pgd import PGD

    return PGD(*ball(settings), steps=settings.prune_steps)


def strong_attack(settings):
    """The attack on the finalists, as a suite."""
    from keras_emr.attacks.pgd import PGD
    from keras_emr.evaluation.autoattack import AutoAttack

    epsilon, norm = ball(settings)
    if settings.final_attack == "autoattack":
        return AutoAttack(epsilon, norm, seed=settings.seed)
    steps, restarts = settings.eval_steps, settings.eval_restarts
    attack = PGD(epsilon, norm, steps=steps, restarts=restarts, start="uniform")
    return AutoAttack(epsilon, norm, attacks=[(strong_name(settings), attack)], seed=settings.seed)


def strong_name(settings):
    """What tables call that attack."""
    if settings.final_attack == "autoattack":
        return "AutoAttack"
    return f"PGD-{settings.eval_steps}x{settings.eval_restarts}"


def ball(settings):
    """Epsilon and norm in which all trials are judged."""
    epsilon = settings.epsilon if settings.judge_epsilon is None else settings.judge_epsilon
    return float(epsilon), settings.judge_norm or settings.norm


class TrainTrial:
    """Trains a trial in its run folder, or goes on with what is there.

    Args:
        settings: of the search, merged.
        data: the data set.
        stop: a ``StopOnSignal``.
        reporter: :class:`keras_emr_cli.reporter.Reporter`.
    """

    def __init__(self, settings, data, stop, reporter):
        self.settings, self.data, self.stop, self.reporter = settings, data, stop, reporter
        self._extra = {}

    def __call__(self, trial, path, callbacks):
        from keras_emr.training.run_folder import RunFolder
        from keras_emr_cli.build import classifier, steps_per_epoch
        from keras_emr_cli.progress import EpochReport
        from keras_emr_cli.train_run import describe, train_run

        s = trial_settings(self.settings, trial.values)
        extra = self.extra(s)
        model = classifier(s, self.data, extra=extra, referee=referee(self.settings))
        folder = RunFolder(path)
        folder.prepare()
        begun = any((folder.path / "checkpoints").glob("*"))
        describe(folder, s, self.data, extra)
        # A schedule over all epochs stays the same whatever epoch Hyperband ends a round at.
        epochs = min(trial.epochs or s.epochs, s.epochs)
        steps = steps_per_epoch(s, self.data)
        report = EpochReport(self.reporter, f"trial {trial.name}", epochs, steps)
        return train_run(
            s,
            self.data,
            extra,
            model,
            path,
            resume=begun,
            stop=self.stop,
            callbacks=[report, *callbacks],
            epochs=epochs,
            **({"hparams": dict(trial.values)} if s.tensorboard else {}),
        )

    def extra(self, s):
        """The extra training data of a trial, read once."""
        from keras_emr_cli.load_data import load_extra

        key = (s.extra_data, s.extra_ratio)
        if key not in self._extra:
            self._extra = {key: load_extra(s, self.data)}
        found = self._extra[key]
        if found is not None:
            found.share_of(s.batch_size)
        return found
