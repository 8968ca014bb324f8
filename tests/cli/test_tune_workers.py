"""Searches in processes of their own: killed, with workers, and what is left of them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time

import pytest

from tests.cli.harness import clean_environment, command, shell, write_data
from tests.cli.test_tune import SMALL, SPACE, outcome

pytestmark = pytest.mark.slow

TRIALS = 3
SEARCH = ("tune", "--space", "space.yaml", "--data", "toy.npz", *SMALL, "--backend", "jax")
SEARCH += ("--epochs", 12, "--max-trials", TRIALS, "--stopping", "none", "--epsilon", 0.4)


@pytest.fixture
def here(tmp_path):
    """A folder with the space and the data."""
    (tmp_path / "space.yaml").write_text(SPACE)
    write_data(tmp_path / "toy.npz", n=600)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, jax_cache):
    """The table of the search that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "space.yaml").write_text(SPACE)
    write_data(folder / "toy.npz", n=600)
    done = shell(*SEARCH, "--out", "s", cwd=folder, **jax_cache)
    assert done.code == 0, done.err
    return outcome(folder / "s")


@contextlib.contextmanager
def started(arguments, cwd, environment):
    """A process; it and the workers it started are gone after the block."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def children(pid):
    with contextlib.suppress(OSError):
        return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    return []


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def epochs(folder, trial):
    path = folder / "s" / "trials" / f"{trial:04d}" / "history.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def workers(process):
    """The process id of each worker that is running, by name."""
    found = {}
    for pid in children(process.pid):
        with contextlib.suppress(OSError):
            argv = open(f"/proc/{pid}/cmdline").read().split("\0")
            if "--tuner-id" in argv:
                found[argv[argv.index("--tuner-id") + 1]] = pid
    return found


def began(folder):
    """How often each trial's training began: a process that trains writes its first line once."""
    return sorted(path.name for path in (folder / "s" / "trials").glob("[0-9]*"))


def test_a_search_killed_in_a_trial_goes_on_in_it(here, whole, jax_cache):
    """Twice: in the first trial and in the last."""
    arguments = [*SEARCH, "--out", "s"]
    for trial in (0, 2):
        with started(arguments, here, jax_cache) as process:
            wait_for(lambda t=trial: 2 <= epochs(here, t), process)
            process.kill()
            process.wait()
        done = epochs(here, trial)
        assert done < 12 and not (here / "s" / "trials" / f"{trial:04d}" / "result.json").exists()
        arguments = ["tune", "--out", "s", "--resume"]
    resumed = shell(*arguments, cwd=here, **jax_cache)
    assert resumed.code == 0, resumed.err
    assert "trial 0000  epoch" not in resumed.err  # it had ended
    assert "trial 0001  epoch" not in resumed.err and "trial 0002  epoch 1/" not in resumed.err
    assert began(here) == [f"{i:04d}" for i in range(TRIALS)]
    assert outcome(here / "s") == whole


@pytest.mark.long
def test_workers_one_killed_another_takes_over(here, whole, jax_cache):
    """The same trials as without workers, none lost and none twice."""
    with started([*SEARCH, "--workers", 2, "--out", "s"], here, jax_cache) as process:
        wait_for(lambda: epochs(here, 0) >= 2 and len(workers(process)) == 2, process)
        state = json.loads((here / "s" / "state.json").read_text())
        victim = next(name for name, trial in state["ongoing_trials"].items() if int(trial) == 0)
        os.kill(workers(process)[victim], signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"{victim} is gone (exit code -9); trial 0000 goes on with another worker" in err
    assert f"{victim} is started again" in err
    assert began(here) == [f"{i:04d}" for i in range(TRIALS)]
    assert outcome(here / "s") == whole
    assert "best: s/trials/" in out


def test_all_workers_killed_end_the_chief(here, jax_cache):
    with started([*SEARCH, "--workers", 2, "--out", "s"], here, jax_cache) as process:
        wait_for(lambda: epochs(here, 0) >= 1 and len(workers(process)) == 2, process)
        for pid in workers(process).values():
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=60)
        seconds = time.monotonic() - killed
    assert process.returncode == 1 and seconds < 60
    assert err.splitlines()[-1].startswith("Error: all workers are gone")
    assert "keras-emr tune --out s --resume" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.long
def test_sigterm_and_sigkill_of_the_supervisor(here, whole, jax_cache):
    """The first stops everyone. After the second the workers end alone, and hold their trials
    until then."""
    search = [*SEARCH, "--workers", 2, "--out", "s"]
    with started(search, here, jax_cache) as process:
        wait_for(lambda: epochs(here, 0) >= 1 and len(workers(process)) == 2, process)
        pids = workers(process).values()
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "interrupted (SIGTERM)" in err and "--resume" in err and "Traceback" not in err
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]

    resume, before = ["tune", "--out", "s", "--resume"], epochs(here, 0)
    with started(resume, here, jax_cache) as process:
        wait_for(lambda: epochs(here, 0) > before and len(workers(process)) == 2, process)
        pids = list(workers(process).values())
        process.kill()
        process.wait()
        resumed = shell(*resume, cwd=here, **jax_cache)
    assert resumed.code == 0, resumed.err
    assert outcome(here / "s") == whole
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.long
def test_a_worker_of_another_host(here, whole, jax_cache):
    """A chief without workers of its own, and one that joins by the same flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    chief = [*SEARCH, "--chief", address, "--tuner-id", "chief", "--out", "s"]
    with started(chief, here, jax_cache) as process:
        wait_for(lambda: (here / "s" / "space.yaml").exists(), process)
        join = ["tune", "--out", "s", "--chief", address, "--tuner-id", "far"]
        joined = shell(*join, cwd=here, **jax_cache)
        _, err = process.communicate(timeout=120)
    assert joined.code == 0, joined.err
    assert process.returncode == 0, err
    assert outcome(here / "s") == whole


@pytest.mark.long
def test_a_worker_that_cannot_reach_the_chief(here):
    began = time.monotonic()
    done = shell("tune", "--out", "s", "--chief", "127.0.0.1:1", "--tuner-id", "a", cwd=here)
    assert done.code == 1 and time.monotonic() - began < 60
    assert done.err.startswith("Error: --chief: no answer from 127.0.0.1:1 (Connection refused)")
    assert done.err.count("\n") == 1
