"""The models as a whole: sizes, what the encoder may see, the predictor, the token masks."""

from functools import cache, partial
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beats_jax.masking import Visible, random_masking
from beats_jax.models.beats import (
    PRESETS,
    BEATs,
    Predictor,
    official_token_mask,
    token_padding_mask,
)

LENGTHS = [48, 32, 8, 0]  # valid tokens of the rows


@pytest.fixture(autouse=True)
def strict(strict_promotion):
    with jax.default_matmul_precision("highest"):
        yield


@cache
def inputs() -> tuple[jax.Array, jax.Array, Visible, jax.Array]:
    """Patches, padding mask, visible tokens and hidden mask of a ragged batch."""
    key_patches, key_mask = jax.random.split(jax.random.key(0))
    patches = jax.random.normal(key_patches, (len(LENGTHS), 48, 256))
    padding_mask = jnp.arange(48)[None] >= jnp.array(LENGTHS)[:, None]
    visible, hidden = random_masking(jax.random.uniform(key_mask, (4, 48)), padding_mask)
    return patches, padding_mask, visible, hidden


@cache
def models(mask_token: str = "learned") -> tuple[Any, Any, Any]:
    """The tiny encoder, a predictor for it, and the parameters of both."""
    encoder: Any = BEATs(**PRESETS["tiny"])
    predictor: Any = Predictor(
        **encoder.settings() | dict(num_layers=2, num_classes=32, mask_token=mask_token)
    )
    patches, padding_mask, visible, _ = inputs()

    @jax.jit
    def init(key):
        x, encoder_params = encoder.init_with_output(key, patches, visible=visible)
        return encoder_params, predictor.init(key, x, visible, 48, padding_mask)

    encoder_params, predictor_params = init(jax.random.key(1))
    noisy = jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), predictor_params
    )
    return encoder, predictor, (encoder_params, noisy)


def logits_of(params, patches, visible, padding_mask, mask_token="learned"):
    encoder, predictor, _ = models(mask_token)
    x = encoder.apply(params[0], patches, visible=visible)
    return predictor.apply(params[1], x, visible, patches.shape[1], padding_mask)


def count(model: Any, *args) -> int:
    shapes = jax.eval_shape(lambda key: model.init(key, *args), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_sizes():
    patches = jnp.zeros((1, 8, 256))
    assert BEATs() == BEATs(**PRESETS["base"])
    assert count(BEATs(**PRESETS["base"]), patches) == 90_311_792
    assert count(BEATs(**PRESETS["large"]), patches) == 311_376_576
    assert count(BEATs(**PRESETS["tiny"]), patches) < 300_000
    assert count(BEATs(**PRESETS["small"]), patches) < 3_000_000
    visible = Visible(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    predictor = count(Predictor(), jnp.zeros((1, 2, 768)), visible, 8)
    # connector, three layers without their own tables, one table, mask token, LayerNorm, head
    layers = 3 * 7_088_404 + 320 * 12
    assert predictor == 768 * 769 + layers + 768 + 2 * 768 + 769 * 1024


def test_parameter_names():
    _, _, params = models()
    encoder, predictor = (
        {"/".join(path[1:]) for path in flax.traverse_util.flatten_dict(p)} for p in params
    )
    assert {name for name in encoder if "layers_1" not in name} == {
        "patch_embedding/kernel",
        "layer_norm/scale",
        "layer_norm/bias",
        "encoder/pos_conv/weight_g",
        "encoder/pos_conv/weight_v",
        "encoder/pos_conv/bias",
        "encoder/layer_norm/scale",
        "encoder/layer_norm/bias",
        "encoder/relative_attention_bias/embedding",
        "encoder/layers_0/self_attn/grep_a",
        *(
            f"encoder/layers_0/self_attn/{name}/{leaf}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj", "grep_linear")
            for leaf in ("kernel", "bias")
        ),
        *(
            f"encoder/layers_0/{name}/{leaf}"
            for name in ("self_attn_layer_norm", "final_layer_norm")
            for leaf in ("scale", "bias")
        ),
        *(
            f"encoder/layers_0/{name}/{leaf}"
            for name in ("fc1", "fc2")
            for leaf in ("kernel", "bias")
        ),
    }  # no post_extract_proj: patch_dim is embed_dim
    own = {name for name in predictor if "layers_" not in name}
    head = {"layer_norm/scale", "layer_norm/bias", "head/kernel", "head/bias"}
    bias = {"relative_attention_bias/embedding"}
    assert own == head | bias | {"connector/kernel", "connector/bias", "mask_token"}
    zeros = flax.traverse_util.flatten_dict(models("zeros")[2][1])
    assert {"/".join(p[1:]) for p in zeros if "layers_" not in "/".join(p)} == head | bias


def test_visible_tokens_alone_are_the_grid_with_the_others_padded():
    """One pass over the visible tokens = the full pass with hidden ones zeroed and never keys."""
    patches, padding_mask, visible, hidden = inputs()
    encoder, _, (params, _) = models()
    got = jax.jit(lambda p: encoder.apply(p, patches, visible=visible))(params)
    # The convolution counts its input L / K times where only K of L tokens are there.
    dense = jax.tree.map(lambda x: x, params)
    dense["params"]["encoder"]["pos_conv"]["weight_g"] *= patches.shape[1] / got.shape[1]
    full = jax.jit(lambda p: encoder.apply(p, patches, hidden | padding_mask))(dense)
    want = jnp.take_along_axis(full, visible.index[..., None], 1)
    valid = np.asarray(visible.valid)
    assert got.shape == (4, 12, 64)
    np.testing.assert_allclose(got[valid], want[valid], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got[~valid], 0.0)
    assert float(jnp.abs(got[valid]).max()) > 1


def test_compact_closes_the_gaps():
    patches, _, visible, _ = inputs()
    encoder, _, (params, _) = models()
    kept = jnp.take_along_axis(patches, visible.index[..., None], 1)
    got = jax.jit(lambda p: encoder.apply(p, patches, visible=visible, compact=True))(params)
    want = jax.jit(lambda p: encoder.apply(p, kept, ~visible.valid))(params)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    true = jax.jit(lambda p: encoder.apply(p, patches, visible=visible))(params)
    assert float(jnp.abs(got - true).max()) > 1e-3


@pytest.mark.parametrize("mask_token", ["learned", "zeros"])
def test_hidden_patches_do_not_leak(mask_token):
    patches, padding_mask, visible, hidden = inputs()
    params = models(mask_token)[2]
    token_ids = jax.random.randint(jax.random.key(5), (4, 48), 0, 32)

    def loss(params, patches):
        logits = logits_of(params, patches, visible, padding_mask, mask_token)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), token_ids[..., None], 2)[..., 0]
        return jnp.mean(nll, where=hidden), logits

    step = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))
    (_, logits), pixels = step(params, patches)
    seen = np.asarray(~hidden & ~padding_mask)
    np.testing.assert_array_equal(pixels[~seen], 0.0)
    assert np.all(np.abs(np.asarray(pixels)[seen]).max(-1) > 0)
    other = jnp.where(seen[..., None], patches, 100.0 * jnp.ones_like(patches))
    (_, changed), _ = step(params, other)
    np.testing.assert_array_equal(logits, changed)
    (_, moved), _ = step(params, patches + 0.1)
    assert float(jnp.abs(moved - logits).max()) > 1e-3


