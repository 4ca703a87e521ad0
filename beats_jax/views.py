"""Pictures of what a model says of sounds: features in time, class scores, maps, its codebook.

As in `plots`, every function takes plain numbers and writes one PNG.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from beats_jax.fbank import BANDS, NUM_MELS, PATCH_SIZE
from beats_jax.figures import (
    GREY,
    MARKERS,
    draw_image,
    draw_picture,
    new_figure,
    save_figure,
    styled,
)

MAX_CLASSES = 20  # that a map tells apart; the others are "other"


def plot_frame_features(log_mel: Any, features: Any, path: str | os.PathLike[str]) -> None:
    """Draws a clip's features in time: like colours are like features.

    The features' first three principal components within the clip are red, green and blue.

    Args:
        log_mel: [F, 128] float, normalised or not; frames after the last whole patch are left out.
        features: [T', 8, D] of `Model.frames`, T' = F // 16.
        path: the PNG to write; its folder is made.

    Raises:
        ValueError: the two are not of one clip.
    """
    log_mel, features = np.asarray(log_mel, np.float32), np.asarray(features, np.float64)
    columns = len(features)
    if features.shape[:2] != (len(log_mel) // PATCH_SIZE, BANDS) or columns < 1:
        raise ValueError(
            f"got log_mel {log_mel.shape} and features {features.shape}; wanted [F, {NUM_MELS}] "
            f"and [F // {PATCH_SIZE}, {BANDS}, D]"
        )
    mels = log_mel[: columns * PATCH_SIZE].T
    low, high = np.percentile(mels, (1, 99))
    loud = np.clip((mels - low) / max(high - low, 1e-6), 0, 1)[..., None]
    colours, share = _component_colours(features.reshape(columns * BANDS, -1))
    colours = colours.reshape(columns, BANDS, 3).swapaxes(0, 1)
    tiles = colours.repeat(PATCH_SIZE, 0).repeat(PATCH_SIZE, 1)
    with styled():
        figure, (sound, over, alone) = new_figure(3, 1, (8.0, 6.0), sharex=True)
        draw_image(sound, mels, np.ones(mels.shape, bool), cmap="magma", vmin=low, vmax=high)
        draw_picture(over, (0.15 + 0.85 * loud) * tiles)
        draw_picture(alone, colours)
        sound.set(title="Log-mel spectrogram", ylabel="mel bin")
        over.set(title="Its features (colour) over its loudness (brightness)", ylabel="mel bin")
        title = f"Features: three principal components, {100 * share:.0f} % of the variance"
        alone.set(title=title, ylabel="band", xlabel="time (s)")
        alone.set_yticks(np.arange(0, BANDS, 2) + 0.5, [str(b) for b in range(0, BANDS, 2)])
        for axis in (sound, over):
            axis.set_yticks(range(0, NUM_MELS + 1, 32))
        save_figure(figure, path)


def plot_class_scores(
    spans: Any,
    probs: Any,
    labels: Sequence[str],
    path: str | os.PathLike[str],
    top: int = 8,
) -> None:
    """Draws the class scores of a recording in time, of the classes that are likeliest anywhere.

    Args:
        spans: [W, 2], start and end of each window in seconds, in order (`windows.Scores`).
        probs: [W, C] in 0..1.
        labels: the classes, C.
        path: the PNG to write; its folder is made.
        top: how many classes.
    """
    spans, probs = np.asarray(spans, np.float64), np.asarray(probs)
    if probs.shape != (len(spans), len(labels)) or spans.shape[1:] != (2,):
        raise ValueError(
            f"got spans {spans.shape}, probs {probs.shape} and {len(labels)} labels; wanted "
            "[W, 2], [W, C] and C"
        )
    best = np.argsort(-probs.max(axis=0), kind="stable")[:top]
    best = best[np.argsort(probs[:, best].argmax(axis=0), kind="stable")]  # by when they are
    # A window's colour lies around its middle, as far as the neighbours' middles let it.
    middles = spans.mean(axis=1)
    edges = np.concatenate([spans[:1, 0], (middles[1:] + middles[:-1]) / 2, spans[-1:, 1]])
    with styled():
        figure, (axis,) = new_figure(1, 1, (8.0, 1.2 + 0.28 * len(best)))
        axis.grid(False)
        scores = probs[:, best].T
        image = axis.pcolormesh(edges, np.arange(len(best) + 1), scores, cmap="Blues", vmin=0)
        axis.set_yticks(np.arange(len(best)) + 0.5, [labels[int(i)] for i in best])
        axis.invert_yaxis()
        axis.set(xlabel="time (s)", title=f"Classes in time ({len(spans)} windows)")
        figure.colorbar(image, ax=axis, label="probability", pad=0.01)
        save_figure(figure, path)


def plot_map(
    maps: Mapping[str, Any],
    labels: Sequence[str],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Draws points in the plane, a panel for each projection, a colour and marker for each class.

    Args:
        maps: name of the projection -> [N, 2] (`features.project`).
        labels: [N] classes; over 20 of them, the rarest are drawn grey, as "other".
        path: the PNG to write; its folder is made.
        title: what the points are, in front of the projection's name.
    """
    import matplotlib

    classes = np.asarray(labels)
    if any(np.shape(points) != (len(labels), 2) for points in maps.values()):
        shapes = ", ".join(str(np.shape(points)) for points in maps.values())
        raise ValueError(f"got {shapes} for {len(labels)} labels; wanted [N, 2] each")
    names, counts = np.unique(classes, return_counts=True)
    shown = np.sort(names[np.argsort(-counts, kind="stable")[:MAX_CLASSES]])
    colours = matplotlib.colormaps["tab20"](np.arange(len(shown)))
    with styled():
        figure, axes = new_figure(1, len(maps), (3.9 * len(maps) + 1.6, 3.9))
        for axis, (name, points) in zip(axes, maps.items(), strict=True):
            axis.grid(False)
            points = np.asarray(points, np.float64)
            other = points[~np.isin(classes, shown)]
            if len(other):
                axis.scatter(*other.T, s=9, color=GREY, alpha=0.5, label="other")
            for i, (label, colour) in enumerate(zip(shown, colours, strict=True)):
                look: dict[str, Any] = dict(color=colour, marker=MARKERS[i % len(MARKERS)])
                axis.scatter(*points[classes == label].T, s=16, linewidth=0, label=label, **look)
            axis.set(title=f"{title}: {name}" if title else name, xticks=[], yticks=[])
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=1.4)
        save_figure(figure, path)


