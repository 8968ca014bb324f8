"""Checks that compare attacks with each other: where a weaker one wins, gradients mislead."""

from __future__ import annotations

import numpy as np

from keras_emr.attacks import ball
from keras_emr.evaluation.checks.base import Finding, NotRun, graded, percent, rule
from keras_emr.sampling import example_streams

# A run number that no attack reaches, so that the points are nobody's starts.
_POINTS_RUN = 2**16


@rule("M1", "many steps beat one", 0.005)
def many_steps(bench):
    many, one = bench.accuracy(bench.pgd.right), bench.accuracy(bench.fgsm.right)
    seen = f"{percent(many)} survive PGD with {bench.budget.steps} steps, {percent(one)} one step"
    verdict = graded(many - one, 0.005, bench.n)
    text = (
        f"{seen}. As it should be, more steps do not leave more."
        if verdict == "pass"
        else f"{seen}: the gradient leads astray after the first step, a sign of gradient masking. "
        "Do not trust gradient attacks alone; look at M2 and M7."
    )
    return Finding(verdict, many - one, text, {"pgd": many, "fgsm": one})


@rule("M2", "gradients beat queries and transfer", 0.002)
def gradients_beat_queries(bench):
    white = bench.accuracy(bench.white_box)
    others = {"square": bench.accuracy(bench.square)}
    attack = bench.pgd_of(bench.epsilon)
    index = bench.attacked
    surrogates = [s for s in bench.siblings if s.gradients]
    for number, surrogate in enumerate(surrogates):
        trace = bench.ascent_on(surrogate).run(
            attack, bench.x[index], bench.y[index], index, seed=bench.seed
        )
        fooled = ~bench.right(trace.images, bench.y[index])
        others[f"transfer from sibling {number}"] = bench.accuracy(~fooled)
    best = min(others, key=others.get)
    excess = white - others[best]
    seen = (
        f"{percent(white)} survive attacks that see the gradients, {percent(others[best])} the "
        f"best that does not ({best})"
    )
    verdict = graded(excess, 0.002, bench.n)
    text = (
        f"{seen}. As it should be, knowing the model helps."
        if verdict == "pass"
        else f"{seen}: the gradients hide what is there, so the robust accuracy they give is too "
        "high. Use more queries, or an attack made for this defence."
    )
    return Finding(verdict, excess, text, {"white_box": white, **others})


@rule("M5", "more steps and restarts change little", 0.02)
def enough_steps(bench):
    weak, strong = bench.accuracy(bench.pgd.right), bench.accuracy(bench.strong[0])
    budget = bench.budget
    seen = (
        f"PGD with {budget.steps} steps leaves {percent(weak)}; with {budget.strong_steps} steps "
        f"and {budget.strong_restarts} restarts on top {percent(strong)} are left"
    )
    verdict = graded(weak - strong, 0.02, bench.n)
    text = (
        f"{seen}. The short attack is about as good as the long one."
        if verdict == "pass"
        else f"{seen}: the short attack is too weak for this model. Report the long one, or more."
    )
    return Finding(verdict, weak - strong, text, {"weak": weak, "strong": strong})


@rule("M6", "the loss that is attacked matters little", 0.05)
def loss_choice(bench):
    entropy, dlr = bench.accuracy(bench.pgd.right), bench.accuracy(bench.dlr.right)
    seen = f"PGD leaves {percent(entropy)} with the cross-entropy, {percent(dlr)} with the DLR loss"
    verdict = graded(entropy - dlr, 0.05, bench.n)
    text = (
        f"{seen}. The cross-entropy is fit to attack this model."
        if verdict == "pass"
        else f"{seen}: the cross-entropy misleads or saturates, so PGD on it says too much. Report "
        "attacks on the DLR or margin loss (AutoAttack has one)."
    )
    return Finding(verdict, entropy - dlr, text, {"cross_entropy": entropy, "dlr": dlr})


