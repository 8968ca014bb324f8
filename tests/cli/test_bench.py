"""``keras-emr bench``: a tiny measurement for real, and what is refused before it."""

import json

import pytest

from keras_emr_cli import bench
from tests.cli.harness import assert_error, call, snapshot

pytestmark = pytest.mark.usefixtures("warm_keras")

SMALL = (
    *("bench", "--model", "mlp", "--input-shape", "8x8x1", "--batch-size", 8, "--steps", 2),
    *("--rounds", 2),
)
TINY = (*SMALL, "--jobs", "standard,at,at-emr")
JOB = {
    *("seconds", "images_per_second", "flops", "flops_per_second", "share_of_matrix_rate"),
    *("least_passes", "least_seconds", "measured_over_least"),
}


def test_json_on_stdout_and_in_a_file_and_the_table_of_the_same(capfd, tmp_path):
    out = tmp_path / "bench.json"
    done = call(capfd, *TINY, "--epsilon", "8/255", "--out", out, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert json.loads(out.read_text()) == found
    assert "rounds" in done.err  # progress
    assert {name: found[name] for name in ("model", "input_shape", "batch_size", "steps")} == {
        "model": "mlp",
        "input_shape": [8, 8, 1],
        "batch_size": 8,
        "steps": 2,
    }
    assert (found["epsilon"], found["precision"], found["attack_precision"]) == (
        "8/255",
        "float32",
        "float32",
    )
    assert (found["backend"], found["rounds"], found["accelerated"]) == ("tensorflow", 2, False)
    assert found["versions"]["tensorflow"] and found["hardware"]["cpu_cores"] >= 1
    assert list(found["jobs"]) == ["standard", "at", "at-emr"]
    for job in found["jobs"].values():
        assert set(job) == JOB and job["measured_over_least"] > 0
    assert found["jobs"]["standard"]["measured_over_least"] == pytest.approx(1)
    assert len(found["unstable"]) == 5  # two rounds are too few

    bench._show(found)
    table = capfd.readouterr().out
    for name in ("forward pass", "with input gradient", "standard step", "at", "at-emr"):
        assert any(line.split("  ")[0].strip(" │|") == name for line in table.splitlines()), name
    ratio = f"{found['jobs']['at-emr']['measured_over_least']:.2f}"
    (row,) = [line for line in table.splitlines() if line.lstrip(" │|").startswith("at-emr")]
    assert row.rstrip(" │|").endswith(ratio)
    text = " ".join(table.split())
    for part in ("mlp, 8x8x1, batch 8, 2 attack steps", "attacked in float32", "2 rounds"):
        assert part in text
    assert "Not stable" in text and "No accelerator was found" in text


def test_a_table_is_printed_and_a_file_replaced(capfd, tmp_path):
    out = tmp_path / "bench.json"
    out.write_text("old")
    done = call(capfd, *SMALL, "--jobs", "standard", "--out", out, "--overwrite", "--quiet")
    assert done.code == 0, done.err
    assert "x least time" in done.out and "mlp, 8x8x1" in done.out
    assert done.err == ""
    assert json.loads(out.read_text())["model"] == "mlp"


@pytest.mark.parametrize(
    ("words", "code", "fragments"),
    [
        (("--jobs", "at,fast"), 3, ("jobs", "'fast'", "trades-emr")),
        (("--jobs", ""), 3, ("jobs",)),
        (("--input-shape", "8x8"), 3, ("input_shape", "'8x8'", "32x32x3")),
        (("--input-shape", "8x0x1"), 3, ("input_shape", "'8x0x1'")),
        (("--model", "resnet19"), 3, ("resnet19", "resnet18")),
        (("--model", "wide-resnet-11-2"), 3, ("wide-resnet-11-2", "6 n + 4")),
        (("--model", "gone.keras"), 3, ("gone.keras",)),
        (("--model", "small-cnn", "--input-shape", "3x3x1"), 3, ("small-cnn", "(3, 3, 1)", "mlp")),
        (("--model", "vgg16", "--input-shape", "8x8x3"), 3, ("vgg16", "(8, 8, 3)")),
        (("--rounds", 0), 3, ("rounds", "0")),
        (("--rounds", "many"), 3, ("rounds", "many")),
        (("--batch-size", 0), 3, ("--batch-size", "0")),
        (("--epsilon", "-1"), 3, ("--epsilon", "-1")),
        (("--precision", "float16"), 3, ("--precision", "float16", "mixed_bfloat16")),
        (("--attack-precision", "float16"), 3, ("--attack-precision", "float16", "bfloat16")),
        (("--backend", "theano"), 3, ("--backend", "theano", "jax")),
        (("--out", "no/such/file.json"), 3, ("out", "no such folder")),
        (("--out", "."), 3, ("out", "a folder")),
        (("--round", 3), 2, ("--round", "--rounds")),
        (("extra",), 2, ("extra",)),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_measured(capfd, monkeypatch, words, code, fragments):
    from keras_emr.benchmark import measure

    def never(*args, **kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr(measure, "in_turns", never)
    assert_error(call(capfd, *TINY, "--quiet", *words), code, *fragments)


def test_a_file_that_exists_is_kept(capfd, tmp_path):
    out = tmp_path / "bench.json"
    out.write_text("mine")
    before = snapshot(tmp_path)
    assert_error(call(capfd, *TINY, "--out", out), 3, "out", "exists", "--overwrite")
    assert snapshot(tmp_path) == before


def test_a_backend_that_is_not_installed(capfd, monkeypatch):
    from keras_emr_cli import session

    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: None)
    assert_error(
        call(capfd, *TINY, "--backend", "jax"), 3, "jax is not installed", "keras-emr[jax]"
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_other_backends(backend, jax_cache):
    from tests.cli.harness import shell

    words = (*SMALL, "--jobs", "at-emr,at-lstm", "--attack-precision", "bfloat16")
    done = shell(*words, "--backend", backend, "--json", "--quiet", **jax_cache)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["backend"] == backend and list(found["jobs"]) == ["at-emr", "at-lstm"]
    assert all(0.3 < job["measured_over_least"] < 100 for job in found["jobs"].values())
