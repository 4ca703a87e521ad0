"""Audio of any length, in memory that does not grow with it.

A recording is cut into windows of whole time columns, overlapping by half by default; what the
windows say of a column is averaged, weighted by how far the column lies from the window's edge
(tokens cannot be averaged: the window with the largest weight has the word). The last window ends
with the audio's last whole column, so nothing is cut off. What fits one window is one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from beats_jax.data.audio import as_waveform, audio_blocks
from beats_jax.fbank import BANDS, FRAME_SHIFT, MIN_SAMPLES, PATCH_SIZE, SAMPLE_RATE, num_tokens
from beats_jax.inference import COLUMN_SECONDS, Model, bucket, samples_of, times

WINDOW, HOP = 62, 31  # columns: 10 s, the length BEATs is trained on, and 5 s
BATCH_SIZE = 4  # windows; a CPU gains nothing by more, and at base size they are 40 MB each
_COLUMN = PATCH_SIZE * FRAME_SHIFT  # samples
_BLOCK = 10 * SAMPLE_RATE  # of an array, to copy no more of it at once


class Window(NamedTuple):
    """A part of a recording.

    Attributes:
        first: its first column in the recording.
        waveform: float32 [2560 k + 240], k columns.
        last: nothing follows.
    """

    first: int
    waveform: np.ndarray
    last: bool

    @property
    def columns(self) -> int:
        return num_tokens(len(self.waveform)) // BANDS


class Scores(NamedTuple):
    """Class scores of a recording.

    Attributes:
        logits, probs: float32 [C], of the whole: the logits are the mean over its columns.
        spans: float64 [W, 2], each window's start and end in seconds.
        window_probs: float32 [W, C].
    """

    logits: np.ndarray
    probs: np.ndarray
    spans: np.ndarray
    window_probs: np.ndarray


def frames(
    model: Model,
    audio: Any,
    *,
    layer: int | None = None,
    window: int = WINDOW,
    hop: int = HOP,
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features of a recording, piece by piece as they are ready.

    Args:
        audio: a file's path, or a waveform [N] at 16 kHz.
        layer: as in `Model.extract_features`.
        window, hop: in columns of 0.16 s; a window of k columns is 2560 k + 240 samples.
        batch_size: windows at a time.

    Yields:
        x [n, 8, D] float32, bands from low to high; times [n], the columns' middles in seconds.

    Raises:
        ValueError: the audio cannot be read, or has under 2800 samples and so no column.
        OSError: there is no such file.
    """
    yield from _merged(model, audio, "features", window, hop, batch_size, layer)


