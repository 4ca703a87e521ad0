"""The GPU kernels against `encoder.attend`: interpreted on a CPU, compiled where there is a GPU.

On a machine with one: BEATS_JAX_TEST_PLATFORM=cuda pytest tests/test_fused_attention.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beats_jax import sharding
from beats_jax.models import fused_attention
from beats_jax.models.beats import BEATs
from beats_jax.models.encoder import attend
from beats_jax.models.fused_attention import LEVELS, _dropout, _Tile, fused_attend

ON_GPU = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU: BEATS_JAX_TEST_PLATFORM=cuda")


def arguments(batch: int, length: int, heads: int, dim: int, dtype: Any = jnp.float32) -> Any:
    """q, k, v, gate and bias; which tokens are padding; the result's gradient; seeds."""
    keys = jax.random.split(jax.random.key(length), 7)
    q, k, v, dout = (
        jax.random.normal(key, (batch, length, heads, dim)).astype(dtype) for key in keys[:4]
    )
    gate = 2 * jax.random.uniform(keys[4], (batch, heads, length))
    bias = 2 * jax.random.normal(keys[5], (1, heads, length, length))
    padding = jnp.arange(length)[None] >= length - length // 10 * jnp.arange(batch)[:, None]
    seed = jax.random.bits(keys[6], (batch, heads), jnp.uint32)
    return (q * dim**-0.5, k, v, gate, bias), padding, dout, seed


def kept(seed: jax.Array, length: int, rate: float) -> jax.Array:
    """What the kernels' dropout keeps, bool [B, H, L, L]."""
    all_of_them = _Tile(None, jnp.arange(length), jnp.ones(length, bool))
    ones = jnp.ones((length, length))

    def of_one(seed):
        return _dropout(seed, all_of_them, all_of_them, length, round(rate * LEVELS))(ones) > 0

    return jax.vmap(jax.vmap(of_one))(seed)


def plain(args: Any, padding: jax.Array, seed: jax.Array, rate: float) -> jax.Array:
    def drop(probs):
        scale = LEVELS / (LEVELS - round(rate * LEVELS))
        return jnp.where(kept(seed, probs.shape[-1], rate), probs * scale, 0.0).astype(probs.dtype)

    with jax.default_matmul_precision("highest"):
        return attend(*args, padding_mask=padding, drop=drop)


