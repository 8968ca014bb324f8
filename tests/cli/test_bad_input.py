"""Every mistake: one line that says what, what was received and what to do; nothing is written."""

import importlib.util
import os
import re
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from keras_emr_cli.train_settings import TRAIN
from tests.cli.harness import ONLY_PGD, TINY, assert_error, call, shell, snapshot, write_data

pytestmark = pytest.mark.usefixtures("warm_keras")

BUILDERS = {}


def builder(make):
    """Register a maker of a bad .npz file: ``make(path)``."""
    BUILDERS[make.__name__] = make
    return make


@builder
def truncated(path):
    write_data(path)
    path.write_bytes(path.read_bytes()[:2000])


@builder
def not_a_zip(path):
    path.write_text("hello")


@builder
def empty_file(path):
    path.touch()


@builder
def single_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@builder
def no_test_set(path):
    np.savez(path, x_train=np.zeros((4, 8, 8)), y_train=np.arange(4) % 2)


@builder
def float_labels(path):
    write_data(path, y_train=(np.arange(60) % 2).astype("float64"))


@builder
def negative_labels(path):
    write_data(path, y_train=np.arange(60) % 2 - 1)


@builder
def class_only_in_test(path):
    write_data(path, y_test=np.arange(20) % 3)


@builder
def one_hot_labels(path):
    write_data(path, y_train=np.eye(2, dtype="int64")[np.arange(60) % 2])


@builder
def one_class(path):
    write_data(path, y_train=np.zeros(60, "int64"), y_test=np.zeros(20, "int64"))


@builder
def bytes_as_float(path):
    write_data(path, x_train=np.full((60, 8, 8, 1), 255, "float32"))


@builder
def negative_pixels(path):
    write_data(path, x_test=np.full((20, 8, 8, 1), -0.5, "float32"))


@builder
def nan_pixels(path):
    x = np.zeros((60, 8, 8, 1), "float32")
    x[3, 2, 1] = np.nan
    write_data(path, x_train=x)


@builder
def other_test_shape(path):
    write_data(path, x_test=np.zeros((20, 9, 8, 1), "float32"))


@builder
def flat_images(path):
    write_data(path, x_train=np.zeros((60, 64), "float32"))


@builder
def lengths_differ(path):
    write_data(path, y_test=np.arange(19) % 2)


@builder
def too_few_to_split(path):
    write_data(path, classes=4, n=4)


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        ("truncated", [".npz", "Copy it again"]),
        ("not_a_zip", [".npz", "not a zip archive"]),
        ("empty_file", [".npz", "readable"]),
        ("single_array", [".npz", "one array"]),
        ("no_test_set", ["x_test, y_test", "Expected"]),
        ("float_labels", ["y_train", "float64", "integers"]),
        ("negative_labels", ["y_train", "-1", "from 0"]),
        ("class_only_in_test", ["y_test", "label 2", "K=2"]),
        ("one_hot_labels", ["y_train", "(60, 2)", "argmax"]),
        ("one_class", ["y_train", "only label 0", "two classes"]),
        ("bytes_as_float", ["x_train", "max=255", "Divide by 255"]),
        ("negative_pixels", ["x_test", "min=-0.5", "[0, 1]"]),
        ("nan_pixels", ["x_train", "1 NaN", "finite"]),
        ("other_test_shape", ["x_test", "(9, 8, 1)", "(8, 8, 1)"]),
        ("flat_images", ["x_train", "(60, 64)", "(N, H, W, C)"]),
        ("lengths_differ", ["y_test", "19 labels for 20 images"]),
        ("too_few_to_split", ["x_train", "4 images", "x_val"]),
    ],
)
def test_bad_data_files(capfd, tmp_path, make, fragments):
    path = tmp_path / "bad.npz"
    BUILDERS[make](path)
    refused(capfd, tmp_path, ["train", *TINY, "--data", path, "--out", "run"], *fragments)


