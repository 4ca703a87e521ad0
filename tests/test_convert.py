"""Official checkpoints to our parameters: strict about keys, shapes and settings."""

from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest

from beats_jax.convert import encoder_from_official
from beats_jax.models.beats import PRESETS, BEATs

TABLE = "encoder.layers.2.self_attn.relative_attention_bias.weight"


@pytest.fixture
def checkpoint():
    return official.state_dict("dev_encoder")


def test_every_leaf_is_filled_and_every_weight_is_used(checkpoint):
    cfg, state = checkpoint
    kwargs, params = encoder_from_official(state, cfg)
    model = BEATs(**kwargs)
    assert (model.num_layers, model.embed_dim, model.patch_dim) == (3, 48, 32)
    assert (model.max_distance, model.gated, model.deep_norm) == (800, True, True)
    assert model.layerdrop == 0.05
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 256)))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    once = {
        key: value for key, value in state.items() if "attention_bias" not in key or ".0." in key
    }
    ours = np.sort(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)]))
    np.testing.assert_array_equal(ours, np.sort(np.concatenate([v.ravel() for v in once.values()])))
    leaves: Any = flax.traverse_util.flatten_dict(params, sep="/")
    np.testing.assert_array_equal(
        leaves["encoder/layers_1/fc1/kernel"], state["encoder.layers.1.fc1.weight"].T
    )
    # pixel i, j of the official kernel is input 16 i + j of ours
    pixel = state["patch_embedding.weight"][:, 0, 3, 5]
    np.testing.assert_array_equal(leaves["patch_embedding/kernel"][16 * 3 + 5], pixel)


def test_new_names_of_the_weight_norm_and_espnet_helpers(checkpoint):
    cfg, state = checkpoint
    _, want = encoder_from_official(state, cfg)
    conv = "encoder.pos_conv.0"
    renamed = {
        key.replace(f"{conv}.weight_g", f"{conv}.parametrizations.weight.original0").replace(
            f"{conv}.weight_v", f"{conv}.parametrizations.weight.original1"
        ): value
        for key, value in state.items()
    }
    assert renamed.keys() != state.keys()
    renamed["patch_embedding_pad.weight"] = np.ones((1, 1, 16, 16))
    renamed["raw2fbank_pad.weight"] = np.ones((1, 1, 400))
    jax.tree.map(np.testing.assert_array_equal, encoder_from_official(renamed, cfg)[1], want)


def test_released_settings_are_our_base():
    """The cfg of BEATs_iter3_plus_AS2M as dumped by third parties (method.md section 4)."""
    cfg = official.state_dict("dev_encoder")[0] | dict(
        embed_dim=512,
        encoder_layers=1,  # of 12, to be quick
        encoder_embed_dim=768,
        encoder_ffn_embed_dim=3072,
        encoder_attention_heads=12,
        encoder_layerdrop=0.0,
    )
    kwargs, _ = encoder_from_official(official.random_state(np.random.default_rng(0), cfg), cfg)
    base: dict[str, Any] = PRESETS["base"] | {"num_layers": 1}
    assert BEATs(**kwargs) == BEATs(**base)


def test_a_cfg_that_is_silent_means_the_official_defaults():
    sizes = "layers", "embed_dim", "ffn_embed_dim", "attention_heads"
    cfg = official.state_dict("dev_encoder")[0]
    silent = {key: cfg[key] for key in ("embed_dim", "input_patch_size")}
    silent |= {f"encoder_{key}": cfg[f"encoder_{key}"] for key in sizes}
    plain = cfg | dict(relative_position_embedding=False, gru_rel_pos=False)
    state = official.random_state(np.random.default_rng(0), plain)
    model = BEATs(**encoder_from_official(state, silent)[0])
    assert (model.deep_norm, model.relative_position, model.gated) == (False, False, False)
    assert (model.dropout, model.attention_dropout, model.max_distance) == (0.1, 0.1, 1280)


def drop(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: drop(s, "encoder.layers.1.fc1.bias"),
            r"missing: \['encoder\.layers\.1\.fc1\.bias",
        ),
        (lambda s: drop(s, "encoder.pos_conv.0.weight_g"), r"missing: .*weight_g"),
        (lambda s: s | {"predictor.weight": np.zeros((527, 48))}, r"unknown: \['predictor\.weight"),
        (lambda s: s | {"layer_norm.weight": np.zeros(33)}, r"layer_norm\.weight is \(33,\)"),
        (lambda s: s | {TABLE: s[TABLE] + 1}, r"layers\.2.* differs from encoder\.layers\.0"),
    ],
)
def test_a_checkpoint_that_does_not_fit(checkpoint, change, message):
    cfg, state = checkpoint
    with pytest.raises(ValueError, match=message):
        encoder_from_official(change(state), cfg)


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(activation_fn="glu"), "activation_fn 'glu' is not supported"),
        (dict(activation_fn="gelu_accurate"), "activation_fn 'gelu_accurate' is not supported"),
        (dict(input_patch_size=8), "input_patch_size is 8; want 16"),
        (dict(encoder_layers=2), r"unknown: \['encoder\.layers\.2\."),
        (dict(encoder_layers=4), r"missing: \['encoder\.layers\.3\."),
    ],
)
def test_settings_that_do_not_fit(checkpoint, setting, message):
    cfg, state = checkpoint
    with pytest.raises(ValueError, match=message):
        encoder_from_official(state, cfg | setting)
