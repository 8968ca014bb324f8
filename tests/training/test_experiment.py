"""Runs on disk: the best epoch, resuming, divergence, interruption."""

import json
import signal

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.data.dataset import from_arrays
from keras_emr.training.callbacks import (
    EffectiveMarginLogger,
    Interrupted,
    Recorder,
    StopOnSignal,
    TrainingDiverged,
)
from keras_emr.training.run_folder import RunFolder
from tests.builders import assert_same, images, network, newest_checkpoint, snapshot


@pytest.fixture(scope="module")
def data():
    x, y = images(96)
    parts = {"x_train": x[:64], "y_train": y[:64], "x_test": x[64:], "y_test": y[64:]}
    return from_arrays(parts, validation=0.25)


def classifier(defense="trades", dropout=0.3):
    attack = None if defense == "standard" else ke.PGD(0.1, steps=2)
    robust = ke.RobustClassifier(
        network(dropout=dropout),
        defense,
        attack=attack,
        regularizers=[ke.EffectiveMarginRegularizer(0.02)],
        eval_attack=ke.PGD(0.1, steps=2),
    )
    robust.compile(keras.optimizers.Adam(1e-2))
    return robust


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.slow
def test_resuming_equals_never_stopping(data, tmp_path):
    whole = ke.train(classifier(), data, tmp_path / "a", epochs=3, batch_size=16)
    ke.train(classifier(), data, tmp_path / "b", epochs=1, batch_size=16)
    # Another classifier, other seeds: everything must come from the checkpoint.
    other = classifier()
    keras.utils.set_random_seed(99)
    parts = ke.train(other, data, tmp_path / "b", epochs=3, batch_size=16, resume=True)
    assert [row["epoch"] for row in parts.history] == [1, 2, 3]
    assert without_seconds(whole.history) == without_seconds(parts.history)
    models = [keras.saving.load_model(tmp_path / f / "last.keras") for f in "ab"]
    assert_same(*(snapshot(model.weights) for model in models))
    # Nothing is left to do.
    again = ke.train(other, data, tmp_path / "b", epochs=3, batch_size=16, resume=True)
    assert again.history == parts.history


def test_history_lines_hold_clean_and_robust_figures_and_margins(data, tmp_path):
    run = ke.train(classifier(), data, tmp_path, epochs=2, batch_size=16)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == run.history and len(lines) == 2
    twins = {f"val_{k}" for k in ("loss", "accuracy", "robust_accuracy", "emr")}
    margins = {
        "val_effective_margin_l2",
        "val_effective_margin_linf",
        "val_share_above_epsilon",
        "val_effective_weight_norm",
    }
    expected = {"epoch", "loss", "accuracy", "robust_accuracy", "emr", "seconds"} | twins | margins
    assert set(lines[0]) == expected


@pytest.mark.parametrize(
    ("defense", "monitor"), [("at", "val_robust_accuracy"), ("standard", "val_accuracy")]
)
def test_best_is_chosen_on_validation_data(data, tmp_path, defense, monitor):
    run = ke.train(classifier(defense), data, tmp_path, epochs=4, batch_size=16)
    assert run.monitor == monitor
    values = [row[monitor] for row in run.history]
    assert run.best["epoch"] == 1 + int(np.argmax(values))
    best = keras.saving.load_model(tmp_path / "best.keras")
    last = keras.saving.load_model(tmp_path / "last.keras")
    judge = ke.RobustClassifier(best, "standard", eval_attack=ke.PGD(0.1, steps=2))
    judge.compile()
    logs = judge.evaluate(data.x_val, data.y_val, batch_size=256, verbose=0, return_dict=True)
    assert logs[monitor.removeprefix("val_")] == pytest.approx(max(values), abs=1e-6)
    final = keras.ops.convert_to_numpy(last(data.x_val)).argmax(1) == data.y_val
    assert final.mean() == pytest.approx(run.history[-1]["val_accuracy"], abs=1e-6)


def test_a_tie_keeps_the_earlier_epoch(tmp_path):
    rows = [{"epoch": e, "val_robust_accuracy": v} for e, v in ((1, 0.2), (2, 0.5), (3, 0.5))]
    assert Recorder(RunFolder(tmp_path), "val_robust_accuracy", rows).best["epoch"] == 2


