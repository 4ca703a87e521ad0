"""Pictures of scores: who is taken for whom, which classes are found, which layer knows them.

Every function takes plain numbers and writes one PNG; no figure relies on colour alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from beats_jax.figures import BLUE, GREEN, GREY, MARKERS, ORANGE, new_figure, save_figure, styled


def plot_confusion(
    matrix: Any, names: Sequence[str], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draws a confusion matrix: the share of each class's clips that went to each class.

    Args:
        matrix: int [C, C], row = the clip's class, column = the predicted one.
        names: the classes, C.
        path: the PNG to write; its folder is made.
        title: what was scored, e.g. "ensemble".
    """
    matrix = np.asarray(matrix, np.int64)
    size = len(names)
    if matrix.shape != (size, size):
        raise ValueError(f"the matrix is {matrix.shape} for {size} classes; wanted [C, C]")
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    inches = min(max(3.2 + 0.26 * size, 4.5), 12.0)
    with styled():
        figure, (axis,) = new_figure(1, 1, (inches + 0.8, inches))
        axis.grid(False)
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        small: dict[str, Any] = {"fontsize": 8 if size <= 20 else 6}
        axis.set_xticks(range(size), names, rotation=90, **small)
        axis.set_yticks(range(size), names, **small)
        if size <= 20:  # else there is no room for numbers
            for row, column in np.argwhere(matrix):
                colour = "white" if share[row, column] > 0.5 else "black"
                middle: dict[str, Any] = dict(ha="center", va="center", **small)
                axis.text(column, row, str(matrix[row, column]), color=colour, **middle)
        right, total = int(np.trace(matrix)), int(matrix.sum())
        axis.set(xlabel="predicted class", ylabel="class")
        axis.set_title(f"{title or 'Confusion'}: {right} of {total} right", loc="left")
        figure.colorbar(image, ax=axis, label="share of the class's clips", shrink=0.7)
        save_figure(figure, path)


def plot_class_ap(
    average_precisions: Any,
    counts: Any,
    names: Sequence[str],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Draws the average precision of every class, of over 60 only the 30 best and 30 worst.

    Args:
        average_precisions: [C] in 0..1, nan where a class has no positive: left out.
        counts: int [C], positives of each class, written beside its name.
        names: the classes, C.
        path: the PNG to write; its folder is made.
        title: what was scored, e.g. "ensemble".

    Raises:
        ValueError: no class has a positive.
    """
    values = np.asarray(average_precisions, np.float64)
    order = np.argsort(values, kind="stable")[: int(np.isfinite(values).sum())]  # nan sorts last
    if not len(order):
        raise ValueError(f"none of {len(values)} classes has an average precision to draw")
    mean, left_out = values[order].mean(), len(values) - len(order)
    shown = order if len(order) <= 60 else np.concatenate([order[:30], order[-30:]])
    places = np.arange(len(shown)) + (np.arange(len(shown)) >= 30) * (len(shown) < len(order))
    with styled():
        figure, (axis,) = new_figure(1, 1, (7.0, 1.4 + 0.17 * len(shown)))
        axis.barh(places, values[shown], color=BLUE, height=0.75)
        axis.set_yticks(places, [f"{names[i]} ({counts[i]})" for i in shown], fontsize=7)
        axis.grid(False, axis="y")
        axis.axvline(mean, color=ORANGE, linestyle="--", label=f"mean over {len(order)} classes")
        if len(shown) < len(order):
            note = f"{len(order) - len(shown)} classes in between"
            axis.text(0.8, 30, note, ha="center", va="center", color=GREY, fontsize=7)
        axis.set(xlim=(0, 1), ylim=(-0.7, places[-1] + 0.7))
        axis.set(xlabel="average precision")
        name = f"{title or 'Average precision'}: mAP {mean:.3f}"
        axis.set_title(name + (f" (classes without a clip: {left_out})" if left_out else ""))
        axis.legend(loc="lower right")
        save_figure(figure, path)


def plot_layers(
    means: Mapping[str, Any],
    stds: Mapping[str, Any],
    baseline: Mapping[str, float],
    path: str | os.PathLike[str],
) -> None:
    """Draws how good each layer's features are, by several probes.

    Args:
        means: probe -> [N + 1] accuracies in 0..1, of layer 0 to N.
        stds: probe -> [N + 1], their standard deviations over folds, drawn as bars.
        baseline: probe -> accuracy of the log-mel baseline, drawn dashed.
        path: the PNG to write; its folder is made.
    """
    with styled():
        figure, (axis,) = new_figure(1, 1, (6.4, 3.6))
        for (name, values), colour, marker in zip(
            means.items(), (BLUE, ORANGE, GREEN), MARKERS, strict=False
        ):
            values, spread = 100 * np.asarray(values), 100 * np.asarray(stds[name])
            layers = np.arange(len(values))
            line: dict[str, Any] = dict(color=colour, marker=marker, label=name)
            axis.errorbar(layers, values, spread, capsize=2, elinewidth=0.8, **line)
            label = f"{name}, log-mel"
            level = 100 * baseline[name]
            axis.axhline(level, color=colour, linestyle="--", linewidth=0.8, label=label)
        axis.set(title="Probes of every layer (mean and standard deviation over folds)")
        axis.set(xlabel="layer (0 = input of the first block)", ylabel="accuracy (%)")
        axis.set_xticks(layers)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save_figure(figure, path)