def plot_codebook(
    log_mels: Sequence[Any],
    token_ids: Sequence[Any],
    path: str | os.PathLike[str],
    shown: int = 32,
) -> None:
    """Draws what the most used tokens stand for: the mean of the patches that have them.

    Args:
        log_mels: of every clip [F, 128] float, normalised alike.
        token_ids: of every clip int [T', 8], T' = F // 16, -1 = none (`Model.tokenize`).
        path: the PNG to write; its folder is made.
        shown: how many tokens, the most used first.

    Raises:
        ValueError: the two are not of the same clips, or there is no token.
    """
    patches, ids = [], []
    for log_mel, tokens in zip(log_mels, token_ids, strict=True):
        log_mel, tokens = np.asarray(log_mel, np.float32), np.asarray(tokens)
        if tokens.shape != (len(log_mel) // PATCH_SIZE, BANDS):
            raise ValueError(f"tokens {tokens.shape} are not those of a log-mel {log_mel.shape}")
        frames = log_mel[: len(tokens) * PATCH_SIZE]
        tiles = frames.reshape(-1, PATCH_SIZE, BANDS, PATCH_SIZE).swapaxes(1, 2)
        patches.append(tiles[tokens >= 0])  # [n, time, mel]
        ids.append(tokens[tokens >= 0])
    patches, ids = np.concatenate(patches), np.concatenate(ids)
    if not len(ids):
        raise ValueError(f"there is no token in {len(log_mels)} clips")
    kinds, counts = np.unique(ids, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:shown]
    means = [patches[ids == kinds[i]].mean(axis=0).T for i in order]  # mels upwards
    low, high = np.percentile(means, (1, 99))
    columns = 8
    with styled():
        rows = -(-len(means) // columns)
        figure, axes = new_figure(rows, columns, (8.0, 1.2 * rows + 0.6))
        for axis, i, mean in zip(axes, order, means, strict=False):
            axis.imshow(mean, origin="lower", cmap="magma", vmin=low, vmax=high)
            axis.set_title(f"{kinds[i]}: {100 * counts[i] / len(ids):.1f} %", fontsize=8)
        for axis in axes:
            axis.set_axis_off()
        figure.suptitle(
            f"Mean patch (16 mel bins over 0.16 s) of the {len(means)} most used of {len(kinds)} "
            "tokens, and their share",
            fontsize=10,
        )
        save_figure(figure, path)


def _component_colours(features: np.ndarray) -> tuple[np.ndarray, float]:
    """[n, D] -> light colours [n, 3], and the share of the variance that they show."""
    centred = features - features.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    left, sizes = np.pad(left, ((0, 0), (0, 3))), np.pad(sizes, (0, 3))  # there may be under 3
    scores = left[:, :3] * sizes[:3]
    low, high = np.percentile(scores, (2, 98), axis=0)
    # Each over its own range, but a component that hardly varies must not look as if it did.
    spread = np.maximum(high - low, max(0.1 * (high - low)[0], 1e-12))
    colours = np.clip(0.5 + (scores - (low + high) / 2) / spread, 0, 1)
    return 0.2 + 0.8 * colours, float(np.sum(sizes[:3] ** 2) / max(np.sum(sizes**2), 1e-12))
