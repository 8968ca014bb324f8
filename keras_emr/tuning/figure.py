"""The clean/robust plot of a search."""

from __future__ import annotations

from keras_emr.evaluation.plots import blank_figure

_CHEAP, _STRONG, _FRONT = "#0072B2", "#D55E00", "#999999"
_NAMED = 8  # points whose names fit


def pareto_figure(trials, front, cheap, strong, title):
    """Clean against robust accuracy of all trials, and the Pareto front under the cheap attack.

    A finalist's accuracy under the strong attack hangs below its point.

    Args:
        trials: list of dictionaries with ``trial``, ``clean``, ``robust`` and, for finalists,
            ``strong_clean`` and ``strong_robust``.
        front: names of the trials on the front.
        cheap, strong: names of the attacks.
        title: above the plot.

    Returns:
        ``matplotlib.figure.Figure``.
    """
    from matplotlib.patheffects import withStroke

    figure = blank_figure(6.4, 4.8)
    axis = figure.add_subplot()
    shown = [t for t in trials if t["robust"] is not None]
    ends = sorted((t for t in shown if t["trial"] in front), key=lambda t: t["clean"])
    if len(ends) > 1:
        x, y = _percent(ends, "clean"), _percent(ends, "robust")
        axis.step(x, y, where="pre", color=_FRONT, linewidth=1.2, zorder=1, label="Pareto front")
    for inside, face in ((False, "white"), (True, _CHEAP)):
        some = [t for t in shown if (t["trial"] in front) == inside]
        if some:
            label = f"under {cheap}" + (", on the front" if inside else "")
            axis.scatter(
                _percent(some, "clean"), _percent(some, "robust"), s=34, facecolor=face,
                edgecolor=_CHEAP, linewidth=1.3, zorder=3, label=label,
            )  # fmt: skip
    final = [t for t in shown if t.get("strong_robust") is not None]
    for t in final:
        x = 100 * t["clean"]
        axis.plot(
            [x, 100 * t["strong_clean"]], [100 * t["robust"], 100 * t["strong_robust"]],
            color=_STRONG, linewidth=1, linestyle=":", zorder=2,
        )  # fmt: skip
    if final:
        axis.scatter(
            _percent(final, "strong_clean"), _percent(final, "strong_robust"), s=44, marker="D",
            color=_STRONG, zorder=4, label=f"finalists under {strong}",
        )  # fmt: skip
    named = final or ends[:_NAMED]
    for t in named:
        key = "strong_" if final else ""
        axis.annotate(
            t["trial"], (100 * t[f"{key}clean"], 100 * t[f"{key}robust"]), xytext=(0, -14),
            textcoords="offset points", ha="center", fontsize=8, in_layout=False, zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
    axis.margins(0.08)
    axis.set_xlabel("clean accuracy on validation data [%]")
    axis.set_ylabel("robust accuracy on validation data [%]")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _percent(trials, key):
    return [100 * trial[key] for trial in trials]
