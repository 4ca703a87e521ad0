"""The codebook against the official quantizer's stored outputs (probabilities' tolerance: 1e-5)."""

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest

from beats_jax.models import quantizer

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def stored():
    with np.load(official.FIXTURES / "quantizer_train.npz") as arrays:
        return dict(arrays)


def assert_close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=TOLERANCE)


def official_loss(z, codebook, cotangent):
    """The fixture's: the quantized output against a cotangent, plus the mean commitment."""
    quantized = quantizer.quantize(z, codebook)
    commitment = jnp.mean(quantized.distance) / z.shape[-1]
    return jnp.sum(quantized.codes * cotangent) + commitment, (quantized, commitment)


@pytest.mark.usefixtures("strict_promotion")
def test_three_steps_and_an_evaluation(stored):
    codebook = jnp.asarray(stored["ema/weight0"])
    usage = jnp.asarray(stored["ema/cluster_size0"])
    everywhere = jnp.ones(30, bool)
    for step in range(3):
        z = stored["ema/z"][step]
        grad, (quantized, loss) = jax.grad(official_loss, has_aux=True)(
            jnp.asarray(z), codebook, jnp.asarray(stored["ema/cotangent"])
        )
        want = {k.split("/")[-1]: v for k, v in stored.items() if k.startswith(f"ema/step{step}/")}
        np.testing.assert_array_equal(quantized.ids.reshape(-1), want["idx"])
        assert_close(quantized.codes, want["zq"])
        assert_close(loss, want["loss"])
        assert_close(grad, want["grad_z"])
        stats = quantizer.code_statistics(
            quantized.unit.reshape(30, -1), quantized.ids.reshape(-1), everywhere, len(codebook)
        )
        codebook = quantizer.move_codes(codebook, **stats, decay=0.99)
        usage = quantizer.move_usage(usage, stats["counts"], decay=0.99)
        assert_close(codebook, want["weight"])
        assert_close(usage, want["cluster_size"])
    _, (quantized, loss) = official_loss(jnp.asarray(stored["ema/z"][0]), codebook, 0.0)
    np.testing.assert_array_equal(quantized.ids.reshape(-1), stored["ema/eval/idx"])
    assert_close(quantized.codes, stored["ema/eval/zq"])
    assert_close(loss, stored["ema/eval/loss"])


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_kmeans(stored, iterations):
    where = jnp.ones(200, bool)
    data, means = jnp.asarray(stored["kmeans/data"]), jnp.asarray(stored["kmeans/init"])
    means, bins = jax.jit(quantizer.kmeans_from, static_argnums=3)(means, data, where, iterations)
    name = "kmeans" if iterations == 10 else f"kmeans/iter{iterations}"
    assert_close(means, stored[f"{name}/means"])
    np.testing.assert_array_equal(bins, stored[f"{name}/bins"])
    assert np.sum(stored[f"{name}/bins"] == 0) >= 1  # an empty cluster keeps its mean


def test_padding_takes_no_part():
    rng = np.random.default_rng(0)
    unit = quantizer.l2_normalise(jnp.asarray(rng.standard_normal((60, 8), np.float32)))
    where = jnp.arange(60) < 40
    noisy = jnp.where(where[:, None], unit, 99.0)
    key = jax.random.key(0)
    for k in (5, 40):
        means, bins = quantizer.kmeans(key, noisy, where, k)
        assert bins.sum() == 40
        assert_close(jnp.linalg.norm(means, axis=1), np.ones(k))
        assert jnp.max(means) <= 1
        if k == 40:  # from 40 distinct vectors, each its own cluster
            np.testing.assert_array_equal(bins, np.ones(40))
    again, _ = quantizer.kmeans(key, noisy, where, 5)
    np.testing.assert_array_equal(again, quantizer.kmeans(key, noisy, where, 5)[0])
    other, _ = quantizer.kmeans(jax.random.key(1), noisy, where, 5)
    assert np.any(np.asarray(other) != np.asarray(again))
    ids = quantizer.quantize(unit, means).ids
    stats = quantizer.code_statistics(noisy, ids, where, 40)
    assert stats["counts"].sum() == 40 and jnp.all(jnp.isfinite(stats["sums"]))
    assert jnp.max(jnp.abs(stats["sums"])) < 10


def test_fewer_vectors_than_codes_is_no_disaster():
    unit = quantizer.l2_normalise(jnp.asarray(np.random.default_rng(0).standard_normal((6, 4))))
    means, bins = quantizer.kmeans(jax.random.key(0), unit, jnp.ones(6, bool), 16)
    assert jnp.all(jnp.isfinite(means)) and bins.sum() == 6


def test_zero_vectors_have_finite_gradients():
    codebook = quantizer.l2_normalise(jnp.asarray(np.eye(4, dtype=np.float32)))
    grad = jax.grad(lambda z: jnp.sum(quantizer.quantize(z, codebook).codes))(jnp.zeros((2, 4)))
    assert jnp.all(jnp.isfinite(grad))


def test_dead_codes_start_again_where_vectors_are():
    rng = np.random.default_rng(0)
    unit = quantizer.l2_normalise(jnp.asarray(rng.standard_normal((64, 8), np.float32)))
    where = jnp.arange(64) < 50
    noise = jax.random.uniform(jax.random.key(0), (64,))
    candidates = quantizer.candidate_sums(noise, unit, where, 4, num_vectors=1)
    assert_close(candidates.sum(0), unit[:50].sum(0))  # as many places as codes, at least
    few = quantizer.candidate_sums(noise, unit, where, 4, num_vectors=64)
    inside = (np.asarray(noise) * 64 < 4) & np.asarray(where)
    assert 0 < inside.sum() < 16
    assert_close(few.sum(0), unit[inside].sum(0))
    codebook = jnp.eye(4, 8)
    usage = jnp.asarray([5.0, 0.0, 5.0, 0.5])
    candidates = candidates.at[3].set(0.0)  # nothing fell there
    moved, after = quantizer.revive(codebook, usage, candidates, below=1.0)
    np.testing.assert_array_equal(moved[jnp.array([0, 2, 3])], codebook[jnp.array([0, 2, 3])])
    assert_close(moved[1], quantizer.l2_normalise(candidates[1]))
    np.testing.assert_array_equal(after, [5.0, 1.0, 5.0, 0.5])
