"""Figures from plain numbers: nothing here reads a file or knows a model."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

# Okabe and Ito's palette, distinct for colour-blind readers too; a method has one colour in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vP*X"
# Of variants that are not among METHODS: colours of Tol's muted palette and markers that no method has.
OWN_PALETTE = ("#882255", "#999933", "#332288", "#117733", "#AA4499", "#44AA99", "#7F7F7F")
OWN_MARKERS = "<>hpdH8"
METHODS = ("lora", "adalora", "sora", "rm-lora-v1", "rm-lora-v2", "lora-orth", "full", "svd-lora")
Band = tuple[Sequence[float], Sequence[float], Sequence[float]]  # x, mean and standard deviation of y


MOST_INCHES = 60.0  # a side of a figure; a longer one would not fit into an image file
MOST_CELLS = 60  # rows or columns of a heatmap that still have names and numbers
MOST_LETTERS = 34  # of a name on one line
FEWEST_SEEDS = 3  # of two, a deviation says next to nothing: no bar and no band


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
    known = method in METHODS
    palette, markers = (PALETTE, MARKERS) if known else (OWN_PALETTE, OWN_MARKERS)
    i = METHODS.index(method) if known else others.index(method)
    return {"color": palette[i % len(palette)], "marker": markers[(i + same.index(name)) % len(markers)],
            "linestyle": ("-", "--", ":", "-.")[same.index(name) % 4]}  # fmt: skip


def wrapped(text: str, letters: int = MOST_LETTERS) -> str:
    """A name on as many lines as it needs."""
    return "\n".join(textwrap.wrap(shown(text), letters, subsequent_indent="  ")) or " "


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


def curves(
    panels: Mapping[str, Mapping[str, Band]], x_label: str, title: str, one_class: Mapping[str, float] | None = None
) -> Figure:
    """One panel a quantity, one line with a band of a standard deviation a method.

    Args:
        one_class: for each panel that has one, the score of answering the same class for every row.
    """
    figure = _figure(1.0 + 4.6 * len(panels), 4.4)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, (x, mean, deviation) in lines.items():
            look = style(name, names)
            low, high = np.subtract(mean, deviation), np.add(mean, deviation)
            width = 3.0 - 1.8 * names.index(name) / len(names)  # what lies below another line still shows at its sides
            axes.plot(x, mean, label=wrapped(name), markersize=2.5 * width, linewidth=width, **look)
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        _dress(axes)
        axes.set_ylabel(label + _chance(axes.axhline, axes.get_ylim, axes.set_ylim, (one_class or {}).get(label)))
    _legend(figure, title, names)
    return figure


def comparison(
    tasks: Mapping[str, tuple[str, Mapping[str, Sequence[float]]]],
    title: str,
    one_class: Mapping[str, float] | None = None,
) -> Figure:
    """One panel a task: a dot a seed, and the mean, with the standard deviation of three seeds and more, a method.

    Args:
        tasks: for each task the name of its metric, and the scores of each method.
        one_class: for each task that has one, the score of answering the same class for every row.
    """
    all_names = list(dict.fromkeys(name for _, methods in tasks.values() for name in methods))
    counts = {len(values) for _, methods in tasks.values() for values in methods.values()}
    columns = min(3, len(tasks))

    def labels(methods: Mapping[str, Sequence[float]]) -> list[str]:
        return [wrapped(name if len(counts) == 1 else f"{name} (n={len(values)})") for name, values in methods.items()]

    found = [labels(methods) for _, methods in tasks.values()]
    lines = [sum(0.16 + 0.18 * (1 + label.count("\n")) for label in of_task) for of_task in found]
    heights = [1.0 + max(lines[i : i + columns]) for i in range(0, len(lines), columns)]
    widest = max(len(line) for of_task in found for label in of_task for line in label.split("\n"))
    seeds = f"; n = {counts.pop()}" if len(counts) == 1 else ""
    figure = _figure(columns * (3.2 + 0.08 * widest), 0.6 + sum(heights))
    panels = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, of_task, (task, (metric, methods)) in zip(panels.flat, found, tasks.items(), strict=False):
        for row, (name, values) in enumerate(methods.items()):
            look = style(name, all_names)
            axes.plot(values, [row] * len(values), linestyle="", marker=look["marker"], color=look["color"], alpha=0.4)
            deviation = np.std(values, ddof=1) if len(values) >= FEWEST_SEEDS else None
            axes.errorbar(np.mean(values), row, xerr=deviation, fmt="|", color=look["color"], markersize=14, capsize=3)
        axes.set_yticks(range(len(methods)), of_task)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_title(wrapped(task), fontsize=10)
        _dress(axes)
        axes.set_xlabel(metric + _chance(axes.axvline, axes.get_xlim, axes.set_xlim, (one_class or {}).get(task)))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    _title(figure, title + seeds)
    return figure


def frontier(
    points: Mapping[str, Sequence[tuple[float, float, float | None]]],
    metric: str,
    title: str,
    one_class: float | None = None,
) -> Figure:
    """Metric against remaining parameters, a line a method.

    Args:
        points: (parameters, mean, deviation) of each method; the deviation is None where there are too few seeds.
        one_class: the score of answering the same class for every row.
    """
    figure = _figure(6.6, 4.6)
    axes = figure.add_subplot()
    names = list(points)
    drawn: list[float] = []
    for name, values in points.items():
        x, mean, deviation = zip(*sorted(values, key=lambda point: point[:2]), strict=True)
        bars = None if None in deviation else deviation
        # methods of one budget stand side by side, six points apart
        aside = ScaledTranslation(max(map(drawn.count, x)) * 6 / 72, 0, figure.dpi_scale_trans)
        drawn += x
        axes.errorbar(x, mean, yerr=bars, label=wrapped(name), capsize=3, markersize=6,
                      transform=axes.transData + aside, **style(name, names))  # fmt: skip
    everything = [x for values in points.values() for x, _, _ in values]
    ends = [(x, y + sign * (d or 0.0)) for values in points.values() for x, y, d in values for sign in (-1, 1)]
    axes.plot(*zip(*ends, strict=True), linestyle="")  # no ink: what is set aside has no say in the limits
    if min(everything) > 0 and max(everything) > 8 * min(everything):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("parameters of the low-rank factors that remain (head not counted)")
    _dress(axes)
    axes.set_ylabel(metric + _chance(axes.axhline, axes.get_ylim, axes.set_ylim, one_class))
    _legend(figure, title, names)
    return figure


def stages(curves_: Mapping[str, Sequence[Mapping[str, Any]]], key: str, metric: str, title: str) -> Figure:
    """SoRA's schedule: threshold against remaining parameters, and those against the metric, a line a seed.

    Args:
        curves_: for each seed its stages, each with `lambda`, `remaining` and `metrics`.
        key: name of the metric there; a score between 0 and 1.
    """
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    for i, (seed, curve) in enumerate(curves_.items()):
        look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "label": f"seed {seed}"}
        remaining = [stage["remaining"] for stage in curve]
        left.plot([stage["lambda"] for stage in curve], remaining, **look)
        right.plot(remaining, [100 * stage["metrics"][key] for stage in curve], **look)
    left.set_xlabel("threshold (sparse_lambda_2 of the stage)")
    left.set_ylabel("remaining parameters")
    left.xaxis.set_major_locator(MaxNLocator(nbins=5))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    left.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_xlabel("remaining parameters (schedule runs from right to left)")
    right.xaxis.set_major_locator(MaxNLocator(nbins=5))
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_ylabel(metric)
    _dress(left)
    _dress(right)
    _legend(figure, f"{title}: sparsifying schedule, a line a seed", [f"seed {seed}" for seed in curves_])
    return figure


def tuning(
    flags: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]],
    chosen: Mapping[str, Mapping[str, str]],
    best: Mapping[str, Sequence[tuple[float, float]]],
    metric: str,
    title: str,
) -> Figure:
    """One panel a tuned flag: a dot a trial, a line through the means, a ring around the chosen value.

    A cross at the bottom is a trial without a score. The last panel has the best score to expect of so many trials, and
    its deviation.

    Args:
        flags: for each flag and method the scores of its trials, by value as text.
        chosen: for each method the chosen values, by flag.
        best: for each method mean and deviation of the best of 1, 2, ... trials.
    """
    names = list(best)
    figure = _figure(1.0 + 4.6 * (len(flags) + 1), 4.4)
    *panels, last = figure.subplots(1, len(flags) + 1, squeeze=False)[0]
    for axes, (flag, methods) in zip(panels, flags.items(), strict=True):
        place = _places(axes, [value for by_value in methods.values() for value in by_value])
        for name, by_value in methods.items():
            look = style(name, names)
            dots, means = [], []
            for value in sorted(by_value, key=place.__getitem__):
                known = [score for score in by_value[value] if score is not None]
                dots += [(place[value], score) for score in known]
                means += [(place[value], float(np.mean(known)))] if known else []
                if len(known) < len(by_value[value]):
                    axes.plot(place[value], 0.02 + 0.03 * names.index(name), "x", color=look["color"], clip_on=False,
                              transform=axes.get_xaxis_transform())  # fmt: skip
                if value == chosen[name].get(flag) and known:
                    axes.plot(place[value], np.mean(known), "o", markersize=13, fillstyle="none", color=look["color"])
            axes.plot(*zip(*dots, strict=True), **{**look, "linestyle": "", "alpha": 0.4})
            axes.plot(*zip(*means, strict=True), **{**look, "marker": ""})
        axes.set_xlabel(shown(flag))
        axes.set_ylabel(metric)
        _dress(axes)
    for name, of_k in best.items():
        look, (mean, deviation) = style(name, names), np.transpose(of_k)
        last.plot(range(1, len(of_k) + 1), mean, label=wrapped(name), markersize=4, **look)
        last.fill_between(range(1, len(of_k) + 1), mean - deviation, mean + deviation, color=look["color"], alpha=0.15,
                          linewidth=0)  # fmt: skip
    last.set_xlabel("number of trials")
    last.set_ylabel(f"{metric}: best to expect")
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(last)
    _legend(figure, title, names)
    return figure


def _places(axes: Any, values: Sequence[str]) -> dict[str, float]:
    """Where each value of a flag stands on the x axis: numbers by their size, others side by side."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        places = {value: float(i) for i, value in enumerate(dict.fromkeys(values))}
        axes.set_xticks(list(places.values()), [wrapped(value, 16) for value in places])
        return places
    if min(numbers.values()) > 0 and max(numbers.values()) >= 4 * min(numbers.values()):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(set(numbers.values())) <= 8:
        ticks = {number: value for value, number in numbers.items()}
        axes.set_xticks(list(ticks), list(map(shown, ticks.values())), rotation=30 if len(ticks) > 4 else 0)
        axes.minorticks_off()
    return numbers