def tokens(
    model: Model, audio: Any, *, window: int = WINDOW, hop: int = HOP, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Acoustic tokens of a recording: yields ids int32 [n, 8] and times [n]; else as `frames`."""
    yield from _merged(model, audio, "ids", window, hop, batch_size)


def classify(
    model: Model, audio: Any, *, window: int = WINDOW, hop: int = HOP, batch_size: int = BATCH_SIZE
) -> Scores:
    """Class scores of a recording and of each of its windows; arguments as of `frames`."""
    scorer = Scorer(model)
    for _, part, values in run(model, "logits", _one(audio, window, hop), batch_size):
        scorer.add(part.first, values)
    return scorer.scores()


def _merged(
    model: Model,
    audio: Any,
    what: str,
    window: int,
    hop: int,
    batch_size: int,
    layer: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    merger, first = Merger(pick=what == "ids"), 0
    for _, part, values in run(model, what, _one(audio, window, hop), batch_size, layer):
        for ready in (merger.add(part.first, values), merger.rest() if part.last else []):
            if len(ready):
                yield np.asarray(ready), times(len(ready), first)
                first += len(ready)


def _one(audio: Any, window: int, hop: int) -> Iterator[tuple[None, Window]]:
    """The windows of one recording, as `run` takes them."""
    if isinstance(audio, (str, os.PathLike)):
        blocks, name = audio_blocks(audio), os.fspath(audio)
    else:
        waveform = as_waveform(audio)
        if waveform.ndim != 1:
            raise ValueError(f"waveform has shape {waveform.shape}; give one recording, [N]")
        blocks = np.split(waveform, range(_BLOCK, len(waveform), _BLOCK))
        name = "the waveform"
    yield from ((None, part) for part in cut(blocks, window, hop, name))


def cut(
    blocks: Iterable[np.ndarray], window: int = WINDOW, hop: int = HOP, name: str = "the audio"
) -> Iterator[Window]:
    """Cuts a recording into windows.

    Args:
        blocks: float32 [n] each, of any size: joined they are the recording at 16 kHz.
        window, hop: in columns.
        name: of the recording, for the message.

    Yields:
        Its windows in their order, all of one size: `window` columns, or as many as there are.

    Raises:
        ValueError: not 1 <= hop <= window, or there is no whole column.
    """
    if not 1 <= hop <= window:
        raise ValueError(f"window is {window} and hop {hop} columns; give 1 <= hop <= window")
    first, buffer = 0, np.zeros(0, np.float32)  # the buffer begins with column `first`
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) >= samples_of(window + hop):  # so that another whole window follows
            yield Window(first, buffer[: samples_of(window)].copy(), False)
            first, buffer = first + hop, buffer[hop * _COLUMN :]
    columns = num_tokens(len(buffer)) // BANDS
    if not columns:
        raise ValueError(
            f"{name} has {len(buffer)} samples at 16 kHz and so no token; give at least"
            f" {MIN_SAMPLES} ({MIN_SAMPLES / SAMPLE_RATE} s)"
        )
    if (more := columns - window) > 0:
        yield Window(first, buffer[: samples_of(window)].copy(), False)
        first, columns, buffer = first + more, window, buffer[more * _COLUMN :]
    yield Window(first, buffer[: samples_of(columns)].copy(), True)


def run(
    model: Model,
    what: str,
    parts: Iterable[tuple[Any, Window]],
    batch_size: int = BATCH_SIZE,
    layer: int | None = None,
) -> Iterator[tuple[Any, Window, np.ndarray]]:
    """Runs windows of one or many recordings through a model, in batches of one size each.

    Args:
        model: its `by_column` is what is run.
        what: "features", "logits" or "ids".
        parts: (whose, window).
        batch_size: windows at a time.
        layer: of the features.

    Yields:
        (whose, window, values [columns, …]), of each recording in the order of its windows: they
        are all of one size, so that none overtakes another. Recordings do overtake each other.

    Raises:
        ValueError: the model does not give this.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    waiting: dict[int, list[tuple[Any, Window]]] = {}
    for item in parts:
        size = bucket(item[1].columns)
        group = waiting.setdefault(size, [])
        group.append(item)
        if len(group) == batch_size:
            yield from _run(model, what, waiting.pop(size), layer)
    for group in waiting.values():
        yield from _run(model, what, group, layer)


def _run(
    model: Model, what: str, group: list[tuple[Any, Window]], layer: int | None
) -> Iterator[tuple[Any, Window, np.ndarray]]:
    """One batch. Its rows are filled up to a power of two: few programs, few rows in vain."""
    rows = 2 ** (len(group) - 1).bit_length()
    waveforms = np.zeros((rows, samples_of(bucket(group[0][1].columns))), np.float32)
    num_samples = np.zeros(rows, np.int64)
    for row, (_, part) in enumerate(group):
        waveforms[row, : len(part.waveform)] = part.waveform
        num_samples[row] = len(part.waveform)
    values = model.by_column(what, waveforms, num_samples, layer)
    for (whose, part), value in zip(group, values, strict=False):
        yield whose, part, value[: part.columns]


class Merger:
    """Puts together what overlapping windows, in their order, say of each column."""

    def __init__(self, pick: bool = False):
        self._pick = pick  # the word of the window with the largest weight, not the mean
        self._first = 0
        self._values: Any = None  # of the columns from `_first` on, which may still change
        self._weights = np.zeros(0)

    def add(self, first: int, values: np.ndarray) -> np.ndarray:
        """Takes [n, …] of the columns from `first` on; returns those before, which are final."""
        old = values[:0] if self._values is None else self._values
        ready, old = np.split(old, [first - self._first])
        old_weight = np.pad(self._weights[len(ready) :], (0, len(values) - len(old)))
        old = np.concatenate([old, values[len(old) :]])
        place = np.arange(len(values))
        weight = 1.0 + np.minimum(place, place[::-1])
        spread = (-1, *[1] * (values.ndim - 1))
        if self._pick:
            better = weight > old_weight
            self._values = np.where(better.reshape(spread), values, old)
            self._weights = np.maximum(weight, old_weight)
        else:
            self._weights = old_weight + weight
            share = (weight / self._weights).astype(np.float32)
            self._values = old + share.reshape(spread) * (values - old)
        self._first = first
        return ready

    def rest(self) -> np.ndarray:
        """What is left after the last window."""
        return self._values


class Scorer:
    """Puts together the class scores of a recording from its windows' column logits [n, C]."""

    def __init__(self, model: Model):
        self._model, self._merger = model, Merger()
        self._sum, self._columns = np.float64(0.0), 0
        self._spans: list[tuple[float, float]] = []
        self._windows: list[np.ndarray] = []

    def add(self, first: int, logits: np.ndarray) -> None:
        """Takes the next window, whose first column is `first`."""
        self._count(self._merger.add(first, logits))
        start = first * COLUMN_SECONDS
        self._spans.append((start, start + samples_of(len(logits)) / SAMPLE_RATE))
        self._windows.append(logits.mean(axis=0, dtype=np.float64))

    def scores(self) -> Scores:
        """Of all that was taken; after the last window."""
        self._count(self._merger.rest())
        logits = np.stack([self._sum / self._columns, *self._windows]).astype(np.float32)
        probs = self._model.probabilities(logits)
        return Scores(logits[0], probs[0], np.asarray(self._spans), probs[1:])

    def _count(self, ready: np.ndarray) -> None:
        self._sum = self._sum + ready.sum(axis=0, dtype=np.float64)
        self._columns += len(ready)
