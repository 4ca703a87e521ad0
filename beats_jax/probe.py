"""A linear probe of frozen features, and the log-mel baseline they must beat.

How good are features? Fit a logistic regression to them on all folds but one and score it on that
one, for every fold. The regularisation decides much for wide features and few clips, so it is
chosen anew for every test fold, by cross-validation among the training folds, which keeps folds
whole (clips of one recording or speaker share a fold): the final score alone sees the test fold.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from beats_jax.fbank import BANDS, FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, num_tokens

if TYPE_CHECKING:  # scores of arrays need no JAX
    from beats_jax.data.sources import Clips
    from beats_jax.inference import Model

# Inverse regularisation strengths to choose from; on a tie the strongest regularisation wins.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MAX_ITERATIONS = 5000  # standardised features take some hundred; nearly separable ones more


class Row(NamedTuple):
    """One line of the table: what was probed and how well it did.

    Attributes:
        name: e.g. "trained", "untrained", "log-mel".
        accuracies: [n_folds] float64 in 0..1, in the order of the sorted folds.
        strengths: the C chosen for each fold.
    """

    name: str
    accuracies: np.ndarray
    strengths: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """The sample standard deviation over folds: how they differ, not an error of the mean."""
        return float(self.accuracies.std(ddof=1))


def probe_stage(
    stage_folder: str,
    data: str,
    *,
    filter: str = "",
    label: str = "category",
    fold: str = "fold",
    layer: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """A stage's encoder, the same encoder untrained, and the log-mel baseline, on one data set.

    Args:
        stage_folder: `W/<iteration>/<stage>`, `…@STEP`, or an official `.pt` file.
        data: a folder made by `prepare`, with columns for the label and the fold.
        filter: its rows to take, as "esc10=True".
        label, fold: the columns' names.
        layer: whose features are averaged over the clip; the last by default.
        seed: of the inner split, where there are only two folds.

    Raises:
        FileNotFoundError: no checkpoint or no data there.
        ValueError: a column is missing, or the folds cannot be used.
    """
    from beats_jax.data.sources import open_clips
    from beats_jax.inference import Model, load
    from beats_jax.pretrained import untrained

    clips = open_clips(data).select(filter)
    for column in (label, fold):
        if column not in clips.columns:
            known = ", ".join(clips.columns) or "none"
            raise ValueError(f"{data}: no column {column!r}; the columns are: {known}")
    labels, folds = clips.columns[label], clips.columns[fold]
    features = {"trained": pooled_features(load(stage_folder), clips, layer)}
    if not stage_folder.endswith(".pt"):  # the official files do not say how they started
        features["untrained"] = pooled_features(Model(untrained(stage_folder)), clips, layer)
    rows = evaluate_features(features, labels, folds, seed)
    baseline = logmel_baseline_features(clips.fetch(np.arange(len(clips))))
    return rows + [linear_probe(baseline, labels, folds, seed, name="log-mel", strengths=(0.1,))]


def pooled_features(
    model: Model, clips: Clips, layer: int | None = None, batch_size: int = 16
) -> np.ndarray:
    """Mean of each clip's features over its valid tokens (exact mode).

    Args:
        model: of `inference.load`.
        clips: what to read.
        layer: 0 = input of the first block, N = last output; the last by default.
        batch_size: clips at a time.

    Returns:
        [len(clips), D] float32; zeros for a clip under 2800 samples, which has no token.

    Raises:
        ValueError: the model has no such layer.
    """
    from beats_jax.inference import bucket, samples_of

    pooled = np.zeros((len(clips), model.embed_dim), np.float32)
    by_length = np.argsort(clips.num_samples, kind="stable")  # little padding, few programs
    for first in range(0, len(clips), batch_size):
        rows = by_length[first : first + batch_size]
        num_samples = np.zeros(batch_size, np.int64)
        num_samples[: len(rows)] = clips.num_samples[rows]
        columns = num_tokens(num_samples) // BANDS
        size = samples_of(bucket(int(columns.max())))
        waveforms = np.zeros((batch_size, size), np.float32)
        for waveform, pcm in zip(waveforms, clips.fetch(rows), strict=False):
            waveform[: len(pcm)] = pcm[:size] / np.float32(32768)
        features = model.by_column("features", waveforms, num_samples, layer)  # padding is zero
        count = np.maximum(BANDS * columns, 1, dtype=np.float32)[:, None]
        pooled[rows] = (features.sum(axis=(1, 2)) / count)[: len(rows)]
    return pooled


def linear_probe(
    features: Any,
    labels: Any,
    folds: Any,
    seed: int = 0,
    *,
    name: str = "features",
    strengths: Sequence[float] = STRENGTHS,
) -> Row:
    """Cross-validated accuracy of StandardScaler + LogisticRegression, one figure a fold.

    Args:
        features: [N, D] numbers, one row a clip.
        labels: [N] classes (int or text).
        folds: [N] fold of each clip (int or text), at least 2 different.
        seed: for the inner split of a single training fold (only with 2 folds, e.g. train / test);
            everything else is deterministic.
        name: goes into the row.
        strengths: the values of C to choose from; with one there is no choice.

    Raises:
        ValueError: shapes do not match, features are not finite, there are fewer than 2 folds, or
            only one class is left to train on.

    Warns:
        RuntimeWarning: the final fit of a fold did not converge.
    """
    from threadpoolctl import threadpool_limits

    x, y, groups = _checked(features, labels, folds)
    accuracies, chosen = [], []
    for fold in np.unique(groups):
        train, test = groups != fold, groups == fold
        with threadpool_limits(1):  # matrices this small are slower with BLAS threads
            model, strength = _fit(x[train], y[train], groups[train], seed, sorted(strengths))
            accuracies.append(model.score(x[test], y[test]))
        chosen.append(strength)
    return Row(name, np.asarray(accuracies), tuple(chosen))


def evaluate_features(
    named_features: Mapping[str, Any], labels: Any, folds: Any, seed: int = 0
) -> list[Row]:
    """`linear_probe` of several kinds of features [N, D] of the same clips, one row each."""
    return [
        linear_probe(features, labels, folds, seed, name=name)
        for name, features in named_features.items()
    ]


def probe_table(rows: Iterable[Row]) -> str:
    """A Markdown table: accuracy in percent (mean ± std over folds), then every fold."""
    rows = list(rows)
    folds = range(1, len(rows[0].accuracies) + 1)
    lines = [
        "| features | accuracy (%) | " + " | ".join(f"fold {k}" for k in folds) + " | C |",
        "|---|---|" + "---|" * len(folds) + "---|",
    ]
    for row in rows:
        each = " | ".join(f"{100 * accuracy:.1f}" for accuracy in row.accuracies)
        chosen = ", ".join(f"{strength:g}" for strength in sorted(set(row.strengths)))
        lines.append(
            f"| {row.name} | {100 * row.mean:.1f} ± {100 * row.std:.1f} | {each} | {chosen} |"
        )
    return "\n".join(lines)


def logmel_baseline_features(waveforms: Iterable[np.ndarray]) -> np.ndarray:
    """What a plain log-mel says of a clip: the baseline that learned features must beat.

    64 mel bands, 25 ms frames every 10 ms; per band the mean, the standard deviation and the mean
    absolute difference of consecutive frames. With StandardScaler and LogisticRegression(C=0.1)
    (`linear_probe(..., strengths=(0.1,))`) it gives 0.825 on ESC-10's five folds.

    Args:
        waveforms: 16 kHz clips of any length, float in [-1, 1] or int16; zero-padded to 2 frames.

    Returns:
        [N, 192] float32.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return np.asarray([_clip_statistics(np.asarray(w)) for w in waveforms], np.float32)


