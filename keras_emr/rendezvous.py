"""All processes of a job wait for each other, for a bounded time, before an engine starts.

Engines abort the process, or wait for minutes, where one is missing.
"""

from __future__ import annotations

import contextlib
import socket
import time

from keras_emr.errors import UserError

_GREETING, _GO = b"keras-emr", b"go"


def meet(coordinator, processes, process, timeout):
    """Return when all ``processes`` have called this.

    Args:
        coordinator: ``HOST:PORT`` where process 0 listens meanwhile; free again afterwards.
        processes, process: how many there are, and which this is.
        timeout: seconds.

    Raises:
        UserError: an address that is none, or somebody is missing.
    """
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator: expected HOST:PORT. Received: {coordinator!r}.")
    end = time.monotonic() + timeout
    if process == 0:
        _gather(int(port), processes, timeout, end)
    else:
        _report((host.strip("[]"), int(port)), coordinator, process, timeout, end)


def _gather(port, processes, timeout, end):
    there = {}
    with contextlib.ExitStack() as stack:
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
            stack.enter_context(server)
        except OSError as error:
            raise UserError(
                f"coordinator: process 0 cannot listen: {error.strerror}. Received: port {port}. "
                "Choose a free one, the same for all processes."
            ) from None
        while len(there) < processes - 1:
            try:
                server.settimeout(max(end - time.monotonic(), 0.01))
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                greeting = connection.recv(64).split()
            except TimeoutError:
                if time.monotonic() < end:
                    continue  # a stranger who says nothing
                missing = sorted(set(range(1, processes)) - set(there))
                raise UserError(
                    f"distribute: not all processes came within {timeout:g} s. Received: "
                    f"{len(there) + 1} of {processes}; missing: "
                    f"{', '.join(map(str, missing))}. Check that they run and can reach this "
                    f"machine's port {port}."
                ) from None
            except OSError:
                continue
            if len(greeting) == 2 and greeting[0] == _GREETING and greeting[1].isdigit():
                there[int(greeting[1])] = connection
        for connection in there.values():
            connection.sendall(_GO)


def _report(address, coordinator, process, timeout, end):
    reason = "nobody answers"
    while time.monotonic() < end:
        try:
            with socket.create_connection(address, timeout=2) as connection:
                connection.sendall(_GREETING + b" %d" % process)
                connection.settimeout(max(end - time.monotonic(), 0.01))
                if connection.recv(8) == _GO:
                    return
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        time.sleep(0.1)
    raise UserError(
        f"coordinator cannot be reached within {timeout:g} s, or processes are missing: {reason}. "
        f"Received: {coordinator!r}. Check that all processes run and that its port is open."
    )
