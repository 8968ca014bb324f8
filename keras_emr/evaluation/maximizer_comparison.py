"""Inner maximizers side by side on one frozen classifier."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_emr.attacks import TRAINED_ATTACKS
from keras_emr.attacks.apgd import APGD
from keras_emr.attacks.learned import LearnedAttack
from keras_emr.attacks.line_search import LineSearch
from keras_emr.attacks.pgd import PGD
from keras_emr.data.batches import TrainBatches
from keras_emr.errors import unknown
from keras_emr.evaluation.inner_loss import InnerLossMeter, Judge, passes
from keras_emr.evaluation.timing import in_turns, quartiles, training_seconds
from keras_emr.maximizers import make_maximizer
from keras_emr.maximizers.recurrent import CELLS
from keras_emr.part import whole
from keras_emr.training.classifier import RobustClassifier

STEP_SIZES = (0.1, 0.25, 0.5, 1.0)  # times epsilon: what PGD is tuned over
TUNED = "pgd (tuned)"
_FIXED = {"pgd": PGD, "line-search": LineSearch, "apgd": APGD}
METHODS = (*_FIXED, *TRAINED_ATTACKS)


@dataclass
class _Contender:
    """A method, its attack for its own number of steps T, and what it learned with."""

    name: str
    attack: Any
    fit: dict | None = None

    @property
    def restarts_anew(self):
        """Whether its steps depend on how many there will be."""
        own_rule = isinstance(self.attack, PGD) and self.attack.step_size is None
        return own_rule or isinstance(self.attack, APGD)

    def for_steps(self, steps):
        if steps == self.attack.steps:
            return self.attack
        return type(self.attack)(**{**self.attack.get_config(), "steps": steps})

    @property
    def parameters(self):
        return sum(int(np.prod(v.shape)) for v in self.attack.variables)


class MaximizerComparison:
    """Compares inner maximizers in the Linf ball; call it with one frozen model after another.

    The learned ones are trained against each model anew, on training data; all are measured on
    the first test images, each from its own start. PGD appears twice: with its default step size,
    and tuned: for each number of steps the best of the default and ``STEP_SIZES``, chosen *on the
    images that are reported*, which favours PGD.

    Args:
        data: :class:`keras_emr.data.Dataset`.
        epsilon: radius of the ball.
        methods: names among ``METHODS``.
        steps: T; a generator has its own, 1 or 2.
        more: multiples of T that each method is also run for.
        n_examples: the first N test images; ``None``: all.
        batch_size: of the training, the attacks and the times.
        preprocessing: of the lstm and the rnn.
        start: of their attacks.
        fit_epochs: epochs that a learned maximizer is trained for; 0: left untrained.
        learning_rate: of that training (Adam, global norm clipped at 1).
        rounds: of the time measurements.
        seed: of the maximizers' weights, the order of the examples and all noise.
        say: called with a line of text.
        progress: called with a title, returns a function ``(done, total)``.
    """

    def __init__(
        self,
        data,
        epsilon,
        methods=METHODS,
        *,
        steps=10,
        more=(1, 2, 4),
        n_examples=None,
        batch_size=128,
        preprocessing="rms",
        start="gaussian",
        fit_epochs=5,
        learning_rate=0.01,
        rounds=5,
        seed=0,
        say=lambda text: None,
        progress=lambda title: lambda done, total: None,
    ):
        for name in methods:
            if name not in METHODS:
                raise unknown("method", name, METHODS)
        self.data, self.epsilon, self.methods = data, epsilon, methods
        self.steps = whole("steps", steps, 1)
        self.more = sorted({1, *(whole("more", m, 1) for m in more)})
        self.x, self.y = data.x_test[:n_examples], data.y_test[:n_examples]
        self.batch_size = min(whole("batch_size", batch_size, 1), len(self.x))
        self.fit_batch_size = min(batch_size, len(data.x_train))
        self.fit_epochs = whole("fit_epochs", fit_epochs, 0)
        self.learning_rate = learning_rate
        self.preprocessing, self.start = preprocessing, start
        self.rounds = whole("rounds", rounds, 1)
        self.seed = seed
        self.say, self.progress = say, progress

    def __call__(self, model, fresh, own=None, title="model"):
        """Compare on ``model``, which is left as it is.

        Args:
            model: Keras classifier to logits.
            fresh: function that returns another copy of the model; the copies are trained.
            own: ``(name, LearnedAttack)``: a trained maximizer to compare too, as it is.
            title: for progress.

        Returns:
            Plain dictionary, ready for JSON: ``methods``, a list, and ``training``, the costs of
            the learned ones in joint training.
        """
        judge = Judge(model)
        contenders = []
        for name in self.methods:
            if name in _FIXED:
                contenders.append(_Contender(name, _FIXED[name](self.epsilon, steps=self.steps)))
            else:
                contenders.append(self._trained(model, name, title))
        if own is not None:
            contenders.append(_Contender(*own))
        measured = []
        for contender in contenders:
            self.say(f"{title}: attack with {contender.name}")
            results = self._measure(model, contender, judge)
            measured.append((contender, *results))
            if contender.name == "pgd":
                measured.append(self._tune(model, judge, *results, title))
        timed = self._times(model, measured, judge, title)
        entries = [
            {**self._entry(contender, runs), **times}
            for (contender, runs, _), times in zip(measured, timed, strict=True)
        ]
        learned = [c for c in contenders if isinstance(c.attack, LearnedAttack)]
        return {"methods": entries, "training": self._training_costs(learned, fresh, title)}

    def _trained(self, model, name, title):
        of_layer, of_attack = {}, {}
        if name in CELLS:
            of_layer = {"preprocessing": self.preprocessing}
            of_attack = {"steps": self.steps, "start": self.start}
        maximizer = make_maximizer(name, seed=self.seed, **of_layer)
        attack = LearnedAttack.named(name, self.epsilon, maximizer=maximizer, **of_attack)
        self.say(f"{title}: train {name} for {self.fit_epochs} epochs")
        return _Contender(name, attack, self._fit(model, attack))

    def _fit(self, model, attack):
        """Train the maximizer against the frozen model; what came of it."""
        robust = RobustClassifier(model, "at", attack=attack, seed=self.seed)
        robust.compile(maximizer_optimizer=self._optimizer())
        batches = TrainBatches(self.data.x_train, self.data.y_train, self.fit_batch_size, self.seed)
        began = time.perf_counter()
        logs = {}
        if self.fit_epochs:
            logs = robust.fit_maximizer(
                batches, epochs=self.fit_epochs, shuffle=False, verbose=0
            ).history
        return {
            "epochs": self.fit_epochs,
            "updates": self.fit_epochs * len(batches),
            "seconds": time.perf_counter() - began,
            "inner_loss": [float(value) for value in logs.get("inner_loss", [])],
            "skipped_updates": int(sum(logs.get("skipped_updates", []))),
        }

    def _optimizer(self):
        return keras.optimizers.Adam(self.learning_rate, global_clipnorm=1.0)

    def _measure(self, model, contender, judge):
        """``(runs, meter for T steps)``: a run per multiple of T, by its number of steps."""
        own = contender.attack.steps
        numbers = [own * multiple for multiple in self.more]
        meters = {}
        if contender.restarts_anew:
            curves = {}
            for steps in numbers:
                attack = contender.for_steps(steps)
                meters[steps] = InnerLossMeter(model, attack, self.batch_size, judge)
                curves[steps] = self._curve(meters[steps], steps, contender.name)
        else:
            meters[own] = InnerLossMeter(model, contender.attack, self.batch_size, judge)
            longest = self._curve(meters[own], max(numbers), contender.name)
            curves = {steps: longest for steps in numbers}
        runs = {steps: _run(steps, own, curves[steps]) for steps in numbers}
        return runs, meters[own]

    def _curve(self, meter, steps, name):
        progress = self.progress(f"attack with {name}")
        return meter.curve(self.x, self.y, steps=steps, seed=self.seed, progress=progress)

    def _tune(self, model, judge, default_runs, default_meter, title):
        """PGD with the best step size for each number of steps, the default one included."""
        self.say(f"{title}: tune the step size of pgd")
        candidates = {None: (default_runs, default_meter)}
        for size in STEP_SIZES:
            attack = PGD(self.epsilon, steps=self.steps, step_size=size * self.epsilon)
            candidates[size] = self._measure(model, _Contender(TUNED, attack), judge)
        runs = {}
        for steps in default_runs:
            size = max(candidates, key=lambda s: candidates[s][0][steps]["final_loss"])
            step_size = (2.5 / steps if size is None else size) * self.epsilon
            runs[steps] = {
                **candidates[size][0][steps],
                "step_size": step_size,
                "tried": [
                    {
                        "step_size": (2.5 / steps if s is None else s) * self.epsilon,
                        "default": s is None,
                        "final_loss": candidates[s][0][steps]["final_loss"],
                    }
                    for s in candidates
                ],
            }
        attack = PGD(self.epsilon, steps=self.steps, step_size=runs[self.steps]["step_size"])
        return (
            _Contender(TUNED, attack),
            runs,
            InnerLossMeter(model, attack, self.batch_size, judge),
        )

    def _times(self, model, measured, judge, title):
        """Seconds per step of one batch, the methods taking turns, and the ratio to PGD-T."""
        self.say(f"{title}: time {len(measured)} attacks in turns")
        names = [contender.name for contender, _, _ in measured]
        meters = [meter for _, _, meter in measured]
        if "pgd" not in names:
            names.append("pgd")
            pgd = PGD(self.epsilon, steps=self.steps)
            meters.append(InnerLossMeter(model, pgd, self.batch_size, judge))
        jobs = [meter.stopwatch(self.x, self.y, seed=self.seed) for meter in meters]
        taken = in_turns(jobs, self.rounds, 2, self.progress("time the attacks"))
        pgd = taken[names.index("pgd")]
        return [
            {
                "seconds": np.median(seconds, axis=0).tolist(),
                "time_relative_to_pgd": quartiles(seconds[:, -1] / pgd[:, -1]),
            }
            for seconds in taken[: len(measured)]
        ]

    def _entry(self, contender, runs):
        attack, own = contender.attack, contender.attack.steps
        entry = {
            "method": contender.name,
            "steps": own,
            "parameters": contender.parameters,
            "attack": attack.describe(),
            "loss": runs[own]["loss"],
            "robust_accuracy": runs[own]["robust_accuracy"],
            "passes": passes(attack),
            "runs": list(runs.values()),
        }
        return entry if contender.fit is None else {**entry, "fit": contender.fit}

    def _training_costs(self, learned, fresh, title):
        """Steps of joint training beside those of PGD training with the same T, in turns."""
        batches = TrainBatches(self.data.x_train, self.data.y_train, self.fit_batch_size, self.seed)
        costs = []
        for contender in learned:
            self.say(f"{title}: time joint training with {contender.name}")
            maximizer = contender.attack.maximizer
            fresh_config = {**maximizer.get_config(), "trainable": True}
            untrained = type(maximizer).from_config(fresh_config)
            config = {**contender.attack.get_config(), "maximizer": untrained}
            pair = (PGD(self.epsilon, steps=contender.attack.steps), LearnedAttack(**config))
            seconds = training_seconds(
                [self._joint(fresh(), attack) for attack in pair],
                *batches[0],
                self.rounds,
                progress=self.progress("time training steps"),
            )
            step = quartiles(seconds[:, 1])
            costs.append(
                {
                    "method": contender.name,
                    "parameters": contender.parameters,
                    "steps": contender.attack.steps,
                    "step_seconds": step,
                    "batches_per_epoch": len(batches),
                    "epoch_seconds": step["median"] * len(batches),
                    "pgd_step_seconds": quartiles(seconds[:, 0]),
                    "ratio_to_pgd_training": quartiles(seconds[:, 1] / seconds[:, 0]),
                }
            )
        return costs

    def _joint(self, model, attack):
        robust = RobustClassifier(model, "at", attack=attack, seed=self.seed)
        robust.compile(keras.optimizers.Adam(1e-3), maximizer_optimizer=self._optimizer())
        return robust


def _run(steps, own, curve):
    """One run of ``steps`` steps, from a curve that may be longer."""
    return {
        "multiple": steps // own,
        "steps": steps,
        "loss": curve.loss[: steps + 1].tolist(),
        "final_loss": float(curve.loss[steps]),
        "robust_accuracy": float(curve.robust_accuracy[steps]),
    }
