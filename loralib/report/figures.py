"""Figures from plain numbers: nothing here reads a file or knows a model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from loralib.report.style import (
    FEWEST_SEEDS,
    MARKERS,
    NONZERO,
    PALETTE,
    begin_at_zero,
    draw_constant,
    dress,
    new_figure,
    put_legend,
    put_title,
    shown,
    style,
    wrapped,
)

Band = tuple[Sequence[float], Sequence[float], Sequence[float]]  # x, mean and standard deviation of y
MOST_CELLS = 60  # rows or columns of a heatmap that still have names and numbers
MOST_BANDS = 3  # of the last panel of a tuning; more of them hide each other


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


def rank_heatmap(
    ranks: Mapping[str, float], title: str, most: float, lines: Mapping[str, Band] | None = None, name: str = ""
) -> Figure:
    """Layer x module: what is left of each matrix's rank, 0 to `most`, with the number in each cell.

    Args:
        lines: quantities over the optimizer steps, each in a panel on the right.
        name: the method, for their colour.
    """
    kinds, layers, values = rank_grid(ranks)
    lines = lines or {}
    width, height = 3.2 + 0.52 * min(len(layers), MOST_CELLS), 1.7 + 0.42 * min(len(kinds), MOST_CELLS)
    figure = new_figure(width + (4.0 if lines else 0.0), max(height, 1.9 * len(lines)))
    grid = figure.add_gridspec(max(1, len(lines)), 1 + bool(lines), width_ratios=[width, 4.0][: 1 + bool(lines)])
    axes = figure.add_subplot(grid[:, 0])
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    if len(layers) <= MOST_CELLS:
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    if len(kinds) <= MOST_CELLS:
        axes.set_yticks(range(len(kinds)), [shown(kind) for kind in kinds])
    axes.set_xlabel("layer")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and max(len(kinds), len(layers)) <= MOST_CELLS:
            text = f"{value:.0f}" if value == round(value) else f"{value:.1f}"
            ink = "white" if value < 0.6 * most else "black"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=axes, label="rank left", ticks=MaxNLocator(integer=True, nbins=5))
    for place, (label, (x, mean, deviation)) in enumerate(lines.items()):
        panel, look = figure.add_subplot(grid[place, 1]), style(name, [name])
        panel.plot(x, mean, linewidth=2, **look)
        low, high = np.subtract(mean, deviation), np.add(mean, deviation)
        panel.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        begin_at_zero(panel)
        panel.set_ylabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.set_xlabel("optimizer step" if place == len(lines) - 1 else "")
        dress(panel)
    put_title(figure, title)
    return figure


def as_image(figure: Figure) -> np.ndarray:
    """The figure as pixels, (height, width, 3) uint8, for TensorBoard."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curves(
    panels: Mapping[str, Mapping[str, Band]],
    x_label: str,
    title: str,
    one_class: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> Figure:
    """One panel a quantity, one line with a band of a standard deviation a method.

    Args:
        one_class: for each panel that has one, the score of answering the same class for every row.
        from_zero: let the quantities begin at 0, as counts should, so that a small change looks small.
    """
    figure = new_figure(1.0 + 4.6 * len(panels), 4.4)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, (x, mean, deviation) in lines.items():
            look = style(name, names)
            low, high = np.subtract(mean, deviation), np.add(mean, deviation)
            width = 2.6 - 1.4 * names.index(name) / len(names)  # what lies below another line still shows at its sides
            entry = None if name.endswith(NONZERO) else wrapped(name)
            axes.plot(x, mean, label=entry, **{"markersize": 2.5 * width, "linewidth": width} | look)
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        dress(axes)
        if from_zero:
            begin_at_zero(axes)
        axes.set_ylabel(label + draw_constant(axes.axhline, axes.get_ylim, axes.set_ylim, (one_class or {}).get(label)))
    put_legend(figure, title, names)
    return figure