def assert_close(got: Any, wanted: Any, limit: float) -> None:
    """By the norm of the difference, of what `with_gradients` gives."""
    for name, x, y in zip(("out", "q", "k", "v", "gate", "bias"), got, wanted, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < limit, (name, error)


def with_gradients(function: Any, args: Any, dout: jax.Array) -> Any:
    out, back = jax.vjp(function, args)
    return out, *back(dout)[0]


# In whole tiles of 64 and not, in one and in several.
@pytest.mark.skipif(ON_GPU, reason="interpreted on a CPU")
@pytest.mark.parametrize(
    ("length", "rate", "dtype"),
    [(40, 0.0, jnp.float32), (128, 0.1, jnp.float32), (140, 0.1, jnp.bfloat16)],
)
def test_result_and_gradients_are_those_of_attend(length, rate, dtype):
    args, padding, dout, seed = arguments(3, length, 2, 16, dtype)

    def fused(args):
        return fused_attend(*args, padding_mask=padding, seed=seed, rate=rate, interpret=True)

    got = with_gradients(fused, args, dout)
    exact, exact_dout = jax.tree.map(lambda x: x.astype(jnp.float32), (args, dout))
    wanted = with_gradients(lambda args: plain(args, padding, seed, rate), exact, exact_dout)
    for x, given in zip(got, (dout, *args), strict=True):
        assert x.shape == given.shape and x.dtype == given.dtype
    assert_close(got, wanted, 1e-6 if dtype == jnp.float32 else 1e-2)


@pytest.mark.skipif(ON_GPU, reason="interpreted on a CPU")
def test_without_gate_and_padding():
    (q, k, v, _, bias), _, _, seed = arguments(2, 70, 2, 16)
    got = fused_attend(q, k, v, None, bias, None, interpret=True)
    wanted = plain((q, k, v, None, bias), None, seed, 0.0)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_dropout_drops_its_share_everywhere_and_nowhere_the_same():
    seed = jax.random.bits(jax.random.key(0), (4, 3), jnp.uint32)
    masks = np.asarray(kept(seed, 496, 0.1))
    share = 1 - 26 / 256
    spread = np.sqrt(share * (1 - share))
    for axes, count in (((2, 3), 496**2), ((0, 1, 2), 12 * 496), ((0, 1, 3), 12 * 496)):
        far = np.abs(masks.mean(axis=axes) - share).max()
        assert far < 5 * spread / np.sqrt(count), axes
    for one in (masks, masks[..., 1:], masks[:, :, 1:]):
        other = one[::-1] if one is masks else masks[..., : one.shape[2], : one.shape[3]]
        together = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(together) < 5 / np.sqrt(one.size)


@pytest.mark.skipif(ON_GPU, reason="wants 8 devices")
@pytest.mark.parametrize("tensor", [1, 2])
def test_on_a_mesh_every_device_takes_its_clips_and_heads(tensor):
    args, padding, dout, seed = arguments(4, 70, 2, 16)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=tensor, devices=jax.devices()[: 4 * tensor])
    batch = jax.sharding.NamedSharding(mesh, sharding.BATCH)

    def gradients(args, padding, seed, dout):
        def fused(args):
            return fused_attend(*args, padding_mask=padding, seed=seed, rate=0.1, interpret=True)

        return with_gradients(fused, args, dout)

    alone = jax.jit(gradients)(args, padding, seed, dout)
    *rows, bias = args
    rows, padding, seed, dout = jax.device_put((rows, padding, seed, dout), batch)
    args = (*rows, jax.device_put(bias, sharding.replicated(mesh)))
    compiled = jax.jit(sharding.on(mesh, gradients)).lower(args, padding, seed, dout).compile()
    if tensor == 1:
        assert "all-gather" not in str(compiled.as_text())  # nobody fetches others' clips
    for x, y in zip(compiled(args, padding, seed, dout), alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(ON_GPU, reason="there is one")
def test_nothing_but_a_gpu_takes_them():
    args, *_ = arguments(1, 8, 2, 32, jnp.bfloat16)
    assert not fused_attention.supported(args[0], args[4])


# --- compiled -------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize(("length", "rate"), [(496, 0.1), (496, 0.0), (248, 0.1), (40, 0.0)])
def test_compiled_kernels_against_float32(length, rate):
    args, padding, dout, seed = arguments(8, length, 12, 64, jnp.bfloat16)
    assert fused_attention.supported(args[0], args[4])

    @jax.jit
    def fused(args, dout):
        def attention(args):
            return fused_attend(*args, padding_mask=padding, seed=seed, rate=rate)

        return with_gradients(attention, args, dout)

    @jax.jit
    def exact(args, dout):
        args, dout = jax.tree.map(lambda x: x.astype(jnp.float32), (args, dout))
        return with_gradients(lambda args: plain(args, padding, seed, rate), args, dout)

    got, again, wanted = fused(args, dout), fused(args, dout), exact(args, dout)
    jax.tree.map(np.testing.assert_array_equal, got, again)
    assert_close(got, wanted, 1e-2)


@needs_gpu
@pytest.mark.parametrize("remat", ["", "dots_with_no_batch_dims_saveable"])
def test_a_model_computes_the_same_with_and_without_them(remat):
    def gradients(fused):
        model = BEATs(
            num_layers=2,
            embed_dim=128,
            ffn_dim=256,
            num_heads=2,
            patch_dim=64,
            dtype=jnp.bfloat16,
            remat=remat,
            fused_attention=fused,
        )
        patches = jax.random.normal(jax.random.key(1), (4, 248, 256))
        params = model.init(jax.random.key(0), patches)["params"]

        def loss(params):
            features: Any = model.apply(
                {"params": params},
                patches,
                deterministic=False,
                rngs={"dropout": jax.random.key(2)},
            )
            return jnp.mean(jnp.square(features.astype(jnp.float32) - patches[..., :128]))

        return jax.jit(jax.value_and_grad(loss))(params)

    (loss, grads), (loss_plain, grads_plain) = gradients(True), gradients(False)
    assert loss == pytest.approx(loss_plain, rel=1e-3)
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(grads_plain)))
    apart = jax.tree.map(lambda x, y: float(jnp.sum((x - y) ** 2)), grads, grads_plain)
    assert np.sqrt(sum(jax.tree.leaves(apart))) < 2e-2 * norm
