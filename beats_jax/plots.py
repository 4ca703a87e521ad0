"""Pictures of a run: its curves, its use of the codebook, one clip in its eyes, tokens under noise.

Every function takes plain numbers and writes one PNG; no figure relies on colour alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from beats_jax.fbank import BANDS, NUM_MELS, PATCH_SIZE
from beats_jax.figures import (
    BLUE,
    COLUMN_SECONDS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    draw_background,
    draw_image,
    draw_picture,
    new_figure,
    save_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MASKED, VISIBLE = "#B8B8B8", "#ECECEC"  # backgrounds where nothing is drawn
SMOOTHING = 50  # a curve of over 100 points is drawn as the mean over 1/50 of them, on top

# Title, y label, then (metric, label, colour, line style) of each line; `val_METRIC` is drawn as
# points of the same colour. A metric that a run did not log is left out, and a panel without any.
PANELS = (
    (
        "Loss",
        "cross-entropy (nats)",
        ("loss", "model", BLUE, "-"),
        ("unigram_loss", "per-band unigram", GREY, "--"),
    ),
    (
        "Masked accuracy",
        "share of masked tokens",
        ("masked_accuracy", "model", BLUE, "-"),
        ("unigram_accuracy", "per-band unigram", GREY, "--"),
    ),
    (
        "Code perplexity",
        "effective codes",
        ("code_perplexity", "target", GREY, "--"),
        ("predicted_code_perplexity", "predicted", BLUE, "-"),
    ),
    (
        "Codes used",
        "different codes",
        ("codes_used", "target", GREY, "--"),
        ("predicted_codes_used", "predicted", BLUE, "-"),
    ),
    ("Feature spread", "std over clips", ("feature_std", "pooled features", GREEN, "-")),
    ("Accuracy", "share of clips", ("accuracy", "model", BLUE, "-")),
    ("mAP", "mean average precision", ("mAP", "model", BLUE, "-")),
    ("Learning rate", "learning rate", ("lr", "learning rate", ORANGE, "-")),
)
# Of a tokenizer's distillation: a run that logs `teacher_cosine`.
TOKENIZER_PANELS = (
    ("Loss", "1 − cosine + commitment", ("loss", "model", BLUE, "-")),
    (
        "Cosine to the teacher",
        "mean over tokens",
        ("teacher_cosine", "estimator", BLUE, "-"),
        ("constant_cosine", "best constant", GREY, "--"),
    ),
    ("Commitment", "squared distance to the code", ("commitment", "vectors", GREEN, "-")),
    (
        "Use of the codebook",
        "codes",
        ("codes_used", "in use in a batch", BLUE, "-"),
        ("code_perplexity", "perplexity", ORANGE, "--"),
        ("dead_codes", "dead", GREY, ":"),
    ),
    ("Learning rate", "learning rate", ("lr", "learning rate", ORANGE, "-")),
)


def plot_curves(
    metrics: Sequence[Mapping[str, float]],
    path: str | os.PathLike[str],
    reference: Sequence[Mapping[str, float]] = (),
) -> None:
    """Draws the curves of a pre-training or tokenizer run against the step.

    Args:
        metrics: the lines of `metrics.jsonl` (see `writers.read_metrics`): dicts with `step`.
        path: the PNG to write; its folder is made.
        reference: the same of another run, drawn dotted below: its solid lines.

    Raises:
        ValueError: no line holds any metric that can be drawn.
    """
    panels = [
        p
        for p in (TOKENIZER_PANELS if any("teacher_cosine" in x for x in metrics) else PANELS)
        if any(
            _points(metrics, prefix + line[0])[0].size for line in p[2:] for prefix in ("", "val_")
        )
    ]
    if not panels:
        raise ValueError(f"{len(metrics)} lines of metrics hold nothing to draw for {path}")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with styled():
        figure, axes = new_figure(rows, columns, (3.7 * columns, 2.7 * rows))
        for axis, (title, unit, *lines) in zip(axes, panels, strict=False):
            for name, label, colour, style in lines:
                steps, values = _points(reference, name)
                if style == "-" and steps.size and name != "lr":
                    axis.plot(steps, values, ":", color="black", label="reference", linewidth=1)
                _draw_line(axis, metrics, name, label, colour, style)
            axis.set(title=title, xlabel="step", ylabel=unit, xlim=(0, None))
            if title != "Loss":  # all others have a zero that means something
                axis.set_ylim(0, None)
            if len(axis.get_legend_handles_labels()[0]) > 1:
                axis.legend()
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if any(name.startswith("val_") for line in metrics for name in line):
            axes[0].set_title("points: held-out clips", loc="right", fontsize=8, color=GREY)
        save_figure(figure, path)


def plot_code_usage(counts: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws how evenly codes are used: the share of every code, most used first.

    Args:
        counts: label -> [K] counts, e.g. {"target": ..., "predicted": ...} or one entry a band.
        path: the PNG to write; its folder is made.
    """
    import matplotlib

    with styled():
        figure, (axis,) = new_figure(1, 1, (6.4, 3.4))
        # From dark to light, so that bands read as an order.
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(counts)))
        for (label, values), colour in zip(counts.items(), shades, strict=True):
            share = np.sort(np.asarray(values, np.float64))[::-1] / max(np.sum(values), 1)
            share = share[share > 0]
            perplexity = np.exp(-(share * np.log(share)).sum())
            label = f"{label} (perplexity {perplexity:.0f})"
            axis.plot(np.arange(1, len(share) + 1), share, color=colour, label=label)
        num_codes = max(len(values) for values in counts.values())
        axis.axhline(1 / num_codes, color=GREY, linestyle="--", label=f"uniform: 1/{num_codes}")
        axis.set(title="Code usage", xlabel="code, most used first", ylabel="share of tokens")
        axis.set(xscale="log", yscale="log")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save_figure(figure, path)


