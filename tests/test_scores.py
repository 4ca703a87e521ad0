"""Scores against scikit-learn and by hand: missing classes, ties, one class, bad input."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from beats_jax import scores
from beats_jax.metrics import mean_average_precision


def _multi_label(seed: int, n: int = 200, classes: int = 12):
    rng = np.random.default_rng(seed)
    labels = rng.random((n, classes)) < np.linspace(0.02, 0.6, classes)
    labels[0] = True
    return rng.normal(size=labels.shape) + labels, labels


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_scikit_learn(seed):
    x, y = _multi_label(seed)
    theirs = [sklearn_metrics.average_precision_score(y[:, c], x[:, c]) for c in range(12)]
    np.testing.assert_allclose(scores.average_precisions(x, y), theirs, rtol=1e-12)
    assert mean_average_precision(x, y) == pytest.approx(
        sklearn_metrics.average_precision_score(y, x, average="macro"), rel=1e-12
    )
    assert scores.mean_auc(x, y) == pytest.approx(sklearn_metrics.roc_auc_score(y, x), rel=1e-12)
    truth = y.argmax(axis=1)
    single = scores.single_label_metrics(x, truth)
    predicted = x.argmax(axis=1)
    assert single["accuracy"] == sklearn_metrics.accuracy_score(truth, predicted)
    each = [sklearn_metrics.recall_score(truth == c, predicted == c) for c in np.unique(truth)]
    assert single["balanced_accuracy"] == pytest.approx(np.mean(each))


def test_by_hand():
    """Ranked +-+-: precision 1 at the first positive, 2/3 at the second; 3 of 4 pairs in order."""
    x, y = np.array([[0.9], [0.8], [0.7], [0.1]]), np.array([[1], [0], [1], [0]])
    assert mean_average_precision(x, y) == pytest.approx((1 + 2 / 3) / 2)
    assert scores.mean_auc(x, y) == pytest.approx(3 / 4)
    assert mean_average_precision(x - 5, y.astype(bool)) == mean_average_precision(x, y)


def test_classes_without_positives_are_left_out_of_the_mean():
    x, y = _multi_label(0)
    y[:, 3], y[:, 5] = False, True
    with_all = scores.average_precisions(x, y)
    assert np.flatnonzero(np.isnan(with_all)).tolist() == [3]
    others = np.delete(np.arange(12), 3)
    assert mean_average_precision(x, y) == mean_average_precision(x[:, others], y[:, others])
    assert np.flatnonzero(np.isnan(scores.roc_aucs(x, y))).tolist() == [3, 5]
    assert scores.mean_auc(x, y) == scores.mean_auc(
        np.delete(x, (3, 5), 1), np.delete(y, (3, 5), 1)
    )


def test_ties_are_the_share_of_positives():
    y = np.arange(10)[:, None] < 3
    x = np.zeros((10, 1))
    assert mean_average_precision(x, y) == pytest.approx(0.3)
    assert mean_average_precision(x, y[::-1]) == pytest.approx(0.3)  # the order of rows is no rank
    assert scores.mean_auc(x, y) == 0.5 and scores.d_prime(0.5) == 0


def test_d_prime_is_the_distance_of_two_gaussians():
    rng = np.random.default_rng(0)
    y = np.arange(20000)[:, None] % 2
    figures = scores.multi_label_metrics(rng.normal(size=y.shape) + 1.5 * y, y)
    assert figures["d_prime"] == pytest.approx(1.5, abs=0.05)
    assert figures["d_prime"] == scores.d_prime(figures["mAUC"])
    assert scores.d_prime(1.0) == np.inf


def test_classes_of_unlike_size_and_confusion():
    truth, predicted = np.array([0] * 8 + [1, 1]), np.array([0] * 9 + [1])
    assert scores.accuracy(predicted, truth) == 0.9
    assert scores.balanced_accuracy(predicted, truth) == 0.75
    matrix = scores.confusion_matrix(predicted, truth, 3)
    assert matrix.tolist() == [[8, 0, 0], [1, 1, 0], [0, 0, 0]] and matrix.dtype == np.int64


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[0.1], [np.nan]], [[0], [1]], "scores of 1 clips are not finite; the first is row 1"),
        ([[0.1], [np.inf]], [[0], [1]], "not finite"),
        ([0.1, 0.2], [0, 1], r"scores are \(2,\); wanted \[N, C\]"),
        (np.zeros((0, 3)), np.zeros((0, 3)), r"scores are \(0, 3\)"),
        ([[0.1, 0.2]], [[1]], r"got scores \(1, 2\), labels \(1, 1\)"),
        ([[0.1]], [[2]], "values other than 0 and 1"),
        ([[0.1], [0.2]], [[0], [0]], "no class has a positive"),
    ],
)
def test_bad_multi_label_input(x, y, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision(x, y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.accuracy([0.5], [1]), "got predicted float64"),
        (lambda: scores.accuracy(np.zeros(0, int), np.zeros(0, int)), "no clip to score"),
        (lambda: scores.balanced_accuracy([1, 2], [1]), r"labels int64 \(1,\)"),
        (lambda: scores.confusion_matrix([1], [3], 3), "got classes 1 to 3; wanted 0 to 2"),
        (lambda: scores.mean_auc([[0.1]], [[1]]), "positives and negatives"),
        (lambda: scores.single_label_metrics([[np.nan, 1]], [1]), "not finite"),
    ],
)
def test_bad_single_label_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scikit_learn_is_imported_when_it_is_used():
    code = "import sys; from beats_jax.metrics import mean_average_precision; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "beats_jax.scores" in done.stdout.split()
    assert not {"sklearn", "scipy.stats"} & set(done.stdout.split())
