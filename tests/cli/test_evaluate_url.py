"""``keras-emr evaluate --url``: attacks on a served model, and one that goes away."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests

from keras_emr.reports.files import read_report
from tests.cli.harness import assert_error, call
from tests.serving import image_model
from tests.serving.image_model import CLASSES, expected, weights

EPSILON = 0.03
QUICK = ("--steps", 60, "--extra-examples", 0, "--quiet", "--json")


@pytest.fixture(scope="module")
def files(tmp_path_factory, warm_keras):
    """``toy.npz``, away from the walls of the box, and ``source.keras``, as served as version 1."""
    import keras

    folder = tmp_path_factory.mktemp("source")
    x = 0.2 + 0.6 * image_model.images(36, seed=8)
    y = expected(x)["class_id"]
    y[::7] = (y[::7] + 1) % CLASSES  # some are wrong
    parts = {"x_train": x, "y_train": y, "x_test": x[:24], "y_test": y[:24]}
    np.savez(folder / "toy.npz", **parts)
    for name, scale in (("source", 1.0), ("other", -1.0)):
        model = keras.Sequential(
            [keras.Input(image_model.SHAPE), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
        )
        model.layers[-1].set_weights(list(weights(scale)))
        model.save(folder / f"{name}.keras")
    return folder


def given(files, url, *more):
    return ("--url", url, "--data", files / "toy.npz", "--epsilon", EPSILON, *more)


def withstands(files, radius=EPSILON, norm="linf"):
    """Whether each test image is right and stays so: exact, for a linear model."""
    data = np.load(files / "toy.npz")
    x, y = data["x_test"], data["y_test"]
    found = expected(x)
    return found["class_id"] == y, (found["class_id"] == y) & (
        found[f"effective_margin_{norm}"] > radius
    )


def test_images_made_against_the_source_and_square(capfd, tmp_path, files, running):
    url = running.url("m/versions/1")
    arguments = given(files, url, "--extra-examples", 12, "--quiet", "--json", "--steps", 100)
    result = call(capfd, "evaluate", files / "source.keras", *arguments)
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert report == read_report(tmp_path / "m-report")
    correct, robust = withstands(files)
    assert 0 < robust.sum() < correct.sum() < 24
    assert report["accuracy"]["correct"] == correct.sum()
    assert report["accuracy"]["survived"] == robust.sum()
    assert [entry["name"] for entry in report["attacks"]] == ["transfer", "square"]
    assert [entry["attacked"] for entry in report["attacks"]] == [correct.sum()] * 2
    assert report["attacks"][0]["broken"] == correct.sum() - robust.sum()
    assert report["attacks"][0]["queries"] == correct.sum()
    assert report["threat_model"]["knowledge"] == "black box: scores"
    assert report["model"] == {
        "name": "m/versions/1",
        "path": None,
        "sha256": None,
        "parameters": None,
    }
    assert report["robustbench"]["autoattack_acc"] is None
    assert report["margins"] is None and set(report["curves"].values()) == {None}
    verdicts = {check["id"]: check["verdict"] for check in report["checks"]}
    for id in ("M1", "M3", "M8", "M9", "M11"):  # these need gradients
        assert verdicts[id] == "not run"
    assert verdicts["M10"] == verdicts["M12"] == verdicts["A-probabilities"] == "pass"
    source = report["source"]
    assert (source["attack"], source["n"]) == ("PGD-100", 24)
    assert (source["clean"], source["adversarial"]) == (1.0, 1.0)
    right = {"clean": correct.sum() / 24, "adversarial": robust.sum() / 24}
    assert source["source_accuracy"] == source["served_accuracy"] == pytest.approx(right)
    assert report["settings"]["url"] == url


def test_labels_that_do_not_agree(capfd, tmp_path, files, running):
    arguments = given(files, running.url("m/versions/1"), *QUICK, "--attacks", "transfer")
    result = call(capfd, "evaluate", files / "other.keras", *arguments)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    x = np.load(files / "toy.npz")["x_test"]
    same = expected(x)["class_id"] == expected(x, -1.0)["class_id"]
    assert report["source"]["clean"] == pytest.approx(same.mean())
    assert report["source"]["clean"] < 1
    y = np.load(files / "toy.npz")["y_test"]
    for name, scale in (("served_accuracy", 1.0), ("source_accuracy", -1.0)):
        right = (expected(x, scale)["class_id"] == y).mean()
        assert report["source"][name]["clean"] == pytest.approx(right)
    page = (tmp_path / "m-report" / "report.html").read_text()
    assert "give different labels" in page and f'<td class="num">{same.sum()} of 24</td>' in page
    assert report["threat_model"]["knowledge"] == "black box: another model of the same data"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, warm_keras):
    """A convolutional network as ``source.keras`` and served with every signature of an export."""
    import keras

    from keras_emr_serving.export import savedmodel
    from keras_emr_serving.export.signatures import Served
    from keras_emr_serving.server.config import store_models
    from keras_emr_serving.server.server import Options, Server

    folder = tmp_path_factory.mktemp("exported")
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(6, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(4),
        ]
    )
    x = np.random.default_rng(1).uniform(0, 1, (120, 8, 8, 1)).astype("float32")
    logits = keras.ops.convert_to_numpy(model(x))
    logits -= (bias := logits.mean(axis=0))  # or all are of one class
    model.layers[-1].bias.assign(-bias)
    model.save(folder / "source.keras")
    y = logits.argmax(axis=1)
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    served = Served(model, (8, 8, 1), ("a", "b", "c", "d"), "linf", 0.05)
    (folder / "store" / "net").mkdir(parents=True)
    savedmodel.write(served, folder / "store" / "net" / "1")
    options = Options(rest_port=0, grpc_port=0)
    with Server(store_models(folder / "store"), options) as server:
        yield folder, server


@pytest.mark.parametrize("api", ["http", "grpc"])
def test_adversarial_examples_of_the_keras_model_get_its_labels_through_the_server(
    capfd, tmp_path, exported, api
):
    folder, server = exported
    port = server.rest_port if api == "http" else server.grpc_port
    url = f"{api}://127.0.0.1:{port}/v1/models/net"
    arguments = ("--url", url, "--data", folder / "data.npz", "--attacks", "transfer", *QUICK)
    result = call(capfd, "evaluate", folder / "source.keras", *arguments, "--epsilon", 0.03)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    source = report["source"]
    assert (source["n"], source["clean"], source["adversarial"]) == (120, 1.0, 1.0)
    assert source["source_accuracy"] == source["served_accuracy"]
    assert source["source_accuracy"]["clean"] == 1.0
    assert 0.05 < source["source_accuracy"]["adversarial"] < 0.95
    # What the attack did through the server is what it does to the file.
    assert report["attacks"][0]["broken"] >= round(
        120 * (1 - source["source_accuracy"]["adversarial"])
    )
    page = (tmp_path / "net-report" / "report.html").read_text()
    assert page.count('<td class="num">120 of 120</td>') == 2


@pytest.mark.parametrize(
    ("attack", "steps", "norm", "radius"),
    [("hopskipjump", 8, "linf", 0.2), ("boundary", 300, "l2", 0.8), ("nes", 60, "linf", 0.2)],
)
def test_other_attacks_that_ask(capfd, files, running, attack, steps, norm, radius):
    url = running.url("m/versions/1")
    arguments = given(files, url, *QUICK, "--attacks", attack, "--n-examples", 8)
    arguments += ("--steps", steps, "--norm", norm, "--epsilon", radius)
    result = call(capfd, "evaluate", *arguments)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    correct, _ = withstands(files)
    _, robust = withstands(files, radius, norm)
    assert report["accuracy"]["correct"] == correct[:8].sum()
    assert robust[:8].sum() <= report["accuracy"]["survived"] < correct[:8].sum()
    labels_only = attack != "nes"
    knowledge = "black box: predicted labels" if labels_only else "black box: scores"
    assert report["threat_model"]["knowledge"] == knowledge
    assert "source" not in report


def test_grpc_gives_the_same(capfd, files, running):
    arguments = (*QUICK, "--attacks", "square", "--n-examples", 8)
    told = []
    for url, out in ((running.url("m"), "rest"), (running.grpc_url("m"), "grpc")):
        result = call(capfd, "evaluate", *given(files, url, *arguments, "--out", out))
        assert result.code == 0, result.err
        report = json.loads(result.out)
        assert report["model"]["name"] == "m/versions/2"
        told.append([report["accuracy"], [entry["queries"] for entry in report["attacks"]]])
    assert told[0] == told[1]


def test_what_is_printed(capfd, files, running):
    url = running.url("m/versions/1")
    arguments = given(files, url, "--attacks", "transfer", "--extra-examples", 0, "--quiet")
    result = call(capfd, "evaluate", files / "source.keras", *arguments)
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    assert "same labels as the source clean: 24 of 24; PGD-50 on the source: 24 of 24" in text
    assert f"{url}: 24 test images" in text and "asked as it is served" in text


@pytest.mark.parametrize("attacks", ["autoattack", "pgd", "square,apgd-ce", "cw", "learned"])
def test_white_box_attacks_are_refused(capfd, tmp_path, files, attacks):
    # Before anybody is asked: nobody is there.
    arguments = given(files, "http://127.0.0.1:9/v1/models/m", "--attacks", attacks)
    result = call(capfd, "evaluate", *arguments)
    name = attacks.rpartition(",")[2]
    assert_error(result, 3, "--attacks", "gives no gradients", f"Received: {name}.", "square")
    assert list(tmp_path.iterdir()) == []


def test_mistakes(capfd, tmp_path, files, running):
    url = running.url("m")
    data = ("--data", files / "toy.npz")
    for arguments, texts in (
        ((), ["RUN_OR_MODEL", "--url"]),
        (("--checkpoint", "best"), ["RUN_OR_MODEL"]),
    ):
        assert_error(call(capfd, "evaluate", *arguments), 2, *texts)
    np.savez(
        "wide.npz",
        **{k: np.zeros((40, 7, 7, 1)) for k in ("x_train", "x_test")},
        y_train=np.arange(40) % 2,
        y_test=np.arange(40) % 2,
    )
    for arguments, texts in (
        (("--url", url, *data), ["--epsilon", "a served model does not say it"]),
        (("--url", url, "--epsilon", "0.1"), ["--data", "a served model does not say it"]),
        (("--url", "m", *data, "--epsilon", "0.1"), ["url: not the address of a model"]),
        (given(files, url, "--attacks", "transfer"), ["--attacks: transfer needs a model"]),
        (given(files, url, "--data", "wide.npz"), ["model and data do not fit", "(6, 5, 1)"]),
        (given(files, running.url("nosuch")), ["answered 404", "Latest(nosuch)"]),
        (given(files, url, "--checkpoint", "best"), ["--checkpoint needs a run"]),
        (given(files, url, "--timeout", "0"), ["--timeout"]),
    ):
        assert_error(call(capfd, "evaluate", *arguments), 3, *texts)
    away = given(files, "http://127.0.0.1:9/v1/models/m", "--retries", 0)
    assert_error(call(capfd, "evaluate", *away), 1, "Connection refused")
    assert [path.name for path in tmp_path.iterdir()] == ["wide.npz"]


@contextmanager
def forwarder(port):
    """Passes requests on to the server at ``port`` until ``left`` predictions were made.

    Yields:
        An object with ``url``, ``left`` and ``seen``, the number of predictions that were made.
    """

    class Door:
        left, seen = 10**9, 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits 40 ms for the end of its head

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.forward(requests.get(f"http://127.0.0.1:{port}{self.path}", timeout=30))

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if Door.left <= 0:
                self.close_connection = True
                return
            Door.left, Door.seen = Door.left - 1, Door.seen + 1
            there = f"http://127.0.0.1:{port}{self.path}"
            self.forward(requests.post(there, data=body, timeout=30))

        def forward(self, answer):
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    Door.url = f"http://127.0.0.1:{server.server_address[1]}/v1/models/m/versions/1"
    try:
        yield Door
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_server_that_goes_away_in_the_middle(capfd, tmp_path, files, running):
    settings = ("--attacks", "square", "--steps", 40, "--batch-size", 4, "--n-examples", 16)
    settings += ("--extra-examples", 0, "--quiet", "--json", "--retries", 1)

    def outcome(result):
        assert result.code == 0, result.err
        report = json.loads(result.out)
        entry = report["attacks"][0]
        return report["accuracy"], entry["broken"], entry["queries"]

    with forwarder(running.rest_port) as door:
        whole = call(capfd, "evaluate", *given(files, door.url, *settings, "--out", "whole"))
        needed = door.seen
        door.left, door.seen = needed * 6 // 10, 0
        result = call(capfd, "evaluate", *given(files, door.url, *settings, "--out", "r"))
        assert_error(result, 75, "no answer", "call it again to go on where it stopped")
        state = tmp_path / "r" / "state" / "00-square.npz"
        with np.load(state) as file:
            assert json.loads(str(file["meta"]))["position"][2] >= 3  # some are done
        door.left, first = 10**9, door.seen
    # It comes back at another address.
    url = running.url("m/versions/1")
    result = call(capfd, "evaluate", *given(files, url, *settings, "--out", "r"))
    assert outcome(result) == outcome(whole)
    assert not state.exists() and first < needed

    # Another version is another model.
    with forwarder(running.rest_port) as door:
        door.left = needed * 6 // 10
        result = call(capfd, "evaluate", *given(files, door.url, *settings, "--out", "s"))
        assert result.code == 75
    url = running.url("m/versions/2")
    result = call(capfd, "evaluate", *given(files, url, *settings, "--out", "s"))
    assert_error(result, 3, "state: of another evaluation, model differs")
