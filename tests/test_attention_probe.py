"""The attention probe: a mean at first, finds a short event that a mean drowns, sees no padding."""

import numpy as np
import pytest
from jax.nn import softmax

from beats_jax.attention_probe import Attention, attention_logits, attention_weights, fit_attention
from beats_jax.probe import attention_probe, linear_probe

CLIPS, LENGTH, WIDTH = 120, 40, 16


@pytest.fixture(scope="module")
def events():
    """One token of 40 tells the class; a mark shared by all classes tells which token it is."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, CLIPS)
    tokens = rng.normal(size=(CLIPS, LENGTH, WIDTH))
    place = rng.integers(0, 20, CLIPS)
    tokens[np.arange(CLIPS), place, 0] = 6.0
    tokens[np.arange(CLIPS), place, 1:4] = 4.0 * np.eye(3)[labels]
    padding = np.arange(LENGTH) >= rng.integers(20, LENGTH + 1, CLIPS)[:, None]
    return tokens.astype(np.float16), padding, labels, np.arange(CLIPS) % 4


def test_weights_and_logits_by_hand():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    padding = np.array([[False] * 3 + [True] * 2, [True] * 5])
    params = Attention(*(rng.normal(size=s).astype(np.float32) for s in ((4,), (4, 3), (3,))))
    weights = np.asarray(attention_weights(params, x, padding))
    np.testing.assert_allclose(weights[0, :3], softmax(x[0, :3] @ params.query / 2), rtol=1e-5)
    assert not weights[0, 3:].any() and not weights[1].any()
    logits = np.asarray(attention_logits(params, x, padding))
    pooled = weights[0] @ x[0]
    np.testing.assert_allclose(logits[0], pooled @ params.kernel + params.bias, rtol=1e-5)
    np.testing.assert_array_equal(logits[1], params.bias)  # no token: the bias, and no nan
    mean = np.asarray(attention_weights(params._replace(query=np.zeros(4)), x, padding))
    np.testing.assert_allclose(mean[0, :3], 1 / 3, rtol=1e-6)


def test_finds_what_a_mean_drowns(events):
    tokens, padding, labels, folds = events
    valid = ~padding[..., None]
    means = tokens.mean(axis=1, where=valid, dtype=np.float32)
    linear, found = linear_probe(means, labels, folds), attention_probe(*events, name="x")
    assert found.mean > 0.9 > 0.8 > linear.mean
    assert found.accuracies.shape == (4,) and (found.name, found.strengths) == ("x", ())


def test_is_seeded_and_blind_to_padding_and_to_the_test_clips(events):
    tokens, padding, labels, folds = events
    train = np.flatnonzero(folds)
    options = dict(seed=0, num_classes=3)
    logits = fit_attention(tokens, padding, labels, train, **options)
    assert logits.shape == (CLIPS, 3) and logits.dtype == np.float32
    spoiled = np.where(padding[..., None], np.float16(1000), tokens)
    np.testing.assert_allclose(
        fit_attention(spoiled, padding, labels, train, **options), logits, rtol=0, atol=1e-4
    )
    others = np.where((folds == 0)[:, None, None], np.float16(9), tokens)
    wrong = np.where(folds == 0, 0, labels)
    again = fit_attention(others, padding, wrong, train, **options)
    np.testing.assert_array_equal(again[train], logits[train])
    other = fit_attention(tokens, padding, labels, train, seed=1, num_classes=3)
    assert np.abs(other - logits).max() > 1e-4
