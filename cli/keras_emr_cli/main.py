"""Entry point: finds the command, loads only that one, and turns errors into exit codes."""

from __future__ import annotations

import importlib
import sys

import click

from keras_emr._version import __version__
from keras_emr.errors import NotWritten, UserError, unknown

EXIT_FAILURE, EXIT_USAGE, EXIT_INVALID, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_RESUMABLE = 75  # called again, the command goes on where it stopped

_COMMANDS = {
    "train": (
        "keras_emr_cli.train",
        "Train a robust classifier and compare it with a standard one.",
    ),
    "tune": ("keras_emr_cli.tune", "Search the settings of train for robust accuracy."),
    "evaluate": ("keras_emr_cli.evaluate", "Attack a trained model and report what survives."),
    "compare": ("keras_emr_cli.compare", "Put inner maximizers side by side on trained models."),
    "export": ("keras_emr_cli.export", "Publish a trained model for TensorFlow Serving."),
    "report": ("keras_emr_cli.report", "Put evaluation reports side by side on one page."),
    "serve": ("keras_emr_cli.serve", "Serve models on this machine as TensorFlow Serving would."),
    "serving": (
        "keras_emr_cli.serving",
        "Which version of a model clients get: status, promote, rollback.",
    ),
    "predict": ("keras_emr_cli.predict", "Classify image files with a served model."),
    "data": ("keras_emr_cli.data", "What can be trained on: list it, inspect it, prepare it."),
    "bench": ("keras_emr_cli.bench", "Time training steps here, beside the least possible time."),
    "config": ("keras_emr_cli.config", "Write a config file, or show the merged settings."),
}


class LazyGroup(click.Group):
    """Lists commands from a table; imports a command's module when it is called."""

    def list_commands(self, ctx):
        return list(_COMMANDS)

    def get_command(self, ctx, name):
        if name not in _COMMANDS:
            return None
        return importlib.import_module(_COMMANDS[name][0]).command

    def resolve_command(self, ctx, args):
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(str(unknown("command", args[0], _COMMANDS)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="keras-emr")
def cli():
    """Adversarially robust image classifiers for Keras 3.

    Exit codes: 0 ok, 1 failure, 2 usage, 3 invalid settings or data, 4 a gate failed,
    75 interrupted but resumable, 130 Ctrl-C.
    """


def fail(message, code):
    """Print one line on stderr and return ``code``."""
    click.echo(f"Error: {' '.join(str(message).split())}", err=True)
    return code


def main(arguments=None):
    """Run the command line; returns by ``sys.exit`` with the documented codes."""
    try:
        code = cli.main(args=arguments, prog_name="keras-emr", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help(), err=True)
        code = EXIT_USAGE
    except click.NoSuchOption as error:
        hint = f" (did you mean {error.possibilities[0]}?)" if error.possibilities else ""
        code = fail(f"{error.message.split('.')[0]}{hint}", EXIT_USAGE)
    except click.ClickException as error:
        code = fail(error.format_message(), EXIT_USAGE)
    except UserError as error:
        code = fail(error, EXIT_INVALID)
    except NotWritten as error:
        code = fail(error, EXIT_FAILURE)
    except AssertionError as error:
        # An attack that left its ball is our bug; a traceback would not help whoever meets it.
        evaluation = sys.modules.get("keras_emr.evaluation.robust_accuracy")
        if evaluation is None or not isinstance(error, evaluation.InfeasibleAttack):
            raise
        code = fail(f"{error}. This is a bug of keras_emr; no result is given.", EXIT_FAILURE)
    except (click.Abort, KeyboardInterrupt):
        code = fail("interrupted", EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