def refused(capfd, tmp_path, arguments, *fragments, code=3):
    """The command fails with one line, and no file under ``tmp_path`` has changed."""
    before = snapshot(tmp_path)
    result = call(capfd, *arguments)
    assert_error(result, code, *fragments)
    assert snapshot(tmp_path) == before
    return result


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--data", "digitz"], ["data", "'digitz'", "did you mean 'digits'?"]),
        (["--data", "no.npz"], ["not found", "'no.npz'"]),
        (["--data", "no/such/folder"], ["not found", "'no/such/folder'"]),
        (["--data", ""], ["data", "''", "digits"]),
        (["--model", "small-cn"], ["--model", "'small-cn'", "did you mean 'small-cnn'?"]),
        (["--defense", "trade"], ["--defense", "'trade'", "did you mean 'trades'?"]),
        (["--defense", "qwerty"], ["--defense", "'qwerty'", "mail-trades"]),
        (["--attack", "pdg"], ["--attack", "'pdg'", "did you mean 'pgd'?"]),
        (["--backend", "tensorflwo"], ["--backend", "'tensorflwo'", "'tensorflow'"]),
        (["--norm", "l1"], ["--norm", "'l1'", "linf, l2"]),
        (["--epsilon=-8/255"], ["--epsilon", "'-8/255'", ">= 0"]),
        (["--epsilon", "8/O"], ["--epsilon", "'8/O'", "8/255"]),
        (["--validation", "1.5"], ["validation", "1.5", "(0, 1)"]),
        (["--validation", "1"], ["validation", "1", "(0, 1)"]),
        (["--seed", "-1"], ["--seed", "'-1'", ">= 0"]),
        (["--seed", str(2**32)], ["seed", str(2**32)]),
        (["--split-seed", str(2**63)], ["seed", str(2**63)]),
        (["--optimizer", "sgd", "--momentum", "1.5"], ["momentum", "1.5"]),
        (["--optimizer", "adamw"], ["--optimizer", "'adamw'", "adam, sgd"]),
        (["--emr-preset", "at-emr"], ["--emr-preset", "'at-emr'", "at-emr-released"]),
        (["--emr-warmup", "2", "--emr-decay-epochs", "3"], ["emr_warmup", "emr_decay_epochs"]),
        (["--checkpoint-every", "soon"], ["--checkpoint-every:", "Received: 'soon'", "500steps"]),
        *(
            ([*changed, "--emr-preset", "trades-emr-released"], [*named, "trades-emr-released"])
            for changed, named in [
                (["--emr", "0.5"], ["emr:", "Received: 0.5"]),
                (["--emr", "0"], ["emr:", "Received: 0.0"]),
                (["--emr-temperature", "2"], ["emr_temperature:", "Received: 2.0"]),
                (["--emr-reduction", "released"], ["emr_reduction:", "Received: released"]),
                (["--emr-decay-epochs", "3,5"], ["emr_decay_epochs:", "Received: [3, 5]"]),
                (["--emr-warmup", "2"], ["emr_warmup:", "Received: 2"]),
            ]
        ),
        (["--emr-decay-epochs", "0,2"], ["decay", "Received: ", "0", ">= 1"]),
        (["--defense", "standard", "--emr-at", "adversarial"], ["adversarial", "at='clean'"]),
        (["--config", "no.yaml"], ["config", "'no.yaml'"]),
        (["--model", "wide-resnet-33-10"], ["--model", "'wide-resnet-33-10'", "6 n + 4"]),
        (["--model", "vgg16"], ["vgg16", "32x32", "(8, 8, 1)"]),
        (["--model", "missing.keras"], ["model", "missing.keras"]),
        (["--model", "no_module_of_mine:make"], ["model", "no_module_of_mine"]),
        (["--activation", "rely"], ["--activation", "'rely'", "did you mean 'relu'?"]),
        (["--normalization", "cifar10"], ["normalization", "per channel", "(8, 8, 1)"]),
        (["--lr-schedule", "steps"], ["learning rate", "steps", "none"]),
        (["--lr-epochs", "3,4"], ["learning rate", "constant", "[3, 4]"]),
        (["--lr-schedule", "linear"], ["--lr-schedule", "'linear'", "cosine"]),
        (["--lr-epochs", "0"], ["--lr-epochs", "'0'", ">= 1"]),
        (["--label-smoothing", "1"], ["--label-smoothing", "'1'", "0.999"]),
        (["--defense", "mart", "--label-smoothing", "0.1"], ["label_smoothing", "mart", "0.1"]),
        (["--defense", "mail-mart", "--label-smoothing", "0.1"], ["label_smoothing", "mart"]),
        (["--averaging", "polyak"], ["--averaging", "'polyak'", "ema, swa"]),
        (["--averaging-decay", "1"], ["--averaging-decay", "'1'"]),
        (["--awp", "-0.1"], ["--awp", "'-0.1'", ">= 0"]),
        (["--early-stopping", "0"], ["--early-stopping", "'0'", ">= 1"]),
        (["--overfitting-guard", "0"], ["--overfitting-guard", "'0'", "> 0"]),
        (["--epsilon-warmup", "0"], ["--epsilon-warmup", "'0'", ">= 1"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_bad_settings(capfd, tmp_path, data, arguments, fragments):
    refused(
        capfd,
        tmp_path,
        ["train", *TINY, "--data", data, "--out", "new/run", *arguments],
        *fragments,
    )


def test_a_bad_setting_is_one_line_in_a_process_too(data, tmp_path):
    """What a library prints while it loads counts as well."""
    arguments = ["train", *TINY, "--data", data, "--out", "run", "--validation", "1.5"]
    assert_error(shell(*arguments, cwd=tmp_path), 3, "validation", "1.5")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("name", ["jax", "torch", "tensorflow"])
def test_a_backend_that_is_not_installed(capfd, tmp_path, monkeypatch, data, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a)
    )
    extra = {"tensorflow": "keras-emr"}.get(name, f"keras-emr[{name}]")
    for arguments in (["train", *TINY, "--data", data, "--out", "run"], ["evaluate", data]):
        arguments += ["--data", data, "--epsilon", "0.1", "--backend", name]
        refused(capfd, tmp_path, arguments, "--backend", f"{name!r}", f"pip install '{extra}'")
    assert os.environ.get("KERAS_BACKEND") != "jax"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_images_too_small_for_the_network(capfd, tmp_path, size):
    path = write_data(tmp_path / "small.npz", shape=(size, size, 1))
    result = call(capfd, "train", *TINY, "--data", path, "--out", "run", "--model", "small-cnn")
    assert_error(result, 3, "small-cnn", f"({size}, {size}, 1)")
    assert not (tmp_path / "run").exists()


# --- the run folder


def test_a_folder_in_use_is_left_alone(capfd, tmp_path, data):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    arguments = ["train", *TINY, "--data", data, "--out", "mine"]
    refused(capfd, tmp_path, arguments, "out", "'mine'", "--resume", "--overwrite")
    refused(capfd, tmp_path, [*arguments, "--overwrite"], "out", "'mine'", "not a run")
    refused(capfd, tmp_path, [*arguments, "--resume"], "out", "'mine'", "no run to resume")


def test_overwrite_refuses_a_folder_with_a_config_of_something_else(capfd, tmp_path, data):
    """``config.yaml`` and ``report/`` are names that many projects use."""
    report = tmp_path / "project" / "report"
    report.mkdir(parents=True)
    (report / "thesis.tex").write_text("keep")
    (tmp_path / "project" / "config.yaml").write_text("site: mine\n")
    arguments = ["train", *TINY, "--data", data, "--out", "project", "--overwrite"]
    refused(capfd, tmp_path, arguments, "out", "'project'", "not a run")


def test_a_run_is_not_replaced_unasked(capfd, run, data):
    arguments = ["train", *TINY, "--data", data, "--out", run.path]
    refused(capfd, run.path, arguments, "out", str(run.path), "--resume", "--overwrite")


@pytest.mark.parametrize(
    ("out", "fragments"),
    [
        ("file", ["out", "'file'", "not a folder"]),
        ("file/run", ["out", "file/run"]),
        ("x" * 300, ["out", "x" * 300]),
        ("/proc/no/such", ["out", "/proc/no/such"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_folder_that_cannot_be_made(capfd, tmp_path, data, out, fragments):
    (tmp_path / "file").write_text("keep")
    refused(capfd, tmp_path, ["train", *TINY, "--data", data, "--out", out], *fragments)


def test_resume_without_a_run(capfd, tmp_path, data):
    arguments = ["train", *TINY, "--data", data, "--out", "none", "--resume"]
    refused(capfd, tmp_path, arguments, "out", "'none'", "no run to resume")


def test_resume_and_overwrite_exclude_each_other(capfd, run):
    arguments = ["train", "--out", run.path, "--resume", "--overwrite"]
    refused(capfd, run.path, arguments, "--resume", "--overwrite", code=2)


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        (["--defense", "at"], ["defense", "at", "trades"]),
        (["--epsilon", "4/255"], ["epsilon", "4/255", "8/255"]),
        (["--batch-size", "8"], ["batch_size", "8", "16"]),
        (["--data", "digits"], ["data", "digits", "toy.npz"]),
        (["--backend", "jax"], ["backend", "jax", "tensorflow"]),
        (["--beta", "3"], ["beta", "3", "auto"]),
    ],
    ids=" ".join,
)
def test_resume_with_a_changed_setting(capfd, run, changed, fragments):
    arguments = ["train", "--out", run.path, "--resume", *changed]
    refused(capfd, run.path, arguments, *fragments)


def test_resume_with_a_changed_setting_in_a_config_or_the_environment(
    capfd, tmp_path, run, monkeypatch
):
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    text = (copy / "config.yaml").read_text()
    with open("changed.yaml", "w") as file:
        file.write(text.replace("defense: trades", "defense: at"))
    arguments = ["train", "--out", copy, "--resume"]
    refused(capfd, copy, [*arguments, "--config", "changed.yaml"], "defense", "trades")
    monkeypatch.setenv("KERAS_EMR_STEPS", "3")
    refused(capfd, copy, arguments, "steps", "3", "2")


def test_resume_with_a_damaged_run(capfd, tmp_path, run):
    for pattern, text, fragment in [
        ("checkpoints/*/arrays.npz", "junk", "no checkpoint can be used: arrays.npz has 4 bytes"),
        ("config.yaml", "epochs: [\n", "config.yaml"),
    ]:
        copy = tmp_path / "copy"
        shutil.copytree(run.path, copy)
        for damaged in copy.glob(pattern):
            damaged.write_text(text)
        weights = snapshot(copy)["last.keras"]
        result = call(capfd, "train", "--out", copy, "--resume", "--epochs", 3, "--quiet")
        skipped, error = re.fullmatch("((?:Warning: .*\n)*)(.*\n)", result.err).groups()
        assert_error(replace(result, err=error), 3, fragment)
        assert skipped.count("checkpoint skipped: ") == pattern.startswith("checkpoints")
        assert snapshot(copy)["last.keras"] == weights
        shutil.rmtree(copy)


# --- evaluate


def dense(path, *, shape=(8, 8, 1), outputs=2, activation=None):
    import keras

    layers = [keras.Input(shape), keras.layers.Flatten()]
    layers.append(keras.layers.Dense(outputs, activation=activation))
    keras.Sequential(layers).save(path)
    return path


def two_outputs(path):
    import keras

    x = keras.Input((8, 8, 1))
    flat = keras.layers.Flatten()(x)
    keras.Model(x, [keras.layers.Dense(2)(flat), keras.layers.Dense(2)(flat)]).save(path)
    return path


GIVEN = ("--epsilon", "0.1", "--attacks", "pgd", "--steps", "2", "--restarts", "1")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"activation": "softmax"}, ["must end in logits", "'softmax'", "activation=None"]),
        ({"activation": "sigmoid"}, ["must end in logits", "'sigmoid'", "activation=None"]),
        ({"shape": (4, 4, 1)}, ["(8, 8, 1)", "(4, 4, 1)", "do not fit"]),
        ({"shape": (8, 8, 3)}, ["(8, 8, 1)", "(8, 8, 3)", "do not fit"]),
        ({"outputs": 1}, ["K >= 2", "(4, 1)"]),
    ],
    ids=str,
)
def test_models_that_cannot_be_attacked(capfd, tmp_path, data, options, fragments):
    path = dense(tmp_path / "model.keras", **options)
    refused(capfd, tmp_path, ["evaluate", path, "--data", data, *GIVEN], *fragments)


