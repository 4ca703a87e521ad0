"""Synthetic clips: reproducible, varied, and different enough to be told apart."""

import numpy as np
import pytest
import soundfile

from beats_jax.data.sources import list_source, write_folds
from beats_jax.data.synthetic import (
    AUDIOSET_NAMES,
    EVENTS,
    synthetic_clips,
    write_audioset,
    write_folder,
)
from beats_jax.fbank import fbank
from beats_jax.labels import audioset


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


def test_a_folder_as_a_person_would_have_it(tmp_path, clips):
    files = write_folder(tmp_path, 20, seconds=1.5)
    listing = list_source(tmp_path)
    assert listing.paths == files and listing.kind == "manifest"
    assert listing.columns == {name: column[:20] for name, column in clips.columns.items()}
    assert all(
        path.parent.name == c for path, c in zip(files, listing.columns["category"], strict=True)
    )
    waveform, rate = soundfile.read(files[3], dtype="int16")
    assert rate == 16000
    np.testing.assert_array_equal(waveform, clips.fetch(np.array([3]))[0])


def test_a_fake_audioset_has_both_splits_all_classes_and_gaps(tmp_path):
    write_audioset(tmp_path, 84, seconds=0.2)
    listing = list_source(tmp_path)
    assert listing.kind == "audioset" and len(listing.ids) == 84 - 17
    names = {"balanced_train": set(), "eval": set()}
    for split, labels in zip(listing.columns["split"], listing.columns["labels"], strict=True):
        names[split] |= {audioset()[mid] for mid in labels.split(";")}
    assert names["balanced_train"] == names["eval"] == set(AUDIOSET_NAMES.values())
    assert set(AUDIOSET_NAMES) == set(EVENTS)
    assert listing.notes[0].startswith("balanced_train_segments.csv: 45 of 56 segments have a clip")


def test_folds_for_a_folder_that_has_none(tmp_path):
    files = write_folder(tmp_path / "sounds", 70, seconds=0.2)
    (tmp_path / "sounds" / "metadata.csv").unlink()
    listing = list_source(write_folds(tmp_path / "sounds", tmp_path / "a" / "folds.csv", folds=5))
    assert set(listing.paths) == set(files)
    pairs = zip(listing.columns["category"], listing.columns["fold"], strict=True)
    assert len(set(pairs)) == 14 * 5  # five clips a class, one in each fold
    again = write_folds(tmp_path / "sounds", tmp_path / "b.csv", seed=0)
    assert again.read_text() == (tmp_path / "a" / "folds.csv").read_text()
    with pytest.raises(ValueError, match="'species'; the columns are: category"):
        write_folds(tmp_path / "sounds", tmp_path / "c.csv", label="species")