def plot_example(
    log_mel: Any,
    mask: Any,
    target_ids: Any,
    predicted_ids: Any,
    padding_mask: Any,
    path: str | os.PathLike[str],
) -> None:
    """Draws one clip as the model sees it: log-mel, what is masked, target and predicted tokens.

    Args:
        log_mel: [F, 128] float, normalised or not; frames after the last whole patch are left out.
        mask: [L] bool, True = masked and predicted; token p = 8 t + f is column t, band f.
        target_ids: [L] int, the acoustic tokens.
        predicted_ids: [L] int, read where `mask` is True.
        padding_mask: [L] bool, True = padding: left white.
        path: the PNG to write; its folder is made.

    Raises:
        ValueError: the arrays do not describe one clip.
    """
    log_mel, hidden, target, predicted, padding = _one_clip(
        log_mel, mask, target_ids, predicted_ids, padding_mask
    )
    padding = padding.astype(bool)
    with styled():
        figure = _draw_example(log_mel, hidden.astype(bool) & ~padding, target, predicted, padding)
        save_figure(figure, path)


def plot_token_map(
    log_mel: Any, token_ids: Any, padding_mask: Any, path: str | os.PathLike[str]
) -> None:
    """Draws one clip's tokens over its log-mel: equal ids have equal colours, and only they.

    Args:
        log_mel: [F, 128] float, normalised or not; frames after the last whole patch are left out.
        token_ids: [L] int; token p = 8 t + f is column t, band f.
        padding_mask: [L] bool, True = padding: left white.
        path: the PNG to write; its folder is made.

    Raises:
        ValueError: the arrays do not describe one clip.
    """
    log_mel, ids, padding = _one_clip(log_mel, token_ids, padding_mask)
    valid = ~padding.astype(bool)
    columns = ids.shape[1]
    kinds, places, counts = np.unique(ids, return_inverse=True, return_counts=True)
    # As many hues as there are different ids, in an order that keeps near ids apart.
    shades = _hues(len(kinds))[places.reshape(ids.shape)]  # [8, T', 3]
    mels = log_mel[: columns * PATCH_SIZE].T
    low, high = np.percentile(mels[_pixels(valid)], (1, 99)) if valid.any() else (0.0, 1.0)
    loud = np.clip((mels - low) / max(high - low, 1e-6), 0, 1)[..., None]
    with styled():
        figure, (sound, over, tokens) = new_figure(3, 1, (8.0, 6.0), sharex=True)
        draw_image(sound, mels, _pixels(valid), cmap="magma", vmin=low, vmax=high)
        tiles = shades.repeat(PATCH_SIZE, 0).repeat(PATCH_SIZE, 1)
        draw_picture(over, np.where(_pixels(valid)[..., None], (0.15 + 0.85 * loud) * tiles, 1))
        draw_picture(tokens, np.where(valid[..., None], shades, 1))
        frequent = [k for k in np.argsort(-counts) if counts[k] > 1][:8]
        for number, kind in enumerate(frequent, start=1):
            band, column = np.nonzero((ids == kinds[kind]) & valid)
            seconds = (column + 0.5) * COLUMN_SECONDS
            label = f"token {kinds[kind]}: {len(band)} times"
            size = max(3.0, min(7.0, 200 / columns))
            mark: dict[str, Any] = dict(
                marker=f"${number}$", markersize=size, linestyle="", color="black"
            )
            tokens.plot(seconds, band + 0.5, label=label, markeredgewidth=0.2, **mark)
        if frequent:
            tokens.legend(loc="upper left", bbox_to_anchor=(1, 1))
        sound.set(title="Log-mel spectrogram", ylabel="mel bin")
        over.set(title="Its tokens (colour) over its loudness (brightness)", ylabel="mel bin")
        title = f"Tokens: {len(np.unique(ids[valid]))} different in {valid.sum()} patches"
        tokens.set(title=title, ylabel="band", xlabel="time (s)")
        tokens.set_yticks(np.arange(0, BANDS, 2) + 0.5, [str(b) for b in range(0, BANDS, 2)])
        for axis in (sound, over):
            axis.set_yticks(range(0, NUM_MELS + 1, 32))
        save_figure(figure, path)


