"""What a probe reads of a clip: a model's mean features, all its tokens, or a plain log-mel.

And how features look: `project`ed into the plane.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from beats_jax.fbank import BANDS, FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, num_tokens

if TYPE_CHECKING:  # the log-mel needs no JAX
    from beats_jax.data.sources import Clips
    from beats_jax.inference import Model


def mean_features(
    model: Model, clips: Clips, layer: int | slice, cache: str | Path | None, name: str
) -> np.ndarray:
    """`pooled_features` of one layer, [n, D], or of all, [N + 1, n, D], kept for the next call.

    Args:
        model: of `inference.load`.
        clips: what to read.
        layer: which; `slice(None)` = all.
        cache: a folder; it keeps all layers, by the hashes of model and data. None = nowhere.
        name: tells models apart that have one hash: the trained and the untrained one.
    """
    if cache is None:
        if isinstance(layer, int):
            return pooled_features(model, clips, layer)
        return pooled_layers(model, clips)[layer]
    hashes = f"{model.source['params_sha256'][:16]}_{clips.fingerprint[:16]}"
    path = Path(cache) / f"{name}_{hashes}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft.npy")
        np.save(draft, pooled_layers(model, clips))
        draft.replace(path)
    return np.load(path, mmap_mode="r")[layer]


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
    pooled = np.zeros((len(clips), model.embed_dim), np.float32)
    for rows, waveforms, num_samples, _ in _batches(clips, batch_size):
        features = model.by_column("features", waveforms, num_samples, layer)  # padding is zero
        count = np.maximum(num_tokens(num_samples), 1, dtype=np.float32)[:, None]
        pooled[rows] = (features.sum(axis=(1, 2)) / count)[: len(rows)]
    return pooled


def pooled_layers(model: Model, clips: Clips, batch_size: int = 16) -> np.ndarray:
    """`pooled_features` of every layer, from one pass: [N + 1, len(clips), D] float32."""
    pooled = np.zeros((model.num_layers + 1, len(clips), model.embed_dim), np.float32)
    for rows, waveforms, num_samples, _ in _batches(clips, batch_size):
        mask = np.arange(waveforms.shape[1]) >= num_samples[:, None]
        mask[len(rows) :] = False  # rows that only fill the batch are no clips to be warned of
        features = model.all_layers(waveforms, mask, mask_mode="exact")  # padding is zero
        count = np.maximum(num_tokens(num_samples), 1, dtype=np.float32)[:, None]
        pooled[:, rows] = (features.sum(axis=2) / count)[:, : len(rows)]
    return pooled


def token_features(
    model: Model, clips: Clips, layer: int | None = None, batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Features of every token of every clip.

    Args:
        model, clips, layer, batch_size: as of `pooled_features`.

    Returns:
        float16 [len(clips), L, D], L that of the longest clip: half precision is what a probe
        needs, and this is all of it at once; and bool [len(clips), L], True = padding.
    """
    length = max(int(num_tokens(clips.num_samples).max()), 1)
    tokens = np.zeros((len(clips), length, model.embed_dim), np.float16)
    for rows, waveforms, num_samples, columns in _batches(clips, batch_size):
        features = model.by_column("features", waveforms, num_samples, layer)[: len(rows), :columns]
        tokens[rows, : BANDS * columns] = features.reshape(len(rows), -1, model.embed_dim)
    return tokens, np.arange(length) >= num_tokens(clips.num_samples)[:, None]


def _batches(
    clips: Clips, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """All clips, those of like length together: little padding, few programs.

    Yields:
        rows int [n <= batch_size], waveforms float32 [batch_size, N], num_samples [batch_size], and
        the number of columns of the longest; what is beyond n is empty.
    """
    from beats_jax.inference import bucket, samples_of

    by_length = np.argsort(clips.num_samples, kind="stable")
    for first in range(0, len(clips), batch_size):
        rows = by_length[first : first + batch_size]
        num_samples = np.zeros(batch_size, np.int64)
        num_samples[: len(rows)] = clips.num_samples[rows]
        columns = int(num_tokens(num_samples).max()) // BANDS
        size = samples_of(bucket(columns))
        waveforms = np.zeros((batch_size, size), np.float32)
        for waveform, pcm in zip(waveforms, clips.fetch(rows), strict=False):
            waveform[: min(len(pcm), size)] = pcm[:size] / np.float32(32768)
        yield rows, waveforms, np.minimum(num_samples, size), columns


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


def project(features: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Features [N, D] in the plane, to be looked at: "PCA" and "t-SNE" -> float32 [N, 2].

    Both of standardised features. PCA keeps distances as far as two dimensions can; t-SNE keeps
    neighbours, and its distances between groups mean nothing.

    Raises:
        ValueError: under 4 rows, or some that are not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if len(features) < 4 or not np.isfinite(features).all():
        raise ValueError(f"features {features.shape}: a map needs 4 rows or more, all finite")
    x = StandardScaler().fit_transform(np.asarray(features, np.float64))
    perplexity = min(30.0, (len(x) - 1) / 3)
    with threadpool_limits(1):  # on a busy machine t-SNE's threads wait for each other for minutes
        maps = {
            "PCA": PCA(2, random_state=seed).fit_transform(x),
            "t-SNE": TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(x),
        }
    return {name: points.astype(np.float32) for name, points in maps.items()}