def comparison(
    tasks: Mapping[str, tuple[str, Mapping[str, Sequence[float]]]],
    title: str,
    one_class: Mapping[str, float] | None = None,
) -> Figure:
    """One panel per task, one place per method: one dot per seed, their mean, and from three seeds on the deviation.

    Args:
        tasks: for each task the name of its metric, and the scores of each method.
        one_class: for each task that has one, the score of answering the same class for every row.
    """
    names = list(dict.fromkeys(name for _, methods in tasks.values() for name in methods))
    counts = sorted({len(values) for _, methods in tasks.values() for values in methods.values()})
    labels = [wrapped(name) for name in names]
    inches = np.array([0.16 + 0.18 * (1 + label.count("\n")) for label in labels])  # of each row
    places = dict(zip(names, np.cumsum(inches) - inches / 2, strict=True))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    widest = max(len(line) for label in labels for line in label.split("\n"))
    figure = new_figure(max(5.0, 3.2 * columns + 0.085 * widest), 0.6 + rows * (1.0 + inches.sum()))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, (task, (metric, methods)) in zip(panels.flat, tasks.items(), strict=False):
        for name, y in places.items():
            values, look = methods.get(name, ()), style(name, names)
            if len(counts) > 1 or not values:
                axes.text(1.01, y, f"n = {len(values)}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
            if not values:
                continue
            axes.plot(values, [y] * len(values), linestyle="", marker=look["marker"], color=look["color"], alpha=0.4)
            deviation = np.std(values, ddof=1) if len(values) >= FEWEST_SEEDS else None
            axes.errorbar(np.mean(values), y, xerr=deviation, fmt="|", color=look["color"], markersize=14, capsize=3)
        axes.set_yticks(list(places.values()), labels)
        axes.set_ylim(inches.sum(), 0)
        axes.set_title(wrapped(task), fontsize=10)
        dress(axes)
        axes.set_xlabel(metric + draw_constant(axes.axvline, axes.get_xlim, axes.set_xlim, (one_class or {}).get(task)))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    marks = "a dot is a seed" + (", a stroke their mean" if counts[-1] > 1 else "")
    if counts[-1] >= FEWEST_SEEDS:
        few = " of three seeds and more" if counts[0] < FEWEST_SEEDS else ""
        marks += f", a bar one standard deviation{few}"
    put_title(figure, f"{title}; {marks}; " + (f"n = {counts[0]}" if len(counts) == 1 else "n: the number of seeds"))
    return figure


def frontier(
    points: Mapping[str, Sequence[tuple[float, float, float | None]]],
    metric: str,
    title: str,
    one_class: float | None = None,
) -> Figure:
    """Metric against remaining parameters, one line per method whose points all differ in them.

    Args:
        points: (parameters, mean, deviation) of each method; the deviation is None where there are too few seeds.
        one_class: the score of answering the same class for every row.
    """
    figure = new_figure(6.6, 4.6)
    axes = figure.add_subplot()
    names = list(points)
    budgets = {name: {x for x, _, _ in values} for name, values in points.items()}
    most = 1
    for name, values in points.items():
        x, mean, deviation = zip(*sorted(values, key=lambda point: point[:2]), strict=True)
        bars = None if None in deviation else deviation
        look = style(name, names) | ({} if 1 < len(x) == len(budgets[name]) else {"linestyle": ""})
        # the points of methods with one budget are shifted by six points each, so that they do not overlap
        beside = [other for other in names if budgets[other] & budgets[name]]
        most = max(most, len(beside))
        aside = ScaledTranslation((beside.index(name) - (len(beside) - 1) / 2) * 6 / 72, 0, figure.dpi_scale_trans)
        axes.errorbar(x, mean, yerr=bars, label=wrapped(name), capsize=3, markersize=6,
                      transform=axes.transData + aside, **look)  # fmt: skip
    everything = [x for values in points.values() for x, _, _ in values]
    ends = [(x, y + sign * (d or 0.0)) for values in points.values() for x, y, d in values for sign in (-1, 1)]
    axes.plot(*zip(*ends, strict=True), linestyle="")  # no ink: shifted points must not change the limits
    axes.margins(x=0.05 + most * 3 / 72 / 5)  # but has its room
    if min(everything) > 0 and max(everything) > 8 * min(everything):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("parameters of the low-rank factors that remain (head not counted)")
    dress(axes)
    axes.set_ylabel(metric + draw_constant(axes.axhline, axes.get_ylim, axes.set_ylim, one_class))
    put_legend(figure, title, names)
    return figure


def stages(by_seed: Mapping[str, Sequence[Mapping[str, Any]]], key: str, metric: str, title: str) -> Figure:
    """SoRA's schedule: threshold against remaining parameters, and those against the metric, one line per seed.

    Args:
        by_seed: for each seed its stages, each with `lambda`, `remaining` and `metrics`.
        key: name of the metric there; a score between 0 and 1.
    """
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    for i, (seed, curve) in enumerate(by_seed.items()):
        look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "label": f"seed {seed}"}
        remaining = [stage["remaining"] for stage in curve]
        left.plot([stage["lambda"] for stage in curve], remaining, **look)
        right.plot(remaining, [100 * stage["metrics"][key] for stage in curve], **look)
    left.set_xlabel("threshold (sparse_lambda_2 of the stage)")
    left.set_ylabel("parameters of the factors that remain")
    left.xaxis.set_major_locator(MaxNLocator(nbins=5))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    left.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_xlabel("parameters of the factors that remain\n(the schedule runs from right to left)")
    right.xaxis.set_major_locator(MaxNLocator(nbins=5))
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_ylabel(metric)
    dress(left)
    dress(right)
    put_legend(
        figure,
        f"{title}: sparsifying schedule, a point at the end of each stage, one line per seed",
        [f"seed {seed}" for seed in by_seed],
    )
    return figure


