"""The probe: finds what is there, nothing where nothing is, and never looks at the test fold."""

import csv
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from runs import FIXTURES

import beats_jax
from beats_jax import cli, features, probe
from beats_jax.data import sources
from beats_jax.data.synthetic import synthetic_clips
from beats_jax.probe import (
    NEIGHBOURS,
    STRENGTHS,
    Row,
    cross_validate,
    evaluate_features,
    linear_probe,
    logmel_baseline_features,
    probe_table,
    sweep_table,
)


def _blobs(distance, num_clips=200, dims=16, classes=4, folds=5):
    """Gaussian blobs whose means lie about `distance` standard deviations apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(num_clips) % classes
    means = rng.normal(0, distance / np.sqrt(2 * dims), (classes, dims))
    features = means[labels] + rng.normal(size=(num_clips, dims))
    scales = 10.0 ** rng.integers(-3, 4, dims)  # what the scaler must undo
    return (features * scales).astype(np.float32), labels, rng.permutation(num_clips) % folds


def test_separable_blobs_are_separated():
    features, labels, folds = _blobs(distance=8)
    names = np.array(["dog", "rain", "siren", "clock"])[labels]  # text, as metadata has it
    row = linear_probe(features, names, folds.astype(str))
    assert row.accuracies.shape == (5,) and row.mean > 0.98


def test_shuffled_labels_are_at_chance():
    features, labels, folds = _blobs(distance=8, num_clips=400)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert 0.15 < linear_probe(features, shuffled, folds).mean < 0.35


def test_choice_of_strength_and_scale_never_see_the_test_fold():
    """Garbage in the test fold changes its own score, and neither the choice nor the fit."""
    features, labels, folds = _blobs(distance=2, num_clips=100)
    row = linear_probe(features, labels, folds)
    for fold in range(5):
        test = folds == fold
        spoiled = np.where(test[:, None], 1e6 * features[::-1] + 1e3, features)
        spoiled_labels = np.where(test, 0, labels)
        again = linear_probe(spoiled, spoiled_labels, folds)
        assert again.strengths[fold] == row.strengths[fold]
    # Nor the fit: a test fold of copies of one clip is right exactly where that clip was.
    test = np.flatnonzero(folds == 0)
    wrong_or_right = []
    for clip in test:
        copies = features.copy()
        copies[test] = features[clip]
        copied = np.where(folds == 0, labels[clip], labels)
        wrong_or_right.append(linear_probe(copies, copied, folds, strengths=[0.1]).accuracies[0])
    alone = linear_probe(features, labels, folds, strengths=[0.1]).accuracies[0]
    assert 0 < alone < 1 and np.mean(wrong_or_right) == pytest.approx(alone)


def test_the_better_strength_is_chosen():
    features, labels, folds = _blobs(distance=2)
    weak, strong = (linear_probe(features, labels, folds, strengths=[c]) for c in (0.1, 1e-6))
    chosen = linear_probe(features, labels, folds, strengths=[0.1, 1e-6])
    assert weak.mean > strong.mean + 0.2
    np.testing.assert_array_equal(chosen.accuracies, weak.accuracies)


def test_strength_is_chosen_by_whole_folds():
    """Clips of one fold share a fingerprint that gives the label away inside that fold only: a
    choice by mixed folds trusts it, one by whole folds sees that it is worth nothing elsewhere."""
    rng = np.random.default_rng(0)
    folds = np.repeat(np.arange(5), 40)
    labels = rng.integers(0, 2, 200)
    signal = labels + rng.normal(0, 1.5, 200)
    prints = rng.normal(size=(5, 2, 60))[folds, labels]  # one per fold and class
    features = np.column_stack([signal, prints + 0.05 * rng.normal(size=prints.shape)])
    whole = linear_probe(features, labels, folds)
    mixed = linear_probe(features, labels, rng.permutation(folds))
    assert mixed.mean > 0.95 > 0.65 > whole.mean
    assert set(whole.strengths) == {min(STRENGTHS)} and min(mixed.strengths) > min(STRENGTHS)


def test_two_folds_and_the_seed():
    features, labels, folds = _blobs(distance=3)
    split = np.where(folds < 3, "train", "test")
    first, second = (linear_probe(features, labels, split, seed=0) for _ in range(2))
    np.testing.assert_array_equal(first.accuracies, second.accuracies)
    assert first.accuracies.shape == (2,) and first.strengths == second.strengths


def test_constant_features_and_a_class_absent_from_training_are_no_error():
    features, labels, folds = _blobs(distance=8)
    features[:, 3] = 7.0
    labels = np.where((folds == 0) & (labels == 0), 9, labels)  # only in the test fold
    row = linear_probe(features, labels, folds)
    assert 0.5 < row.accuracies[0] < 0.95 and row.accuracies[1:].min() > 0.9


def test_what_does_not_converge_is_said(monkeypatch):
    features, labels, folds = _blobs(distance=1)
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 2)
    with pytest.warns(RuntimeWarning, match="C=10 did not converge in 2 iterations"):
        linear_probe(features, labels, folds, strengths=[10.0])
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 5000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe(features, labels, folds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, f: (x[0], y, f), r"got features \(16,\), labels \(200,\)"),
        (lambda x, y, f: (x, y[:-1], f), r"labels \(199,\), folds \(200,\); wanted"),
        (lambda x, y, f: (x, y, np.zeros(200)), "all clips are in one fold"),
        (lambda x, y, f: (np.where(np.arange(200)[:, None] == 3, np.nan, x), y, f), "row 3"),
        (lambda x, y, f: (x, np.where(f == 2, 1, 0), f), "without fold 2 all clips are"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(*change(*_blobs(distance=1)))


def test_rows_and_table():
    features, labels, folds = _blobs(distance=3)
    noise = np.random.default_rng(2).normal(size=features.shape)
    trained, untrained = evaluate_features({"trained": features, "untrained": noise}, labels, folds)
    assert (trained.name, untrained.name) == ("trained", "untrained")
    assert trained.mean > untrained.mean + 0.3
    assert trained.mean == np.mean(trained.accuracies)
    row = Row("trained", np.array([0.5, 0.6, 0.7]), (0.1, 0.01, 0.1))
    assert probe_table([row, row._replace(name="log-mel")]).splitlines() == [
        "| features | accuracy (%) | fold 1 | fold 2 | fold 3 | C |",
        "|---|---|---|---|---|---|",
        "| trained | 60.0 ± 10.0 | 50.0 | 60.0 | 70.0 | 0.01, 0.1 |",
        "| log-mel | 60.0 ± 10.0 | 50.0 | 60.0 | 70.0 | 0.01, 0.1 |",
    ]


@pytest.mark.parametrize("kind", ["knn", "mean"])
def test_other_probes_find_what_is_there_and_nothing_else(kind):
    features, labels, folds = _blobs(distance=8)
    row = cross_validate(kind, features, labels, folds)
    assert row.accuracies.shape == (5,) and row.mean > 0.95
    shuffled = np.random.default_rng(1).permutation(labels)
    assert cross_validate(kind, features, shuffled, folds).mean < 0.45


def test_neighbours_are_cosine_and_their_number_is_chosen_by_the_training_folds():
    features, labels, folds = _blobs(distance=3)
    row = cross_validate("knn", features, labels, folds)
    assert len(row.strengths) == 5 and set(row.strengths) <= set(NEIGHBOURS)
    for fold in (0, 3):
        test = folds == fold
        spoiled = np.where(test[:, None], 1e6 * features[::-1], features)
        again = cross_validate("knn", spoiled, np.where(test, 0, labels), folds)
        assert again.strengths[fold] == row.strengths[fold]
    model, _ = probe._fit(probe.KINDS["knn"], features, labels, folds, 0, [5])
    assert model["probe"].effective_metric_ == "cosine"
    few = cross_validate("knn", features[:10], labels[:10] % 2, np.arange(10) % 5)
    assert max(few.strengths) <= 5  # of 6 clips to choose by, 10 neighbours cannot be had


def test_nearest_mean_is_the_nearest_mean():
    features, labels, folds = _blobs(distance=2)
    row = cross_validate("mean", features, labels, folds)
    test = folds == 0
    x = (features - features[~test].mean(0)) / features[~test].std(0)
    means = np.stack([x[~test & (labels == c)].mean(0) for c in range(4)])
    nearest = np.linalg.norm(x[test][:, None] - means, axis=-1).argmin(1)
    assert row.accuracies[0] == pytest.approx(np.mean(nearest == labels[test]))
    assert row.strengths == ()


def test_tables_of_other_probes_and_of_layers():
    row = Row("trained", np.array([0.5, 0.7]), ())
    assert (
        probe_table([row], "mean").splitlines()[0]
        == "| features | accuracy (%) | fold 1 | fold 2 |"
    )
    assert probe_table([row._replace(strengths=(5, 3))], "knn").endswith("| 50.0 | 70.0 | 3, 5 |")
    layers = [row._replace(name="layer 0"), Row("layer 1", np.array([0.8, 0.8]), ())]
    rows = {"linear": layers, "knn": layers[::-1]}
    table = sweep_table(rows, dict.fromkeys(rows, row._replace(name="log-mel")))
    assert table.splitlines() == [
        "| features | linear | knn |",
        "|---|---|---|",
        "| layer 0 | 60.0 ± 14.1 | **80.0 ± 0.0** |",
        "| layer 1 | **80.0 ± 0.0** | 60.0 ± 14.1 |",
        "| log-mel | 60.0 ± 14.1 | 60.0 ± 14.1 |",
    ]


# --- a model's features ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips():
    """18 clips of three lengths, 3 classes, 3 folds; the last clip has no token."""
    made = synthetic_clips(18, seconds=1.0, seed=0)
    lengths = np.array([16000, 9000, 5000] * 6)
    lengths[-1] = 2000
    columns = {"category": list("aabbcc") * 3, "fold": list("123") * 6}

    def read(record: int) -> np.ndarray:
        return made.read(record)[: lengths[record]]

    return sources.Clips(made.ids, lengths, columns, made.digests, read, made.records)


@pytest.fixture(scope="module")
def model():
    return beats_jax.load(FIXTURES / "dev_encoder.pt")


def test_pooled_features_and_tokens_are_those_of_each_clip_alone(model, clips):
    layers = features.pooled_layers(model, clips, batch_size=4)
    last = features.pooled_features(model, clips, batch_size=4)
    second = features.pooled_features(model, clips, layer=1, batch_size=4)
    tokens, padding = features.token_features(model, clips, layer=1, batch_size=4)
    assert layers.shape == (4, 18, 48) and tokens.shape == (18, 48, 48)
    for row in (0, 1, 2):
        (pcm,) = clips.fetch(np.array([row]))
        alone = model.all_layers(pcm)
        np.testing.assert_allclose(layers[:, row], alone.mean(axis=1), rtol=0, atol=1e-4)
        assert np.sum(~padding[row]) == alone.shape[1]
        np.testing.assert_allclose(tokens[row][~padding[row]], alone[1], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(layers[-1], last, rtol=0, atol=1e-4)
    np.testing.assert_allclose(layers[1], second, rtol=0, atol=1e-4)
    assert not layers[:, -1].any() and padding[-1].all() and not tokens[padding].any()


@pytest.fixture
def data(clips, monkeypatch):
    monkeypatch.setattr(sources, "open_clips", lambda path: clips)
    return "DATA"


def test_command_runs_every_probe_and_reads_the_audio_once(data, tmp_path, capsys, monkeypatch):
    words = ["probe", str(FIXTURES / "dev_encoder.pt"), data, "--cache", str(tmp_path)]
    assert cli.main([*words, "--probe", "linear,knn,mean,attention"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.endswith(":")] == [
        *("linear:", "knn:", "mean:", "attention:")
    ]
    assert said.count("| trained |") == 4 and said.count("| log-mel |") == 3
    assert "untrained" not in said  # an official file does not say how it began
    monkeypatch.setattr(features, "pooled_layers", lambda *_: pytest.fail("read again"))
    picture = tmp_path / "layers.png"
    assert cli.main([*words, "--probe", "knn,mean", "--sweep-layers", str(picture)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| features | knn | mean |" and len(table) == 2 + 4 + 1
    assert picture.stat().st_size > 10_000
    plain = probe.probe_stage(words[1], data, kinds=["mean"], layer=2)["mean"][0]
    assert "| layer 2 |" in table[4] and f"{100 * plain.mean:.1f} ± " in table[4]


def test_the_default_table_is_of_the_linear_probe(data, capsys):
    assert cli.main(["probe", str(FIXTURES / "dev_encoder.pt"), data]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| features | accuracy (%) | fold 1 | fold 2 | fold 3 | C |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| trained", "| log-mel"]
    assert lines[3].endswith("| 0.1 |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--probe", "svm"], "no probe 'svm' here; the probes are: linear, knn, mean, attention"),
        (["--probe", "attention", "--sweep-layers", "x.png"], "are: linear, knn, mean"),
        (["--label", "species"], "no column 'species'; the columns are: category, fold"),
        (["--layer", "9"], "layer 9 is not one of 0"),
    ],
)
def test_bad_words_are_one_line(words, message, data, capsys):
    assert cli.main(["probe", str(FIXTURES / "dev_encoder.pt"), data, *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_logmel_features():
    time = np.arange(16000) / 16000
    low, high = (0.3 * np.sin(2 * np.pi * f * time) for f in (300, 5000))
    burst = low * (time < 0.5)
    features = logmel_baseline_features([low, high, burst, low[:100]])
    assert features.shape == (4, 192) and features.dtype == np.float32
    assert np.isfinite(features).all()
    mean, std, change = np.split(features, 3, axis=1)
    assert mean[0].argmax() < 10 < 40 < mean[1].argmax()
    assert std[2].max() > 5 * std[0].max() and change[2].max() > change[0].max()
    pcm = logmel_baseline_features([np.round(low * 32768).astype(np.int16)])
    np.testing.assert_allclose(pcm[0, :5], features[0, :5], atol=1e-2)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "column", "accuracy"), [("esc50", "esc10", 0.825), ("ravdess", None, 0.478)]
)
def test_baseline_on_real_audio(folder, column, accuracy):
    """The figures published with the data, five folds, C = 0.1."""
    import soundfile

    root = Path(os.environ["BEATS_JAX_DATA"]) / folder
    with open(root / "metadata.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if column is None or r[column] == "True"]
    waveforms = (soundfile.read(root / "audio" / r["filename"], dtype="int16")[0] for r in rows)
    features = logmel_baseline_features(waveforms)
    labels, folds = ([r[name] for r in rows] for name in ("target", "fold"))
    row = linear_probe(features, labels, folds, strengths=[0.1])
    assert row.mean == pytest.approx(accuracy, abs=5e-3)