def test_a_row_of_a_ragged_batch_is_what_it_is_alone():
    patches, padding_mask, visible, _ = inputs()
    params = models()[2]
    together = jax.jit(logits_of)(params, patches, visible, padding_mask)
    assert together.shape == (4, 48, 32) and together.dtype == jnp.float32
    assert bool(jnp.isfinite(together).all())
    for row, tokens in enumerate(LENGTHS[:3]):
        part = slice(row, row + 1)
        alone = Visible(visible.index[part, : tokens // 4], visible.valid[part, : tokens // 4])
        logits = jax.jit(logits_of)(params, patches[part, :tokens], alone, None)
        np.testing.assert_allclose(together[part, :tokens], logits, rtol=0, atol=2e-5)


def test_predictor_tells_hidden_places_apart_by_position():
    patches, padding_mask, visible, hidden = inputs()
    for mask_token in ("learned", "zeros"):
        forward = jax.jit(partial(logits_of, mask_token=mask_token))
        logits = forward(models(mask_token)[2], patches, visible, padding_mask)
        at_hidden = np.asarray(logits[0])[np.asarray(hidden[0])]
        assert len(np.unique(at_hidden.round(4), axis=0)) == len(at_hidden)


def test_exact_token_mask():
    num_samples = jnp.array([0, 399, 2799, 2800, 5359, 5360, 16000, 160000])
    mask = token_padding_mask(num_samples, 496)
    np.testing.assert_array_equal((~mask).sum(1), [0, 0, 0, 8, 8, 16, 48, 496])
    assert not np.any(np.diff(np.asarray(mask).astype(int), axis=1) < 0)  # right-padding


def test_official_token_mask_wants_a_mask_of_samples():
    assert official_token_mask(np.zeros((2, 98), bool), 98).shape == (2, 48)
    with pytest.raises(ValueError, match="97 samples for 98 frames"):
        official_token_mask(np.zeros((2, 97), bool), 98)


def test_bad_arguments():
    visible = inputs()[2]
    tiny: Any = BEATs(**PRESETS["tiny"])
    with pytest.raises(ValueError, match=r"want \[B, L, 256\]"):
        jax.eval_shape(tiny.init, jax.random.key(0), jnp.zeros((1, 98, 128)))
    predictor: Any = Predictor(**tiny.settings() | dict(num_layers=1, mask_token="mean"))
    with pytest.raises(ValueError, match="mask_token is 'mean'; want 'learned' or 'zeros'"):
        jax.eval_shape(
            lambda x: predictor.init(jax.random.key(0), x, visible, 48), jnp.zeros((4, 12, 64))
        )
