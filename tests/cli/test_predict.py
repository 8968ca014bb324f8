"""``keras-emr predict``: files in, answers out."""

import json
import re
import resource
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.cli.harness import assert_error, call, python, shell
from tests.serving import image_model
from tests.serving.image_model import LABELS, expected
from tests.serving.scripted import scripted


@pytest.fixture
def url(running):
    return running.url("m/versions/1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve PNG files of the model's size; what the model answers."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = (image_model.images(12, seed=4) * 255).round().astype("uint8")
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(12)], expected(pixels / 255)


def test_the_answers_as_json(capfd, url, pictures):
    files, wanted = pictures
    result = call(capfd, "predict", *files, "--url", url, "--json", "--top", 2, "--batch-size", 5)
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert (report["url"], report["model"], report["version"]) == (url, "m", 1)
    assert report["signature"] == "robust"
    assert [row["file"] for row in report["images"]] == [str(file) for file in files]
    order = np.argsort(-wanted["probabilities"], axis=1)
    for i, row in enumerate(report["images"]):
        assert (row["index"], row["class"], row["label"]) == (None, *named(order[i, 0]))
        assert [(one["class"], one["label"]) for one in row["top"]] == [*map(named, order[i, :2])]
        for k, one in zip(order[i], row["top"], strict=False):
            assert one["probability"] == pytest.approx(wanted["probabilities"][i, k], abs=1e-5)
        for name in ("margin", "effective_margin_l2", "effective_margin_linf"):
            assert row[name] == pytest.approx(wanted[name][i], rel=1e-3, abs=1e-5)
        assert row["trusted"] == wanted["trusted"][i]
    assert 0 < sum(row["trusted"] for row in report["images"]) < 12


def named(k):
    return int(k), LABELS[k]


def test_the_table(capfd, url, pictures):
    files, wanted = pictures
    result = call(capfd, "predict", *files, "--url", url, "--top", 2)
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    titles = "file label probability next margin eff. margin L2 eff. margin Linf trusted"
    assert text.startswith(titles)
    assert result.out.count(" yes\n") + result.out.count(" yes \n") == wanted["trusted"].sum()
    assert len(re.findall(r" NO *\n", result.out)) == (~wanted["trusted"]).sum()
    # Long paths go over several lines.
    paths = "".join(re.match(r" ?(\S*)", line)[1] for line in result.out.splitlines())
    for i, k in enumerate(wanted["class_id"]):
        assert f"{wanted['probabilities'][i, k]:.4f}" in text
        assert str(files[i]) in paths
    assert "dog [red]" in result.out or 1 not in wanted["class_id"]


def test_untrusted_images_are_a_failed_gate(capfd, url, pictures):
    files, wanted = pictures
    trusted = [file for file, fine in zip(files, wanted["trusted"], strict=True) if fine]
    doubtful = [file for file, fine in zip(files, wanted["trusted"], strict=True) if not fine]
    result = call(capfd, "predict", *trusted, "--url", url, "--reject-untrusted")
    assert (result.code, result.err) == (0, "")
    result = call(capfd, "predict", trusted[0], doubtful[0], "--url", url, "--reject-untrusted")
    assert result.code == 4
    assert f"for 1 of 2 images. Received: {doubtful[0]}. Expected" in result.err
    assert result.err.startswith("Error: --reject-untrusted: ") and result.err.count("\n") == 1
    assert len(re.findall(r" NO *\n", result.out)) == 1
    result = call(capfd, "predict", doubtful[0], "--url", url)
    assert (result.code, result.err) == (0, "")


def test_a_model_without_margins(capfd, running, pictures):
    files, _ = pictures
    result = call(capfd, "predict", files[0], "--url", running.url("plain"), "--json")
    (row,) = json.loads(result.out)["images"]
    assert (row["trusted"], row["margin"]) == (None, None)
    result = call(capfd, "predict", files[0], "--url", running.url("plain"))
    assert "margin" not in result.out and result.code == 0
    result = call(capfd, "predict", files[0], "--url", running.url("plain"), "--reject-untrusted")
    assert_error(result, 3, "--reject-untrusted", "Expected robust")