def spectra(values: Mapping[str, tuple[np.ndarray, Sequence[float]]], title: str) -> Figure:
    """Left: singular values of the update, mean over the matrices; right: their effective ranks, a box a method.

    Args:
        values: for each method the mean singular values, largest first, and the effective rank of each matrix.
    """
    names = list(values)
    widest = max(len(line) for name in names for line in wrapped(name).split("\n"))
    figure = _figure(9.4 + 0.085 * widest, max(4.4, 0.5 * len(names)))
    left, right = figure.subplots(1, 2)
    for name, (singular, _) in values.items():
        drawn = np.maximum(singular, 1e-12)
        left.semilogy(range(1, len(drawn) + 1), drawn, label=wrapped(name), markersize=4, **style(name, names))
    seen = np.concatenate([singular for singular, _ in values.values()])
    largest = float(seen.max(initial=0.0)) or 1.0
    smallest = float(seen.min(initial=largest, where=seen > 1e-4 * largest))
    left.set_ylim(0.5 * smallest, 2 * largest)  # what was pruned is 0 and falls out below
    left.set_xlabel("index of the singular value")
    left.set_ylabel("singular value of the update, mean over matrices")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(left)
    boxes = right.boxplot([ranks for _, ranks in values.values()], orientation="horizontal", patch_artist=True)
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set(facecolor=style(name, names)["color"], edgecolor=style(name, names)["color"], linewidth=2, alpha=0.6)
    for line in boxes["medians"]:
        line.set_color("black")
    right.set_yticks(range(1, len(names) + 1), [wrapped(name) for name in names])
    right.invert_yaxis()
    right.set_xlim(0, 1.05 * max([1.0, *(rank for _, ranks in values.values() for rank in ranks)]))
    right.set_xlabel("effective rank of each matrix's update\n(exponential of the entropy)")
    _dress(right)
    _legend(figure, title, names)
    return figure


