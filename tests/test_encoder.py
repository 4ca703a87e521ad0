"""Parts of the encoder: positions, attention, layers, their initialisation and randomness."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from beats_jax.masking import gather_rows, random_masking, scatter_rows
from beats_jax.models import encoder as encoder_module
from beats_jax.models.dropout import Dropout
from beats_jax.models.encoder import (
    Encoder,
    SelfAttention,
    attend,
    attend_in_parts,
    deep_norm_constants,
)
from beats_jax.models.position import (
    PositionalConv,
    RelativePositionBias,
    relative_position_buckets,
)

SIZES: dict[str, Any] = dict(num_layers=2, embed_dim=32, ffn_dim=64, num_heads=4)


@pytest.fixture(autouse=True)
def strict(strict_promotion):
    with jax.default_matmul_precision("highest"):
        yield


def visible_of(batch, length, lengths=None, seed=0):
    padding_mask = jnp.arange(length)[None] >= jnp.asarray(lengths or [length] * batch)[:, None]
    return random_masking(jax.random.uniform(jax.random.key(seed), (batch, length)), padding_mask)[
        0
    ]


def make(x, **kwargs) -> tuple[Any, Any]:
    model: Any = Encoder(**SIZES | kwargs)
    return model, jax.jit(model.init)(jax.random.key(0), x)


def noise(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


# Positions


def test_buckets():
    distance = [-80, -83, -1, 0, 1, 79, 80, 85, 100, 200, 495, 5000]
    want = [80, 81, 1, 0, 161, 239, 240, 242, 247, 271, 303, 319]  # method.md 4.3
    np.testing.assert_array_equal(relative_position_buckets(np.array(distance)), want)
    used = relative_position_buckets(np.arange(-495, 496))
    assert len(np.unique(used)) == 287


def direct_conv(params, x, kernel_size, groups):
    """The convolution as it is defined, by XLA's."""
    v = params["weight_v"]
    kernel = v * (params["weight_g"] / jnp.sqrt(jnp.sum(v**2, axis=(1, 2))))[:, None, None]
    out = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,),
        padding=[(kernel_size // 2, (kernel_size - 1) // 2)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )
    return jax.nn.gelu(out + params["bias"][None, None], approximate=False)


@pytest.mark.parametrize("length, kernel_size", [(8, 128), (48, 128), (200, 128), (50, 31), (7, 6)])
def test_positional_conv_is_the_convolution(length, kernel_size):
    conv: Any = PositionalConv(kernel_size, groups=4)
    x = noise(2, length, 16)
    params = jax.jit(conv.init)(jax.random.key(0), x)["params"]
    params["weight_g"] = params["weight_g"] * jnp.linspace(0.5, 20.0, kernel_size)
    params["bias"] = noise(16, seed=3)
    weights = noise(2, length, 16, seed=2)

    def ours(params, x):
        out = conv.apply({"params": params}, x)
        return jnp.sum(weights * out), out

    def direct(params, x):
        out = direct_conv(params, x, kernel_size, 4)
        return jnp.sum(weights * out), out

    (_, got), got_grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(params, x)
    (_, want), want_grads = jax.jit(jax.value_and_grad(direct, (0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_positional_conv_is_the_same_for_few_and_many_clips():
    """On a CPU two clips are convolved directly, three by Fourier transforms."""
    conv: Any = PositionalConv(128, 4)
    x = noise(3, 40, 16)
    params = conv.init(jax.random.key(0), x)
    alone = jax.jit(lambda x: conv.apply(params, x, forward_only=True))
    np.testing.assert_allclose(alone(x[:2]), alone(x)[:2], atol=2e-6)
    assert "conv_general_dilated" in str(jax.make_jaxpr(alone)(x[:2]))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(alone)(x))


def test_positional_conv_on_a_grid_with_holes():
    conv: Any = PositionalConv(groups=4)
    visible = visible_of(3, 96, [96, 64, 8])
    rows = gather_rows(noise(3, 96, 16), visible)
    params = jax.jit(conv.init)(jax.random.key(0), rows)
    apply = jax.jit(conv.apply, static_argnums=3)
    want = gather_rows(apply(params, scatter_rows(rows, visible, 96)), visible)
    share = rows.shape[1] / 96  # each row counts 1 / share times where there are holes
    got = apply(params, rows * share, visible.index, 96)
    valid = np.asarray(visible.valid)
    np.testing.assert_allclose(got[valid], want[valid], rtol=0, atol=1e-6)
    closed_up = apply(params, rows)
    assert float(jnp.abs(closed_up - want)[valid].max()) > 1e-3


def test_weight_norm_starts_at_the_drawn_weights():
    conv: Any = PositionalConv()
    params = jax.jit(conv.init)(jax.random.key(0), jnp.zeros((1, 8, 256)))["params"]
    assert params["weight_v"].shape == (128, 16, 256)
    np.testing.assert_allclose(params["weight_v"].std(), np.sqrt(4 / (128 * 256)), rtol=0.01)
    tap_norms = jnp.linalg.norm(params["weight_v"].reshape(128, -1), axis=1)
    np.testing.assert_allclose(params["weight_g"], tap_norms, rtol=1e-5)


def test_position_bias_is_the_table_at_the_bucketed_distance():
    table: Any = RelativePositionBias(num_heads=4)
    params = table.init(jax.random.key(0), 40)
    embedding = np.asarray(params["params"]["embedding"])
    assert embedding.shape == (320, 4)
    place = np.arange(200)
    full = embedding[relative_position_buckets(place[None] - place[:, None])]  # [query, key, H]
    np.testing.assert_array_equal(table.apply(params, 200)[0], np.moveaxis(full, -1, 0))

    visible = visible_of(2, 200)
    got = np.asarray(table.apply(params, 200, visible.index))
    assert got.shape == (2, 4, 50, 50)
    for row, index in zip(got, np.asarray(visible.index), strict=True):
        np.testing.assert_array_equal(row, np.moveaxis(full[np.ix_(index, index)], -1, 0))


def test_position_bias_gradient_counts_the_pairs():
    table: Any = RelativePositionBias(num_heads=2)
    visible = visible_of(2, 64)
    params = table.init(jax.random.key(0), 64)

    def total(params):
        return jnp.sum(table.apply(params, 64, visible.index))

    counts = np.zeros(320)
    for index in np.asarray(visible.index):
        np.add.at(counts, relative_position_buckets(index[None] - index[:, None]), 1)
    gradient = jax.grad(total)(params)["params"]["embedding"]
    np.testing.assert_allclose(gradient, np.stack([counts] * 2, 1), rtol=1e-6)


def test_local_bias_falls_with_the_distance_in_the_patch_grid():
    table: Any = RelativePositionBias(num_heads=4, bias_init="local")
    bias = np.asarray(table.apply(table.init(jax.random.key(0), 248), 248))[0]
    query = 8 * 15 + 3
    here, band, column, far = (bias[:, query, key] for key in (query, query + 1, query + 8, 3))
    assert np.all(here > band - 0.1) and np.all(np.abs(band - column) < 0.2)
    assert np.all(band - far > 0.5)
    slopes = here - column
    assert np.all(np.diff(slopes) < 0) and slopes[0] / slopes[-1] > 4  # sharp heads, then broad
    # 7 tokens on is one column later and one band down, or 7 bands up: taken as the nearer one
    np.testing.assert_allclose(here - bias[:, query, query + 7], slopes * np.sqrt(2), atol=0.2)


# Attention and layers


def test_deep_norm_constants():
    for layers, alpha, beta in [
        (12, 2.213364, 0.319472),
        (24, 2.632148, 0.268643),
        (3, 1.565085, 0.451801),
        (2, 1.414214, 0.5),
    ]:
        np.testing.assert_allclose(deep_norm_constants(layers), (alpha, beta), rtol=2e-6)


@pytest.mark.parametrize("own_bias", [False, True])
@pytest.mark.parametrize("heads_at_once", [1, 2, 3])
def test_attention_in_parts_is_attention(own_bias, heads_at_once, monkeypatch):
    batch, length, heads, dim = 3, 10, 4, 8
    monkeypatch.setattr(encoder_module, "SCORES_AT_ONCE", heads_at_once * length**2)
    q, k, v = (noise(batch, length, heads, dim, seed=i) for i in range(3))
    gate, bias = noise(batch, heads, length), noise(3 if own_bias else 1, heads, length, length)
    padding_mask = jnp.arange(length)[None] >= jnp.array([10, 7, 0])[:, None]
    for inputs in (gate, bias, padding_mask), (None, bias, None), (None, None, padding_mask):
        parts = jax.jit(attend_in_parts)(q, k, v, *inputs)
        np.testing.assert_allclose(parts, jax.jit(attend)(q, k, v, *inputs), atol=1e-6)
    text = str(jax.make_jaxpr(attend_in_parts)(q, k, v, gate, bias, padding_mask))
    assert text.count("scan") >= 2, "all heads at once"


def test_gate_starts_at_seven_quarters():
    attention: Any = SelfAttention(num_heads=4)
    x, bias = jnp.zeros((1, 6, 32)), noise(1, 4, 6, 6)
    params = attention.init(jax.random.key(0), x, bias, None, True)
    scores = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "softmax", lambda s, axis: scores.setdefault("s", s))
        attention.apply(params, x, bias, None, False)  # True: traced, for any platform
    np.testing.assert_allclose(scores["s"], 1.75 * bias, rtol=1e-6)  # queries are zero


def test_initialisation():
    x = jnp.zeros((1, 8, 256))
    model: Any = Encoder(num_layers=3, embed_dim=256, ffn_dim=512, num_heads=4)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    layer = params["layers_1"]
    _, beta = deep_norm_constants(3)
    square, ffn = np.sqrt(2 / 512), np.sqrt(2 / 768)
    for name, std in {
        "q_proj": square,
        "k_proj": square,
        "v_proj": square * beta,
        "out_proj": square * beta,
        "grep_linear": 0.02,
    }.items():
        np.testing.assert_allclose(layer["self_attn"][name]["kernel"].std(), std, rtol=0.1)
        np.testing.assert_array_equal(layer["self_attn"][name]["bias"], 0.0)
    for name in ("fc1", "fc2"):
        np.testing.assert_allclose(layer[name]["kernel"].std(), ffn * beta, rtol=0.02)
    np.testing.assert_array_equal(layer["self_attn"]["grep_a"], 1.0)
    table = params["relative_attention_bias"]["embedding"]
    np.testing.assert_allclose(table.std(), 0.02, rtol=0.1)
    plain: Any = Encoder(num_layers=1, embed_dim=256, num_heads=4, deep_norm=False)
    kernel = jax.jit(plain.init)(jax.random.key(0), x)["params"]["layers_0"]["fc1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.02)


def test_a_wholly_padded_row_gives_zeros_and_no_nan():
    x = noise(3, 24, 32)
    padding_mask = jnp.arange(24)[None] >= jnp.array([[24], [8], [0]])
    model, params = make(x)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y = model.apply(params, x, padding_mask)
            return jnp.sum(jnp.sin(y)), y

        kept = model.apply(params, x, padding_mask, zero_padding=False)
        return *jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x), kept

    (_, y), grads, kept = jax.tree.map(np.asarray, run(params, x))
    mask = np.asarray(padding_mask)
    np.testing.assert_array_equal(y[mask], 0.0)
    assert np.isfinite(y).all() and np.abs(y[~mask]).min() > 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads[1][mask], 0.0)
    np.testing.assert_allclose(kept[~mask], y[~mask], rtol=0, atol=1e-6)
    assert np.isfinite(kept).all() and np.abs(kept[mask]).max() > 0


@pytest.mark.parametrize("pre_norm", [False, True])
def test_all_layers(pre_norm):
    x = noise(2, 24, 32)
    model, params = make(x, layer_norm_first=pre_norm)
    layers = jax.jit(lambda p: model.apply(p, x, all_layers=True))(params)
    assert layers.shape == (3, 2, 24, 32)
    last = jax.jit(lambda p: model.apply(p, x))(params)
    np.testing.assert_allclose(layers[-1], last, rtol=0, atol=1e-6)
    # the norm of unit scale is at the end, or else right before the layers
    normal = np.asarray(layers[-1] if pre_norm else layers[0])
    np.testing.assert_allclose(normal.mean(-1), 0.0, atol=1e-6)
    np.testing.assert_allclose(normal.std(-1), 1.0, rtol=1e-3)
    assert pre_norm == (np.abs(np.asarray(layers[0]).std(-1) - 1.0).max() > 0.05)


def test_bfloat16_keeps_parameters_and_softmax_in_float32():
    x = noise(2, 48, 32)
    model, params = make(x)
    low, low_params = make(x, dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(low_params))
    padding_mask = jnp.arange(48)[None] >= jnp.array([[48], [16]])
    got = jax.jit(lambda p: low.apply(p, x, padding_mask))(params)
    want = jax.jit(lambda p: model.apply(p, x, padding_mask))(params)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.1)
    jaxpr = str(jax.make_jaxpr(lambda p: low.apply(p, x))(params))
    for name in ("exp", "rsqrt", "logistic"):  # softmax, LayerNorm, gate
        lines = [line for line in jaxpr.splitlines() if f" = {name}" in line]
        assert len(lines) >= 2 and all(":f32[" in line for line in lines), name


def test_dropout():
    x = noise(2, 24, 32)
    for field in ("dropout", "attention_dropout", "activation_dropout"):
        model, params = make(x, num_layers=1, **{field: 0.3})

        @jax.jit
        def run(seed, model=model, params=params):
            rngs = {"dropout": jax.random.key(seed)}
            return model.apply(params, x, deterministic=False, rngs=rngs)

        np.testing.assert_array_equal(run(0), run(0))
        assert float(jnp.abs(run(0) - run(1)).max()) > 1e-3, field


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    x = jnp.full((64, 5, 126), 2.0, jnp.bfloat16)  # 126: the last word of a row is used by half
    y: Any = Dropout(rate).apply({}, x, rngs={"dropout": jax.random.key(0)})
    assert y.dtype == x.dtype and len(np.unique(np.float32(y))) == 2
    dropped = np.asarray(y == 0)
    sigma = np.sqrt(rate * (1 - rate) / dropped.size)
    assert abs(dropped.mean() - round(rate * 256) / 256) < 4 * sigma
    assert float(y.mean(dtype=jnp.float32)) == pytest.approx(2, rel=0.02)
    # Each of the four bytes of a word is a draw of its own, in every row and column alike.
    draws = dropped.reshape(-1, 126)
    assert np.abs(np.corrcoef(draws[:, :4].T) - np.eye(4)).max() < 4 / np.sqrt(len(draws))
    assert np.abs(draws.mean(axis=0) - rate).max() < 5 * np.sqrt(rate * (1 - rate) / len(draws))


def test_dropout_of_nothing_and_of_all():
    x, rngs = noise(2, 3, 5), {"dropout": jax.random.key(0)}
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x), x)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, deterministic=True), x)
    nothing: Any = Dropout(1.0).apply({}, x, rngs=rngs)
    assert not np.any(nothing)


