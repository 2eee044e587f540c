"""Two classifiers side by side, and what their words contribute, drawn by matplotlib."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from mechinterp.core.display import term, visible
from mechinterp.core.result import Result
from mechinterp.report.figures import PALETTE, drawable

SHOWN = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "mean_confidence", "calibration_error")
WORDS = 16
CELLS = 8
"""Labels of a confusion matrix that still has numbers in its cells."""


def metrics_figure(scores: Mapping[str, Result], title: str) -> Figure:
    """Metrics with their intervals, side by side, and the confusion matrix of each result of `classify`."""
    names = list(scores)
    figure, axes = _figure(4.2 + 3.1 * len(names), 3.9, [1.35, *[1.0] * len(names)])
    places = np.arange(len(SHOWN))
    each = 0.8 / len(names)
    for k, name in enumerate(names):
        data: Any = scores[name].data.sel(metric=list(SHOWN))
        value, low, high = (data[column].values for column in ("value", "ci_low", "ci_high"))
        at = places + (k - (len(names) - 1) / 2) * each
        axes[0].barh(at, value, each * 0.92, color=PALETTE[k], label=_spaced(name))
        axes[0].hlines(at, low, high, color="#333333", linewidth=1)
    axes[0].set_yticks(places, [_spaced(name) for name in SHOWN])
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1)
    axes[0].grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes[0].set_axisbelow(True)
    axes[0].set_title("whiskers: 95% bootstrap interval", loc="left", fontsize=8, color="#666666")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(names), frameon=False, fontsize=8)
    for one, name in zip(axes[1:], names, strict=True):
        _confusion(one, scores[name], _spaced(name))
    return _finished(figure, title)


def summary_figure(result: Result, title: str) -> Figure:
    """The words that contribute most in a `TokenAttribution`: a dot for each time one occurs, and their mean size."""
    found = occurrences(result)
    words = sorted(found, key=lambda word: -float(np.mean(np.abs(found[word]))))[:WORDS]
    figure, (dots, bars) = _figure(8.6, 1.5 + 0.27 * len(words), [1.7, 1.0], sharey=True)
    for i, word in enumerate(words):
        values = np.asarray(found[word])
        spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1)
        colors = [PALETTE[0] if value > 0 else PALETTE[1] for value in values]
        dots.scatter(values, i + spread, s=14, c=colors, linewidths=0)
    sizes = [float(np.mean(np.abs(found[word]))) for word in words]
    bars.barh(range(len(words)), sizes, color="#9a9a9a", height=0.7)
    dots.set_yticks(range(len(words)), [drawable(visible(word, 24)) for word in words])
    dots.invert_yaxis()
    dots.axvline(0, color="#888888", linewidth=0.8)
    unit = str(result.data.attrs.get("unit", "attribution"))
    dots.set_xlabel(unit, fontsize=8)
    bars.set_xlabel("mean |attribution|", fontsize=8)
    for axes in (dots, bars):
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
    n = int(result.data.sizes["example"])
    dots.set_title(f"a dot for each occurrence in {n} texts", loc="left", fontsize=8, color="#666666")
    return _finished(figure, title)


def occurrences(result: Result) -> dict[str, list[float]]:
    """Word, in lower case and without punctuation → what it contributes each time it occurs."""
    out: dict[str, list[float]] = defaultdict(list)
    words = result.data["word"].transpose("example", "word_number").values
    values = result.data["word_attribution"].transpose("example", "word_number").values
    for word, value in zip(words.ravel(), values.ravel(), strict=True):
        if np.isfinite(value):
            out[term(str(word))].append(float(value))
    return dict(out)


def _confusion(axes: Axes, result: Result, name: str) -> None:
    data: Any = result.data["confusion"].transpose("gold_label", "label")
    counts, labels = data.values, [drawable(visible(str(label), 16)) for label in data["label"].values]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if len(labels) <= CELLS:
        for i, j in np.ndindex(*counts.shape):
            axes.text(
                j, i, str(counts[i, j]), ha="center", va="center", fontsize=9, color="w" if share[i, j] > 0.5 else "k"
            )  # fmt: skip
    axes.set_xticks(
        range(len(labels)), labels, rotation=45 * (len(labels) > 3), ha="right" if len(labels) > 3 else "center"
    )
    axes.set_yticks(range(len(labels)), labels, rotation=90 * (len(labels) <= 3), va="center")
    axes.set_xlabel("prediction", fontsize=8)
    axes.set_ylabel("right class", fontsize=8)
    axes.set_title(name, loc="left", fontsize=9)


def _figure(width: float, height: float, ratios: Sequence[float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, sharey=sharey, squeeze=False)[0]
    return figure, list(axes)


def _finished(figure: Figure, title: str) -> Figure:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    for axes in figure.axes:
        axes.tick_params(labelsize=8, length=2.5, color="#888888")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    texts: list[Any] = figure.findobj(Text)
    for text in texts:
        text.set_parse_math(False)
        text.set_text(drawable(text.get_text()))
    return figure


def _spaced(name: str) -> str:
    return name.replace("_", " ")