def plot_augmentations(
    before: Any, after: Any, titles: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draws clips before augmentation (above) and after it (below), side by side.

    Args:
        before: [N, F, 128] log-mel, normalised.
        after: [N, F, 128], the same clips rolled, mixed, masked.
        titles: N texts, such as the labels after augmentation.
        path: the PNG to write; its folder is made.
    """
    before, after = np.asarray(before), np.asarray(after)
    low, high = np.percentile(before, (1, 99))
    with styled():
        size = (3.6 * len(titles), 4.6)
        figure, axes = new_figure(2, len(titles), size, sharex=True, sharey=True)
        rows = (axes[: len(titles)], axes[len(titles) :])
        for row, clips in zip(rows, (before, after), strict=True):
            for axis, clip in zip(row, clips, strict=True):
                image = draw_image(axis, clip.T, np.ones(clip.T.shape, bool), cmap="magma")
                image.set_clim(low, high)
        for above, below, title in zip(*rows, titles, strict=True):
            above.set_title("as it is")
            below.set(title=f"augmented: {title}", xlabel="time (s)")
        for row in rows:
            row[0].set(ylabel="mel bin", yticks=range(0, NUM_MELS + 1, 32))
        figure.colorbar(image, ax=axes, label="log-mel", pad=0.01, aspect=40)
        save_figure(figure, path)


def plot_token_agreement(
    snrs_db: Sequence[float],
    agreement: Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike[str],
) -> None:
    """Draws the share of tokens that noise leaves unchanged, for several tokenizers.

    Args:
        snrs_db: [S] signal-to-noise ratios; drawn with the noise growing to the right.
        agreement: name -> `agreement` [S] in 0..1 and `chance`, a float, drawn dashed.
        path: the PNG to write; its folder is made.
    """
    with styled():
        figure, (axis,) = new_figure(1, 1, (6.4, 3.6))
        colours = (BLUE, ORANGE, GREEN, GREY)
        for (name, row), colour, marker in zip(agreement.items(), colours, MARKERS, strict=False):
            axis.plot(snrs_db, row["agreement"], f"-{marker}", color=colour, label=name)
            label = f"{name}, by chance"
            axis.axhline(row["chance"], color=colour, linestyle="--", linewidth=0.8, label=label)
        axis.set(title="Tokens that white noise leaves as they were", ylim=(0, 1))
        axis.set(xlabel="signal-to-noise ratio (dB)", ylabel="share of tokens", xticks=snrs_db)
        axis.invert_xaxis()
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save_figure(figure, path)


def _one_clip(log_mel: Any, *tokens: Any) -> tuple[np.ndarray, ...]:
    """Checked: log-mel [F, 128], and every array [L] as [8, T']."""
    log_mel = np.asarray(log_mel, np.float32)
    arrays = [np.asarray(a) for a in tokens]
    length = arrays[0].size
    if log_mel.shape[1:] != (NUM_MELS,) or any(a.shape != (length,) for a in arrays):
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise ValueError(
            f"got log_mel {log_mel.shape} and {shapes}; wanted [F, {NUM_MELS}] and "
            f"{len(arrays)} times [L]"
        )
    if not length or length % BANDS or length * PATCH_SIZE > len(log_mel) * BANDS:
        raise ValueError(
            f"{length} tokens do not lie in {len(log_mel)} frames of log-mel; "
            f"wanted {BANDS} for every {PATCH_SIZE} frames"
        )
    return log_mel, *(a.reshape(-1, BANDS).T for a in arrays)


def _hues(number: int) -> np.ndarray:
    """[number, 3] light colours; neighbours are far apart on the colour circle."""
    from matplotlib.colors import hsv_to_rgb

    golden = 0.618034 * np.arange(number)
    hue, saturation = golden % 1, 0.35 + 0.4 * ((3 * golden) % 1)
    return hsv_to_rgb(np.stack([hue, saturation, np.full(number, 0.95)], axis=-1))


def _draw_example(
    log_mel: np.ndarray,
    hidden: np.ndarray,
    target: np.ndarray,
    predicted: np.ndarray,
    padding: np.ndarray,
) -> Figure:
    """The four panels; the last four arguments are [8, T'], `hidden` = masked and not padding."""
    columns = target.shape[1]
    figure, axes = new_figure(4, 1, (8.0, 7.2), sharex=True)
    seen, masked, targets, predictions = axes

    mels = log_mel[: columns * PATCH_SIZE].T  # [128, 16 T']: mels upwards
    inside = mels[~_pixels(padding)]
    low, high = np.percentile(inside, (1, 99)) if inside.size else (0.0, 1.0)
    mel = dict(cmap="magma", vmin=low, vmax=high)
    image = draw_image(seen, mels, ~_pixels(padding), **mel)
    draw_image(masked, mels, ~_pixels(padding | hidden), **mel)
    draw_background(masked, hidden, MASKED, NUM_MELS)
    figure.colorbar(image, ax=[seen, masked], label="log-mel", pad=0.01, aspect=30)

    ids = dict(cmap="viridis", vmin=0, vmax=max(target.max(), predicted[hidden].max(initial=1)))
    image = draw_image(targets, target, ~padding, **ids)
    draw_background(predictions, ~hidden & ~padding, VISIBLE, BANDS)
    draw_image(predictions, predicted, hidden, **ids)
    band, column = np.nonzero(hidden & (predicted == target))
    seconds = (column + 0.5) * COLUMN_SECONDS
    predictions.plot(seconds, band + 0.5, "o", ms=3, mfc="white", mec="black", mew=0.6)
    figure.colorbar(image, ax=[targets, predictions], label="token id", pad=0.01, aspect=30)

    right, total = len(band), int(hidden.sum())
    share = f", {100 * right / total:.0f} %" if total else ""
    if padding.any():
        centre = (np.nonzero(padding)[1].mean() + 0.5) * COLUMN_SECONDS
        seen.text(centre, NUM_MELS / 2, "padding", ha="center", va="center", color=GREY)
    seen.set(title="Log-mel spectrogram", ylabel="mel bin")
    masked.set(title=f"What the encoder sees ({total} patches masked, grey)", ylabel="mel bin")
    targets.set(title="Target tokens", ylabel="band")
    predictions.set(
        title=f"Predicted tokens of masked patches (dots: right, {right} of {total}{share})",
        ylabel="band",
        xlabel="time (s)",
        xlim=(0, columns * COLUMN_SECONDS),
    )
    for axis in (seen, masked):
        axis.set_yticks(range(0, NUM_MELS + 1, 32))
    for axis in (targets, predictions):
        axis.set_yticks(np.arange(0, BANDS, 2) + 0.5, [str(b) for b in range(0, BANDS, 2)])
    return figure


def _draw_line(
    axis: Axes,
    metrics: Sequence[Mapping[str, float]],
    name: str,
    label: str,
    colour: str,
    style: str,
) -> None:
    """One metric as a line and, where there is any, its `val_` figure as points."""
    steps, values = _points(metrics, name)
    if steps.size > 2 * SMOOTHING and name != "lr":  # a schedule has no noise
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        window = np.full(steps.size // SMOOTHING, 1 / (steps.size // SMOOTHING))
        steps, values = (np.convolve(x, window, "valid") for x in (steps, values))
    if steps.size:
        axis.plot(steps, values, style, color=colour, label=label, linewidth=1.3)
    steps, values = _points(metrics, f"val_{name}")
    if steps.size:
        axis.plot(steps, values, "o" if style == "-" else "D", color=colour, mfc="white", ms=4)


def _points(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric where it was logged and is finite."""
    points = [(x["step"], x[name]) for x in metrics if np.isfinite(x.get(name, np.nan))]
    steps, values = np.asarray(points, np.float64).reshape(-1, 2).T
    return steps, values


def _pixels(patches: np.ndarray) -> np.ndarray:
    """[8, T'] per patch -> [128, 16 T'] per pixel."""
    return patches.repeat(PATCH_SIZE, axis=0).repeat(PATCH_SIZE, axis=1)
