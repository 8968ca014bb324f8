"""Figures of evaluations, as PNG files. matplotlib is imported when one is drawn."""

from __future__ import annotations

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well.
_COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
_MARKERS = "os^Dv<>P*X"


def inner_loss_figure(models, epsilon, batch):
    """Mean inner loss against steps and against time: a row per model, a line per maximizer.

    Lines: the run of T steps, from its start on. Dotted, with open markers: the ends of the runs
    of multiples of T steps. All rows have the same axes.

    Args:
        models: list of ``{"name": ..., "methods": [...]}``, entries as from
            :class:`MaximizerComparison`.
        epsilon: of the ball, as it is to be shown.
        batch: images per timed batch.

    Returns:
        ``matplotlib.figure.Figure``.
    """
    from matplotlib.ticker import MaxNLocator

    rows = len(models)
    figure = blank_figure(10, 1.3 + 3.1 * rows)
    axes = figure.subplots(rows, 2, sharex="col", sharey=True, squeeze=False)
    styles = {}
    for row, model in zip(axes, models, strict=True):
        for entry in model["methods"]:
            style = styles.setdefault(entry["method"], line_style(len(styles)))
            _draw_method(row, entry, style)
        row[0].set_ylabel("mean cross-entropy [nats]")
        for axis in row:
            axis.set_title(model["name"], fontsize=10, loc="left")
            axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("attack steps")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1, 1].set_xlabel(f"time [ms per batch of {batch}]")
    handles = [_handle(name, style) for name, style in styles.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=9,
        title="open markers: the end of longer runs",
        title_fontsize=9,
    )
    figure.suptitle(f"Inner loss, Linf ball of radius {epsilon}", fontsize=12)
    return figure


def loss_surface_figure(models, epsilon):
    """Loss surfaces, a panel per model, all with the same axes, heights and colours.

    Args:
        models: list of ``{"name": ..., "surface": LossSurface}``.
        epsilon: as it is to be shown.

    Returns:
        ``matplotlib.figure.Figure``.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    figure = blank_figure(max(6.5, 1.0 + 4.3 * columns), 1.6 + 4.0 * rows)
    low = min(float(m["surface"].loss.min()) for m in models)
    high = max(float(m["surface"].loss.max()) for m in models)
    high = high if high > low else low + 1e-6
    colors = Normalize(low, high)
    panels = []
    for i, model in enumerate(models):
        axis = figure.add_subplot(rows, columns, i + 1, projection="3d", computed_zorder=False)
        panels.append(axis)
        surface = model["surface"]
        a, b = np.meshgrid(surface.a, surface.b, indexing="ij")
        axis.plot_surface(
            a, b, surface.loss, cmap="cividis", norm=colors, rstride=1, cstride=1, linewidth=0.2,
            edgecolor="#00000030", zorder=1,
        )  # fmt: skip
        middle = len(surface.a) // 2
        for row, marker, color, label in (
            (middle, "o", "white", "the image"),
            (-1, "^", "#D55E00", "FGSM: a = epsilon, b = 0"),
        ):
            axis.scatter(
                surface.a[row], surface.b[middle], surface.loss[row, middle], marker=marker,
                color=color, edgecolor="black", s=45, label=label, zorder=2, depthshade=False,
            )  # fmt: skip
        axis.set_zlim(low, high)
        axis.set_xlim(surface.a[0], surface.a[-1])
        axis.set_ylim(surface.b[0], surface.b[-1])
        axis.set_xlabel("a (gradient's sign)\n[pixel units]", fontsize=8, labelpad=6)
        axis.set_ylabel("b (random ±1)\n[pixel units]", fontsize=8, labelpad=6)
        axis.tick_params(labelsize=7, pad=1)
        axis.locator_params(nbins=5)
        axis.text2D(0.0, 0.8, "cross-entropy\n[nats]", transform=axis.transAxes, fontsize=8)
        axis.view_init(elev=28, azim=-125)
        axis.set_title(model["name"], fontsize=10)
    bar = figure.colorbar(
        ScalarMappable(colors, "cividis"), ax=panels, shrink=0.6, pad=0.08, aspect=25
    )
    bar.set_label("cross-entropy [nats]", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"Loss around the image, a and b in ±{epsilon}, clipped to [0, 1]", fontsize=12)
    return figure


def save(figure, path):
    """Write a figure as PNG."""
    figure.savefig(path, format="png", dpi=150)


def blank_figure(width, height):
    """A figure without axes; ``width`` and ``height`` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and nothing global changes
    return figure


def line_style(i, colors=_COLORS):
    """Colour, marker and line of series number ``i``: dashed when the colours are used up."""
    return {
        "color": colors[i % len(colors)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": "-" if i < len(colors) else "--",
    }


def _handle(name, style):
    from matplotlib.lines import Line2D

    return Line2D([], [], label=name, markersize=5, linewidth=1.5, **style)


def _draw_method(row, entry, style):
    steps = np.arange(len(entry["loss"]))
    every = max(1, len(steps) // 5)
    line = {**style, "markersize": 4.5, "linewidth": 1.5}
    line["markevery"] = slice((len(steps) - 1) % every, None, every)
    row[0].plot(steps, entry["loss"], label=entry["method"], **line)
    row[1].plot(1e3 * np.array(entry["seconds"]), entry["loss"], **line)
    longer = {r["steps"]: r["final_loss"] for r in entry["runs"] if r["steps"] > entry["steps"]}
    if longer:
        ends = {entry["steps"]: entry["loss"][-1], **longer}
        row[0].plot(
            list(ends), list(ends.values()), color=style["color"], linestyle=":", linewidth=1
        )
        row[0].plot(
            list(longer), list(longer.values()), color=style["color"], linestyle="none",
            marker=style["marker"], markersize=5, markerfacecolor="none",
        )  # fmt: skip