def test_arrays_and_pictures_of_other_sizes(capfd, tmp_path, url):
    images = image_model.images(3)
    np.save("three.npy", images)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), "uint8")
    Image.fromarray(pixels).save("large.jpg")
    result = call(capfd, "predict", "three.npy", "large.jpg", "--url", url, "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)["images"]
    assert [(row["file"], row["index"]) for row in rows] == [
        *(("three.npy", i) for i in range(3)),
        ("large.jpg", None),
    ]
    assert [row["class"] for row in rows[:3]] == expected(images)["class_id"].tolist()
    table = call(capfd, "predict", "three.npy", "--url", url).out
    assert "three.npy[2]" in table


@pytest.mark.parametrize(
    "text", ["a\nb b\nc\n", '["a", "b b", "c"]', '{"labels": ["a", "b b", "c"]}']
)
def test_labels_from_a_file(capfd, tmp_path, url, pictures, text):
    (tmp_path / "labels").write_text(text)
    files, wanted = pictures
    result = call(capfd, "predict", *files, "--url", url, "--labels", "labels", "--json")
    found = [row["label"] for row in json.loads(result.out)["images"]]
    assert found == [["a", "b b", "c"][k] for k in wanted["class_id"]]


def test_grpc(capfd, running, pictures):
    files, wanted = pictures
    quiet = shell("predict", *files, "--url", running.grpc_url("m/labels/stable"), "--json")
    assert (quiet.code, quiet.err) == (0, "")
    rows = json.loads(quiet.out)["images"]
    assert [row["class"] for row in rows] == wanted["class_id"].tolist()
    assert [row["trusted"] for row in rows] == wanted["trusted"].tolist()
    # The same host and port in a URL for REST, and the flag.
    url = running.grpc_url("m").replace("grpc://", "http://")
    result = call(capfd, "predict", files[0], "--url", url, "--grpc", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["version"] == 2


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["none.png"], ["image: no such file", "'none.png'"]),
        (["text.png"], ["cannot be read: not an image", "'text.png'"]),
        (["good.png", "--labels", "none"], ["--labels: cannot be read"]),
        (["good.png", "--labels", "two"], ["--labels", "Received: 2. Expected 3"]),
        (["good.png", "--labels", "bad.json"], ["--labels: not labels"]),
        (["good.png", "--ca", "x.pem"], ["without TLS"]),
        (["good.png", "--url", "localhost:8501"], ["url: not the address", "/v1/models/NAME"]),
        (["good.png", "--url", "{nosuch}"], ["answered 404", "Latest(nosuch)"]),
        (["good.png", "--url", "{m/versions/7}"], ["answered 404", "Specific(m, 7)"]),
        (["good.png", "--url", "{m/labels/new}"], ["answered 400", "Unrecognized", "new"]),
        (["7x5.npy"], ["the model takes other images", "(1, 7, 5, 1)"]),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else None,
)
def test_mistakes(capfd, tmp_path, running, url, arguments, texts):
    Image.fromarray(np.zeros((6, 5), "uint8")).save("good.png")
    np.save("7x5.npy", np.zeros((1, 7, 5, 1), "float32"))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "bad.json").write_text('{"labels": 3}')
    arguments = [running.url(a[1:-1]) if a.startswith("{") else a for a in arguments]
    if "--url" not in arguments:
        arguments += ["--url", url]
    assert_error(call(capfd, "predict", *arguments), 3, *texts)


def test_a_server_that_fails_or_is_away_is_a_failure(capfd, tmp_path):
    Image.fromarray(np.zeros((2, 2), "uint8")).save("x.png")
    with scripted((500, {"error": "XLA compilation disabled\n\t [[node]]"})) as (url, _):
        result = call(capfd, "predict", "x.png", "--url", url)
        assert_error(result, 1, "answered 500: XLA compilation disabled", url)
    began = time.perf_counter()
    result = call(capfd, "predict", "x.png", "--url", url, "--retries", 1)
    assert_error(result, 1, "Connection refused", url)
    assert time.perf_counter() - began < 3
    with scripted("silence") as (url, _):
        result = call(capfd, "predict", "x.png", "--url", url, "--timeout", "0.3")
        assert_error(result, 1, "none within 0.3 s")


@pytest.mark.parametrize(
    ("package", "text"), [("requests", "keras-emr[serving]"), ("PIL", "pip install pillow")]
)
def test_a_package_that_is_missing(capfd, monkeypatch, pictures, url, package, text):
    monkeypatch.setitem(sys.modules, package, None)
    result = call(capfd, "predict", pictures[0][0], "--url", url)
    assert_error(result, 3, "a package is missing. Received: ", text)


def test_a_model_of_numbers_that_are_none(capfd):
    """JSON has no NaN: a strict reader takes the report all the same."""
    np.save("x.npy", np.zeros((1, 2, 2, 1), "float32"))
    with scripted((200, '{"outputs": [[NaN, 0.5]]}')) as (url, _):
        result = call(capfd, "predict", "x.npy", "--url", url, "--json", "--top", 2)
    assert result.code == 0, result.err

    def strict(word):
        raise AssertionError(word)

    (row,) = json.loads(result.out, parse_constant=strict)["images"]
    assert {one["probability"] for one in row["top"]} == {None, 0.5}


def test_usage(capfd):
    assert_error(call(capfd, "predict", "x.png"), 2, "--url")
    assert_error(call(capfd, "predict", "--url", "http://h/v1/models/m"), 2, "IMAGE")


def test_it_is_quick(url, pictures):
    """In all, with Python's own start; CPU time, as others may be at work on this machine."""
    files, _ = pictures
    seconds = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert shell("predict", files[0], "--url", url).code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5, seconds


def test_it_starts_without_tensorflow(url, pictures):
    files, _ = pictures
    code = """
import json, sys
from keras_emr_cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    heavy = ("tensorflow", "keras", "jax", "torch", "grpc", "matplotlib", "scipy")
    print(stop.code, [n for n in heavy if n in sys.modules], file=sys.stderr)
"""
    result = python("-c", code, "predict", files[0], "--url", url)
    assert result.err == "0 []\n"