def test_layerdrop_draws_once_a_layer():
    x = noise(2, 24, 32)
    model, params = make(x, layerdrop=0.5, num_layers=4)

    @jax.jit
    @jax.vmap
    def skipped(seed):
        rngs = {"layerdrop": jax.random.key(seed)}
        layers = model.apply(params, x, deterministic=False, all_layers=True, rngs=rngs)
        return jnp.all(layers[1:] == layers[:-1], axis=(1, 2, 3))

    draws = np.asarray(skipped(jnp.arange(64)))  # [step, layer]
    assert 0.35 < draws.mean() < 0.65
    assert len(np.unique(draws, axis=0)) > 8  # of 16: the layers draw apart
    layers = jax.jit(lambda: model.apply(params, x, all_layers=True))()
    assert not np.any([np.array_equal(a, b) for a, b in zip(layers[1:], layers[:-1], strict=True)])


def test_remat_changes_nothing():
    x = noise(2, 24, 32)
    model, params = make(x, dropout=0.1)
    policy = "dots_with_no_batch_dims_saveable"
    saving: Any = Encoder(**SIZES, dropout=0.1, remat=policy)
    shapes = jax.eval_shape(saving.init, jax.random.key(0), x)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)

    def gradient(model):
        def loss(params):
            rngs = {"dropout": jax.random.key(3)}
            return jnp.sum(jnp.sin(model.apply(params, x, deterministic=False, rngs=rngs)))

        return jax.jit(jax.grad(loss))(params)

    assert "prevent_cse" in str(jax.make_jaxpr(lambda p: saving.apply(p, x))(params))
    for a, b in zip(
        jax.tree.leaves(gradient(model)), jax.tree.leaves(gradient(saving)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(activation="glu"), "activation 'glu' is not supported; want gelu or relu"),
        (dict(num_heads=5), "embed_dim 32 does not divide into 5 heads"),
        (dict(conv_pos_groups=5), "embed_dim 32 does not divide into conv_pos_groups 5"),
        (dict(bias_init="flat"), "bias_init is 'flat'; want 'normal' or 'local'"),
        (dict(remat="everything"), "remat 'everything' is unknown"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Encoder(**SIZES | kwargs).init, jax.random.key(0), jnp.zeros((1, 8, 32)))