def test_a_model_with_two_outputs(capfd, tmp_path, data):
    path = two_outputs(tmp_path / "model.keras")
    refused(capfd, tmp_path, ["evaluate", path, "--data", data, *GIVEN], "output")


def corrupt(path, how, good):
    content = bytearray(good.read_bytes())
    if how == "junk":
        content = b"junk" * 100
    elif how == "empty":
        content = b""
    elif how == "truncated":
        del content[len(content) // 2 :]
    elif how == "first bytes changed":
        content[200:250] = bytes(50)
    elif how == "weights changed":
        middle = len(content) // 2
        content[middle : middle + 50] = bytes(50)
    elif how == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "b")
        return
    path.write_bytes(content)


@pytest.mark.parametrize(
    "how",
    ["junk", "empty", "truncated", "first bytes changed", "weights changed", "another zip"],
)
def test_corrupt_models(capfd, tmp_path, data, run, how):
    path = tmp_path / "model.keras"
    corrupt(path, how, run.path / "best.keras")
    arguments = ["evaluate", path, "--data", data, *GIVEN]
    refused(capfd, tmp_path, arguments, "cannot load the model", str(path), ".keras file")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["no.keras"], ["model not found", "'no.keras'"]),
        (["."], ["not a run folder", "'.'"]),
        (["plain.keras"], ["--data", "Give --data"]),
        (["plain.keras", "--data", "digits"], ["--epsilon", "Give --epsilon"]),
        (["plain.keras", "--data", "digits", *GIVEN, "--checkpoint", "last"], ["--checkpoint"]),
        (["RUN", "--checkpoint", "worst"], ["checkpoint", "'worst'", "best, last"]),
        (["RUN", "--attacks", "pgd,pdg"], ["attack", "'pdg'", "did you mean 'pgd'?"]),
        (["RUN", "--attacks", ","], ["--attacks", "','", "pgd"]),
        (["RUN", "--epsilon=-1"], ["--epsilon", "'-1'", "> 0"]),
        (["RUN", "--attacks", "fgsm", "--steps", "3"], ["--steps", "fgsm has none"]),
        (["RUN", "--attacks", "transfer"], ["--surrogates", "Received: nothing"]),
        (["RUN", "--attacks", "boundary", "--norm", "linf"], ["norm", "'linf'", "l2"]),
        (["RUN", "--time-budget", "soon"], ["--time-budget", "'soon'"]),
        (["RUN", "--norm", "l0"], ["--norm", "'l0'", "linf, l2"]),
        (["RUN", "--n-examples", "0"], ["--n-examples", "'0'", ">= 1"]),
        (["RUN", "--backend", "mxnet"], ["--backend", "'mxnet'", "tensorflow, jax, torch"]),
        (["RUN", "--data", "no.npz"], ["'no.npz'", "not found"]),
        (["RUN", "--config", "bad.yaml"], ["'epsilom'", "did you mean 'epsilon'?"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_arguments_of_evaluate(capfd, tmp_path, run, arguments, fragments):
    (tmp_path / "plain.keras").write_text("never read")
    (tmp_path / "bad.yaml").write_text("epsilom: 0.1\n")
    arguments = [run.path if a == "RUN" else a for a in arguments]
    refused(capfd, tmp_path, ["evaluate", *arguments], *fragments)


def test_a_run_without_its_model(capfd, tmp_path, run):
    (tmp_path / "half").mkdir()
    shutil.copy(run.path / "config.yaml", tmp_path / "half")
    refused(capfd, tmp_path, ["evaluate", "half"], "model not found", "best.keras")


def test_a_run_whose_data_has_changed(capfd, tmp_path):
    """Figures of a run are those of its data; on other data only if that is asked for."""
    path = write_data(tmp_path / "toy.npz")
    assert call(capfd, "train", *TINY, "--data", path, "--out", "run").code == 0
    write_data(path, n_test=10)
    evaluate = ["evaluate", "run", *ONLY_PGD]
    said = ["data", "SHA-256", str(path), "give --data"]
    refused(capfd, tmp_path, evaluate, *said)
    result = call(capfd, *evaluate, "--data", path)
    assert result.code == 0 and "10 test images" in result.out, result.err
    for content in ("{}", "junk", "[]"):
        (tmp_path / "run" / "environment.json").write_text(content)
        refused(capfd, tmp_path, evaluate, "environment.json", "give --data")
    (tmp_path / "run" / "environment.json").unlink()
    refused(capfd, tmp_path, evaluate, "environment.json", "give --data")


def test_a_model_that_gives_nan(capfd, tmp_path, data):
    import keras

    path = dense(tmp_path / "model.keras")
    model = keras.saving.load_model(path)
    model.layers[-1].bias.assign([0.0, float("nan")])
    model.save(path)
    arguments = ["evaluate", path, "--data", data, *GIVEN]
    refused(capfd, tmp_path, arguments, "not finite", "Received: NaN or Inf for 20 of 20")


def test_a_bug_in_an_attack_is_one_line_and_no_result(capfd, tmp_path, data, monkeypatch):
    from keras_emr.attacks.pgd import PGD

    def too_far(self, objective, x, state):
        return (state[0] + 0.2, *state[1:])

    path = dense(tmp_path / "model.keras")
    monkeypatch.setattr(PGD, "step", too_far)
    arguments = ["evaluate", path, "--data", data, "--quiet", *GIVEN]
    refused(capfd, tmp_path, arguments, "left its threat model", "bug of keras_emr", code=1)


def test_other_assertions_are_not_swallowed(capfd, monkeypatch):
    from keras_emr_cli import main

    def broken(**options):
        raise AssertionError("another bug")

    monkeypatch.setattr(main.cli, "main", broken)
    with pytest.raises(AssertionError, match="another bug"):
        call(capfd, "data", "list")


def test_every_choice_names_what_was_received_and_what_is_known(capfd):
    for setting in TRAIN:
        if setting.kind == "choice":
            result = call(capfd, "config", "show", setting.flag, "xyzzy")
            assert_error(result, 3, setting.flag, "'xyzzy'", *setting.choices)
