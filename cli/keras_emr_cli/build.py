"""From settings to the library's objects. Imports keras: call it after ``select_backend``."""

from __future__ import annotations

import math

from keras_emr.attacks import ATTACKS, TRAINED_ATTACKS
from keras_emr.defenses import get_defense
from keras_emr.errors import UserError
from keras_emr.models import make_model
from keras_emr_cli.build_defense import defense, logit_margin, mma_margin, number
from keras_emr_cli.progress import warn
from keras_emr_cli.settled import awp_warmup, learning_rate, swa_start
from keras_emr_cli.train_settings import TRAIN

# What an EMR preset decides: the regularizer's option by the setting's name.
_PRESET_DECIDES = {
    "emr": "weight",
    "emr_temperature": "temperature",
    "emr_reduction": "reduction",
    "emr_decay_epochs": "schedule",
    "emr_warmup": "schedule",
}
# Training images whose pixels give the mean and deviation of `--normalization data`.
_SEEN_FOR_NORMALIZATION = 10_000


def training_attack(s, channels):
    """The attack of the inner maximisation, for images with so many channels."""
    if s.defense in ("mma", "free-at") and s.attack != "pgd":
        raise UserError(
            f"attack: defense {s.defense} has its own, along PGD's direction. Received: "
            f"attack={s.attack!r}. Leave it out."
        )
    if s.attack in TRAINED_ATTACKS:
        return _trained_attack(s, channels)
    if s.maximizer is not None:
        raise UserError(
            f"maximizer: only a trained attack has one. Received: attack={s.attack!r}. Expected "
            f"--attack {', '.join(TRAINED_ATTACKS)}."
        )
    epsilon = mma_margin(s) if s.defense == "mma" else float(s.epsilon)
    options = {"epsilon": epsilon, "norm": s.norm, "objective": s.attack_objective}
    if s.attack == "fast-fgsm":  # Wong et al., ICLR 2020
        length = 1.25 * float(s.epsilon) if s.step_size is None else float(s.step_size)
        start = s.start or "uniform"
        return ATTACKS.get("pgd")(**options, steps=1, step_size=length, start=start)
    if s.attack != "fgsm":
        options["steps"] = s.steps or 10
    if s.attack in ("pgd", "bim") and s.step_size is not None:
        options["step_size"] = float(s.step_size)
    if s.attack not in ("fgsm", "bim"):
        options |= {"start": s.start, "restarts": s.restarts}
    return ATTACKS.get(s.attack)(**options)


def _trained_attack(s, channels):
    from keras_emr.attacks.learned import LearnedAttack
    from keras_emr.maximizers import make_maximizer
    from keras_emr.maximizers.files import foreign, load_maximizer

    scale = number(s.maximizer_scale)
    if s.attack in ("lstm", "rnn"):
        maximizer = make_maximizer(
            s.attack,
            hidden=s.hidden,
            layers=s.maximizer_layers,
            preprocessing=s.preprocessing,
            output=s.maximizer_output,
            scale=scale,
            seed=s.seed,
        )
    else:
        size = {"width": s.generator_width, "depth": s.generator_depth}
        maximizer = make_maximizer(s.attack, **size, scale=scale, seed=s.seed)
    if s.maximizer is not None:
        loaded = load_maximizer(s.maximizer)
        kinds = [m.describe().get("reads", m.describe()["cell"]) for m in (loaded, maximizer)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"maximizer: made for another attack. Received: {s.maximizer!r}, a {kinds[0]}, for "
                f"attack {s.attack}."
            )
        for line in foreign(loaded, float(s.epsilon), channels):
            warn(line)
        maximizer = loaded
    given = {
        "norm": s.norm,
        "steps": s.steps,
        "start": s.start,
        "objective": s.attack_objective,
        "step_weights": s.step_weights,
        "bptt_horizon": s.bptt_horizon,
    }
    return LearnedAttack.named(
        s.attack,
        float(s.epsilon),
        maximizer=maximizer,
        start_noise=s.start_noise,
        straight_through=s.straight_through,
        learn_share=s.learn_share,
        **{key: value for key, value in given.items() if value is not None},
    )


def maximizer_optimizer(s):
    import keras

    return keras.optimizers.Adam(
        s.maximizer_learning_rate, global_clipnorm=s.maximizer_clip or None
    )


def regularizers(s):
    """EMR, or nothing where its weight is zero and no preset is chosen."""
    from keras_emr.regularizers.effective_margin import EffectiveMarginRegularizer
    from keras_emr.regularizers.schedules import StepDecay, WarmUp

    if s.emr_decay_epochs and s.emr_warmup:
        raise UserError(
            "emr_warmup and emr_decay_epochs cannot be combined. Received: both. Choose one."
        )
    schedule = None
    if s.emr_decay_epochs:
        schedule = StepDecay(s.emr_decay_epochs)
    elif s.emr_warmup:
        schedule = WarmUp(s.emr_warmup)
    options = {
        "weight": s.emr,
        "weighting": s.emr_weighting,
        "temperature": s.emr_temperature,
        "center": s.emr_center,
        "norm": s.emr_norm,
        "power": int(s.emr_power),
        "reduction": s.emr_reduction,
        "at": s.emr_at,
        "bn_mode": s.emr_bn_mode,
        "estimator": s.emr_estimator,
        "step": s.emr_step,
        "central": s.emr_central,
        "schedule": schedule,
    }
    if s.emr_preset:
        _require_defaults_beside_preset(s)
        for decided in set(_PRESET_DECIDES.values()):
            options.pop(decided)
        return [EffectiveMarginRegularizer.preset(s.emr_preset, **options)]
    return [EffectiveMarginRegularizer(**options)] if s.emr > 0 else []


