"""Figures from plain numbers: nothing here reads a file or knows a model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's palette, distinct for colour-blind readers too; a method has one colour in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F")
MARKERS = "osD^vP*Xh"
METHODS = ("lora", "adalora", "sora", "rm-lora-v1", "rm-lora-v2", "lora-orth", "full", "svd-lora")
Band = tuple[Sequence[float], Sequence[float], Sequence[float]]  # x, mean and standard deviation of y


MOST_INCHES = 60.0  # a side of a figure; a longer one would not fit into an image file
MOST_CELLS = 60  # rows or columns of a heatmap that still have names and numbers


def shown(text: str) -> str:
    """A name as matplotlib prints it: no formula, and no leading underscore, which a legend leaves out."""
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(min(width, MOST_INCHES), min(height, MOST_INCHES)), layout="constrained")


def style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of a line: by its method, else by its place among `names`."""
    method = name.partition(" ")[0]
    same = [other for other in names if other.partition(" ")[0] == method]
    others = sorted({other.partition(" ")[0] for other in names} - set(METHODS))
    i = METHODS.index(method) if method in METHODS else len(METHODS) + others.index(method)
    return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[(i + same.index(name)) % len(MARKERS)],
            "linestyle": ("-", "--", ":", "-.")[same.index(name) % 4]}  # fmt: skip


def rank_grid(ranks: Mapping[str, float]) -> tuple[list[str], list[int], np.ndarray]:
    """Module kinds, layers, and the values as (kinds, layers), NaN where a layer has no such module.

    Args:
        ranks: a value for each matrix by module name, such as `deberta.encoder.layer.3.attention.self.query_proj`.
    """
    places: dict[tuple[str, int], float] = {}
    for name, value in ranks.items():
        match = re.search(r"\.(\d+)\.(.+)$", name)
        layer, kind = (int(match[1]), match[2]) if match else (0, name)
        kind = re.sub(r"^attention\.self\.|^attention\.(?!output)|\.dense$", "", kind)
        places[kind, layer] = value
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    layers = sorted({layer for _, layer in places})
    values = np.array([[places.get((kind, layer), np.nan) for layer in layers] for kind in kinds])
    return kinds, layers, values


def rank_heatmap(ranks: Mapping[str, float], title: str, most: float) -> Figure:
    """Layer x module: what is left of each matrix's rank, 0 to `most`, with the number in each cell."""
    kinds, layers, values = rank_grid(ranks)
    figure = _figure(3.2 + 0.52 * len(layers), 1.7 + 0.42 * len(kinds))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    if len(layers) <= MOST_CELLS:
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    if len(kinds) <= MOST_CELLS:
        axes.set_yticks(range(len(kinds)), [shown(kind) for kind in kinds])
    axes.set_xlabel("layer")
    axes.set_title(shown(title), fontsize=10, loc="left", wrap=True)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and max(len(kinds), len(layers)) <= MOST_CELLS:
            text = f"{value:.0f}" if value == round(value) else f"{value:.1f}"
            ink = "white" if value < 0.6 * most else "black"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=axes, label="rank left", ticks=MaxNLocator(integer=True, nbins=5))
    return figure


