"""``keras-emr report``: reads evaluations, compares them, and leaves other files alone."""

import json
import time

import pytest

from tests.cli.harness import assert_error, call, python, shell, snapshot
from tests.cli.test_help import HEAVY, PROBE, UNNEEDED
from tests.report.example import example_images, example_report

PAGE = "report-comparison.html"


def write(folder, *arguments, **options):
    from keras_emr.reports.files import write_report

    report = example_report(*arguments, **options)
    write_report(folder, report, example_images(report))
    return report


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs with reports, ``a`` and ``b``, and a report of another ball, ``c``."""
    folder = tmp_path_factory.mktemp("reports")
    write(folder / "a" / "report", "a", classes=2)
    write(folder / "b" / "report", "b", classes=2, clean=0.8, robust=0.6, seed=2)
    write(folder / "c", "c", classes=2, n=1000, epsilon=0.1, epsilon_text="0.1", suite="individual",
          margins=False, complete=False)  # fmt: skip
    return folder


def test_the_table_and_the_page(capfd, folders, tmp_path):
    before = snapshot(folders)
    result = call(capfd, "report", folders / "a", folders / "b" / "report" / "report.json")
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    margins = json.loads((folders / "a" / "report" / "report.json").read_text())["margins"]["clean"]
    end = f"{margins['effective_margin_linf']:.4f} {100 * margins['share_above_epsilon']:.1f} %"
    start = "a 90.0 % 45.0 % 38.3 - 51.9 45.00 % 200 linf 8/255 warn"
    assert f"{start} {end}".split() in rows
    assert any(row[:5] == ["b", "80.0", "%", "60.0", "%"] for row in rows)
    assert "Not comparable" not in result.out and "upper bound" in result.out
    assert result.out.rstrip().endswith(f"page: {PAGE}")
    text = (tmp_path / PAGE).read_text()
    assert "Robustness side by side" in text and text.count("data:image/png") == 2 * 8 * 3
    assert [path.name for path in tmp_path.iterdir()] == [PAGE]
    assert snapshot(folders) == before


def test_what_cannot_be_compared_is_said(capfd, folders):
    result = call(capfd, "report", folders / "a", folders / "c", "--out", "new/pages")
    assert result.code == 0
    assert "Different threat models: Linf 8/255, Linf 0.1." in result.out
    assert "c (incomplete)" in result.out and "not run" in result.out
    assert "page: new/pages/report-comparison.html" in result.out


def test_json(capfd, folders, tmp_path):
    result = call(capfd, "report", folders / "c", "--json", "--out", tmp_path / "one.html")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["page"] == str(tmp_path / "one.html") and found["warnings"] == []
    (row,) = found["reports"]
    assert (row["model"], row["clean"], row["robust"], row["n"]) == ("c", 0.9, 0.45, 1000)
    assert row["autoattack_percent"] is row["effective_margin_l2"] is None
    assert "Robustness of c" in (tmp_path / "one.html").read_text()


def test_only_its_own_pages_are_overwritten(capfd, folders, tmp_path):
    assert call(capfd, "report", folders / "a").code == 0
    first = (tmp_path / PAGE).read_bytes()
    assert call(capfd, "report", folders / "b").code == 0
    assert (tmp_path / PAGE).read_bytes() != first

    (tmp_path / "mine.html").write_text("<html>mine</html>")
    for target in (tmp_path / "mine.html", folders / "a" / "report" / "report.html"):
        before = snapshot(folders), target.read_bytes()
        result = call(capfd, "report", folders / "a", "--out", target)
        assert_error(result, 3, "--out", "not a page of keras-emr report", "--overwrite")
        assert before == (snapshot(folders), target.read_bytes())
    result = call(capfd, "report", folders / "a", "--out", tmp_path / "mine.html", "--overwrite")
    assert result.code == 0 and "Robustness of a" in (tmp_path / "mine.html").read_text()


def test_bad_reports(capfd, folders, tmp_path):
    empty = tmp_path / "run"
    (empty / "report").mkdir(parents=True)
    fix = f"keras-emr evaluate {empty}"
    assert_error(call(capfd, "report", folders / "a", empty), 3, "not found", str(empty), fix)
    assert_error(call(capfd, "report", "nowhere"), 3, "not found", "'nowhere'")
    twice = call(capfd, "report", folders / "a", folders / "a" / "report")
    assert_error(twice, 3, "a report twice")
    for content, fragment in (
        ({"test": {"accuracy": 0.9}}, "keras-emr evaluate"),
        ({**example_report(), "schema": "keras-emr-report/2"}, "upgrade"),
        ({**example_report(), "accuracy": {}}, "accuracy.clean: missing"),
    ):
        (empty / "report" / "report.json").write_text(json.dumps(content))
        result = call(capfd, "report", empty)
        assert_error(result, 3, str(empty / "report" / "report.json"), fragment)
    (empty / "report" / "report.json").write_text("{")
    assert_error(call(capfd, "report", empty), 3, "not JSON")
    assert not (tmp_path / PAGE).exists()


def test_names_do_not_steer_the_terminal(capfd, tmp_path):
    write(tmp_path / "x", "[bold]x[/bold]\x1b[31m")
    result = call(capfd, "report", tmp_path / "x")
    assert result.code == 0 and "[bold]x[/bold]?[31m" in result.out


def test_a_place_that_cannot_be_written(capfd, folders, tmp_path):
    (tmp_path / "file").write_text("")
    result = call(capfd, "report", folders / "a", "--out", tmp_path / "file" / "x.html")
    assert_error(result, 3, str(tmp_path / "file"))


def test_wrong_usage(capfd):
    assert_error(call(capfd, "report"), 2, "RUN_OR_REPORT")
    assert_error(call(capfd, "report", "x", "--overwite"), 2, "did you mean --overwrite?")


def test_help_is_quick_and_light():
    result = python("-c", PROBE, json.dumps(["report", "--help"]))
    code, modules = json.loads(result.err)
    assert code == 0
    assert [name for name in (*HEAVY, *UNNEEDED, "jinja2", "jsonschema") if name in modules] == []
    for flag in ("--out", "--overwrite", "--json"):
        assert flag in result.out
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        assert shell("report", "--help").code == 0
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.3, seconds


def test_neither_keras_nor_a_backend_is_loaded(folders, tmp_path):
    arguments = ["report", str(folders / "a"), "--out", str(tmp_path / "page.html")]
    code, modules = json.loads(python("-c", PROBE, json.dumps(arguments)).err)
    assert code == 0
    heavy = ("keras", "tensorflow", "jax", "torch", "sklearn", "scipy", "pandas")
    assert [name for name in heavy if name in modules] == []
