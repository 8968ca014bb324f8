"""``keras-emr evaluate``: attack a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from keras_emr.errors import UserError, unknown
from keras_emr_cli.settings import Merged, merge, options
from keras_emr_cli.train_settings import EVALUATE, TRAIN


@click.command(name="evaluate")
@click.argument("target", metavar="RUN_OR_MODEL")
@click.option("--config", metavar="FILE", help="YAML file of these settings.")
@click.option("--checkpoint", metavar="best|last", help="Which model of a run.  [default: best]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@options(EVALUATE)
def command(target, config, checkpoint, as_json, quiet, **flags):
    """Attack RUN_OR_MODEL (a run folder or any .keras classifier) on test data.

    A run folder brings its data and epsilon; a .keras file needs --data and --epsilon.
    """
    settings = merge(EVALUATE, flags, config)
    its_own_data = settings.data is None  # explicit data may be any
    path, settings, run = _resolve(Path(target), checkpoint, settings)
    from keras_emr_cli.session import select_backend

    select_backend(settings.backend)
    from keras_emr.data import load

    share = {"validation": run["validation"]} if its_own_data else {}
    data = load(settings.data, split_seed=settings.split_seed, **share)
    if its_own_data:
        _require_same_data(Path(target), data, settings)
    cards = _attack_all(path, settings, data, quiet)
    _show(path, settings, cards, as_json)


def _resolve(target, checkpoint, settings):
    """The model file, the settings with the run's own where they were left open, and those."""
    if checkpoint not in (None, "best", "last"):
        raise unknown("checkpoint", checkpoint, ("best", "last"))
    run = {}
    path = target
    if target.is_dir():
        if not (target / "config.yaml").exists():
            raise UserError(f"not a run folder: no config.yaml. Received: {str(target)!r}.")
        run = merge(TRAIN, {}, str(target / "config.yaml"), environment={}).values
        path = target / f"{checkpoint or 'best'}.keras"
    elif checkpoint is not None:
        raise UserError(f"--checkpoint needs a run folder. Received: {str(target)!r}.")
    if not path.exists():
        raise UserError(f"model not found. Received: {str(path)!r}. Expected a run or .keras file.")
    values = dict(settings.values)
    for name in ("data", "split_seed", "epsilon", "norm"):
        if values[name] is None:
            values[name] = run.get(name)
    for name in ("data", "epsilon"):
        if values[name] is None:
            raise UserError(
                f"--{name}: a .keras file does not say it. Received: nothing. Give --{name}."
            )
    values["norm"] = values["norm"] or "linf"
    values["split_seed"] = values["split_seed"] or 0
    return path, Merged(values, settings.origins), run


def _require_same_data(target, data, settings):
    """The data that the run names must still be what the run was trained on."""
    from keras_emr.training.run_folder import RunFolder

    folder = RunFolder(target)
    try:
        trained_on = folder.read_environment()["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"run: cannot tell which data it was trained on. Received: {str(folder.environment)!r}."
            " Expected the run's environment.json; or give --data."
        ) from None
    if trained_on != data.fingerprint:
        raise UserError(
            f"data: not what the run was trained on. Received: {settings.data!r} with SHA-256 "
            f"{data.fingerprint[:12]}, the run has {str(trained_on)[:12]}. To evaluate on other "
            "data give --data explicitly."
        )


def _build(name, s, path, channels):
    """The attacks called ``name``: one, or ``learned`` for each multiple of its steps."""
    from keras_emr.attacks import ATTACKS
    from keras_emr_cli.build import number

    if name == "learned":
        return _learned(s, path, channels)
    options = {"epsilon": float(s.epsilon), "norm": s.norm, "objective": s.objective}
    if name in ("pgd", "apgd", "line-search"):
        options |= {"steps": s.steps, "restarts": s.restarts, "start": s.start}
    if name == "pgd":
        options["step_size"] = number(s.step_size)
    return [ATTACKS.get(name)(**options)]


def _learned(s, path, channels):
    from keras_emr.attacks.learned import LearnedAttack
    from keras_emr.maximizers.files import foreign, load_maximizer
    from keras_emr_cli.progress import warn

    maximizer = load_maximizer(s.maximizer or path.parent)
    for line in foreign(maximizer, float(s.epsilon), channels):
        warn(line)
    before = maximizer.trained_for or {"steps": 10, "latent": False}
    return [
        LearnedAttack(
            float(s.epsilon),
            s.norm,
            maximizer=maximizer,
            steps=times * before["steps"],
            latent=before["latent"],
            restarts=s.restarts,
            objective=s.objective,
        )
        for times in s.times
    ]


def _attack_all(path, settings, data, quiet):
    from keras_emr.evaluation.inputs import require_fit
    from keras_emr.evaluation.scorecard import scorecard
    from keras_emr_cli.progress import Reporter

    model = _load(path)
    require_fit(model, data.image_shape, data.classes)
    x, y = data.x_test[: settings.n_examples], data.y_test[: settings.n_examples]
    channels = data.image_shape[-1]
    attacks = [a for name in settings.attacks for a in _build(name, settings, path, channels)]
    cards = []
    with Reporter(quiet) as reporter:
        for attack in attacks:
            progress = reporter.steps(f"attack {attack.name}")
            cards.append(
                scorecard(
                    model,
                    attack,
                    x,
                    y,
                    batch_size=settings.batch_size,
                    seed=settings.seed,
                    progress=progress,
                )
            )
    return cards


def _load(path):
    import keras

    from keras_emr.training.classifier import RobustClassifier

    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # a damaged archive can fail in any way
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot load the model: {reason[0] if reason else type(error).__name__} "
            f"Received: {str(path)!r}. Expected a .keras file."
        ) from None
    return model.model if isinstance(model, RobustClassifier) else model


def _show(path, settings, cards, as_json):
    if as_json:
        click.echo(json.dumps({"model": str(path), "results": cards}, indent=2))
        return
    from keras_emr_cli.tables import figure, percent, print_table

    columns = ["attack", "clean", "robust", "margin L2", "margin Linf", "margin > eps", "seconds"]
    rows = []
    for card in cards:
        attack, margins = card["attack"], card["margins"]
        name = attack["name"]
        if name == "learned":
            name = attack["maximizer"]["cell"]
        if name not in ("fgsm", "bim"):
            name = f"{name.upper()}-{attack['steps']}x{attack['restarts']}"
        rows.append(
            [
                name,
                percent(card["accuracy"]),
                percent(card["robust_accuracy"]),
                figure(margins["effective_margin_l2"], 3),
                figure(margins["effective_margin_linf"], 4),
                percent(margins["share_above_epsilon"]),
                f"{card['seconds']:.0f}",
            ]
        )
    print_table(columns, rows)
    click.echo(
        f"{path}: {cards[0]['n']} test images of {settings.data}; {settings.norm}, epsilon "
        f"{settings.epsilon}; seed {settings.seed}; {settings.backend}; inference mode."
    )
    click.echo("Accuracy under these attacks is an upper bound of robust accuracy.")