def tuning(
    flags: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]],
    chosen: Mapping[str, Mapping[str, str]],
    best: Mapping[str, Sequence[tuple[float, float]]],
    metric: str,
    title: str,
) -> Figure:
    """One panel per tuned flag: one dot per trial, a line through the means, a ring around the chosen value.

    A cross at the bottom is a trial without a score. The last panel has the best score to expect of so many trials,
    with its deviation.

    Args:
        flags: for each flag and method the scores of its trials, by value as text.
        chosen: for each method the chosen values, by flag.
        best: for each method mean and deviation of the best of 1, 2, ... trials.
    """
    names = list(best)
    figure = new_figure(1.0 + 4.6 * (len(flags) + 1), 4.4)
    *panels, last = figure.subplots(1, len(flags) + 1, squeeze=False)[0]
    for axes, (flag, methods) in zip(panels, flags.items(), strict=True):
        place = _places(axes, [value for by_value in methods.values() for value in by_value])
        lost: list[tuple[str, float]] = []
        for name, by_value in methods.items():
            look = style(name, names)
            dots, means = [], []
            for value in sorted(by_value, key=place.__getitem__):
                known = [score for score in by_value[value] if score is not None]
                dots += [(place[value], score) for score in known]
                means += [(place[value], float(np.mean(known)))] if known else []
                if len(known) < len(by_value[value]):
                    lost.append((name, place[value]))
                if value == chosen[name].get(flag) and known:
                    axes.plot(place[value], np.mean(known), "o", markersize=13, fillstyle="none", color=look["color"])
            axes.plot(*zip(*dots, strict=True), **{**look, "linestyle": "", "alpha": 0.4})
            axes.plot(*zip(*means, strict=True), **{**look, "marker": ""})
        if lost:
            low, high = axes.get_ylim()
            axes.plot([x for _, x in lost], [0.5 * (low + high)] * len(lost), linestyle="")  # no ink: room for them
            axes.set_ylim(low - 0.1 * (high - low), high)
        for i, (name, x) in enumerate(lost):  # side by side, below the dots
            aside = ScaledTranslation((sum(x == other for _, other in lost[:i])) * -7 / 72, 0, figure.dpi_scale_trans)
            axes.plot(x, 0.04, "x", color=style(name, names)["color"], clip_on=False, markeredgewidth=2,
                      transform=axes.get_xaxis_transform() + aside)  # fmt: skip
        axes.set_xlabel(shown(flag))
        axes.set_ylabel(f"{metric}: trials")
        dress(axes)
    few = len(best) <= MOST_BANDS  # bands of more methods hide each other: bars side by side do not
    for i, (name, of_k) in enumerate(best.items()):
        look, (mean, deviation) = style(name, names), np.transpose(of_k)
        drawn = np.arange(1, len(of_k) + 1) + (0 if few else 0.035 * (i - (len(best) - 1) / 2))
        last.plot(drawn, mean, label=wrapped(name), markersize=4, **look)
        if few:
            last.fill_between(drawn, mean - deviation, mean + deviation, color=look["color"], alpha=0.15, linewidth=0)
        else:
            last.errorbar(drawn, mean, deviation, fmt="none", ecolor=look["color"], elinewidth=1, capsize=2, alpha=0.7)
    last.set_xlabel(f"number of trials ({'band' if few else 'bar'}: one standard deviation)")
    last.set_ylabel(f"{metric}: best to expect")
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(last)
    put_legend(figure, title, names)
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
    figure = new_figure(9.4 + 0.085 * widest, max(4.4, 0.5 * len(names)))
    left, right = figure.subplots(1, 2)
    for name, (singular, _) in values.items():
        drawn = np.where(singular > 1e-7 * singular.max(initial=0.0), singular, np.nan)  # what was pruned is 0
        left.semilogy(range(1, len(drawn) + 1), drawn, label=wrapped(name), markersize=4, **style(name, names))
    seen = np.concatenate([singular for singular, _ in values.values()])
    largest = float(seen.max(initial=0.0)) or 1.0
    smallest = float(seen.min(initial=largest, where=seen > 1e-4 * largest))
    left.set_ylim(0.5 * smallest, 2 * largest)
    left.set_xlim(left=0.5)
    left.set_xlabel("index of the singular value")
    left.set_ylabel("singular value of the update, mean over matrices")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(left)
    boxes = right.boxplot(
        [ranks for _, ranks in values.values()], orientation="horizontal", patch_artist=True, whis=(0, 100)
    )
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set(facecolor=style(name, names)["color"], edgecolor=style(name, names)["color"], linewidth=2, alpha=0.6)
    for line in boxes["medians"]:
        line.set_color("black")
    right.set_yticks(range(1, len(names) + 1), [wrapped(name) for name in names])
    right.invert_yaxis()
    right.set_xlim(0, 1.05 * max([1.0, *(rank for _, ranks in values.values() for rank in ranks)]))
    right.set_xlabel("effective rank of each matrix's update\nbox: quartiles and median, whiskers: lowest and highest")
    dress(right)
    put_legend(figure, title, names)
    return figure
