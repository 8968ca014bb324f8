"""AutoAttack (Croce and Hein, ICML 2020): an ensemble of attacks without parameters to tune."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

import numpy as np
from keras import ops

from keras_emr.attacks import ATTACKS
from keras_emr.errors import UserError
from keras_emr.evaluation.journal import Journal
from keras_emr.evaluation.robust_accuracy import clean_pass
from keras_emr.evaluation.session import open_session, perturbation, portions
from keras_emr.evaluation.target import as_target
from keras_emr.geometry import NORMS
from keras_emr.part import one_of

# What each version runs, in this order: name on the report, registered attack, options.
VERSIONS = {
    "standard": [
        ("apgd-ce", "apgd", {"objective": "cross_entropy"}),
        ("apgd-t", "apgd-t", {}),
        ("fab-t", "fab-t", {}),
        ("square", "square", {}),
    ],
    "plus": [
        ("apgd-ce", "apgd", {"objective": "cross_entropy", "restarts": 5}),
        ("apgd-dlr", "apgd", {"objective": "dlr", "restarts": 5}),
        ("fab", "fab", {"restarts": 5}),
        ("square", "square", {}),
        ("apgd-t", "apgd-t", {}),
        ("fab-t", "fab-t", {}),
    ],
    "rand": [
        ("apgd-ce", "apgd", {"objective": "cross_entropy", "eot": 20}),
        ("apgd-dlr", "apgd", {"objective": "dlr", "eot": 20}),
    ],
}


class OutOfTime(Exception):
    """The time budget is used up; what was found so far is in ``result`` and in the state file."""

    def __init__(self, result):
        super().__init__("the time budget is used up")
        self.result = result


def version_attacks(version, epsilon, norm):
    """The attacks of a version: ``[(name, attack), ...]``."""
    one_of("AutoAttack version", version, VERSIONS)
    return [
        (name, ATTACKS.get(attack)(epsilon, norm, **options))
        for name, attack, options in VERSIONS[version]
    ]


@dataclass
class AutoAttackResult:
    """Outcome on N examples.

    ``correct``: (N,) bool, right on the clean image. ``robust``: (N,) bool, right on it and on
    every image found. ``x_adv``: (N, H, W, C), the image that broke an example, else the clean
    one. ``broken_by``: (N,) int, which attack broke it, -1 for none. ``attacks``: a dictionary per
    finished attack: ``name``, every option, how many examples were ``attacked`` and ``broken``,
    ``robust_accuracy`` after it, ``queries`` and ``seconds``. ``complete``: whether all attacks
    ran to their end. ``max_perturbation``: largest norm of a perturbation. ``notes``: what had to
    be done otherwise than the version says.
    """

    correct: np.ndarray
    robust: np.ndarray
    x_adv: np.ndarray
    broken_by: np.ndarray
    attacks: list
    complete: bool
    max_perturbation: float
    version: str
    notes: list = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """Survivors over all N examples: an upper bound of the true one."""
        return float(self.robust.mean())


class AutoAttack:
    """Attack after attack, each on the examples that the ones before left unbroken.

    ``standard``: APGD on cross-entropy, targeted APGD on the DLR loss (9 targets), targeted FAB
    (9 targets), Square with 5000 queries. ``plus`` adds untargeted APGD on the DLR loss and FAB
    and gives APGD and FAB 5 restarts. ``rand``, for models that are random at inference: APGD on
    both losses with gradients averaged over 20 passes. The parameters are the authors'.

    An example that is wrong on the clean image is never attacked and counts as not robust. With
    two classes the DLR loss is the difference of the logits, with three so is the targeted one:
    ``notes`` says it.

    Args:
        epsilon: radius of the ball, in units of [0, 1] images.
        norm: ``linf`` or ``l2``.
        version: ``standard``, ``plus``, ``rand`` or, with ``attacks``, ``custom``.
        attacks: a list of attacks, or of ``(name, attack)``, in the order to run them.
        seed: int; the numbers of an example depend on (seed, run, its index) alone.

    Source: the paper; constants and order as in the authors' code.
    """

    def __init__(self, epsilon, norm="linf", version="standard", attacks=None, seed=0):
        one_of("norm", norm, NORMS)
        if attacks is not None:
            version = "custom"
            pairs = [a if isinstance(a, tuple) else (a.name, a) for a in attacks]
            if not pairs:
                raise UserError("no attacks. Received: an empty list. Expected at least one.")
            for name, attack in pairs:
                if attack.epsilon is None or attack.norm != norm or attack.epsilon > epsilon:
                    raise UserError(
                        f"attack {name!r} is for another threat model. Received: epsilon "
                        f"{attack.epsilon}, {attack.norm}. Expected at most {epsilon}, {norm}."
                    )
        else:
            pairs = version_attacks(version, epsilon, norm)
        self.epsilon, self.norm, self.version, self.seed = float(epsilon), norm, version, seed
        self.attacks = [
            (name, a.with_defaults(objective="cross_entropy") if hasattr(a, "with_defaults") else a)
            for name, a in pairs
        ]

    def settings(self):
        """Everything that decides the result, as plain values."""
        attacks = []
        for name, attack in self.attacks:
            entry = {**attack.describe(), "name": name}
            if getattr(attack, "variables", ()):
                entry["weights"] = _fingerprint(attack.variables)
            attacks.append(entry)
        return {
            "version": self.version,
            "epsilon": self.epsilon,
            "norm": self.norm,
            "seed": self.seed,
            "attacks": attacks,
        }

    def run(
        self,
        model,
        x,
        y,
        *,
        batch_size=256,
        classes=None,
        state=None,
        time_budget=None,
        progress=None,
        tick=None,
    ):
        """Attack ``model`` on N examples.

        Args:
            model: Keras classifier to logits; or, if every attack only asks, a function (see
                :func:`keras_emr.evaluation.target.as_target`).
            x: (N, H, W, C) images in [0, 1].
            y: (N,) integer labels.
            batch_size: images at a time; the result does not depend on it.
            classes: number of classes, for a function that gives labels.
            state: path of a state file. If it exists the evaluation goes on where it stopped;
                it is written as the evaluation proceeds.
            time_budget: seconds; after the batch that uses them up :class:`OutOfTime` is raised.
            progress: called with the attack's name, its runs done so far (a fraction) and their
                number.
            tick: called without arguments after every step of an attack; what it raises ends the
                evaluation, with the state kept.

        ``progress`` and ``tick`` are for whoever waits; the result does not depend on them.

        Returns:
            :class:`AutoAttackResult`.

        Raises:
            UserError: as :func:`evaluate_attack`; a state file of another evaluation.
            InfeasibleAttack: an attack left its ball or [0, 1], or returned NaN.
            OutOfTime: with the result so far.
        """
        batch_size = min(batch_size, max(len(x), 1))
        target = as_target(model, np.shape(x)[1:], classes, batch_size)
        examples = clean_pass(target, x, y)
        return self.run_on(
            target,
            *examples,
            batch_size=batch_size,
            state=state,
            time_budget=time_budget,
            progress=progress,
            tick=tick,
        )

    def run_on(
        self,
        target,
        x,
        y,
        correct,
        *,
        batch_size=256,
        state=None,
        time_budget=None,
        progress=None,
        tick=None,
    ):
        """As :meth:`run`, on a target whose clean pass has been made (:func:`clean_pass`)."""
        began = time.monotonic()
        journal = Journal(state, target, x, y, self.settings())
        run = _Run(self, target, x, y, correct, journal, batch_size)
        with journal:
            for number, (name, attack) in enumerate(self.attacks):
                for _ in run.attack(number, name, attack, progress, tick):
                    if time_budget is not None and time.monotonic() - began >= time_budget:
                        raise OutOfTime(run.result(complete=False))
        return run.result(complete=True)


class _Run:
    """One evaluation in progress. ``progress`` of the journal: (attack, run, last index)."""

    def __init__(self, suite, target, x, y, correct, journal, batch_size):
        self.suite, self.target, self.x, self.y = suite, target, x, y
        self.batch_size = batch_size
        self.journal = journal
        self.correct = correct
        self.robust, self.x_adv = correct.copy(), x.copy()
        self.broken_by = np.full(len(x), -1)
        self.finished = []
        self.position = [0, 0, -1]
        self.spent = {"seconds": 0.0, "queries": 0, "attacked": None}
        journal.restore(self)

    def attack(self, number, name, attack, progress, tick):
        """Run one attack; yields after every batch."""
        if number < self.position[0]:
            return
        session = open_session(self.target, attack, self.batch_size)
        runs = attack.runs(self.target.classes)
        if self.spent["attacked"] is None:
            self.spent["attacked"] = int(self.robust.sum())
        for run in range(self.position[1], runs):
            survivors = np.flatnonzero(self.robust)
            survivors = survivors[survivors > self.position[2]]
            for index in portions(session, survivors):
                # In runs, because a later one has fewer examples.
                done = np.searchsorted(survivors, index[0])
                span = (run + done / len(survivors), len(index) / len(survivors))
                self._find(session, number, run, index, _teller(name, span, runs, progress, tick))
                self.journal.save(self)
                yield
            self.position = [number, run + 1, -1]
        self._close(number, name, attack)
        if progress:
            progress(name, 1, 1)
        self.journal.save(self, now=True)

    def _find(self, session, number, run, index, tick):
        began = time.perf_counter()
        found = session.find(self.x[index], self.y[index], index, run, self.suite.seed, tick)
        broken = index[found.broken]
        self.x_adv[broken] = found.images[found.broken]
        self.robust[broken] = False
        self.broken_by[broken] = number
        self.position = [number, run, int(index[-1])]
        self.spent["queries"] += found.queries
        self.spent["seconds"] += time.perf_counter() - began
        tick(1.0)

    def _close(self, number, name, attack):
        self.finished.append(
            {
                **attack.describe(),
                "name": name,
                "attacked": self.spent["attacked"],
                "broken": int((self.broken_by == number).sum()),
                "robust_accuracy": float(self.robust.mean()),
                "queries": self.spent["queries"],
                "seconds": round(self.spent["seconds"], 3),
            }
        )
        self.position = [number + 1, 0, -1]
        self.spent = {"seconds": 0.0, "queries": 0, "attacked": None}

    def result(self, complete):
        largest = float(perturbation(self.suite.norm, self.x, self.x_adv).max())
        return AutoAttackResult(
            self.correct,
            self.robust,
            self.x_adv,
            self.broken_by,
            self.finished,
            complete,
            largest,
            self.suite.version,
            _notes(self.suite.attacks, self.target.classes),
        )


def _teller(name, span, runs, progress, tick):
    """``tell(share)`` for a batch that takes progress from ``span[0]`` on by ``span[1]``."""

    def tell(share):
        if tick:
            tick()
        if progress:
            progress(name, span[0] + share * span[1], runs)

    return tell


def _fingerprint(variables):
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(np.ascontiguousarray(ops.convert_to_numpy(variable.value)))
    return digest.hexdigest()


def _notes(attacks, classes):
    notes = []
    names = [name for name, attack in attacks if getattr(attack, "objective", None) == "dlr"]
    targeted = [name for name, attack in attacks if getattr(attack, "targets", None)]
    if classes == 2 and names:
        notes.append(
            f"two classes: the DLR loss of {', '.join(names)} is the difference of the logits"
        )
    aimed = [name for name in names if name in targeted]
    if classes == 3 and aimed:
        notes.append(
            f"three classes: the targeted DLR loss of {', '.join(aimed)} is the difference of "
            "the logits"
        )
    for name, attack in attacks:
        if name in targeted and attack.targets > classes - 1:
            notes.append(f"{classes} classes: {name} has {classes - 1} targets of {attack.targets}")
    return notes