class Poison(keras.callbacks.Callback):
    """Makes a weight NaN, as an exploding step would, at a given step."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        if self.at == (epoch, 0):
            weight = self.model.model.weights[0]
            weight.assign(weight.value * float("nan"))


def test_divergence_names_the_step_and_keeps_the_last_good_epoch(data, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"loss became nan at step 1 of epoch 3"):
        ke.train(classifier(), data, tmp_path, epochs=5, batch_size=16, callbacks=[Poison(2, 0)])
    for name in ("last.keras", "best.keras"):
        weights = keras.saving.load_model(tmp_path / name).weights
        assert all(np.isfinite(value).all() for value in snapshot(weights))
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2
    state, arrays = newest_checkpoint(tmp_path)
    assert (state["epoch"], state["step"]) == (2, 0)
    assert all(np.isfinite(value).all() for value in arrays.values())


class PoisonLastStep(keras.callbacks.Callback):
    """Makes a weight NaN after the loss of the epoch's last step was found good."""

    def __init__(self, epoch):
        super().__init__()
        self.at, self.epoch = epoch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch + 1) == (self.at, self.params["steps"]):
            if keras.backend.backend() == "jax":  # whose state lives elsewhere during a step
                self.model.jax_state_sync()
            weight = self.model.model.weights[0]
            weight.assign(weight.value * float("nan"))


def test_weights_that_became_nan_in_the_last_step_are_not_saved(data, tmp_path):
    """No training loss has seen them: validation does."""
    with pytest.raises(TrainingDiverged, match="val_loss became nan at the end of epoch 3"):
        ke.train(
            classifier(), data, tmp_path, epochs=4, batch_size=16, callbacks=[PoisonLastStep(2)]
        )
    for name in ("last.keras", "best.keras"):
        weights = keras.saving.load_model(tmp_path / name).weights
        assert all(np.isfinite(value).all() for value in snapshot(weights))
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    state, arrays = newest_checkpoint(tmp_path)
    assert (state["epoch"], state["step"]) == (2, 0)
    assert all(np.isfinite(value).all() for value in arrays.values())


def test_interruption_keeps_the_weights_of_that_moment(data, tmp_path):
    stop = StopOnSignal()
    robust = classifier()

    class Trip(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                stop.requested = signal.SIGINT

    with pytest.raises(Interrupted):
        ke.train(robust, data, tmp_path, epochs=2, batch_size=16, stop=stop, callbacks=[Trip()])
    last = keras.saving.load_model(tmp_path / "last.keras")
    assert_same(snapshot(last.weights), snapshot(robust.model.weights))
    before = snapshot(classifier().model.weights)
    assert any((a != b).any() for a, b in zip(before, snapshot(last.weights), strict=True))


def test_margin_logger_logs_what_margin_summary_says(data):
    robust = classifier()
    logger = EffectiveMarginLogger(data.x_val, data.y_val, 0.1)
    history = robust.fit(
        data.x_train, data.y_train, batch_size=16, verbose=0, callbacks=[logger]
    ).history
    summary = ke.margin_summary(robust.model, data.x_val, data.y_val, 0.1)
    assert history["val_effective_margin_linf"][0] == pytest.approx(
        summary["effective_margin_linf"], rel=1e-5
    )
    assert history["val_share_above_epsilon"][0] == summary["share_above_epsilon"]


def test_bad_epochs(data, tmp_path):
    with pytest.raises(ke.UserError, match="epochs must be a whole number >= 1"):
        ke.train(classifier(), data, tmp_path / "none", epochs=0)
    assert not (tmp_path / "none").exists()


def test_overwriting_deletes_a_run_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ke.UserError, match="not empty"):
        folder.check()
    with pytest.raises(ke.UserError, match="not a run"):
        folder.check(overwrite=True)
    for name in ("config.yaml", "history.jsonl", "best.keras", "report/thesis.tex"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    with pytest.raises(ke.UserError, match="not a run"):
        folder.check(overwrite=True)  # somebody else's config.yaml
    folder.write_json(folder.environment, {"versions": {"keras_emr": "0.1"}})
    folder.check(overwrite=True)
    folder.prepare(overwrite=True)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["notes.txt", "report/thesis.tex"]


def test_writing_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    RunFolder.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        RunFolder.write_json(path, {"a": float("nan")})

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        RunFolder.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