def _clip_statistics(waveform: np.ndarray) -> np.ndarray:
    """[192] of one clip."""
    import librosa

    if waveform.dtype == np.int16:
        waveform = waveform / np.float32(32768)
    missing = FRAME_LENGTH + FRAME_SHIFT - len(waveform)
    power = librosa.feature.melspectrogram(
        y=np.pad(waveform.astype(np.float32), (0, max(0, missing))),
        sr=SAMPLE_RATE,
        n_fft=FRAME_LENGTH,
        hop_length=FRAME_SHIFT,
        n_mels=64,
        center=False,
    )
    logmel = np.log(power + 1e-6)
    change = np.abs(np.diff(logmel, axis=1)).mean(1)
    return np.concatenate([logmel.mean(1), logmel.std(1), change])


def _fit(x: np.ndarray, y: np.ndarray, groups: np.ndarray, seed: int, strengths: Sequence[float]):
    """Chooses C by cross-validation inside (x, y, groups), fits to all of it; (model, C)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # The scaler is part of the model: it too is fitted on training clips only, inner ones included.
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    num_groups = len(np.unique(groups))
    if num_groups > 1:
        splitter = GroupKFold(min(5, num_groups))  # up to 5 folds: each is left out once
        splits = list(splitter.split(x, y, groups))
    else:
        rarest = np.unique(y, return_counts=True)[1].min()
        splitter = StratifiedKFold(max(2, min(5, rarest)), shuffle=True, random_state=seed)
        splits = list(splitter.split(x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # judged below, once, on the final fit
        if len(strengths) == 1:
            strength = strengths[0]
        else:
            grid = {"logisticregression__C": list(strengths)}
            search = GridSearchCV(model, grid, cv=splits, refit=False).fit(x, y)
            strength = search.best_params_["logisticregression__C"]
        model.set_params(logisticregression__C=strength).fit(x, y)
    regression: Any = model["logisticregression"]
    if regression.n_iter_.max() >= MAX_ITERATIONS:
        warnings.warn(
            f"the logistic regression with C={strength:g} did not converge in {MAX_ITERATIONS} "
            "iterations; its accuracy is a lower bound: leave large values out of `strengths`",
            RuntimeWarning,
            stacklevel=3,
        )
    return model, float(strength)


def _checked(features: Any, labels: Any, folds: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, groups = np.asarray(features, np.float64), np.asarray(labels), np.asarray(folds)
    if x.ndim != 2 or y.shape != (len(x),) or groups.shape != (len(x),):
        raise ValueError(
            f"got features {x.shape}, labels {y.shape}, folds {groups.shape}; "
            "wanted [N, D], [N], [N]: one row a clip"
        )
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(1))
        raise ValueError(f"features of {len(bad)} clips are not finite; the first is row {bad[0]}")
    if len(np.unique(groups)) < 2:
        raise ValueError(
            "all clips are in one fold; give at least two, one to train on, one to test"
        )
    for fold in np.unique(groups):
        rest = np.unique(y[groups != fold])
        if len(rest) < 2:
            raise ValueError(f"without fold {fold} all clips are of class {rest[0]}: no probe")
    return x, y, groups
