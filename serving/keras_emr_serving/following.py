"""Wait until a running server has done what ``models.config`` says."""

from __future__ import annotations

import time

from keras_emr_serving.models_config import NAME
from keras_emr_serving.running import ServerTrouble

PAUSE = 0.2
# A server has looked at models.config again by then: ours do every 5 s.
GRACE = 15.0


def is_available(state) -> bool:
    """Whether a server answers for the version that is in this state, ``None``: not known."""
    return state is not None and state.state == "AVAILABLE"


def wait_for_version(server, name: str, version: int, timeout: float, before=None) -> None:
    """Return when the version is available.

    Args:
        server, name, version, timeout: what to wait for, and how many seconds.
        before: the version's state when the server was not to load it yet. A failure that was
            there by then may be of files that have been mended since: it counts when it stays.

    Raises:
        ServerTrouble: it cannot be loaded, or is not in ``timeout`` seconds.
    """
    begin = time.monotonic()

    def loaded():
        found = server.states(name).get(version)
        news = found != before or time.monotonic() > begin + GRACE
        if found is not None and found.state == "END" and found.error and news:
            raise CannotLoad(
                f"{server.where} cannot load version {version} of {name}: {found.error}. Nothing "
                "has changed."
            )
        return is_available(found)

    _wait(
        loaded,
        timeout,
        f"{server.where} has not loaded version {version} of {name} in {timeout:g} s. Nothing has "
        f"changed. Is it one that reads this {NAME} again and again (--model_config_file, "
        "--model_config_file_poll_wait_seconds)? With --grpc it need not.",
    )


def wait_for_label(server, name: str, label: str, version: int, timeout: float) -> None:
    """Return when the label is on the version. Raises :class:`ServerTrouble`."""
    _wait(
        lambda: server.labelled(name, label) == version,
        timeout,
        f"{server.where} has not moved label {label!r} to version {version} of {name} in "
        f"{timeout:g} s. {NAME} says so: it follows when the server reads that.",
    )


def wait_blindly(version: int, seconds: float, tell) -> None:
    """Give a server that cannot be asked the time to load a version; ``tell`` says so."""
    if seconds > 0:
        tell(
            f"{NAME}: version {version} is to be loaded; its label follows in {seconds:.3g} s, so "
            "that a server that reads the file again and again has seen this (--pause 0 if none is "
            "running; --url or --grpc to be sure)"
        )
        time.sleep(seconds)


class CannotLoad(ServerTrouble):
    """A version that the server has given up."""


def _wait(done, timeout, otherwise):
    """Ask ``done`` until it says so. A server may miss one answer while it loads or swaps."""
    deadline = time.monotonic() + timeout
    while True:
        trouble = None
        try:
            if done():
                return
        except CannotLoad:
            raise
        except ServerTrouble as error:
            trouble = error
        if time.monotonic() >= deadline:
            raise ServerTrouble(f"{otherwise} {trouble}" if trouble else otherwise)
        time.sleep(PAUSE)
