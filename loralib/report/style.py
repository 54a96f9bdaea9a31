"""How every figure looks: colours, names, titles and legends."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct for colour-blind readers too; a method has one colour in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vP*X"
# Of variants that are not among METHODS: colours of Tol's muted palette and markers that no method has.
OWN_PALETTE = ("#882255", "#999933", "#332288", "#117733", "#AA4499", "#44AA99", "#7F7F7F")
OWN_MARKERS = "<>hpdH8"
METHODS = ("lora", "adalora", "sora", "rm-lora-v1", "rm-lora-v2", "lora-orth", "full", "svd-lora")

MOST_INCHES = 60.0  # a side of a figure; a longer one would not fit into an image file
MOST_LETTERS = 34  # of a name on one line
FEWEST_SEEDS = 3  # of two, a deviation says next to nothing: no bar and no band
NONZERO = " (nonzero)"  # ends the name of a thin dotted line beside the method's own one


def shown(text: str) -> str:
    """A name as matplotlib prints it: no formula, and no leading underscore, which a legend leaves out."""
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def wrapped(text: str, letters: int = MOST_LETTERS) -> str:
    """A name on as many lines as it needs."""
    return "\n".join(textwrap.wrap(shown(text), letters, subsequent_indent="  ")) or " "


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, whose panels keep some room between them."""
    figure = Figure(figsize=(min(width, MOST_INCHES), min(height, MOST_INCHES)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, wspace=0.03)  # type: ignore[union-attr, call-arg]
    return figure


def style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of a line: by its method, else by its place among `names`.

    Where all names are grid points of one method, the colour runs from dark to light in their order.
    """
    if name.endswith(NONZERO):
        return style(name.removesuffix(NONZERO), names) | {"linestyle": ":", "marker": "", "linewidth": 1.2}
    names = [other for other in names if not other.endswith(NONZERO)]
    method = name.partition(" ")[0]
    same = [other for other in names if other.partition(" ")[0] == method]
    others = sorted({other.partition(" ")[0] for other in names} - set(METHODS))
    known = method in METHODS
    palette, markers = (PALETTE, MARKERS) if known else (OWN_PALETTE, OWN_MARKERS)
    i, place = METHODS.index(method) if known else others.index(method), same.index(name)
    grid = len(same) == len(names) > 1
    color: Any = colormaps["viridis"](0.85 * place / (len(same) - 1)) if grid else palette[i % len(palette)]
    return {"color": color, "marker": markers[(i + place) % len(markers)],
            "linestyle": ("-", "--", ":", "-.")[place % 4]}  # fmt: skip


def dress(axes: Any) -> None:
    """A light grid, and no frame above and on the right."""
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def begin_at_zero(axes: Any) -> None:
    """Let the y axis begin at 0, or below where the data do, and end above the data."""
    low, high = axes.dataLim.intervaly
    axes.set_ylim(min(0.0, low), high + 0.07 * (high - min(0.0, low)))


def draw_constant(line: Any, limits: Any, set_limits: Any, score: float | None) -> str:
    """Draw the score of answering one class for every row where it is near the data, and give it as words for the axis.

    If it is far away, only the axis label names it, because a line would compress the data.
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


def put_title(figure: Figure, title: str) -> None:
    """The title on as many lines as the width of the figure asks for."""
    letters = max(20, int(13 * figure.get_figwidth()))
    parts = shown(title).replace("n = ", "n\xa0=\xa0").split("\n")  # a number of seeds stays on one line
    lines = [line for part in parts for line in textwrap.wrap(part, letters, break_on_hyphens=False)]
    figure.suptitle("\n".join(lines).replace("\xa0", " "), fontsize=10)
    figure.set_figheight(min(MOST_INCHES, figure.get_figheight() + 0.17 * (len(lines) - 1)))


def put_legend(figure: Figure, title: str, names: Sequence[str]) -> None:
    """The title, and one legend below the panels: never over the data."""
    put_title(figure, title)
    seen: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    order = [label for label in map(wrapped, names) if label in seen]
    if not order:
        return
    longest = max(len(line) for label in order for line in label.split("\n"))
    columns = max(1, min(len(order), int(figure.get_figwidth() / (0.85 + 0.075 * longest))))
    lines = max(label.count("\n") + 1 for label in order) * math.ceil(len(order) / columns)
    figure.set_figheight(min(MOST_INCHES, figure.get_figheight() + 0.19 * lines))
    figure.legend([seen[label] for label in order], order, loc="outside lower center", ncols=columns, fontsize=8,
                  frameon=False, handlelength=3.5)  # fmt: skip
