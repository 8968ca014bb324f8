"""``benchmarks/peers.py``, run as its users run it, and how it judges."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import parties
import peers
import peers_tables
import pytest
from peers_options import parse

SCRIPT = Path(peers.__file__)
SMALL = ("--image", "16x16x1", "--batch-size", "8", "--batches", "24", "--steps", "2")
SMALL += ("--epsilon", "0.1", "--device", "cpu", "--threads", "1", "--turn", "0.01")


def run(tmp_path, *arguments):
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, *SMALL, *arguments, "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.slow
def test_small_run(tmp_path):
    jobs = ["at", "trades", "mart", "at-emr"]
    table = tmp_path / "table.md"
    done, told = run(
        tmp_path, "--parties", "pytorch,tensorflow,torchattacks", "--jobs", ",".join(jobs),
        "--rounds", "2", "--warm-up", "1", "--markdown", table,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(told["check"]) == list(told["times"]) == jobs
    for job in jobs:
        rows = told["check"][job]
        ours, peer = rows["tensorflow"], rows["pytorch"]
        assert len(ours["losses"]) == len(peer["losses"]) == 24
        assert np.mean(peer["losses"]) == pytest.approx(np.mean(ours["losses"]), rel=0.2)
        assert np.mean(ours["losses"]) > 4  # of chance 2.3: the attack shows
        assert ours["agrees"] and peer["agrees"]
        times = told["times"][job]
        for name in ("tensorflow", "pytorch"):
            seconds = times[name]["seconds"]
            assert len(seconds) == 2 and min(seconds) > 0
            assert times[name]["median"] == pytest.approx(np.median(seconds))
            assert math.isfinite(times[name]["last_loss"])
        assert times["tensorflow"]["steps"] == times["pytorch"]["steps"]
    ours, peer = (told["check"]["at-emr"][name]["penalties"] for name in ("tensorflow", "pytorch"))
    assert np.mean(peer) == pytest.approx(np.mean(ours), rel=0.15) and np.mean(ours) > 1
    assert told["options"]["shape"] == [16, 16, 1] and told["options"]["step_size"] == 0.125
    assert {"keras", "tensorflow", "torch", "keras-emr", "python"} <= set(
        told["hardware"]["versions"]
    )
    assert told["hardware"]["cpu"] and told["began"] and "commit" in told["hardware"]
    assert any("2 rounds, fewer than 5" in line for line in told["unstable"])
    assert any("GPU" in note for note in told["notes"])
    if importlib.util.find_spec("torchattacks") is None:
        assert told["left_out"] == {"torchattacks": "torchattacks not installed"}
        assert "left out: torchattacks: torchattacks not installed" in done.stderr.splitlines()
    text = table.read_text()
    assert text == done.stdout and "| tensorflow | " in text and "small-cnn, 16x16x1" in text


@pytest.mark.slow
@pytest.mark.long
def test_every_party_and_job(tmp_path):
    done, told = run(tmp_path, "--rounds", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(told["times"]["at-lstm"]) == {"tensorflow", "jax", "torch"}
    assert set(told["times"]["standard"]) == set(told["options"]["parties"]) - set(told["left_out"])


@pytest.mark.parametrize("model", ["resnet18", "wide-resnet-10-1"])
@pytest.mark.slow
@pytest.mark.long
def test_residual_networks(tmp_path, model):
    done, told = run(
        tmp_path, "--model", model, "--image", "8x8x3", "--parties", "tensorflow,pytorch-best",
        "--rounds", "1", "--jobs", "standard,at,mart,at-emr",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(row["agrees"] for rows in told["check"].values() for row in rows.values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "vgg16"], "no PyTorch twin"),
        (["--model", "wide-resnet-34-10-emr"], "no PyTorch twin"),
        (["--parties", "foolbox"], "foolbox not among tensorflow"),
        (["--jobs", "mail"], "mail not among standard"),
    ],
)
def test_options_that_do_not_exist(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parse("", arguments)
    assert message in capsys.readouterr().err


def test_a_network_that_cannot_be_made_is_one_line(tmp_path):
    done, _ = run(tmp_path, "--image", "2x2x1", "--parties", "pytorch")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "cannot prepare small-cnn: UserError: small-cnn needs images of at least" in done.stderr


def test_options_left_open():
    found = parse("", ["--device", "cpu", "--parties", "pytorch,tensorflow"])
    assert (found["batch_size"], found["epsilon"], found["step_size"]) == (128, 0.3, 0.075)
    assert found["parties"] == ["tensorflow", "pytorch"]  # who is compared with comes first
    found = parse("", ["--model", "resnet18", "--device", "cpu", "--steps", "5"])
    assert (found["batch_size"], found["epsilon"], found["step_size"]) == (16, 8 / 255, 4 / 255)
    wide = parse("", ["--model", "wide-resnet-34-10", "--device", "cpu", "--epsilon", "1/10"])
    assert (wide["batch_size"], wide["epsilon"], tuple(wide["image"])) == (2, 0.1, (32, 32, 3))


STEADY = {"losses": [2.0, 2.2, 1.8, 2.0], "penalties": [1.0, 1.0, 1.0, 1.0]}


def checked(monkeypatch, job, answers):
    rows = {"tensorflow": STEADY, **answers}
    rows = {name: {"penalties": None, "first_seconds": 0.0, **row} for name, row in rows.items()}
    monkeypatch.setattr(parties, "ask", lambda process, request: rows[process])
    options = {"tolerance": 0.03, "device": "cpu"}
    return peers.check(job, {name: name for name in rows}, options)


@pytest.mark.parametrize(
    "other, agrees",
    [
        ({"losses": [2.05, 2.25, 1.85, 2.05]}, True),  # 2.5 % apart
        ({"losses": [2.07, 2.27, 1.87, 2.07]}, False),
        ({"losses": [2.4, 2.2, 1.8, 2.1]}, True),  # 6 % apart, standard error 5 %
        ({"losses": [6.0, 2.2, 1.8, 2.0]}, False),  # 50 % apart, as much as the error
        (STEADY | {"penalties": [1.05, 1.05, 1.05, 1.05]}, False),
        ({"losses": [2.0, 2.2, 1.8, float("nan")]}, False),
    ],
)
def test_check(monkeypatch, other, agrees):
    rows = checked(monkeypatch, "at", {"pytorch": other})
    assert rows["tensorflow"]["agrees"] and rows["pytorch"]["agrees"] == agrees
    assert peers_tables.disagreements({"at": rows}) == ([] if agrees else [("at", "pytorch")])


def test_check_excuses_work_that_is_known_to_differ(monkeypatch):
    for job, wrong in (("trades", []), ("at", [("at", "art")])):
        rows = checked(monkeypatch, job, {"art": {"losses": [1.0] * 4}})
        assert not rows["art"]["agrees"] and peers_tables.disagreements({job: rows}) == wrong


def test_check_tells_a_party_that_fails(monkeypatch):
    rows = checked(monkeypatch, "at", {"art": {"error": "ValueError: no"}})
    assert rows["art"]["why"] == "ValueError: no" and "agrees" not in rows["art"]


def test_networks_that_differ_end_the_run():
    peers.compare("pytorch", np.ones((2, 3)), np.ones((2, 3)) + 1e-5, 1e-3)
    for other in (1.01, np.nan):
        with pytest.raises(SystemExit, match="pytorch: logits"):
            peers.compare("pytorch", np.full((2, 3), other), np.ones((2, 3)), 1e-3)


def test_ratios_are_taken_round_by_round():
    seconds = {"tensorflow": [1.0, 2.0, 4.0], "pytorch": [2.0, 4.0, 6.0], "art": [9.0, 9.0, 9.0]}
    rows = {name: {"seconds": s, "median": float(np.median(s))} for name, s in seconds.items()}
    peers.relate(rows)
    assert rows["pytorch"]["to_tensorflow"]["median"] == 2.0  # of 2, 2, 1.5
    assert rows["tensorflow"]["to_fastest_peer"] == {
        "of": "pytorch", "median": 0.5, "low": 0.5, "high": pytest.approx(7 / 12)
    }  # fmt: skip


def test_unstable_times_are_named():
    steady = {"median": 1.0, "low": 0.97, "high": 1.03, "last_loss": 1.0}
    rows = {"jax": steady, "art": steady | {"high": 1.2}, "torch": steady | {"last_loss": math.nan}}
    assert peers_tables.unstable({"at": rows}, 5) == [
        "at, art: quartiles 23 % of the median apart",
        "at, torch: trained until its loss was not finite",
    ]
    assert peers_tables.unstable({"at": {"jax": steady}}, 4) == [
        "every time: 4 rounds, fewer than 5"
    ]
    assert peers_tables.unstable({}, 0) == []


def test_a_party_that_dies_ends_the_run_in_one_line():
    process = parties.start(["-c", "print('[]'); input()"], "jax")
    assert parties.ask(process) == []
    with pytest.raises(SystemExit, match="jax ended while doing 'x'"):
        parties.ask(process, "x")
    parties.stop([process])
