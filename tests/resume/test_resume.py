"""A run that is stopped again and again ends as one that never was, to the last bit."""

import json

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.training import snapshot
from keras_emr.training.callbacks import Interrupted
from tests.builders import assert_same_arrays, newest_checkpoint
from tests.resume import runs


def scramble(robust):
    """As in another process: nothing is left of the state but the shapes."""
    for variables in snapshot._groups(robust).values():
        for variable in variables:
            value = keras.ops.convert_to_numpy(variable.value)
            variable.assign(np.full_like(value, 3))
    keras.utils.set_random_seed(99)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An RNN-TRADES run that was never stopped: folder, classifier, the state it began with."""
    folder, robust = tmp_path_factory.mktemp("whole"), runs.classifier("rnn-trades")
    began = snapshot.capture(robust)
    runs.train(robust, folder)
    return folder, robust, began


# How often training looks before it is stopped, and what the checkpoint then says. An epoch: eight
# steps, a batch of validation, a batch of margins, its end.
MOMENTS = [
    (2, "the maximizer's warm-up, step 2"),
    (4, "epoch 1, step 3"),
    (6, "epoch 1, step 8"),  # in validation
    (2, "epoch 1, step 8"),  # between validation and margins
    (3, "epoch 2, step 0"),
    (8, "epoch 2, step 8"),  # before validation
]


def test_stopped_at_every_kind_of_moment(whole, tmp_path):
    folder, robust, began = whole
    snapshot.restore(robust, began)
    for i, (k, where) in enumerate(MOMENTS):
        with pytest.raises(Interrupted) as stopped:
            runs.train(robust, tmp_path, stop=runs.StopAt(k), resume=True)
        assert stopped.value.where == where, i
        assert not list(tmp_path.rglob("*part*"))
        scramble(robust)
    last = runs.train(robust, tmp_path, resume=True)
    assert runs.history(tmp_path) == runs.history(folder) and len(last.history) == 2
    (at, arrays), (expected_at, expected) = map(newest_checkpoint, (tmp_path, folder))
    assert (at["epoch"], at["step"]) == (expected_at["epoch"], expected_at["step"]) == (2, 0)
    assert_same_arrays(arrays, expected)
    assert {"state", "optimizer", "maximizer_optimizer"} <= {k.split("/")[0] for k in arrays}
    found, kept = runs.models(tmp_path), runs.models(folder)
    assert_same_arrays(found, kept)
    assert {name.split("/")[0] for name in kept} == {"best.keras", "last.keras", "maximizer.keras"}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


class Numbers(keras.callbacks.Callback):
    """What a callback of the user's sees, and remembers over an interruption."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def get_state(self):
        return self.seen

    def set_state(self, seen):
        self.seen = seen

    def __getattribute__(self, name):
        if name in ("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end"):
            return lambda *a, **k: self.seen.append([name, *(v for v in a if isinstance(v, int))])
        if name in ("on_train_batch_begin", "on_train_batch_end"):
            return lambda batch, logs=None: self.seen.append([name, batch])
        return super().__getattribute__(name)


def test_callbacks_see_the_true_numbers_of_batches_and_times_add_up(whole, tmp_path):
    _, robust, began = whole
    told = []
    for stop, resume in ((None, False), (runs.StopAt(6), False), (None, True)):
        if not resume:
            snapshot.restore(robust, began)
        numbers = Numbers()
        folder = tmp_path / ("whole" if stop is None and not resume else "parts")
        options = {"callbacks": [numbers], "stop": stop, "resume": resume, "epochs": 1}
        try:
            run = runs.train(robust, folder, maximizer_warmup=0, **options)
        except Interrupted as stopped:
            assert stopped.where == "epoch 1, step 6"
            elapsed = newest_checkpoint(folder)[0]["elapsed"]
        told.append(json.loads(json.dumps(numbers.seen)))
    uninterrupted, before, after = told
    assert len(uninterrupted) == 2 * 8 + 4
    # The second process enters the epoch once more; its first batch is the seventh.
    assert after[:14] == before and after[14] == ["on_epoch_begin", 0]
    assert after[15:] == uninterrupted[14:]
    assert run.seconds > elapsed > 0


def test_another_run_cannot_take_up_a_checkpoint(whole):
    folder, robust, _ = whole
    before = snapshot.without_random(snapshot.capture(robust))
    for options, fragment in [
        ({"batch_size": 8}, "another batch size. Received: 8, while "),
        ({"seed": 1}, "another data seed. Received: 1, while "),
        ({"augment": "none"}, "another augment. Received: none, while "),
        ({"n": 60}, "another data set. Received: arrays, 20 training"),
    ]:
        with pytest.raises(ke.UserError, match=r"^the checkpoint is of ") as refused:
            runs.train(robust, folder, resume=True, **options)
        assert fragment in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(
        ke.UserError, match=r"another defense\. Received: AdversarialTraining, while "
    ):
        runs.train(runs.classifier("at"), folder, resume=True)
    assert_same_arrays(before, snapshot.without_random(snapshot.capture(robust)))


def test_no_run_begins_anew_because_its_checkpoints_are_gone(whole, tmp_path):
    _, robust, _ = whole
    (tmp_path / "history.jsonl").write_text("{}\n")
    with pytest.raises(ke.UserError, match=r"no checkpoint to resume from\. Received: .*overwrite"):
        runs.train(robust, tmp_path, resume=True)


def test_checkpoints_inside_an_epoch(whole, tmp_path):
    """Every third step; the two newest are kept."""
    _, robust, began = whole
    snapshot.restore(robust, began)
    seen = []

    class Looking(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(sorted(p.name for p in (tmp_path / "checkpoints").iterdir()))

    every = {"checkpoint_every": "3steps", "callbacks": [Looking()], "epochs": 1}
    runs.train(robust, tmp_path, maximizer_warmup=0, **every)
    start, third, sixth = (f"epoch-00001-step-000000{i}" for i in (0, 3, 6))
    assert seen == [[start]] * 3 + [[start, third]] * 3 + [[third, sixth]] * 2
