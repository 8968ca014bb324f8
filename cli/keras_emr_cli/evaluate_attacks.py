"""From the settings of ``evaluate`` to attacks. Imports keras."""

from __future__ import annotations

import inspect

from keras_emr.errors import UserError
from keras_emr_cli.build import number
from keras_emr_cli.progress import warn
from keras_emr_cli.targets import load_model, model_file

_PGD_LIKE = ("pgd", "cw", "apgd", "line-search")


def jobs(s, path, data, source=None):
    """What an :class:`Assessment` runs, in the order of ``--attacks``.

    Args:
        s: settings.
        path: of the model.
        data: the data set.
        source: the model that a served one was made from, or ``None``.
    """
    from keras_emr.evaluation.autoattack import AutoAttack

    found = []
    if s.survivors and any(name.startswith("autoattack") for name in s.attacks):
        raise UserError(
            f"--survivors: AutoAttack is such a list itself. Received: {', '.join(s.attacks)}. "
            "Name its attacks, e.g. apgd-ce,apgd-t,fab-t,square, or leave --survivors out."
        )
    for name in dict.fromkeys(s.attacks):
        if name.startswith("autoattack"):
            version = name.partition("-")[2] or "standard"
            found.append(AutoAttack(float(s.epsilon), s.norm, version, seed=s.seed))
        elif name == "learned":
            found += _learned(s, path, data.image_shape[-1])
        else:
            found.append((_title(name, s), _attack(name, s, data, source)))
    if s.survivors:
        return [AutoAttack(float(s.epsilon), s.norm, attacks=found, seed=s.seed)]
    return found


def surrogates(s, data, source=None):
    """``source``, if there is one, and the models that ``--surrogates`` names."""
    from keras_emr.evaluation.inputs import require_fit

    names = [name.strip() for name in s.surrogates.split(",") if name.strip()]
    models = [load_model(model_file(name)) for name in names]
    for model in models:
        require_fit(model, data.image_shape, data.classes)
    return models if source is None else [source, *models]


def knowledge(entries):
    """What an attacker has to know for the attacks in a report."""
    from keras_emr.attacks.query import QueryAttack
    from keras_emr.attacks.transfer import Transfer

    attacks = []
    for entry in entries:
        attacks += entry.attacks if hasattr(entry, "attacks") else [entry]
    kinds = [attack for _, attack in attacks]
    if not all(isinstance(attack, QueryAttack) for attack in kinds):
        return "white box: architecture, weights and gradients"
    if all(isinstance(attack, Transfer) for attack in kinds):
        return "black box: another model of the same data"
    if all(attack.needs == "labels" for attack in kinds):
        return "black box: predicted labels"
    return "black box: scores"


def _attack(name, s, data, source):
    from keras_emr.attacks import ATTACKS

    objectives = {"cw": "margin", "apgd-ce": "cross_entropy", "apgd-dlr": "dlr"}
    cls = ATTACKS.get({"cw": "pgd", "apgd-ce": "apgd", "apgd-dlr": "apgd"}.get(name, name))
    if name == "transfer":
        return _transfer(cls, s, data, source)
    known = inspect.signature(cls).parameters
    given = {"epsilon": float(s.epsilon), "norm": s.norm}
    if name in _PGD_LIKE:
        given |= {"start": s.start, "steps": s.steps or 50, "restarts": s.restarts or 5}
    else:
        given |= {"steps": s.steps, "restarts": s.restarts}
    if name in ("pgd", "cw"):
        given["step_size"] = number(s.step_size)
    given["objective"] = objectives.get(name, s.objective)
    for field in ("steps", "restarts"):
        if s.values[field] is not None and field not in known:
            raise UserError(
                f"--{field}: the attack {name} has none. Received: {s.values[field]}. Leave it out."
            )
    try:
        return cls(**{k: v for k, v in given.items() if k in known and v is not None})
    except UserError as error:
        raise UserError(f"attack {name}: {error}") from None


def _transfer(cls, s, data, source):
    from keras_emr.attacks.pgd import PGD

    models = surrogates(s, data, source)
    if not models:
        raise UserError(
            "--surrogates: the attack transfer makes its images against them. Received: nothing. "
            "Expected runs or .keras files."
        )
    if s.restarts is not None:
        raise UserError(
            f"--restarts: the attack transfer has none. Received: {s.restarts}. Leave it out."
        )
    attack = PGD(float(s.epsilon), s.norm, s.steps or 50, objective=s.objective)
    return cls(attack, models, seed=s.seed)


def _learned(s, path, channels):
    from keras_emr.attacks.learned import LearnedAttack
    from keras_emr.maximizers.files import foreign, load_maximizer

    maximizer = load_maximizer(s.maximizer or path.parent)
    for line in foreign(maximizer, float(s.epsilon), channels):
        warn(line)
    before = maximizer.trained_for or {"steps": 10, "latent": False}
    cell = maximizer.describe()["cell"]
    restarts = s.restarts or 5
    return [
        (
            f"{cell}-{times * before['steps']}x{restarts}",
            LearnedAttack(
                float(s.epsilon),
                s.norm,
                maximizer=maximizer,
                steps=times * before["steps"],
                latent=before["latent"],
                restarts=restarts,
                objective=s.objective,
            ),
        )
        for times in s.times
    ]


def _title(name, s):
    """As reports call it: with steps and restarts where those are chosen here."""
    if name in _PGD_LIKE:
        return f"{name}-{s.steps or 50}x{s.restarts or 5}"
    return name
