"""Metrics against numpy, and that they add: in parts, under jit, sharded."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beats_jax.metrics import Histogram, Mean, Spread, summarize

CODES = 64
pytestmark = pytest.mark.usefixtures("strict_promotion")


def _batch(seed, size=24):
    """One batch as a stage sees it: losses and ids with some padding, pooled features."""
    rng = np.random.default_rng(seed)
    valid = rng.random((size, 8)) < 0.7
    return {
        "values": rng.normal(3, 1, (size, 8)).astype(np.float32),
        "valid": valid,
        "ids": np.where(valid, rng.geometric(0.1, (size, 8)) % CODES, -1).astype(np.int32),
        "features": rng.normal(0.5, 0.2, (size, 5)).astype(np.float32),
        "rows": valid.any(1),
    }


def _measure(batch):
    return {
        "loss": Mean.of(batch["values"], batch["valid"]),
        "code": Histogram.of(batch["ids"], CODES),
        "feature_std": Spread.of(batch["features"], batch["rows"]),
    }


def _oracle(batch):
    ids = batch["ids"][batch["ids"] >= 0]
    p = np.unique(ids, return_counts=True)[1] / ids.size
    entropy = -(p * np.log(p)).sum()
    return {
        "loss": batch["values"][batch["valid"]].astype(np.float64).mean(),
        "code_perplexity": np.exp(entropy),
        "code_entropy": entropy,
        "codes_used": len(np.unique(ids)),
        "feature_std": batch["features"][batch["rows"]].astype(np.float64).std(0).mean(),
    }


def test_against_numpy():
    batch = _batch(0)
    summary = summarize(jax.jit(_measure)(batch))
    assert all(type(value) is float for value in summary.values())
    assert summary == pytest.approx(_oracle(batch), rel=1e-5)


def test_parts_of_different_size_add_up_to_the_whole():
    whole = _batch(1, size=30)
    parts = [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 3), (3, 19), (19, 30))]
    total = jax.tree.map(operator.add, _measure(parts[0]), _measure(parts[1]))
    total = jax.tree.map(operator.add, total, _measure(parts[2]))
    assert summarize(total) == pytest.approx(_oracle(whole), rel=1e-5)
    losses = [_oracle(part)["loss"] for part in parts]
    assert abs(np.mean(losses) - _oracle(whole)["loss"]) > 1e-3  # so a mean of means would show


def test_sharded_batch_gives_the_same():
    devices = jax.devices()
    batch = _batch(2, size=8 * len(devices))
    mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.device_put(batch, rows)
    assert sharded["ids"].sharding.num_devices == len(devices)
    assert summarize(jax.jit(_measure)(sharded)) == pytest.approx(_oracle(batch), rel=1e-5)


def test_names_of_other_histograms():
    counts = np.array([5, 0, 5, 0])
    summary = summarize({"predicted_code": Histogram(counts)})
    assert summary == pytest.approx(
        {
            "predicted_code_perplexity": 2.0,
            "predicted_code_entropy": np.log(2),
            "predicted_codes_used": 2.0,
        }
    )


def test_histogram_counts_what_it_should():
    ids = np.array([[0, 1, 1, -1], [3, 3, 3, 2]], np.int32)
    where = np.array([[True, True, True, True], [True, True, False, False]])
    np.testing.assert_array_equal(Histogram.of(ids, 4).counts, [1, 2, 1, 3])
    np.testing.assert_array_equal(Histogram.of(ids, 4, where).counts, [1, 2, 0, 2])
    np.testing.assert_array_equal(Histogram.of(ids, 3).counts, [1, 2, 1])  # 3 is out of range


def test_nothing_measured_is_nan_and_adds_as_nothing():
    batch = _batch(3)
    nothing = dict(batch, valid=np.zeros_like(batch["valid"]), rows=np.zeros(24, bool))
    nothing["ids"] = np.full_like(batch["ids"], -1)
    summary = summarize(_measure(nothing))
    assert summary["codes_used"] == 0
    assert all(np.isnan(v) for name, v in summary.items() if name != "codes_used")
    both = jax.tree.map(operator.add, _measure(nothing), _measure(batch))
    assert summarize(both) == pytest.approx(_oracle(batch), rel=1e-5)


def test_padding_may_hold_nan():
    values = np.array([1.0, np.nan, 3.0], np.float32)
    features = np.array([[1.0], [np.nan], [3.0]], np.float32)
    where = np.array([True, False, True])
    metrics = {"loss": Mean.of(values, where), "feature_std": Spread.of(features, where)}
    assert summarize(metrics) == pytest.approx({"loss": 2.0, "feature_std": 1.0})


def test_extremes():
    one_code = summarize({"code": Histogram(np.array([7, 0]))})
    assert one_code == {"code_perplexity": 1.0, "code_entropy": 0.0, "codes_used": 1.0}
    same = jnp.full((100, 4), 1.7)  # a collapsed encoder
    assert summarize({"feature_std": Spread.of(same)})["feature_std"] < 2e-3
    assert summarize({"accuracy": Mean.of(jnp.array([True, False]))}) == {"accuracy": 0.5}
