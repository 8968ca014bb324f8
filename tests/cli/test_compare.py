"""``keras-emr compare maximizers``: what it reports is what an independent computation finds."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from keras_emr_cli.compare import COMPARE_MAXIMIZERS
from tests.cli.harness import TINY, assert_error, call, python, snapshot, write_data
from tests.cli.test_help import HEAVY, PROBE, UNNEEDED

pytestmark = pytest.mark.usefixtures("warm_keras")

EPSILON = 8 / 255
QUICK = (
    *("--methods", "pgd,rnn", "--steps", 2, "--more", "1,3", "--fit-epochs", 1, "--rounds", 1),
    *("--surface-points", 5, "--surface-examples", "2,5", "--batch-size", 16, "--seed", 3),
)
FILES = {"report.json", "inner_loss.png", "loss_surface.png"}


def compare(capfd, *arguments):
    return call(capfd, "compare", "maximizers", *arguments)


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    """A run and its baseline compared by a process of its own."""
    from tests.cli.harness import shell

    folder = tmp_path_factory.mktemp("compared")
    models = snapshot(run.path)
    arguments = ["compare", "maximizers", run.path, run.path / "baseline" / "best.keras", *QUICK]
    result = shell(*arguments, "--out", "out", cwd=folder)
    assert result.code == 0, result.err
    assert snapshot(run.path) == models
    return folder / "out", result


@pytest.fixture(scope="module")
def report(compared):
    return json.loads((compared[0] / "report.json").read_text())


@pytest.fixture(scope="module")
def models(run):
    import keras

    paths = (run.path / "best.keras", run.path / "baseline" / "best.keras")
    return [keras.saving.load_model(path) for path in paths]


@pytest.fixture(scope="module")
def test_set(data):
    arrays = np.load(data)
    return arrays["x_test"], arrays["y_test"]


def judged(model, x, y):
    """Per-example cross-entropy and its input gradient, by TensorFlow alone."""
    import tensorflow as tf

    x = tf.constant(x, "float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        logits = model(x, training=False)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
    return loss.numpy(), tape.gradient(loss, x).numpy(), logits.numpy().argmax(1) == y


def test_the_loss_of_pgd_is_what_pgd_by_hand_finds(report, models, test_set):
    x, y = test_set
    noise = [np.random.default_rng([3, 0, i]).uniform(-1, 1, x.shape[1:]) for i in range(len(x))]
    for model, found in zip(models, report["models"], strict=True):
        clean = judged(model, x, y)[2]
        for run in found["methods"][0]["runs"]:
            step = np.float32(2.5 * EPSILON / run["steps"])
            image = np.clip(x + EPSILON * np.stack(noise), 0, 1).astype("float32")
            losses = []
            for _ in range(run["steps"] + 1):
                loss, gradient, right = judged(model, image, y)
                losses.append(loss.mean())
                before = image
                low, high = np.maximum(x - EPSILON, 0), np.minimum(x + EPSILON, 1)
                image = np.clip(before + step * np.sign(gradient), low, high).astype("float32")
            np.testing.assert_allclose(run["loss"], losses, rtol=1e-4)
            assert run["final_loss"] == run["loss"][-1]
            assert run["robust_accuracy"] == pytest.approx((clean & right).mean())


def test_the_surface_has_the_clean_loss_and_that_of_fgsm(report, models, test_set):
    x, y = (part[[2, 5]] for part in test_set)
    for model, found in zip(models, report["models"], strict=True):
        surface = found["surface"]
        assert surface["examples"] == [2, 5] and surface["clipped_to"] == [0, 1]
        assert surface["a"] == surface["b"] and surface["a"][2] == 0
        assert [surface["a"][0], surface["a"][-1]] == pytest.approx([-EPSILON, EPSILON])
        clean, gradient, _ = judged(model, x, y)
        fgsm = judged(model, np.clip(x + EPSILON * np.sign(gradient), 0, 1), y)[0]
        assert surface["loss"][2][2] == pytest.approx(clean.mean(), rel=1e-5)
        assert surface["loss"][4][2] == pytest.approx(fgsm.mean(), rel=1e-5)


def test_cells_with_other_inputs_and_start(capfd, run, tmp_path):
    given = ("--preprocessing", "log_sign", "--start", "uniform", "--json", "--quiet")
    result = compare(capfd, run.path, *QUICK, *given, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    pgd, _, rnn = json.loads(result.out)["models"][0]["methods"]
    assert rnn["parameters"] == 130  # two features for each pixel
    assert rnn["loss"][0] == pytest.approx(pgd["loss"][0], rel=1e-6)  # the same noise


def test_the_report_says_how_it_was_made(report, run):
    assert [m["name"] for m in report["models"]] == ["toy-run", "baseline/best"]
    names = ["pgd", "pgd (tuned)", "rnn"]
    for model in report["models"]:
        assert [entry["method"] for entry in model["methods"]] == names
        for entry in model["methods"]:
            assert [r["steps"] for r in entry["runs"]] == [2, 6]
            assert len(entry["loss"]) == len(entry["seconds"]) == 3
            assert entry["passes"] == {"input_gradients": 2, "forward_passes": 0}
        assert model["methods"][2]["parameters"] == 120
        assert [cost["method"] for cost in model["training"]] == ["rnn"]
    settings = report["settings"]
    assert (settings["epsilon"], settings["steps"], settings["more"]) == ("8/255", 2, [1, 3])
    assert (report["seed"], report["n"], report["bn_mode"]) == (3, 20, "inference")
    assert {"keras", "tensorflow", "matplotlib"} <= set(report["versions"])
    assert report["hardware"]["devices"] and len(report["data_sha256"]) == 64


def test_results_on_stdout_and_progress_on_stderr(compared, report):
    out, result = compared
    assert {path.name for path in out.iterdir()} == FILES
    for name in ("inner_loss.png", "loss_surface.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = [line.split() for line in result.out.splitlines() if line.strip().startswith("rnn ")]
    entry = report["models"][0]["methods"][2]
    assert rows[0][:5] == [
        *("rnn", "2", "120"),
        *(f"{run['final_loss']:.4f}" for run in entry["runs"]),
    ]
    assert "not a paper's tables" in result.out and "toy-run: train rnn" in result.err
    assert "toy-run: train" not in result.out


def test_models_are_drawn_on_the_same_axes(report):
    from types import SimpleNamespace

    from keras_emr.evaluation import plots

    figure = plots.inner_loss_figure(report["models"], "8/255", 16)
    losses, times = figure.axes[::2], figure.axes[1::2]
    assert [axis.get_title(loc="left") for axis in losses] == ["toy-run", "baseline/best"]
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    assert len({axis.get_xlim() for axis in losses}) == len({a.get_xlim() for a in times}) == 1
    low, high = figure.axes[0].get_ylim()
    for axis, model in zip(losses, report["models"], strict=True):
        for entry in model["methods"]:
            assert low <= min(entry["loss"]) <= max(entry["loss"]) <= high
            drawn = [line for line in axis.lines if line.get_label() == entry["method"]]
            np.testing.assert_array_equal(drawn[0].get_ydata(), entry["loss"])
            assert drawn[0].get_xdata().tolist() == [0, 1, 2]

    surfaces = [
        {
            "name": m["name"],
            "surface": SimpleNamespace(
                **{k: np.array(m["surface"][k]) for k in ("a", "b", "loss")}
            ),
        }
        for m in report["models"]
    ]
    panels = [a for a in plots.loss_surface_figure(surfaces, "8/255").axes if a.name == "3d"]
    everything = np.array([m["surface"].loss for m in surfaces])
    limits = {(a.get_xlim(), a.get_ylim(), a.get_zlim()) for a in panels}
    assert len(panels) == 2 and len(limits) == 1
    assert panels[0].get_zlim() == (everything.min(), everything.max())


def test_json_and_overwrite_touch_our_files_only(capfd, run, tmp_path):
    model = run.path / "best.keras"
    quick = (*QUICK, "--methods", "pgd", "--n-examples", 8, "--json", "--quiet", "--out", "o")
    result = compare(capfd, run.path, *quick)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == json.loads((tmp_path / "o" / "report.json").read_text())
    (tmp_path / "o" / "notes.txt").write_text("mine")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    before = snapshot(tmp_path / "o")
    assert_error(compare(capfd, run.path, *quick), 3, "out: the folder is not empty", "--overwrite")
    assert snapshot(tmp_path / "o") == before

    again = compare(capfd, run.path, *quick, "--overwrite", "--seed", 4)
    assert again.code == 0 and json.loads(again.out)["seed"] == 4
    assert {path.name for path in (tmp_path / "o").iterdir()} == FILES | {"notes.txt"}
    assert (tmp_path / "o" / "notes.txt").read_text() == "mine"
    assert hashlib.sha256(model.read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_a_run_is_compared_with_its_own_maximizer(capfd, data, tmp_path):
    flags = ("--data", data, "--defense", "at", "--attack", "rnn", "--emr", 0, "--quiet")
    assert call(capfd, "train", *TINY, *flags, "--out", "learned").code == 0
    shutil.copy(tmp_path / "learned" / "best.keras", "alone.keras")
    brief = (*QUICK, "--methods", "pgd", "--more", 1, "--json")
    result = compare(capfd, "learned", *brief, "--out", "o")
    assert result.code == 0, result.err
    (found,) = json.loads(result.out)["models"]
    own = found["methods"][2]
    assert (own["method"], own["steps"], own["parameters"]) == ("own (rnn)", 2, 120)
    assert "fit" not in own
    assert [cost["method"] for cost in found["training"]] == ["own (rnn)"]
    alone = ("--data", data, "--epsilon", "0.15")
    result = compare(capfd, "alone.keras", *alone, *brief)
    assert [m["method"] for m in json.loads(result.out)["models"][0]["methods"]] == [
        "pgd",
        "pgd (tuned)",
    ]
    assert (tmp_path / "runs" / "compare-maximizers" / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        ([], 2, ["RUN_OR_MODEL"]),
        (["RUN", "--methods", "pgd,lstmm"], 3, ["--methods: unknown method", "'lstm'"]),
        (["RUN", "--methods", ","], 3, ["--methods", "pgd, line-search"]),
        (["RUN", "--steps", "0"], 3, ["--steps", "'0'", ">= 1"]),
        (["RUN", "--more", "2,0"], 3, ["--more", "2,0", ">= 1"]),
        (["RUN", "--more", ""], 3, ["--more", "whole numbers"]),
        (["RUN", "--epsilon", "0"], 3, ["--epsilon", "> 0"]),
        (["RUN", "--fit-epochs", "-1"], 3, ["--fit-epochs", ">= 0"]),
        (["RUN", "--learning-rate", "0"], 3, ["--learning-rate", "> 0"]),
        (["RUN", "--surface-points", "4"], 3, ["--surface-points", "odd"]),
        (["RUN", "--surface-examples", "3,20"], 3, ["--surface-examples", "20", "below 20"]),
        (["RUN", "RUN"], 3, ["a model twice"]),
        (["RUN", "nowhere.keras"], 3, ["model not found", "nowhere.keras"]),
        (["EMPTY"], 3, ["not a run folder"]),
        (["RUN/best.keras"], 3, ["--data"]),
        (["RUN/best.keras", "--data", "DATA"], 3, ["--epsilon"]),
        (["RUN", "--data", "digits"], 3, ["10 classes for a model with 2 outputs"]),
        (["RUN", "--data", "WIDE"], 3, ["do not fit", "(8, 9, 1)"]),
        (["RUN", "--data", "missing.npz"], 3, ["missing.npz"]),
        (["RUN", "--out", "FULL"], 3, ["not empty", "--overwrite"]),
        (["RUN", "--out", "FULL", "--overwrite"], 3, ["not a comparison"]),
        (["RUN", "--out", "FULL/mine.txt"], 3, ["not a folder"]),
        (["RUN", "--backend", "theano"], 3, ["theano"]),
        (["RUN", "--stepps", "3"], 2, ["--stepps", "did you mean --steps?"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_bad_input_is_one_line_and_nothing_is_written(
    capfd, run, data, tmp_path, arguments, code, fragments
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    wide = write_data(tmp_path / "wide.npz", shape=(8, 9, 1))
    places = {"RUN": run.path, "DATA": data, "EMPTY": "empty", "FULL": "full", "WIDE": wide}
    for name, place in places.items():
        arguments = [str(a).replace(name, str(place)) for a in arguments]
    before = snapshot(tmp_path)
    assert_error(compare(capfd, *arguments), code, *fragments)
    assert snapshot(tmp_path) == before


def test_a_run_in_another_ball_needs_its_epsilon_said(capfd, run, tmp_path):
    other = shutil.copytree(run.path, tmp_path / "l2")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("norm: linf", "norm: l2"))
    assert_error(compare(capfd, other), 3, "--epsilon", "norm l2")


def test_data_that_changed_since_the_run_are_refused(capfd, run, data, tmp_path):
    other = shutil.copytree(run.path, tmp_path / "moved")
    changed = write_data(tmp_path / "changed.npz", n=64)
    config = (other / "config.yaml").read_text()
    lines = [line for line in config.splitlines() if not line.startswith("data:")]
    (other / "config.yaml").write_text("\n".join([*lines, f"data: {changed}"]))
    assert_error(compare(capfd, other), 3, "data: not what the run was trained on")


def test_help_imports_nothing_heavy_and_names_every_setting():
    result = python("-c", PROBE, json.dumps(["compare", "maximizers", "--help"]))
    code, modules = json.loads(result.err)
    assert code == 0
    assert [name for name in HEAVY + UNNEEDED if name in modules] == []
    words = result.out.replace(",", " ").replace("/", " ").split()
    flags = {setting.flag for setting in COMPARE_MAXIMIZERS}
    assert flags | {"--config", "--json", "--quiet", "--overwrite"} <= set(words)
