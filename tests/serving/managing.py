"""What tests that change what is served ask and do."""

import time


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def states(manager, name="m"):
    """Version -> state."""
    return {number: state for number, state, _ in manager.status(name)}


def breaks(version):
    """Make a version one that cannot be loaded."""
    (version / "variables" / "variables.index").write_bytes(b"broken")