@rule("M7", "random points find nothing that PGD missed", 0.0)
def random_points(bench):
    if bench.target.gradients:
        left, by = np.flatnonzero(bench.white_box), "PGD"
    else:
        left, by = np.flatnonzero(bench.flags.robust & bench.correct), "the evaluation"
    streams = example_streams(bench.seed, _POINTS_RUN, left)
    active = np.arange(len(left))
    for number in range(bench.budget.random_points):
        if not len(active):
            break
        x = bench.x[left[active]]
        points = np.stack(
            [_point(streams[i], x.shape[1:], bench.norm, outermost=number % 2 == 1) for i in active]
        )
        images = ball.project(x + bench.epsilon * points, x, bench.epsilon, bench.norm)
        active = active[bench.right(images.astype(x.dtype), bench.y[left[active]])]
    found = len(left) - len(active)
    share = found / bench.n
    points = bench.budget.random_points
    verdict = graded(share, 0.0, bench.n)
    text = (
        f"{points} random points around each of the {len(left)} examples that {by} left broke none."
        if verdict == "pass"
        else f"{points} random points around each example broke {found} of the {len(left)} that "
        f"{by} left. Chance must not beat an attack: its robust accuracy is too high."
    )
    return Finding(verdict, share, text, {"found": found, "tried_on": len(left), "points": points})


def _point(stream, shape, norm, outermost):
    """A point of the unit ball: anywhere, or a corner (linf) or on the sphere (l2)."""
    if norm == "linf":
        point = stream.uniform(-1, 1, shape)
        return np.sign(point) if outermost else point
    point = stream.normal(size=shape)
    radius = 1 if outermost else stream.uniform() ** (1 / point.size)
    return radius * point / np.linalg.norm(point)


@rule("M15", "what is broken on the way is broken at the end", 0.01)
def silent_success(bench):
    missed = bench.pgd.ever_wrong & bench.pgd.right
    share = bench.accuracy(missed)
    seen = f"PGD breaks {int(missed.sum())} of {bench.n} examples on its way, but not at its end"
    if share <= 0.01:
        return Finding("pass", share, f"{seen}.", {"count": int(missed.sum())})
    text = (
        f"{seen}. Testing the last iterate alone counts them as robust: use an attack that keeps "
        "its best iterate, such as APGD."
    )
    return Finding("warn", share, text, {"count": int(missed.sum())})


@rule("M16", "the attack raises the loss", 0.05)
def loss_goes_up(bench):
    lower = bench.pgd.last_loss < bench.pgd.first_loss
    share = float(lower.mean())
    seen = f"The loss at the end of PGD is below that at its start for {percent(share)} of examples"
    if share <= 0.05:
        return Finding("pass", share, f"{seen}.")
    text = f"{seen}: it climbs badly. Use a smaller step, and see whether gradients are right (M8)."
    return Finding("fail", share, text)


@rule("M20", "a naturally trained model is broken", 0.0)
def natural_model(bench):
    if bench.natural is None:
        raise NotRun("it needs a model that was trained without adversarial examples (natural=)")
    ascent, attack = bench.ascent_on(bench.natural), bench.pgd_of(bench.epsilon)
    clean = bench.right(bench.x, target=bench.natural)
    left = np.flatnonzero(clean)
    for objective in ("cross_entropy", "dlr"):
        if not len(left):
            break
        trace = ascent.run(
            attack, bench.x[left], bench.y[left], left, seed=bench.seed, objective=objective
        )
        left = left[~trace.ever_wrong]
    accuracy = len(left) / bench.n
    verdict = graded(accuracy, 0.0, bench.n)
    seen = f"{percent(accuracy)} survive PGD on the naturally trained model"
    text = (
        f"{seen}: the attack works where it must."
        if verdict == "pass"
        else f"{seen}. Such a model has no robustness at the usual radii (8/255 on CIFAR-10, 0.3 "
        "on MNIST): there the attack, or the scale of the images, is broken."
    )
    return Finding(verdict, accuracy, text, {"clean": bench.accuracy(clean)})
