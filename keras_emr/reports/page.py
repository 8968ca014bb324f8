"""The page of one report or of several side by side: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from importlib import resources

import numpy as np

from keras_emr._version import __version__
from keras_emr.reports import figures, views
from keras_emr.reports.compare import differences, titles

REPORT, COMPARISON = "report", "comparison"
_CURVES = {
    "epsilon": "Robust accuracy over epsilon. It must fall, and reach 0 for a large one: if it "
    "does not, the attack is at fault, not the model robust.",
    "steps": "Robust accuracy over attack steps. Flat at its end: more steps would not help.",
    "restarts": "Robust accuracy over restarts. Flat at its end: more restarts would not help.",
}
_MARGINS = {
    "l2": "Effective margins in L2: first-order distances to the decision boundary, negative "
    "where the image is misclassified.",
    "linf": "Effective margins in Linf: first-order distances to the decision boundary, negative "
    "where the image is misclassified.",
    "weight_norm": "Effective weight norms of the predicted class: the larger, the more a small "
    "change of the image moves its score.",
}


def page(reports, images=None, kind=REPORT):
    """The page, as text.

    Args:
        reports: list of valid reports.
        images: for each report a list of ``{"index", "clean", "adversarial"}``, images (H, W, C)
            in [0, 1], for its gallery; an example without images is shown as text.
        kind: ``report`` or ``comparison``; stands in the page, so that a program can tell.

    Returns:
        HTML. The same arguments give the same text.
    """
    images = images or [[] for _ in reports]
    names = titles(reports)
    pairs = list(zip(names, reports, strict=True))
    factor = magnification([image for some in images for image in some])
    models = [
        _model(name, report, some, factor, alone=len(reports) == 1)
        for (name, report), some in zip(pairs, images, strict=True)
    ]
    return _template().render(
        kind=kind,
        version=__version__,
        title=f"Robustness of {names[0]}" if len(names) == 1 else "Robustness side by side",
        models=models,
        several=len(models) > 1,
        explanation=views.BOUND,
        warnings=differences(reports),
        comparison=views.comparison_rows(names, reports) if len(names) > 1 else [],
        curves=_figures(pairs, _CURVES, figures.curve_figure),
        margins=_figures(pairs, _MARGINS, figures.margin_figure),
        factor=factor,
        pictures=any(images),
    )


def magnification(images):
    """Round factor that makes the gallery's largest perturbation about half the grey range."""
    changes = [np.abs(image["adversarial"] - image["clean"]).max() for image in images]
    largest = float(max(changes, default=0))
    if largest == 0:
        return 1
    fitting = [f for f in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if f * largest <= 0.501]
    return max(fitting, default=1)


def picture_uri(image):
    """An image (H, W, C) in [0, 1] as a ``data:`` URI of a PNG; unless C is 3, its grey mean."""
    from matplotlib.image import imsave

    image = np.asarray(image, "float32")
    if image.shape[-1] != 3:
        image = np.repeat(image.mean(axis=-1, keepdims=True), 3, axis=-1)
    file = io.BytesIO()
    imsave(file, np.round(255 * np.clip(image, 0, 1)).astype("uint8"), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _template():
    import jinja2

    source = resources.files("keras_emr.reports") / "page.html"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source.read_text(encoding="utf-8"))


def _model(name, report, images, factor, alone):
    n = report["accuracy"]["n"]
    title = "" if alone else name
    return {
        "name": name,
        "report": report,
        "clean": views.percent(report["accuracy"]["clean"], n),
        "robust": views.percent(report["accuracy"]["robust"], n),
        "ball": views.ball(report["threat_model"]),
        "banners": views.banners(report),
        "verdict": views.verdict(report["checks"]),
        "summary": views.summary(report),
        "attacks": views.attack_rows(report),
        "source": views.source_rows(report),
        "checks": views.check_rows(report),
        "classes": views.class_rows(report),
        "margins": views.margin_rows(report),
        "settings": views.setting_groups(report),
        "survival": figures.data_uri(figures.survival_figure(title, report)),
        "confusion": [
            (at, figures.data_uri(figures.confusion_figure(text, report["confusion"][at])))
            for at, text in (("clean", "Clean images"), ("adversarial", "Adversarial images"))
        ],
        "gallery": _gallery(report, images, factor),
    }


def _figures(pairs, captions, draw):
    drawn = ((name, text, draw(pairs, name)) for name, text in captions.items())
    return [
        (name, text, figures.data_uri(figure)) for name, text, figure in drawn if figure is not None
    ]


def _gallery(report, images, factor):
    by_index = {image["index"]: image for image in images}
    cards = []
    for example in report["gallery"]:
        found = by_index.get(example["index"])
        pictures = []
        if found is not None:
            clean, adversarial = (np.asarray(found[k], float) for k in ("clean", "adversarial"))
            pictures = [
                ("clean", picture_uri(clean)),
                (f"change, {factor} times", picture_uri(0.5 + factor * (adversarial - clean))),
                ("adversarial", picture_uri(adversarial)),
            ]
        if example["broken_by"] is not None:
            outcome = f"broken by {example['broken_by']}"
        elif example["predicted_clean"] != example["label"]:
            outcome = "wrong without an attack"
        else:
            outcome = "not broken"
        norm = views.number(example["perturbation"])
        cards.append({**example, "pictures": pictures, "outcome": outcome, "norm": norm})
    return cards
