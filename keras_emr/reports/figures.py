"""Figures of reports. Each has one panel, so that a page can stack them on a phone."""

from __future__ import annotations

import base64
import io

import numpy as np

from keras_emr.evaluation.plots import blank_figure, line_style

_CLEAN, _ATTACKED, _SURVIVORS, _WORST = "#56B4E9", "#0072B2", "#E69F00", "#D55E00"
# For models: of Okabe and Ito's colours all but green, which marks epsilon.
_HUES = ("#0072B2", "#E69F00", "#CC79A7", "#000000", "#56B4E9", "#D55E00", "#999999")
_WIDTH, _HEIGHT = 5.4, 3.6
_AXES = {
    "epsilon": "epsilon, radius of the {norm} ball [pixel units]",
    "steps": "attack steps",
    "restarts": "restarts",
}
_MARGINS = {
    "l2": "effective margin, L2 [pixel units]",
    "linf": "effective margin, Linf [pixel units]",
    "weight_norm": "weight norm of the predicted class, L2",
}
_NUMBERS_UP_TO = 12  # classes whose counts still fit into a confusion matrix


def data_uri(figure):
    """A figure as a ``data:`` URI of an SVG; the same figure gives the same text."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "keras_emr"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def survival_figure(title, report):
    """Bars: accuracy clean, under each attack, and under all of them.

    Args:
        title: name of the model.
        report: its report.

    Returns:
        ``matplotlib.figure.Figure``.
    """
    from matplotlib.patches import Patch

    accuracy = report["accuracy"]
    rows = [("no attack", accuracy["clean"], _CLEAN)]
    for attack in report["attacks"]:
        color = _ATTACKED if attack["mode"] == "individual" else _SURVIVORS
        rows.append((attack["name"], attack["robust_accuracy"], color))
    rows.append(("all attacks, worst case", accuracy["robust"], _WORST))
    figure = blank_figure(_WIDTH, 1.2 + 0.3 * len(rows))
    axis = figure.add_subplot()
    values = [100 * value for _, value, _ in rows]
    axis.barh(range(len(rows)), values, color=[color for *_, color in rows], height=0.7)
    for i, value in enumerate(values):
        inside = value > 82
        axis.text(
            value + (-1.5 if inside else 1.5), i, f"{value:.1f}", va="center", fontsize=8,
            ha="right" if inside else "left", in_layout=False,
            color="white" if inside and rows[i][2] in (_ATTACKED, _WORST) else "black",
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [_plain(name, 30) for name, *_ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("images still classified correctly [%]", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    kinds = {
        "individual": (_ATTACKED, "this attack alone"),
        "survivors": (_SURVIVORS, "after this and those before it in its suite"),
    }
    modes = dict.fromkeys(attack["mode"] for attack in report["attacks"])
    handles = [Patch(color=kinds[mode][0], label=kinds[mode][1]) for mode in modes]
    if handles:
        _legend(figure, handles, len(handles))
    _title(axis, title)
    return figure


def curve_figure(models, name):
    """Robust accuracy against ``name``: ``epsilon``, ``steps`` or ``restarts``.

    Args:
        models: list of ``(title, report)``.
        name: of the curve.

    Returns:
        ``matplotlib.figure.Figure``, or ``None`` if no report has this curve.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if all(report["curves"][name] is None for _, report in models):
        return None
    figure = blank_figure(_WIDTH, _HEIGHT)
    axis = figure.add_subplot()
    marked, shown = set(), []
    norms = dict.fromkeys(report["threat_model"]["norm"].capitalize() for _, report in models)
    for i, (title, report) in enumerate(models):
        curve = report["curves"][name]
        if curve is None:
            continue
        shown += curve["x"]
        shares = [100 * value for value in curve["robust_accuracy"]]
        label = f"{curve['attack']}, {curve['n']} images"
        label = _plain(f"{title} ({label})" if len(models) > 1 else label, 60)
        line = line_style(i, _HUES)
        axis.plot(curve["x"], shares, label=label, markersize=4.5, linewidth=1.5, **line)
        if name == "epsilon":
            _mark_epsilon(axis, report, marked, norms)
    if name != "epsilon":
        if max(shown) > 20 * min((x for x in shown if x > 0), default=1):
            # A curve may start at 0 steps, which a logarithmic axis would leave out.
            axis.set_xscale("symlog", linthresh=1) if 0 in shown else axis.set_xscale("log")
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(-3, 103)
    axis.set_xlabel(_AXES[name].format(norm=" or ".join(norms)), fontsize=9)
    axis.set_ylabel("robust accuracy [%]", fontsize=9)
    axis.grid(alpha=0.3)
    _legend(figure, axis.get_legend_handles_labels()[0], 1 if len(models) > 1 else 2)
    return figure


