"""``keras-emr export``: publish a trained model for TensorFlow Serving."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path

import click

from keras_emr.errors import UserError
from keras_emr_cli.evaluate_settings import EXPORT
from keras_emr_cli.load_data import load_data
from keras_emr_cli.settings import BACKENDS, Merged, Ratio, merge, options

EXIT_GATE = 4
_EPSILON = "8/255"  # of a .keras file that does not say


@click.command(name="export")
@click.argument("target", metavar="RUN_OR_MODEL")
@click.option("--to", "store", metavar="STORE", required=True, help="Folder of models.")
@click.option("--checkpoint", metavar="best|last", help="Which model of a run.  [default: best]")
@click.option("--with-attack", is_flag=True, help="Also serve PGD, for red-teaming.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@options(EXPORT)
def command(target, store, checkpoint, with_attack, as_json, quiet, **flags):
    """Publish RUN_OR_MODEL (a run folder or any .keras classifier) as STORE/NAME/VERSION.

    The version appears only if the exported model, run as TensorFlow Serving runs it, agrees with
    its source on 1,024 clean and adversarial images (exit code 4 otherwise). A run folder brings
    its data and epsilon; a .keras file needs --data.
    """
    settings = merge(EXPORT, flags)
    from keras_emr_cli.targets import require_same_data, resolve

    target = Path(target)
    if settings.epsilon is None and not target.is_dir():
        settings = Merged({**settings.values, "epsilon": Ratio(_EPSILON)}, settings.origins)
    its_own_data = settings.data is None
    path, settings, run = resolve(target, checkpoint, settings)
    if not float(settings.epsilon) > 0:
        raise UserError(f"--epsilon: of the run is {settings.epsilon}. Expected more than 0.")
    backend = settings.backend or _trained_on(target) or "tensorflow"
    _require_installed(backend)
    from keras_emr_cli.main import EXIT_FAILURE, fail
    from keras_emr_serving.export import ExportFailed, ParityError, export
    from keras_emr_serving.store import ModelFolder, check_version

    # What is quick to refuse comes before the data is read.
    name = _default_name(path) if settings.name is None else settings.name
    ModelFolder(store, name).require_free(check_version(settings.version))
    data = load_data(settings, run["validation"] if its_own_data and run else None, quiet)
    if its_own_data:
        require_same_data(target, data, settings)
    # A SIGTERM cleans up as Ctrl-C does; a kill leaves what no server loads, for the next export.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = export(
            path,
            store,
            name,
            data,
            epsilon=float(settings.epsilon),
            norm=settings.norm,
            version=settings.version,
            backend=backend,
            with_attack=with_attack,
            keep=settings.keep,
            facts={"epsilon_text": str(settings.epsilon), "run": _reported(path)},
            progress=None if quiet else lambda text: click.echo(text, err=True),
        )
    except ParityError as error:
        return fail(error, EXIT_GATE)
    except ExportFailed as error:
        return fail(error, EXIT_FAILURE)
    if as_json:
        click.echo(json.dumps(done, indent=2))
    else:
        _show(done, settings)


def _default_name(path):
    """The run's name, or the file's."""
    of_run = path.stem in ("best", "last") and (path.parent / "config.yaml").exists()
    return path.resolve().parent.name if of_run else path.stem


def _trained_on(target):
    """The backend that a run was trained on; ``None`` where nothing tells it."""
    try:
        environment = json.loads((target / "environment.json").read_text())
        return environment["backend"] if environment["backend"] in BACKENDS else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_installed(backend):
    for package in dict.fromkeys((backend, "tensorflow", "tensorflow_serving")):
        if importlib.util.find_spec(package) is None:
            extra = {"tensorflow_serving": "[serving]", "tensorflow": ""}.get(
                package, f"[{package}]"
            )
            other = "; or give --backend tensorflow" if package in ("jax", "torch") else ""
            raise UserError(
                f"export: {package} is not installed. Received: a model of backend {backend}. "
                f"Install it with: pip install 'keras-emr{extra}'{other}"
            )


def _reported(path):
    """What the run's training found for this checkpoint, from ``report/training.json``."""
    try:
        rows = json.loads((path.parent / "report" / "training.json").read_text())["results"]
        row = [r for r in rows if r["checkpoint"] == path.stem][-1]  # the baseline comes first
        return {key: row[key] for key in ("accuracy", "robust_accuracy", "n", "attack")}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _show(done, settings):
    logits, card = done["parity"]["logits"], done["card"]
    click.echo(f"published: {done['path']}")
    click.echo(f"signatures: {', '.join(card['signatures'])}")
    click.echo(
        f"parity: {logits['images']} images, {done['parity']['adversarial_images']} of them "
        f"adversarial; logits within {logits['relative_difference']:.1e} of their scale, "
        f"{logits['label_flips']} label flips"
    )
    threshold = card["threshold"]
    click.echo(
        f"trusted: effective margin ({threshold['norm']}) above {threshold['value']:.4g}; "
        f"{threshold['rule']}"
    )
    for kind, text in (("wrong_clean", "wrong clean"), ("wrong_attacked", "wrong under PGD")):
        found = card["trusted"][kind]
        if found["n"]:
            click.echo(f"  of {found['n']} {text}: {100 * found['trusted']:.1f} % still trusted")