def _require_defaults_beside_preset(s):
    for setting in TRAIN:
        if setting.name in _PRESET_DECIDES:
            default = setting.parse(setting.default, setting.flag)
            if s.values[setting.name] != default:
                raise UserError(
                    f"{setting.name}: the EMR preset decides it. Received: "
                    f"{s.plain()[setting.name]} with emr_preset {s.emr_preset}. Leave one of the "
                    "two out."
                )


def optimizer(s, steps):
    """The classifier's optimizer; ``steps``: per epoch."""
    from keras_emr.training import learning_rates, optimizers

    rate = learning_rates.learning_rate(
        s.lr_schedule, learning_rate(s), steps, s.epochs, s.lr_epochs, s.lr_factor, s.lr_warmup
    )
    options = {
        "weight_decay": s.weight_decay,
        "decayed": s.weight_decay_of,
        "global_clipnorm": s.clip_norm or None,
    }
    if s.optimizer == "sgd":
        return optimizers.SGD(rate, s.momentum, s.nesterov, **options)
    return optimizers.AdamW(rate, **options)


def averaging(s, steps):
    """How the weights are averaged, or ``None``; ``steps``: per epoch."""
    from keras_emr.training.averaging import EMA, SWA

    statistics = {} if s.averaging_statistics is None else {"statistics": s.averaging_statistics}
    if s.averaging == "ema":
        return EMA(s.averaging_decay, s.averaging_start or 1, **statistics)
    if s.averaging == "swa":
        return SWA(swa_start(s), steps, **statistics)
    return None


def overfitting_guard(s):
    """Largest fall of validation robust accuracy, or ``None``."""
    if s.overfitting_guard is not None:
        return s.overfitting_guard if s.overfitting_guard < 1 else None
    return 0.2 if s.attack in ("fgsm", "fast-fgsm") else None


def mixing(s, data):
    """How training images are mixed, or ``None``."""
    from keras_emr.data.mixing import Mixing

    return Mixing(data.classes, s.mixup, s.cutmix) if s.mixup or s.cutmix else None


def network(s, data, name=None):
    """The network called ``name``, ``--model`` by default, freshly seeded unless from a file."""
    from keras_emr.models.hypersphere import hypersphere_head

    normalization = s.normalization
    if normalization == "data":
        images = data.x_train[:_SEEN_FOR_NORMALIZATION]
        mean, std = images.mean(axis=(0, 1, 2)), images.std(axis=(0, 1, 2))
        normalization = (mean.tolist(), std.clip(min=1e-3).tolist())
    name = s.model if name is None else name
    model = make_model(name, data.image_shape, data.classes, s.activation, normalization)
    return hypersphere_head(model, s.head_scale) if s.head == "hypersphere" else model


def classifier(s, data, standard=False, extra=None, referee=None):
    """A compiled RobustClassifier with freshly seeded weights.

    ``standard``: the baseline, which is chosen by clean accuracy and not attacked in validation.
    ``referee``: attack of validation, if not ``--val-steps`` of PGD.
    """
    import keras

    from keras_emr.attacks.pgd import PGD
    from keras_emr.regularizers.schedules import WarmUp
    from keras_emr.training.classifier import RobustClassifier
    from keras_emr.training.weight_perturbation import AWP

    keras.utils.set_random_seed(s.seed)
    keras.config.set_dtype_policy(s.precision)
    referee = referee or PGD(float(s.epsilon), s.norm, steps=s.val_steps)
    model = network(s, data)
    steps = steps_per_epoch(s, data, standard)
    attacked = not standard and s.defense != "standard"
    if standard:
        method = get_defense("standard", logit_margin=logit_margin(s, "standard"))
    else:
        method = defense(s, len(data.x_train) + (len(extra.x) if extra else 0))
    robust = RobustClassifier(
        model,
        defense=method,
        attack=training_attack(s, data.image_shape[-1]) if attacked else None,
        regularizers=[] if standard else regularizers(s),
        eval_attack=None if standard else referee,
        attack_mode=s.attack_mode,
        attack_precision=s.attack_precision,
        maximizer_update=s.maximizer_update,
        averaging=averaging(s, steps),
        weight_perturbation=AWP(s.awp, awp_warmup(s)) if s.awp and attacked else None,
        epsilon_schedule=WarmUp(s.epsilon_warmup) if s.epsilon_warmup and attacked else None,
        teacher=network(s, data, s.teacher) if method.needs_teacher else None,
        seed=s.seed,
    )
    if s.mixup or s.cutmix:
        robust.require_shares()
    robust.compile(optimizer(s, steps), maximizer_optimizer=maximizer_optimizer(s))
    return robust


def steps_per_epoch(s, data, standard=False):
    """Steps of an epoch, as :class:`keras_emr.data.TrainBatches` makes them."""
    own = s.batch_size
    if s.extra_data is not None:
        own -= math.floor(s.extra_ratio * own + 0.5)
    replays = s.replays if s.defense == "free-at" and not standard else 1
    return max(1, len(data.x_train) // own) * replays
