"""What several devices are fed with, and what is refused before they start."""

import threading
import time

import numpy as np
import pytest

import keras_emr as ke
from keras_emr.data.batches import EvenBatches, TrainBatches
from keras_emr.data.extra import ExtraData
from keras_emr.distribution import Distribution
from keras_emr.errors import UserError
from keras_emr.rendezvous import meet
from tests.builders import images
from tests.distribution.test_devices import free_port


def test_the_shares_of_a_batch_are_the_batch():
    """Augmented, with extra data in its last rows, which no process has alone."""
    x, y = images(40, side=8)
    x = np.repeat(x, 3, axis=-1)
    extra = ExtraData(1 - x, y, 0.3)
    made = {
        n: [TrainBatches(x, y, 12, 7, "cifar", extra, share=(i, n)) for i in range(n)]
        for n in (1, 2, 3)
    }
    for n, parts in made.items():
        for index in (0, 2):
            (whole,) = made[1]
            together = [
                np.concatenate(rows) for rows in zip(*(p[index] for p in parts), strict=True)
            ]
            assert [len(p[index][0]) for p in parts] == [12 // n] * n
            for one, many in zip(whole[index], together, strict=True):
                np.testing.assert_array_equal(one, many)


def test_the_mean_over_even_batches_is_that_over_the_data():
    x, y = images(13)
    batches = [EvenBatches(x, y, 8, (i, 2)) for i in range(2)]
    assert [len(b) for b in batches] == [2, 2]
    total = places = 0
    for part in batches:
        for index in range(2):
            images_, labels, weights = part[index]
            assert images_.shape == (4, 6, 6, 1) and labels.shape == weights.shape == (4,)
            total, places = total + (weights * images_.mean(axis=(1, 2, 3))).sum(), places + 4
    assert total / places == pytest.approx(x.mean(), abs=1e-6)
    with pytest.raises(IndexError):
        batches[0][2]


@pytest.mark.parametrize(("size", "near"), [(16, "15 or 18"), (2, "Use 3")])
def test_a_batch_that_does_not_divide_is_refused(size, near):
    group = Distribution(("a", "b", "c"))
    group.check_batch(18)
    with pytest.raises(UserError, match=near):
        group.check_batch(size)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "model"}, "unknown distribute"),
        ({"devices": 0}, "devices must be a whole number >= 1"),
        ({"coordinator": "h:1"}, "go together"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "counted from 0"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(UserError, match=text), ke.distribute(**options):
        pass


def test_processes_meet():
    address, done = f"127.0.0.1:{free_port()}", []
    threads = [
        threading.Thread(target=lambda i=i: done.append(meet(address, 3, i, 20.0)))
        for i in (2, 0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3


@pytest.mark.parametrize(
    ("process", "text"), [(0, "1 of 2; missing: 1"), (1, "cannot be reached within 0.3 s")]
)
def test_who_is_missing_is_said_in_time(process, text):
    began = time.monotonic()
    with pytest.raises(UserError, match=text):
        meet(f"127.0.0.1:{free_port()}", 2, process, 0.3)
    assert time.monotonic() - began < 10


def test_an_address_without_a_port_is_refused():
    with pytest.raises(UserError, match="expected HOST:PORT"):
        meet("host", 2, 1, 0.1)


@pytest.mark.parametrize(
    "config",
    ["{", "[]", '{"cluster": {}}', '{"cluster": {"worker": ["a:1"]}, "task": {"index": 1}}'],
)
def test_a_bad_tf_config_is_one_line(monkeypatch, config):
    replicas = pytest.importorskip("keras_emr.backend.tensorflow_replicas")
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match="TF_CONFIG is not that of a worker"):
        replicas.start(None, None, None, None, 1.0)


def test_half_of_torchruns_environment_is_one_line(monkeypatch):
    processes = pytest.importorskip("keras_emr.backend.torch_processes")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is no number"):
        processes.start(None, None, None, None, 1.0)


def test_workers_that_cannot_be_joined_say_why():
    replicas = pytest.importorskip("keras_emr.backend.tensorflow_replicas")

    def refuse():
        raise RuntimeError("the port is taken")

    with pytest.raises(UserError, match="cannot be joined: the port is taken"):
        replicas._within(5.0, ["a:1"], refuse)