def as_image(figure: Figure) -> np.ndarray:
    """The figure as pixels, (height, width, 3) uint8, for TensorBoard."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curves(panels: Mapping[str, Mapping[str, Band]], x_label: str, title: str) -> Figure:
    """One panel a quantity, one line with a band of a standard deviation a method."""
    figure = _figure(1.6 + 4.6 * len(panels), 4.4)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, (x, mean, deviation) in lines.items():
            look = style(name, names)
            low, high = np.subtract(mean, deviation), np.add(mean, deviation)
            width = 3.0 - 1.8 * names.index(name) / len(names)  # what lies below another line still shows at its sides
            axes.plot(x, mean, label=shown(name), markersize=2.5 * width, linewidth=width, **look)
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        _dress(axes)
    _legend(figure, title, names)
    return figure


def comparison(tasks: Mapping[str, tuple[str, Mapping[str, Sequence[float]]]], title: str) -> Figure:
    """One panel a task: a dot a seed, and mean with standard deviation, for each method."""
    all_names = list(dict.fromkeys(name for _, methods in tasks.values() for name in methods))
    columns = min(3, len(tasks))
    lengths = [len(methods) for _, methods in tasks.values()]
    heights = [0.9 + 0.34 * max(lengths[i : i + columns]) for i in range(0, len(lengths), columns)]
    widest = max(map(len, all_names))
    figure = _figure(columns * (2.8 + 0.08 * widest), 0.5 + sum(heights))
    panels = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, (task, (metric, methods)) in zip(panels.flat, tasks.items(), strict=False):
        for row, (name, values) in enumerate(methods.items()):
            look = style(name, all_names)
            axes.plot(values, [row] * len(values), linestyle="", marker=look["marker"], color=look["color"], alpha=0.4)
            deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
            axes.errorbar(np.mean(values), row, xerr=deviation, fmt="|", color=look["color"], markersize=14, capsize=3)
        axes.set_yticks(range(len(methods)), [shown(name) for name in methods])
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_title(shown(task), fontsize=10)
        axes.set_xlabel(metric)
        _dress(axes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    figure.suptitle(shown(title), fontsize=10)
    return figure


def frontier(points: Mapping[str, Sequence[tuple[float, float, float]]], metric: str, title: str) -> Figure:
    """Metric against remaining parameters: points (parameters, mean, deviation) of each method, joined by a line."""
    figure = _figure(7.2, 4.6)
    axes = figure.add_subplot()
    names = list(points)
    for name, values in points.items():
        x, mean, deviation = zip(*sorted(values), strict=True)
        axes.errorbar(x, mean, yerr=deviation, label=shown(name), capsize=3, markersize=6, **style(name, names))
    everything = [x for values in points.values() for x, _, _ in values]
    if min(everything) > 0 and max(everything) > 8 * min(everything):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.set_xlabel("parameters of the low-rank factors that remain (head not counted)")
    axes.set_ylabel(metric)
    _dress(axes)
    _legend(figure, title, names)
    return figure


def stages(curves_: Sequence[Sequence[Mapping[str, Any]]], key: str, metric: str, title: str) -> Figure:
    """SoRA's schedule: threshold against remaining parameters, and those against the metric, a line a seed.

    Args:
        curves_: for each run its stages, each with `lambda`, `remaining` and `metrics`.
        key: name of the metric there; a score between 0 and 1.
    """
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    for i, curve in enumerate(curves_):
        look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
        remaining = [stage["remaining"] for stage in curve]
        left.plot([stage["lambda"] for stage in curve], remaining, **look)
        right.plot(remaining, [100 * stage["metrics"][key] for stage in curve], **look)
    left.set_xlabel("threshold (sparse_lambda_2 of the stage)")
    left.set_ylabel("remaining parameters")
    left.yaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    right.set_xlabel("remaining parameters (schedule runs from right to left)")
    right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    right.set_ylabel(metric)
    _dress(left)
    _dress(right)
    figure.suptitle(shown(f"{title}: sparsifying schedule, a line a seed"), fontsize=10)
    return figure


def spectra(values: Mapping[str, tuple[np.ndarray, Sequence[float]]], title: str) -> Figure:
    """Left: singular values of the update, mean over the matrices; right: their effective ranks, a box a method.

    Args:
        values: for each method the mean singular values, largest first, and the effective rank of each matrix.
    """
    figure = _figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    names = list(values)
    for name, (singular, _) in values.items():
        drawn = np.maximum(singular, 1e-12)
        left.semilogy(range(1, len(drawn) + 1), drawn, label=shown(name), markersize=4, **style(name, names))
    largest = [singular.max() for singular, _ in values.values() if singular.max(initial=0.0) > 0] or [1.0]
    left.set_ylim(1e-4 * min(largest), 2 * max(largest))  # what was pruned is 0 and falls out below
    left.set_xlabel("index of the singular value")
    left.set_ylabel("singular value of B A, mean over matrices")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(left)
    boxes = right.boxplot([ranks for _, ranks in values.values()], orientation="horizontal", patch_artist=True)
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set(facecolor=style(name, names)["color"], edgecolor=style(name, names)["color"], linewidth=2, alpha=0.6)
    for line in boxes["medians"]:
        line.set_color("black")
    right.set_yticks(range(1, len(names) + 1), [shown(name) for name in names])
    right.invert_yaxis()
    right.set_xlim(left=0)
    right.set_xlabel("effective rank of each matrix's update (exp of the entropy)")
    _dress(right)
    _legend(figure, title, names)
    return figure


def _short(x: float) -> str:
    """1327104 as 1.33M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:g}"


def _dress(axes: Any) -> None:
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, title: str, names: Sequence[str]) -> None:
    """The title, and one legend beside the panels: never over the data."""
    figure.suptitle(shown(title), fontsize=10)
    seen: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    order = [label for label in map(shown, names) if label in seen]
    figure.legend([seen[label] for label in order], order, loc="outside right upper", fontsize=8, frameon=False)
