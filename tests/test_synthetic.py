"""Synthetic clips: reproducible, varied, and different enough to be told apart."""

import numpy as np
import pytest

from beats_jax.data.synthetic import EVENTS, synthetic_clips
from beats_jax.fbank import fbank


@pytest.fixture(scope="module")
def clips():
    return synthetic_clips(140, seconds=1.5, seed=0)


def test_what_is_made(clips):
    assert len(EVENTS) >= 12
    assert len(clips) == len(set(clips.ids)) == len(set(clips.digests)) == 140
    waveforms = clips.fetch(np.arange(140))
    assert all(w.dtype == np.int16 and len(w) == 24000 for w in waveforms)
    assert (clips.num_samples == 24000).all()
    peaks = np.array([np.abs(w.astype(int)).max() for w in waveforms])
    assert peaks.min() > 1000 and peaks.max() < 32767  # audible, of many loudnesses, never clipped
    assert peaks.std() > 3000


def test_columns(clips):
    pairs = set(zip(clips.columns["category"], clips.columns["fold"], strict=True))
    assert pairs == {(c, f) for c in [*EVENTS, "mixture"] for f in "12345"}
    for category, events in zip(clips.columns["category"], clips.columns["events"], strict=True):
        names = events.split("|")
        assert set(names) <= set(EVENTS)
        assert len(names) >= 2 if category == "mixture" else names == [category]


def test_clip_i_is_a_function_of_seed_and_i(clips):
    fewer = synthetic_clips(30, seconds=1.5, seed=0)
    assert fewer.digests == clips.digests[:30]
    assert not set(synthetic_clips(30, seconds=1.5, seed=1).digests) & set(clips.digests)


def test_classes_can_be_told_apart(clips):
    """Nearest class mean of simple log-mel statistics, scored on a fold of its own."""
    single = clips.select("category!=mixture")
    features = []
    for waveform in single.fetch(np.arange(len(single))):
        logmel = fbank(waveform)
        logmel = logmel - logmel.mean()
        change = np.abs(np.diff(logmel, axis=0))
        features.append(np.concatenate([logmel.mean(0), logmel.std(0), change.mean(0)]))
    features = np.array(features)
    labels = np.array(single.columns["category"])
    test = np.array(single.columns["fold"]) == "5"
    names = sorted(EVENTS)
    means = np.array([features[~test & (labels == name)].mean(0) for name in names])
    distances = np.linalg.norm(features[test][:, None] - means, axis=-1)
    accuracy = np.mean(np.array(names)[distances.argmin(1)] == labels[test])
    assert accuracy > 0.5  # chance is 1/13


def test_refuses_nothing():
    with pytest.raises(ValueError, match="at least 1 clip"):
        synthetic_clips(0)
