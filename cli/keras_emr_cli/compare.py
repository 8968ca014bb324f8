"""``keras-emr compare``: methods side by side on trained models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from keras_emr.attacks import TRAINED_ATTACKS
from keras_emr.errors import UserError
from keras_emr_cli.attack_settings import PREPROCESSINGS
from keras_emr_cli.compare_report import REPORT, show, write
from keras_emr_cli.load_data import load_data
from keras_emr_cli.reading_settings import READING
from keras_emr_cli.settings import BACKENDS, SEEDS, Merged, Setting, merge, options
from keras_emr_cli.targets import load_model, require_same_data, resolve

S = Setting
COMPARE_MAXIMIZERS = [
    S("data", "text", None, "Data set.", auto="the first run's"),
    *READING,
    S("split_seed", "int", None, "Seed of the split.", low=0, auto="the first run's, or 0"),
    S(
        "epsilon",
        "ratio",
        None,
        "Radius of the Linf ball in [0, 1] units, e.g. 8/255.",
        low=0,
        low_open=True,
        auto="the first run's",
    ),
    S(
        "methods",
        "names",
        "pgd,line-search,apgd,lstm,rnn,generator-gradient",
        "Inner maximizers, separated by commas.",
        ("pgd", "line-search", "apgd", *TRAINED_ATTACKS),
    ),
    S("steps", "int", 10, "Attack steps T; the generators have their own, 1 or 2.", low=1),
    S(
        "preprocessing",
        "choice",
        "rms",
        "What lstm and rnn see of a gradient.",
        PREPROCESSINGS,
    ),
    S("start", "choice", "gaussian", "Start of lstm and rnn.", ("gaussian", "uniform", "none")),
    S("more", "ints", "1,2,4", "Also run for these multiples of T.", low=1),
    S("n_examples", "int", None, "The first N test images.", low=1, auto="all"),
    S(
        "fit_epochs",
        "int",
        5,
        "Epochs that a learned maximizer is trained against each frozen model; 0: not at all.",
        low=0,
    ),
    S(
        "learning_rate",
        "float",
        0.01,
        "Learning rate of that training.",
        low=0,
        low_open=True,
    ),
    S("batch_size", "int", 64, "Images at a time, also in what is timed.", low=1),
    S("rounds", "int", 10, "Rounds of the time measurements.", low=1),
    S(
        "surface_examples",
        "ints",
        "0,1,2,3,4,5,6,7",
        "Loss surface: the mean over the test images with these indices.",
        low=0,
    ),
    S("surface_points", "int", 21, "Loss surface: points per side, odd.", low=3),
    S("backend", "choice", "tensorflow", "Keras backend.", BACKENDS),
    S("seed", "int", 0, "Seed of maximizers, order and noise.", low=0, high=SEEDS - 1),
    S("out", "text", None, "Folder for the report.", auto="a new folder under runs/"),
]

_KIND = "keras-emr compare maximizers"


@click.group()
def command():
    """Put methods side by side on trained models."""


@command.command("maximizers")
@click.argument("targets", metavar="RUN_OR_MODEL...", nargs=-1, required=True)
@click.option("--config", metavar="FILE", help="YAML file of these settings.")
@click.option("--overwrite", is_flag=True, help="Replace the comparison in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@options(COMPARE_MAXIMIZERS)
def maximizers(targets, config, overwrite, as_json, quiet, **flags):
    """Compare inner maximizers on frozen models: loss per step and per second.

    RUN_OR_MODEL is a run folder or any .keras classifier; without a run among them --data and
    --epsilon are needed. Learned maximizers are trained against each model first, which the
    models do not notice. A run that kept a maximizer of its own is compared with that, too.
    """
    settings = merge(COMPARE_MAXIMIZERS, flags, config)
    its_own_data = settings.data is None
    if settings.surface_points % 2 == 0:
        raise UserError(
            f"--surface-points: bad value. Received: {settings.surface_points}. Expected an odd "
            "number, so that the image itself is a point."
        )
    jobs, settings, validation = _resolve_all([Path(t) for t in targets], settings)
    out = _check_out(settings, overwrite)
    from keras_emr_cli.session import select_backend

    select_backend(settings.backend)
    data = load_data(settings, validation if its_own_data else None, quiet)
    if its_own_data:
        for job in jobs:
            if job["run"]:
                require_same_data(job["target"], data, settings)
    settings = _with_examples(settings, data)
    _load_all(jobs, settings, data)
    _make(out)
    report, surfaces = _compare(jobs, settings, data, quiet)
    write(out, report, surfaces)
    show(report, settings, out, as_json)


def _resolve_all(targets, settings):
    """A job per model, the settings with what the first run decides, its validation share."""
    validation = None
    values = {**settings.values, "norm": None}
    ordered = sorted(targets, key=lambda target: not target.is_dir())  # stable: runs first
    found = {}
    for target in ordered:
        path, resolved, run = resolve(target, None, Merged(values, settings.origins))
        if run and values["epsilon"] is None and run["norm"] != "linf":
            raise UserError(
                f"--epsilon: the run was trained in another ball. Received: norm {run['norm']} in "
                f"{str(target)!r}. Give the radius of the Linf ball: --epsilon."
            )
        if run and validation is None:
            validation = run["validation"]
        values = {**resolved.values, "norm": "linf"}
        found[target] = {"target": target, "path": path, "run": run}
    jobs = [found[target] for target in targets]
    if len(found) < len(targets):
        raise UserError(
            f"a model twice. Received: {', '.join(map(str, targets))}. Give each model once."
        )
    for job, name in zip(jobs, _names(jobs), strict=True):
        job["name"] = name
    return jobs, Merged(values, settings.origins), validation


def _names(jobs):
    """What tables and plots call the models: short where that tells them apart."""
    short = [
        job["target"].resolve().name
        if job["run"]
        else "/".join(job["target"].resolve().with_suffix("").parts[-2:])
        for job in jobs
    ]
    return short if len(set(short)) == len(short) else [str(job["target"]) for job in jobs]


def _check_out(settings, overwrite):
    """The folder for the report; nothing is changed yet."""
    if settings.out is None:
        name, number = Path("runs") / "compare-maximizers", 1
        out = name
        while out.exists():
            number += 1
            out = name.with_name(f"{name.name}-{number}")
        return out
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: not a folder. Received: {str(out)!r}.")
    try:
        used = out.exists() and any(out.iterdir())
        ours = used and json.loads((out / REPORT).read_text())["kind"] == _KIND
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if used and not overwrite:
        raise UserError(
            f"out: the folder is not empty. Received: {str(out)!r}. Use --overwrite to replace a "
            "comparison in it, or another --out."
        )
    if used and not ours:
        raise UserError(
            "out: refusing to overwrite a folder that is not a comparison of keras_emr. "
            f"Received: {str(out)!r}. Choose another --out."
        )
    return out


def _make(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(
            f"out: cannot use this folder: {error.strerror}. Received: {str(out)!r}. Choose "
            "another --out."
        ) from None


def _with_examples(settings, data):
    """The settings, with test images for the surface that exist."""
    n = len(data.x_test)
    inside = [i for i in settings.surface_examples if i < n]
    if len(inside) == len(settings.surface_examples):
        return settings
    if settings.origins["surface_examples"] != "default":
        beyond = next(i for i in settings.surface_examples if i >= n)
        raise UserError(
            f"--surface-examples: no such test image. Received: {beyond}. Expected indices "
            f"below {n}."
        )
    return Merged({**settings.values, "surface_examples": inside}, settings.origins)


def _load_all(jobs, settings, data):
    """Every model and maximizer, checked against the data, before anything is trained."""
    from keras_emr.attacks.learned import LearnedAttack
    from keras_emr.evaluation.inputs import require_fit
    from keras_emr.maximizers.files import FILE_NAME, foreign, load_maximizer
    from keras_emr_cli.progress import warn

    for job in jobs:
        job["model"] = load_model(job["path"])
        require_fit(job["model"], data.image_shape, data.classes)
        job["own"] = None
        if job["run"] and (job["target"] / FILE_NAME).exists():
            maximizer = load_maximizer(job["target"])
            for line in foreign(maximizer, float(settings.epsilon), data.image_shape[-1]):
                warn(f"{job['name']}: {line}")
            before = maximizer.trained_for or {"steps": settings.steps, "latent": False}
            attack = LearnedAttack(
                float(settings.epsilon),
                maximizer=maximizer,
                steps=before["steps"],
                latent=before["latent"],
            )
            job["own"] = (f"own ({job['run']['attack']})", attack)


def _compare(jobs, settings, data, quiet):
    """The report, and the surfaces for the plot."""
    from importlib import metadata

    from keras_emr.evaluation.loss_surface import loss_surface
    from keras_emr.evaluation.maximizer_comparison import MaximizerComparison
    from keras_emr.training.run_folder import describe_environment
    from keras_emr_cli.reporter import Reporter

    models, surfaces = [], []
    epsilon = float(settings.epsilon)
    with Reporter(quiet) as reporter:
        compare = MaximizerComparison(
            data,
            epsilon,
            settings.methods,
            steps=settings.steps,
            more=settings.more,
            preprocessing=settings.preprocessing,
            start=settings.start,
            n_examples=settings.n_examples,
            batch_size=settings.batch_size,
            fit_epochs=settings.fit_epochs,
            learning_rate=settings.learning_rate,
            rounds=settings.rounds,
            seed=settings.seed,
            say=reporter.say,
            progress=reporter.steps,
        )
        for job in jobs:
            found = compare(
                job["model"], lambda job=job: load_model(job["path"]), job["own"], job["name"]
            )
            reporter.say(f"{job['name']}: loss surface")
            chosen = settings.surface_examples
            surface = loss_surface(
                job["model"],
                data.x_test[chosen],
                data.y_test[chosen],
                epsilon,
                points=settings.surface_points,
                index=chosen,
                seed=settings.seed,
                batch_size=settings.batch_size,
            )
            surfaces.append({"name": job["name"], "surface": surface})
            plain = {"a": surface.a.tolist(), "b": surface.b.tolist()}
            plain |= {"loss": surface.loss.tolist(), "clipped_to": [0, 1], "examples": chosen}
            models.append(
                {"name": job["name"], "model": str(job["path"]), **found, "surface": plain}
            )
    facts = {"backend": settings.backend, "seed": settings.seed, "split_seed": settings.split_seed}
    environment = describe_environment(**facts, data=data.name, data_sha256=data.fingerprint)
    environment["versions"]["matplotlib"] = metadata.version("matplotlib")
    report = {
        "kind": _KIND,
        "settings": settings.plain(),
        **environment,
        "n": len(compare.x),
        "timed_batch": compare.batch_size,
        "training_batch": compare.fit_batch_size,
        "objective": "cross_entropy",
        "tuned_on": "the reported images",
        "bn_mode": "inference",
        "models": models,
    }
    return report, surfaces
