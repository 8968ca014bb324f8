"""``keras-emr serving``: which version of a model the clients of a server get."""

from __future__ import annotations

import dataclasses
import json
import shlex

import click

from keras_emr.errors import UserError


@click.group(name="serving", no_args_is_help=True)
def command():
    """Say which version of a model clients get, and go back to the one before.

    Clients ask for a label: /v1/models/NAME/labels/stable:predict. STORE/models.config, which
    TensorFlow Serving reads again and again, says which version carries it.
    """


def _server_options(function):
    options = [
        click.option("--url", metavar="URL", help="REST API of a running server to follow it on."),
        click.option(
            "--grpc", metavar="HOST:PORT", help="Or its gRPC API: told to reload at once."
        ),
        click.option("--grpc-ca", metavar="FILE", help="Who signed its certificate: TLS."),
        click.option(
            "--grpc-cert", metavar="FILE", help="Our certificate, if it verifies clients."
        ),
        click.option("--grpc-key", metavar="FILE", help="The key of our certificate."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _change_options(function):
    options = [
        click.option("--label", default="stable", show_default=True, help="What clients ask for."),
        click.option(
            "--pause",
            type=click.FloatRange(0),
            default=10.0,
            show_default=True,
            help="Seconds between loading a version and labelling it, without --url or --grpc.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(0),
            default=300.0,
            show_default=True,
            help="Seconds that the server has for each step.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        function = option(function)
    return _server_options(function)


@command.command()
@click.argument("store", metavar="STORE")
@click.argument("name", metavar="[NAME]", required=False)
@_server_options
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(store, name, as_json, **where):
    """Versions on disk, labels and policy; with --url or --grpc also what the server says.

    Exit code 3 if models.config names a model or version that is not there.
    """
    from keras_emr_serving.lifecycle import Store

    return _guarded(lambda: _show_status(Store(store).status(name), _server(where), as_json))


@command.command()
@click.argument("store", metavar="STORE")
@click.argument("name", metavar="NAME")
@click.argument("version", metavar="[VERSION]", required=False, type=click.IntRange(0))
@click.option("--base-path", metavar="DIR", help="Where the server sees STORE, such as /models.")
@_change_options
def promote(store, name, version, label, pause, timeout, base_path, as_json, **where):
    """Make VERSION (default: the newest) the one that clients of the label get.

    The version before is remembered under the label `previous`, and both stay loaded.
    """
    from keras_emr_serving.lifecycle import Store

    def change():
        return Store(store).promote(
            name, version, label, base_path, _server(where), pause, timeout, _tell
        )

    return _guarded(lambda: _show_change(change(), store, as_json))


@command.command()
@click.argument("store", metavar="STORE")
@click.argument("name", metavar="NAME")
@_change_options
def rollback(store, name, label, pause, timeout, as_json, **where):
    """Go back to the version before; once more returns to the one after it."""
    from keras_emr_serving.lifecycle import Store

    def change():
        return Store(store).rollback(name, label, _server(where), pause, timeout, _tell)

    return _guarded(lambda: _show_change(change(), store, as_json))


def _tell(text):
    click.echo(text, err=True)


def _server(where):
    """The running server that the flags name, or ``None``."""
    from keras_emr_serving.running import GrpcServer, RestServer

    tls = {key: where[f"grpc_{key}"] for key in ("ca", "cert", "key")}
    if where["url"] and where["grpc"]:
        raise click.UsageError("give either --url or --grpc")
    if where["url"]:
        return RestServer(where["url"])
    if where["grpc"]:
        from keras_emr_cli.session import quiet_tensorflow

        with quiet_tensorflow():  # its stubs import TensorFlow, which would greet on stderr
            return GrpcServer(where["grpc"], tls["ca"], tls["cert"], tls["key"])
    if any(tls.values()):
        raise click.UsageError("--grpc-ca, --grpc-cert and --grpc-key need --grpc")
    return None


def _guarded(work):
    """Run ``work``; a server's trouble is a failure, not a mistake in what the user gave."""
    from importlib.util import find_spec

    missing = [name for name in ("tensorflow_serving", "grpc") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"serving: packages are missing. Received: no {', '.join(missing)}. Install them with "
            'pip install "keras-emr[serving]".'
        )
    from keras_emr_cli.main import EXIT_FAILURE, fail
    from keras_emr_serving.running import ServerTrouble

    try:
        return work()
    except ServerTrouble as error:
        return fail(error, EXIT_FAILURE)


def _show_change(change, store, as_json):
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(change), indent=2))
        return
    if change.was == change.version:
        text = f"{change.name}: label {change.label!r} is on version {change.version} already"
    else:
        was = "" if change.was is None else f" (was {change.was})"
        text = f"{change.name}: label {change.label!r} is on version {change.version}{was}"
    click.echo(text)
    if change.previous is not None:
        more = "" if change.label == "stable" else f" --label {change.label}"
        again = f"keras-emr serving rollback {shlex.quote(str(store))} {change.name}{more}"
        click.echo(f"to go back to version {change.previous}: {again}")
    if not change.confirmed:
        click.echo(f"written to {change.path}; ask the server with --url", err=True)


def _show_status(found, server, as_json):
    from keras_emr_cli.main import EXIT_INVALID, fail

    said = {one.name: server.states(one.name) for one in found} if server else {}
    problems = [problem for one in found for problem in one.problems]
    if as_json:
        shown = [dataclasses.asdict(one) for one in found]
        for one in shown:
            if server:
                states = said[one["name"]].items()
                one["server"] = {number: dataclasses.asdict(state) for number, state in states}
        click.echo(json.dumps({"models": shown, "problems": problems}, indent=2))
    else:
        for one in found:
            _show_model(one, said.get(one.name))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return fail(f"models.config: {problems[0]}{more}", EXIT_INVALID)


def _show_model(one, said):
    policy = "not in models.config" if one.policy is None else f"policy {one.policy}"
    click.echo(f"{one.name}: {policy}")
    for number in sorted({*one.versions, *one.labels.values(), *(said or ())}):
        notes = [label for label, on in one.labels.items() if on == number]
        if number not in one.versions:
            notes.append("not on disk")
        elif not one.versions[number]:
            notes.append("half-written")
        elif number in one.wanted:
            notes.append("to be served")
        if said is not None:
            state = said.get(number)
            notes.append(f"server: {state.state if state else 'not known'}")
            if state and state.error:
                notes.append(" ".join(state.error.split()))
        click.echo(f"  {number}  {', '.join(notes)}".rstrip())
    if one.wanted and len(one.versions) > 1:
        click.echo(f"  without a label clients get version {max(one.wanted)}")
