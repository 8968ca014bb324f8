"""Requests that are run together, and the bounds of the queue."""

import threading
import time

import numpy as np
import pytest

from keras_emr_serving.server.batching import Batcher
from keras_emr_serving.server.servable import Servable
from keras_emr_serving.server.status import ServingError
from keras_emr_serving.server.text_protos import Batching, read_batching


class Doubling:
    """Stands in for a servable: doubles its input, and remembers what it was given."""

    def __init__(self, wait=0.0):
        self.batches, self.wait, self.gate = [], wait, threading.Event()
        self.gate.set()

    def check(self, feeds, infos):
        pass

    def run(self, feeds, fetches, timeout_ms=None, infos=None):
        self.gate.wait()
        self.batches.append(feeds[0][1].copy())
        return [2 * feeds[0][1]], 1.0


def call_all(batcher, arrays):
    """Run all at once; what each got, or its error."""
    results = [None] * len(arrays)

    def one(i):
        try:
            results[i] = batcher.run([("x", arrays[i])], ["y"], 20_000)[0][0]
        except ServingError as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(arrays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def batching():
    made = []

    def make(servable, **settings):
        made.append(Batcher(servable, Batching(**{"threads": 1, **settings})))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_requests_share_a_run_and_get_their_own_rows(batching):
    servable = Doubling()
    batcher = batching(servable, max_batch_size=8, timeout_seconds=5)
    arrays = [np.full((2, 3), i, np.float32) for i in range(4)]
    for i, result in enumerate(call_all(batcher, arrays)):
        np.testing.assert_array_equal(result, np.full((2, 3), 2 * i))
    assert [len(batch) for batch in servable.batches] == [8]  # full, so nothing waited 5 s


def test_a_lone_request_waits_no_longer_than_the_timeout(batching):
    batcher = batching(Doubling(), max_batch_size=8, timeout_seconds=0.1)
    began = time.monotonic()
    call_all(batcher, [np.ones((1, 1))])
    assert 0.1 <= time.monotonic() - began < 2


def test_allowed_sizes_pad_with_the_first_row(batching):
    servable = Doubling()
    batcher = batching(servable, max_batch_size=8, allowed_sizes=(4, 8))
    (result,) = call_all(batcher, [np.float32([[1], [2], [3]])])
    assert result.tolist() == [[2], [4], [6]]
    assert servable.batches[0].tolist() == [[1], [2], [3], [1]]


def test_a_full_queue_refuses_at_once_and_recovers(batching):
    servable = Doubling()
    servable.gate.clear()
    batcher = batching(servable, max_batch_size=1, max_enqueued_batches=2)
    done = []
    worker = threading.Thread(
        target=lambda: done.extend(call_all(batcher, [np.ones((1, 1))] * 12)), daemon=True
    )
    worker.start()
    time.sleep(0.5)
    servable.gate.set()
    worker.join(timeout=20)
    refused = [one for one in done if isinstance(one, ServingError)]
    assert len(done) == 12 and len(refused) == 9  # one running, two waiting
    assert {one.code for one in refused} == {"UNAVAILABLE"}
    assert "queue to which this task was submitted is full" in refused[0].message
    assert call_all(batcher, [np.ones((1, 1))])[0].tolist() == [[2]]


def test_different_shapes_in_one_batch(batching):
    arrays = [np.ones((1, 2), np.float32), np.ones((1, 3), np.float32)]
    options = {"max_batch_size": 2, "timeout_seconds": 5}
    for result in call_all(batching(Doubling(), **options), arrays):
        assert result.code == "FAILED_PRECONDITION"
        assert result.message.startswith(
            "Tensors with name 'x' from different tasks have different shapes and padding is "
            "turned off."
        )
    padded = call_all(batching(Doubling(), pad_inputs=True, **options), arrays)
    assert [one.shape for one in padded] == [(1, 3), (1, 3)]


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ([("x", np.ones((9, 1)))], "Task size 9 is larger than maximum input batch size 8"),
        ([("x", np.ones(()))], "must have at least one dimension"),
        ([("x", np.ones((1, 1))), ("y", np.ones((2, 1)))], "equal 0th-dimension size"),
    ],
)
def test_what_cannot_be_batched(batching, feeds, text):
    with pytest.raises(ServingError, match=text):
        batching(Doubling(), max_batch_size=8).run(feeds, ["y"])


def test_a_scalar_output_cannot_be_batched(made, batching):
    servable = Servable(made / "toy")
    signature = servable.signatures["scalar"]
    feed = (signature.inputs["x"].name, np.ones((2, 3), np.float32))
    with pytest.raises(ServingError) as error:
        batching(servable).run([feed], [signature.outputs["mean"].name])
    assert str(error.value) == "FAILED_PRECONDITION: Batched output tensor has 0 dimensions"
    servable.close()


def test_stopping_answers_what_waits():
    batcher = Batcher(Doubling(), Batching(max_batch_size=8, timeout_seconds=60, threads=1))
    results = []
    worker = threading.Thread(target=lambda: results.extend(call_all(batcher, [np.ones((1, 1))])))
    worker.start()
    time.sleep(0.2)
    batcher.stop()
    worker.join(timeout=20)
    assert results[0].tolist() == [[2]]
    with pytest.raises(ServingError, match="UNAVAILABLE"):
        batcher.run([("x", np.ones((1, 1)))], ["y"])


def test_a_batching_file():
    text = """
        max_batch_size { value: 64 } batch_timeout_micros { value: 1000 }
        num_batch_threads { value: 2 } max_enqueued_batches { value: 100 }
        allowed_batch_sizes: 8 allowed_batch_sizes: 64 pad_variable_length_inputs: true
    """
    assert read_batching(text) == Batching(64, 0.001, 100, 2, (8, 64), True)
    assert read_batching("", cpus=4) == Batching(threads=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: 64", "not a BatchingParameters"),
        ("no_such_field { value: 1 }", "not a BatchingParameters"),
        ("max_batch_size { value: 0 }", "max_batch_size must be at least 1"),
        (
            "max_batch_size { value: 8 } allowed_batch_sizes: 4",
            "Last entry in allowed_batch_sizes must match max_batch_size; last was 4; expected 8",
        ),
    ],
)
def test_a_batching_file_that_is_refused(text, message):
    with pytest.raises(ServingError) as error:
        read_batching(text)
    assert message in error.value.message
