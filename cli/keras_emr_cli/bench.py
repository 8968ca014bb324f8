"""``keras-emr bench``: how fast this machine trains, and how far from the least time that is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from keras_emr.benchmark import JOBS
from keras_emr.errors import UserError
from keras_emr.models import MODEL_NAMES, check_model_name
from keras_emr_cli.settings import BACKENDS, SEEDS, merge, options
from keras_emr_cli.settings import Setting as S

_SMALL = ("small-cnn", "mlp")


def _shape(text):
    """``HxWxC`` as it was written. Raises :class:`UserError`."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise UserError(
            f"input_shape: not a shape. Received: {text!r}. Expected HEIGHTxWIDTHxCHANNELS, such "
            "as 32x32x3."
        )
    return text


BENCH = [
    S(
        "model",
        "text",
        "small-cnn",
        "Network; also wide-resnet-D-K[-emr], FILE.keras, MODULE:FUNCTION.",
        MODEL_NAMES,
        check=check_model_name,
    ),
    S(
        "input_shape",
        "text",
        None,
        "Images, HxWxC.",
        auto="28x28x1 for small-cnn and mlp, else 32x32x3",
        check=_shape,
    ),
    S("classes", "int", 10, "Classes.", low=2),
    S("jobs", "names", "standard,at,trades,mart,at-emr,at-lstm", "Training steps to time.", JOBS),
    S(
        "batch_size",
        "int",
        None,
        "Images per step.",
        low=1,
        auto="128; for larger networks on a CPU 16",
    ),
    S("steps", "int", 10, "Attack steps (PGD, learned maximizer).", low=1),
    S("epsilon", "ratio", "8/255", "Radius of the Linf ball in [0, 1] units.", low=0),
    S(
        "precision",
        "choice",
        "float32",
        "Precision of the outer step.",
        ("float32", "mixed_bfloat16", "mixed_float16"),
    ),
    S(
        "attack_precision",
        "choice",
        "float32",
        "Precision of the network while it is attacked.",
        ("float32", "bfloat16"),
    ),
    S(
        "learn_share",
        "float",
        1.0,
        "Share of a batch that a learned maximizer learns from.",
        low=0,
        high=1,
        low_open=True,
    ),
    S("rounds", "int", 10, "Rounds that count; in each, everything is timed once.", low=1),
    S("backend", "choice", "tensorflow", "Keras backend.", BACKENDS),
    S("seed", "int", 0, "Seed of weights, images and noise.", low=0, high=SEEDS - 1),
    S("out", "text", None, "Also write the figures to this file, as JSON.", auto="none"),
]