def margin_figure(models, name):
    """Histograms of margins or weight norms: clean solid, adversarial dashed, epsilon marked.

    The height is the share of a model's examples per unit of the axis, since the bins of models
    differ in width.

    Args:
        models: list of ``(title, report)``.
        name: ``l2``, ``linf`` or ``weight_norm``.

    Returns:
        ``matplotlib.figure.Figure``, or ``None`` if no report has margins.
    """
    if all(report["margins"] is None for _, report in models):
        return None
    figure = blank_figure(_WIDTH, _HEIGHT)
    axis = figure.add_subplot()
    marked = set()
    for i, (title, report) in enumerate(models):
        if report["margins"] is None:
            continue
        for at, line in (("clean", "-"), ("adversarial", "--")):
            histogram = report["margins"][at][name]
            edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"], float)
            density = counts / (report["accuracy"]["n"] * np.diff(edges))
            alone = len(models) == 1
            alone_in = {"clean": _ATTACKED, "adversarial": _WORST}
            color = alone_in[at] if alone else line_style(i, _HUES)["color"]
            label = _plain(at if alone else f"{title}, {at}", 46)
            axis.stairs(density, edges, color=color, linestyle=line, linewidth=1.5, label=label)
            if at == "clean" or alone:
                axis.stairs(density, edges, color=color, fill=True, alpha=0.15)
        if name == report["threat_model"]["norm"]:
            _mark_epsilon(axis, report, marked)
    if name != "weight_norm":
        axis.axvline(0, color="#777777", linewidth=0.8)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(_MARGINS[name], fontsize=9)
    axis.set_ylabel("share of examples per unit", fontsize=9)
    axis.grid(alpha=0.3)
    _legend(figure, axis.get_legend_handles_labels()[0], 3 if len(models) == 1 else 2)
    return figure


def confusion_figure(title, matrix):
    """A confusion matrix: colours are shares of a row, numbers are counts.

    Args:
        title: above the figure.
        matrix: K rows of K counts, a row per true class.

    Returns:
        ``matplotlib.figure.Figure``.
    """
    from matplotlib.ticker import MaxNLocator

    counts = np.array(matrix)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = blank_figure(4.4, 4.2)
    axis = figure.add_subplot()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    classes = len(counts)
    if classes <= _NUMBERS_UP_TO:
        for row, column in np.argwhere(counts):
            axis.text(
                column, row, counts[row, column], ha="center", va="center",
                fontsize=7 if classes > 6 else 9, in_layout=False,
                color="white" if share[row, column] > 0.55 else "black",
            )  # fmt: skip
        axis.set_xticks(range(classes))
        axis.set_yticks(range(classes))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=8)
    axis.set_xlabel("predicted class", fontsize=9)
    axis.set_ylabel("true class", fontsize=9)
    bar = figure.colorbar(image, ax=axis, shrink=0.75)
    bar.set_label("share of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _title(axis, title)
    return figure


def _mark_epsilon(axis, report, marked, norms=()):
    threat = report["threat_model"]
    key = (threat["norm"], threat["epsilon"])
    if key in marked:
        return
    marked.add(key)
    norm = f" ({threat['norm'].capitalize()})" if len(norms) > 1 else ""
    label = _plain(f"epsilon = {threat['epsilon_text']}{norm}", 46)
    style = ("-.", ":", (0, (5, 1)), (0, (3, 5)))[(len(marked) - 1) % 4]
    axis.axvline(threat["epsilon"], color="#009E73", linestyle=style, linewidth=1.5, label=label)


def _title(axis, text):
    if text:
        axis.set_title(_plain(text, 60), fontsize=10, loc="left")


def _legend(figure, handles, columns):
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _plain(text, length):
    """Names as they are: no mathematics between dollar signs, and not too long."""
    text = " ".join(str(text).encode(errors="replace").decode().split())
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")