def _dress(axes: Any) -> None:
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _chance(line: Any, limits: Any, set_limits: Any, score: float | None) -> str:
    """Draw the score of answering one class for every row where it is near the data, and give it as words for the axis.

    Farther away a line would squeeze what is to be compared.
    """
    if score is None:
        return ""
    low, high = limits()
    if not low - 0.5 * (high - low) <= score <= high + 0.5 * (high - low):
        return f"\none class for every row: {score:.1f}"
    line(score, color="#555555", linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
    margin = 0.04 * (high - low)
    set_limits(min(low, score - margin), max(high, score + margin))
    return f"\ndotted: one class for every row, {score:.1f}"


def _title(figure: Figure, title: str) -> None:
    """The title on as many lines as the width of the figure asks for."""
    letters = max(20, int(13 * figure.get_figwidth()))
    lines = [line for part in shown(title).split("\n") for line in textwrap.wrap(part, letters)]
    figure.suptitle("\n".join(lines), fontsize=10)
    figure.set_figheight(min(MOST_INCHES, figure.get_figheight() + 0.17 * (len(lines) - 1)))


def _legend(figure: Figure, title: str, names: Sequence[str]) -> None:
    """The title, and one legend below the panels: never over the data."""
    _title(figure, title)
    seen: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    order = [label for label in map(wrapped, names) if label in seen]
    if not order:
        return
    longest = max(len(line) for label in order for line in label.split("\n"))
    columns = max(1, min(len(order), int(figure.get_figwidth() / (0.7 + 0.075 * longest))))
    lines = max(label.count("\n") + 1 for label in order) * math.ceil(len(order) / columns)
    figure.set_figheight(min(MOST_INCHES, figure.get_figheight() + 0.19 * lines))
    figure.legend([seen[label] for label in order], order, loc="outside lower center", ncols=columns, fontsize=8,
                  frameon=False)  # fmt: skip