@click.command(name="bench")
@click.option("--config", metavar="FILE", help="YAML file of these settings.")
@click.option("--overwrite", is_flag=True, help="Replace the file in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@options(BENCH)
def command(config, overwrite, as_json, quiet, **flags):
    """Time training steps on random images, beside the least time that they could take.

    The least time of a step is that of the passes through the network which its method cannot do
    without (for adversarial training with K steps: K forward passes with an input gradient, and
    one full step), each timed alone on this machine. Nothing is trained for use.
    """
    settings = merge(BENCH, flags, config)
    out = _check_out(settings.out, overwrite)
    from keras_emr_cli.session import select_backend

    select_backend(settings.backend)
    found = _measure(settings, quiet)
    text = json.dumps(found, indent=2)
    if out is not None:
        from keras_emr.training.writing import in_place_of

        with in_place_of(out) as path:
            path.write_text(text + "\n")
    if as_json:
        click.echo(text)
    else:
        _show(found)


def _check_out(path, overwrite):
    if path is None:
        return None
    out = Path(path)
    if not out.resolve().parent.is_dir():
        raise UserError(f"out: no such folder. Received: {path!r}. Make its folder first.")
    if out.is_dir():
        raise UserError(f"out: a folder. Received: {path!r}. Expected the name of a file.")
    if out.exists() and not overwrite:
        raise UserError(
            f"out: the file exists. Received: {path!r}. Use --overwrite to replace it, or another "
            "--out."
        )
    return out


def _measure(s, quiet):
    import datetime
    import functools

    import keras

    from keras_emr import backend
    from keras_emr.benchmark.measure import measure
    from keras_emr.models import make_model
    from keras_emr.training.run_folder import describe_environment
    from keras_emr_cli.reporter import Reporter

    small = s.model in _SMALL
    shape = s.input_shape or ("28x28x1" if small else "32x32x3")
    image_shape = tuple(int(side) for side in shape.split("x"))
    batch_size = s.batch_size or (128 if small or backend.accelerated() else 16)
    keras.utils.set_random_seed(s.seed)
    with Reporter(quiet) as reporter:
        report = reporter.by_title()
        measured = measure(
            functools.partial(make_model, s.model, image_shape, s.classes),
            image_shape,
            s.jobs,
            batch_size,
            s.steps,
            float(s.epsilon),
            precision=s.precision,
            attack_precision=s.attack_precision,
            learn_share=s.learn_share,
            rounds=s.rounds,
            seed=s.seed,
            progress=lambda done, total: report("rounds", done, total),
        )
    settings = {
        "model": s.model,
        "input_shape": list(image_shape),
        "classes": s.classes,
        "batch_size": batch_size,
        "steps": s.steps,
        "epsilon": str(s.epsilon),
        "precision": s.precision,
        "attack_precision": s.attack_precision,
        "learn_share": s.learn_share,
        "backend": s.backend,
        "seed": s.seed,
    }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    environment = describe_environment()
    return {"benchmark": "training steps", "date": date, **settings, **environment, **measured}


def _show(found):
    from keras_emr_cli.tables import print_table

    rows = []
    names = {"forward": "forward pass", "inner": "with input gradient", "full": "standard step"}
    for name, title in names.items():
        rows.append(_row(title, found["passes"][name], "-"))
    for name, job in found["jobs"].items():
        rows.append(_row(name, job, f"{job['measured_over_least']:.2f}"))
    columns = ["", "ms", "quartiles", "images / s", "GFLOP", "GFLOP / s", "of matrix rate"]
    print_table([*columns, "x least time"], rows)
    shape = "x".join(map(str, found["input_shape"]))
    devices = ", ".join(found["hardware"]["devices"])
    cores = found["hardware"]["cpu_cores"]
    click.echo(
        f"{found['model']}, {shape}, batch {found['batch_size']}, {found['steps']} attack steps; "
        f"{found['precision']}, attacked in {found['attack_precision']}; {found['backend']} "
        f"{found['versions'][found['backend']]} on {devices} ({cores} CPU cores), "
        f"{found['rounds']} rounds."
    )
    click.echo(
        "least time: the passes that the method cannot do without, each as timed in the first "
        f"three rows. Matrix rate: {found['matrix_flops_per_second'] / 1e9:.0f} GFLOP / s "
        f"({found['matrix_precision']}), a product of large matrices."
    )
    if found["unstable"]:
        click.echo(
            f"Not stable (fewer than 5 rounds, or quartiles more than 10 % apart): "
            f"{', '.join(found['unstable'])}. Use more --rounds on a quiet machine."
        )
    if not found["accelerated"]:
        click.echo("No accelerator was found: these are the CPU's figures.")


def _row(title, part, ratio):
    seconds = part["seconds"]
    low, high = (1e3 * seconds[key] for key in ("low", "high"))
    return [
        title,
        f"{1e3 * seconds['median']:.1f}",
        f"{low:.1f} to {high:.1f}",
        f"{part['images_per_second']:.0f}",
        f"{part['flops'] / 1e9:.2f}",
        f"{part['flops_per_second'] / 1e9:.0f}",
        f"{100 * part['share_of_matrix_rate']:.0f} %",
        ratio,
    ]
