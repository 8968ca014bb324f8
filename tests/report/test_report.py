"""Reports: what is valid, what the page says, and that an old one survives every failure."""

import base64
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from keras_emr.errors import UserError
from keras_emr.reports import figures, views
from keras_emr.reports.compare import differences, interval, titles, worst_verdict
from keras_emr.reports.files import read_images, read_report, validate, write_report
from keras_emr.reports.page import magnification, page, picture_uri
from keras_emr.reports.schema import schema
from tests.report.example import example_images, example_report

HOSTILE = "<script>alert('$x$ & \"y\"')</script>"
EVERY = [
    example_report(),
    example_report(suite="individual", norm="l2", epsilon=0.5, epsilon_text="0.5"),
    example_report(complete=False, curves=False, margins=False, n=7, classes=3),
]


class Tags(HTMLParser):
    """Every tag with its attributes, and the text that a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.inside = [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.inside):
            self.words.append(data)


def changed(path, value, base=None):
    """An example report with one field replaced; ``...`` removes it."""
    report = base or example_report()
    place = report
    for part in path[:-1]:
        place = place[part]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    report = example_report()
    folder = tmp_path_factory.mktemp("made")
    write_report(folder, report, example_images(report))
    return folder


@pytest.fixture
def written(made, tmp_path):
    """A report on disk; its folder."""
    return shutil.copytree(made, tmp_path / "report")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("report", EVERY, ids=["autoattack", "individual", "short"])
def test_a_whole_report_is_valid(report):
    validate(report)
    validate(json.loads(json.dumps(report, allow_nan=False)))


def test_the_schema_is_one_and_describes_every_field():
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(schema())

    def described(part, where):
        assert part.get("description"), where
        for name, field in {**part.get("properties", {}), **part.get("$defs", {})}.items():
            described(field, f"{where}.{name}")
        for name in ("items", "additionalProperties"):
            if isinstance(part.get(name), dict):
                described(part[name], f"{where}.{name}")
        if "properties" in part and "additionalProperties" not in part:
            raise AssertionError(f"{where} does not say whether more fields may follow")

    described(schema(), "report")


def fields(value, path=()):
    if isinstance(value, dict):
        for name, part in value.items():
            yield (*path, name)
            yield from fields(part, (*path, name))
    elif isinstance(value, list) and value:
        yield from fields(value[0], (*path, 0))


def test_every_field_is_needed_but_free_ones():
    whole = example_report()
    free = {("settings", name) for name in ("attacks", "margins")} | {("environment", "tensorflow")}
    for path in fields(whole):
        if path in free or "options" in path[:-1] or path[:2] == ("settings", "margins"):
            validate(changed(path, ..., example_report()))
            continue
        with pytest.raises(UserError) as caught:
            validate(changed(path, ..., example_report()))
        assert str(path[-1]) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "fragments"),
    [
        (["accuracy", "robust"], ..., ["accuracy.robust: missing", "worst case"]),
        (["gallery", 3, "label"], ..., ["gallery[3].label: missing"]),
        (["accuracy", "n"], "200", ["accuracy.n: wrong type", "'200'", "a whole number"]),
        (["accuracy", "n"], True, ["accuracy.n: wrong type", "True"]),
        (["attacks"], None, ["attacks: wrong type", "a list"]),
        (["model", "path"], 3, ["model.path", "text or null"]),
        (["accuracy", "robust"], math.nan, ["accuracy.robust", "nan", "finite"]),
        (["curves", "epsilon", "x", 2], math.inf, ["curves.epsilon.x[2]", "inf"]),
        (["settings", "free"], {"deep": [math.nan]}, ["settings.free.deep[0]", "nan"]),
        (["accuracy", "robust"], np.float32(0.5), ["accuracy.robust", "float32", "plain JSON"]),
        (["gallery", 0, "label"], np.int64(1), ["gallery[0].label", "int64"]),
        (["settings", "free"], (1, 2), ["settings.free", "tuple"]),
        (["checks", 1, "verdict"], "great", ["checks[1].verdict", "'great'", "pass, warn, fail"]),
        (["threat_model", "norm"], "l1", ["threat_model.norm", "'l1'", "linf, l2"]),
        (["threat_model", "epsilon"], 0, ["threat_model.epsilon", "> 0"]),
        (["accuracy", "clean"], 90.0, ["accuracy.clean", "90.0", "<= 1"]),
        (["data", "image_shape"], [8, 8], ["data.image_shape", "[8, 8]"]),
        (["created"], "yesterday", ["created", "'yesterday'", "date"]),
        (["model", "parametres"], 3, ["model", "parametres", "did you mean 'parameters'"]),
        (["surprise"], 1, ["surprise"]),
        (["accuracy", "survived"], 181, ["accuracy.survived", "at most correct, 180"]),
        (["accuracy", "robust"], 0.5, ["accuracy.robust", "0.5", "survived / n, 0.45"]),
        (["accuracy", "n"], 201, ["accuracy.n", "at most data.n, 200"]),
        (["robustbench", "autoattack_acc"], 30.0, ["autoattack_acc", "at least", "45"]),
        (["robustbench", "clean_acc"], 0.9, ["robustbench.clean_acc", "90"]),
        (["robustbench", "threat_model"], "L2", ["robustbench.threat_model", "linf"]),
        (["complete"], False, ["autoattack_acc", "cut short"]),
        (["attacks", 0, "broken"], 181, ["attacks[0].broken", "at most attacked, 180"]),
        (["attacks", 1, "robust_accuracy"], 0.4, ["attacks[1].robust_accuracy", "0.45"]),
        (["curves", "steps", "x"], [1, 2], ["curves.steps.robust_accuracy", "as many as x, 2"]),
        (["curves", "steps", "x", 1], 0, ["curves.steps.x", "rising"]),
        (["confusion", "clean", 0, 0], 99, ["confusion.clean", "n, 200"]),
        (["confusion", "adversarial"], [[200]], ["confusion.adversarial", "10 rows of 10"]),
        (["margins", "clean", "l2", "edges"], [0, 1], ["margins.clean.l2.edges", "21"]),
        (["per_class"], [], ["per_class", "0 entries", "10"]),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_broken_report_is_refused_in_one_line(path, value, fragments):
    with pytest.raises(UserError) as caught:
        validate(changed(path, value))
    message = str(caught.value)
    assert message.startswith(("report: ", "unknown field in report"))
    assert "Received: " in message and "Expected" in message
    assert "\n" not in message and len(message) < 400
    for fragment in fragments:
        assert fragment in message


def test_an_attack_never_leaves_fewer_than_all_of_them_together():
    report = example_report()
    report["attacks"][0] |= {"broken": 100, "robust_accuracy": 0.4}
    with pytest.raises(UserError, match=r"attacks\[0\].robust_accuracy: .*worst case"):
        validate(report)


@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        ({"schema": "keras-emr-report/2"}, ["newer keras_emr", "keras-emr-report/2", "upgrade"]),
        ({"schema": "other/1"}, ["not a report", "other/1", "keras-emr evaluate"]),
        ({"test": {}}, ["not a report", "no schema"]),
        ([], ["not a report", "list"]),
        (None, ["not a report"]),
    ],
)
def test_what_is_no_report_or_a_newer_one(value, fragments):
    with pytest.raises(UserError) as caught:
        validate(value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_what_is_written_is_read(written, tmp_path):
    assert sorted(contents(written)) == ["gallery.npz", "report.html", "report.json"]
    expected = example_report()
    for path in (tmp_path, written, written / "report.json"):
        assert read_report(path) == expected
        for found, image in zip(read_images(path), example_images(expected), strict=True):
            assert found["index"] == image["index"]
            np.testing.assert_array_equal(found["clean"], image["clean"])
            np.testing.assert_array_equal(found["adversarial"], image["adversarial"])
    before = contents(written)
    write_report(written, expected, example_images(expected))
    assert contents(written) == before  # the same report, the same bytes


def test_a_report_without_images_removes_those_of_the_old_one(written):
    write_report(written, example_report("second"))
    assert sorted(contents(written)) == ["report.html", "report.json"]
    assert read_images(written) == [] and read_report(written)["model"]["name"] == "second"


@pytest.mark.parametrize("call", ["open", "replace"])
@pytest.mark.parametrize("name", ["report.html", "gallery.npz", "report.json"])
def test_the_old_report_is_whole_after_a_failure(written, monkeypatch, call, name):
    before = contents(written)
    real = {"open": open, "replace": os.replace}[call]

    def full(path, *arguments, **options):
        at = str(arguments[0] if call == "replace" else path)
        ours = at.endswith(name) if call == "replace" else at.endswith(f".{name}.part")
        if ours and not (call == "replace" and str(path).endswith(".old")):
            raise OSError(28, "No space left on device")
        return real(path, *arguments, **options)

    if call == "open":
        monkeypatch.setattr("keras_emr.reports.files.open", full, raising=False)
    else:
        monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr("keras_emr.reports.page.page", lambda *_: "a new page")
    new = example_report("new", seed=9)
    with pytest.raises(UserError, match="No space left on device") as caught:
        write_report(written, new, example_images(new))
    assert "\n" not in str(caught.value)
    assert contents(written) == before


def test_an_invalid_report_or_image_changes_nothing(written):
    before = contents(written)
    images = example_images(example_report())
    with pytest.raises(UserError, match="accuracy"):
        write_report(written, changed(["accuracy"], 1), images)
    images[2]["adversarial"] = images[2]["adversarial"] + 1
    with pytest.raises(UserError, match=r"gallery image 2. .*Expected \[0, 1\]"):
        write_report(written, example_report(), images)
    images[2]["adversarial"] = np.zeros((8, 8))
    with pytest.raises(UserError, match=r"gallery image 2. .*Expected \(H, W, C\)"):
        write_report(written, example_report(), images)
    assert contents(written) == before


@pytest.mark.parametrize(
    ("content", "fragment"),
    [(None, "not found"), ("{", "not JSON"), (b"\xff\xfe", "not JSON"), ("[" * 10**5, "not JSON"),
     ('{"test": {}}', "not a report"), ('{"schema": "keras-emr-report/7"}', "newer")],
)  # fmt: skip
def test_unreadable_reports(tmp_path, content, fragment):
    if content is not None:
        file = tmp_path / "report.json"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read_report(tmp_path)
    assert fragment in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_images_are_named(written):
    (written / "gallery.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match=r"gallery\.npz"):
        read_images(written)


def test_the_page_says_the_numbers():
    report = example_report()
    text = Tags(page([report], [example_images(report)])).text
    for words in (
        "Robustness of toy", "clean accuracy 90.0 % 180 of 200 images",
        "robust accuracy 45.0 % 90 of 200 images; an upper bound", "Linf, epsilon = 8/255",
        "8/255 (0.0314)", "white box", "lies between 38.3 % and 51.9 % (95 % interval)",
        "suite ran to its end on these images: 45.00 %",
        "! Checks: warn. 1 of 4 checks ask for a closer look", "1 not run.",
        "It rises by 1.2 points between two neighbours: use more steps. measured: 0.012, "
        "threshold: 0.005",
        "apgd-ce survivors 180 79 43.9 % 50.5 %", "steps = 100, restarts = 1, loss.name = dlr",
        "Image 3 , true class 3 predicted: clean 3, adversarial 7 broken by apgd-ce",
        "the change, 10 times as strong", "batch_size 256", "bn_mode inference", "keras 3.15.0",
        "tensorflow 2.20.0", "margins.bins 20", "made up for tests", "312202",
        "0 20 90.0 % 25.0 % 0.2575 0.03219 3.538",
    ):  # fmt: skip
        assert words in text, words
    for words in ("Incomplete", "Not full AutoAttack", "Not comparable", "Not measured"):
        assert words not in text


def served_report(clean=1.0, adversarial=1.0, n=200):
    """A report on a served model of the file ``best.keras``."""
    return {
        **example_report(),
        "source": {
            "path": "run/best.keras",
            "sha256": "ab" * 32,
            "attack": "PGD-50",
            "n": n,
            "clean": clean,
            "adversarial": adversarial,
            "source_accuracy": {"clean": 0.9, "adversarial": 0.31},
            "served_accuracy": {"clean": 0.88, "adversarial": 0.32},
        },
    }


def test_a_served_model_and_its_source():
    report = served_report(adversarial=199 / 200)
    validate(report)
    tags = Tags(page([report]))
    assert "as they are 200 of 200 90.0 % 88.0 %" in tags.text
    assert "made by PGD-50 on the source 199 of 200 31.0 % 32.0 %" in tags.text
    assert "run/best.keras" in tags.text and "ab" * 32 in tags.text
    assert ("a", {"href": "#source"}) in tags.tags and ("section", {"id": "source"}) in tags.tags
    assert tags.text.index("give different labels") < tags.text.index("Checks")


def test_one_label_of_many_that_differs_is_not_rounded_away():
    report = served_report(adversarial=19_999 / 20_000, n=20_000)
    assert [row[1] for row in views.source_rows(report)] == ["20000 of 20000", "19999 of 20000"]
    texts = [banner["text"] for banner in views.banners(report)]
    assert sum("give different labels" in text for text in texts) == 1
    assert not any("labels" in banner["text"] for banner in views.banners(served_report()))


def test_beside_others_only_a_served_model_has_a_source():
    tags = Tags(page([example_report("a"), served_report()]))
    assert tags.text.count("made by PGD-50 on the source") == 1


def test_what_is_missing_is_said_first():
    report = EVERY[2]
    report = changed(["checks", 0, "verdict"], "fail", json.loads(json.dumps(report)))
    text = Tags(page([report])).text
    for words in ("Incomplete: the evaluation was cut short", "Not full AutoAttack",
                  "Checks: fail. 1 of 4 checks failed"):  # fmt: skip
        assert text.index(words) < text.index("clean accuracy")
    assert text.count("Not measured.") == 2
    bare = changed(["checks"], [], changed(["gallery"], [], example_report(suite="individual")))
    bare |= {"attacks": [], "notes": []}
    text = Tags(page([bare])).text
    for words in ("No check of the evaluation was run", "No attack ran to its end", "None was run",
                  "No example was kept"):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("count", [1, 3])
def test_the_page_needs_nothing_but_itself(count):
    reports = [example_report(f"m{i}", classes=2, seed=i) for i in range(count)]
    text = page(reports, [example_images(report) for report in reports])
    written = re.sub(r"base64,[^\"]*", "", text)
    assert "http" not in written.replace("http-equiv", "")
    assert "@import" not in written and "url(" not in written
    found = Tags(text)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("srcset", "data", "action", "background", "poster"):
            assert name not in attributes
        assert attributes.get("src", "data:image/").startswith("data:image/")
        if "href" in attributes:
            assert attributes["href"][0] == "#" and attributes["href"][1:] in ids
    pictures = [a for tag, a in found.tags if tag == "img"]
    assert len(pictures) == count * (3 + 8 * 3) + 6 and all(a["alt"] for a in pictures)
    for uri in (a["src"] for a in pictures if "svg" in a["src"][:20]):
        drawing = base64.b64decode(uri.partition(",")[2]).decode()
        targets = re.findall(r"""(?:href="|url\()([^")]*)""", drawing)
        assert targets and all(target.startswith(("#", "data:image/png")) for target in targets)
    policy = [a["content"] for _, a in found.tags if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_hostile_names_are_text():
    report = example_report(HOSTILE, classes=2, epsilon_text="<b>1</b>")
    report["attacks"][0]["name"] = report["attacks"][0]["options"]["<i>"] = HOSTILE
    report["notes"] = report["settings"]["<img src=x>"] = [HOSTILE, "{{ 7 * 7 }}", "\ud800"]
    report["checks"][0] |= {"title": HOSTILE, "text": HOSTILE, "id": HOSTILE}
    report["gallery"][0]["broken_by"] = HOSTILE
    report["per_class"][0]["class"] = HOSTILE
    validate(report)
    for reports in ([report], [report, example_report(classes=2)]):
        text = page(reports)
        found = Tags(text)
        names = {tag for tag, _ in found.tags}
        assert not names & {"script", "b", "i"} - ({"b"} if len(reports) == 1 else set())
        assert "<script" not in text and "<img src=x" not in text
        assert found.text.count(HOSTILE) >= 8 and "{{ 7 * 7 }}" in found.text


def test_several_reports_on_one_page():
    reports = [
        example_report("a", classes=2),
        example_report("b", classes=2, clean=0.8, robust=0.6, seed=2),
    ]
    text = Tags(page(reports)).text
    assert "clean accuracy 90.0 % 80.0 % robust accuracy (upper bound) 45.0 % 60.0 %" in text
    assert "under full AutoAttack 45.00 % 60.00 %" in text
    assert "Not comparable" not in text
    other = example_report(
        "c", classes=2, n=100, epsilon=0.1, epsilon_text="0.1", suite="individual"
    )
    text = Tags(page([*reports, other])).text
    for words in (
        "Different threat models: Linf 8/255, Linf 0.1.",
        "images: 200, 100.",
        "Different attacks: apgd-ce + apgd-t + fab-t + square, pgd + apgd + square.",
    ):
        assert text.index("Not comparable number by number.") < text.index(words)  # fmt: skip
    assert text.index(words) < text.index("Comparison")


def test_differences():
    base = example_report()
    assert differences([base]) == differences([base, example_report("b", seed=3)]) == []
    same = example_report(epsilon_text=f"{8 / 255}")
    assert differences([base, same]) == []  # one number, written in two ways
    for path, value, words in (
        (["threat_model", "knowledge"], "labels", "knowledge"),
        (["data", "sha256"], "c" * 64, "Different data"),
        (["data", "split"], "validation", "Different data"),
        (["complete"], False, "cut short"),
    ):
        (line,) = differences([base, changed(path, value)])
        assert words in line
    assert titles([base, base, example_report("b")]) == ["toy (1)", "toy (2)", "b"]


def test_worst_verdict_and_interval():
    def worst(*verdicts):
        return worst_verdict([{"verdict": verdict} for verdict in verdicts])

    assert worst("pass", "warn", "fail", "not run") == "fail"
    assert worst("pass", "not run", "warn") == "warn"
    assert worst("not run", "pass") == "pass"
    assert worst("not run") == worst() == "not run"
    # Wilson (1927); the first is scipy.stats.binomtest(90, 200).proportion_ci(method="wilson").
    assert interval(90, 200) == pytest.approx((0.3826, 0.5192), abs=1e-4)
    z2 = 1.959964**2
    assert interval(0, 50) == pytest.approx((0, z2 / (50 + z2)))
    assert interval(50, 50) == pytest.approx((50 / (50 + z2), 1))


def test_models_share_the_axes_of_a_figure():
    pairs = [(name, example_report(name, seed=i, clean=0.9 - i / 10))
             for i, name in enumerate("ab")]  # fmt: skip
    axis = figures.margin_figure(pairs, "linf").axes[0]
    handles, labels = axis.get_legend_handles_labels()
    assert labels == ["a, clean", "a, adversarial", "epsilon = 8/255", "b, clean", "b, adversarial"]
    marked = handles[labels.index("epsilon = 8/255")]
    assert marked.get_xdata() == [8 / 255, 8 / 255]
    outlines = [patch for patch in handles if hasattr(patch, "get_data")]
    for (_, report), at, patch in (
        (pairs[0], "clean", handles[0]),
        (pairs[1], "adversarial", handles[4]),
    ):
        stairs = patch.get_data()
        share = report["accuracy"]["n"] * stairs.values * np.diff(stairs.edges)
        np.testing.assert_allclose(share, report["margins"][at]["linf"]["counts"])
    assert (
        outlines
        and "epsilon = 8/255"
        not in (figures.margin_figure(pairs, "l2").axes[0].get_legend_handles_labels()[1])
    )

    axis = figures.curve_figure(pairs, "epsilon").axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines) == ["a (apgd, 50 images)", "epsilon = 8/255", "b (apgd, 50 images)"]
    curve = pairs[1][1]["curves"]["epsilon"]
    np.testing.assert_allclose(lines["b (apgd, 50 images)"].get_xdata(), curve["x"])
    expected = 100 * np.array(curve["robust_accuracy"])
    np.testing.assert_allclose(lines["b (apgd, 50 images)"].get_ydata(), expected)
    assert axis.get_ylim() == (-3, 103)

    assert figures.curve_figure(pairs, "steps").axes[0].get_xscale() == "log"
    assert figures.curve_figure(pairs, "restarts").axes[0].get_xscale() == "linear"
    pairs[0][1]["curves"]["steps"]["x"][0] = 0
    assert figures.curve_figure(pairs, "steps").axes[0].get_xscale() == "symlog"


def test_bars_and_matrices():
    report = example_report()
    axis = figures.survival_figure("toy", report).axes[0]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([90, 50.5, 45, 45, 45, 45])
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[0] == "no attack" and names[1] == "apgd-ce" and names[-1].startswith("all attacks")
    axis = figures.confusion_figure("", report["confusion"]["clean"]).axes[0]
    shares = axis.images[0].get_array()
    np.testing.assert_allclose(np.asarray(shares).sum(axis=1), 1)
    written = {text.get_position(): int(text.get_text()) for text in axis.texts}
    assert written[0, 0] == report["confusion"]["clean"][0][0]
    large = figures.confusion_figure("", np.eye(100, dtype=int).tolist()).axes[0]
    assert not large.texts
    assert figures.curve_figure([("", EVERY[2])], "steps") is None
    assert figures.margin_figure([("", EVERY[2])], "l2") is None


def test_the_gallery_shows_the_change_magnified():
    from io import BytesIO

    from matplotlib.image import imread

    clean = np.full((2, 2, 1), 0.25, "float32")
    images = [{"index": 0, "clean": clean, "adversarial": clean + 0.03}]
    assert magnification(images) == 10
    assert magnification([]) == magnification([{**images[0], "adversarial": clean}]) == 1
    report = example_report()
    found = Tags(page([report], [images]))
    uris = [a["src"] for tag, a in found.tags if tag == "img" and "Image 0" in a["alt"]]
    pixels = [imread(BytesIO(base64.b64decode(uri.partition(",")[2])))[0, 0, 0] for uri in uris]
    assert pixels == pytest.approx([0.25, 0.8, 0.28], abs=1 / 255)
    color = np.zeros((1, 1, 3))
    color[..., 1] = 1
    shown = imread(BytesIO(base64.b64decode(picture_uri(color).partition(",")[2])))
    assert shown[0, 0, :3].tolist() == [0, 1, 0]


def test_nothing_heavy_is_needed():
    import subprocess
    import sys

    code = (
        "import sys; from tests.report.example import example_report as e; "
        "from keras_emr.reports.page import page; page([e()]); "
        "print([m for m in ('keras', 'tensorflow', 'jax', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_smallest_report_has_a_page():
    """One image, classes without images, no margin that is finite."""
    report = example_report(n=1, classes=2, clean=1.0, robust=1.0)
    nothing = {"edges": [0.0, 1.0], "counts": [0]}
    for at in ("clean", "adversarial"):
        report["margins"][at] |= {"l2": nothing, "linf": nothing, "effective_margin_l2": None}
    report["curves"]["restarts"] = {"attack": "pgd", "n": 1, "x": [0], "robust_accuracy": [1.0]}
    report["data"]["n"] = 10
    validate(report)
    text = Tags(page([report])).text
    assert "tested on 1 of the 10 test images" in text
    assert report["per_class"][1]["accuracy"] is None and "1 0 – – –" in text  # noqa: RUF001
