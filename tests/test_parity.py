"""Against the official PyTorch code's stored outputs, with the tolerances that came with them.

From the stored fbank, CPU float32: layers, positional convolution and the first layer's input
within 3e-5 on unpadded tokens; gradients within 1e-4 of each tensor's maximum; probabilities within
1e-5; masks and bucket tables exactly.
"""

import json
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest

from beats_jax.convert import encoder_from_official
from beats_jax.fbank import num_tokens, patchify
from beats_jax.models.beats import BEATs, official_token_mask, token_padding_mask
from beats_jax.models.position import relative_position_buckets

MASKED = ("batch_1s_falsemask", "padded_3p27s", "odd_mask_1p6s", "readme_10000")
LAYERS = 3e-5
PROBS = 1e-5


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@cache
def dev_encoder() -> tuple[Any, Any]:
    cfg, state = official.state_dict("dev_encoder")
    kwargs, params = encoder_from_official(state, cfg)
    return BEATs(**kwargs), params


@cache
def dev_finetuned() -> tuple[Callable[..., Any], dict[str, np.ndarray]]:
    cfg, state = official.state_dict("dev_finetuned")
    head = {key: state.pop(f"predictor.{key}") for key in ("weight", "bias")}
    kwargs, params = encoder_from_official(state, cfg)
    forward = jax.jit(partial(BEATs(**kwargs).apply, {"params": params}, zero_padding=False))
    return forward, head


def assert_close(got: Any, want: Any, atol: float, name: str = "") -> None:
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol, err_msg=name)


def official_mask(case):
    """The official token mask of a case, from its mask of samples; None where it has none."""
    if "padding_mask" not in case:
        return None
    return official_token_mask(case["padding_mask"], case["fbank"].shape[1])


@pytest.mark.parametrize("name", official.CASES)
def test_layers(name):
    case = official.case("dev_encoder", name)
    model, params = dev_encoder()
    mask = official_mask(case)

    def forward(params, patches, mask):
        return model.apply(
            {"params": params},
            patches,
            mask,
            all_layers=True,
            zero_padding=False,
            capture_intermediates=lambda module, _: (
                module.name in ("pos_conv", "post_extract_proj")
            ),
        )

    layers, captured = jax.jit(forward)(params, patchify(case["fbank"]), mask)
    captured = captured["intermediates"]
    seen = np.ones(case["features"].shape[:2], bool) if mask is None else ~np.asarray(mask)
    assert seen.any(1).all()
    got = {
        "enc_in": captured["post_extract_proj"]["__call__"][0],
        "pos_conv_out": captured["encoder"]["pos_conv"]["__call__"][0],
        "layer0_in": layers[0],
        "features": layers[-1],
    }
    for key, value in got.items():
        assert_close(value[seen], case[key][seen], LAYERS, key)
    assert len(layers) == 1 + len(case["layers"]) == 4
    for i, want in enumerate(case["layers"]):
        assert_close(layers[i + 1][seen], want[seen], LAYERS, f"layer {i}")
        # official mode keeps what the official code computes at padding
        assert_close(layers[i + 1], want, LAYERS, f"layer {i}, padding")


@pytest.mark.parametrize("name", MASKED)
def test_official_masks(name):
    case = official.case("dev_encoder", name)
    np.testing.assert_array_equal(official_mask(case), case["patch_mask"])


def test_official_mask_splits_the_boundary_column():
    edge_cases = json.loads((official.FIXTURES / "edge_cases.json").read_text())
    pattern = re.compile(r"mask_split_len(\d+)_of_(\d+)")
    splits = [(match, text) for k, text in edge_cases.items() if (match := pattern.fullmatch(k))]
    assert len(splits) == 6
    for match, text in splits:
        valid, total = map(int, match.groups())
        mask = official_token_mask(np.arange(total)[None] >= valid, 1 + (total - 400) // 160)
        want = [bit == "1" for bit in text.split(": ")[1] if bit != " "]
        np.testing.assert_array_equal(mask[0], want, err_msg=match[0])


@pytest.mark.parametrize("name", ["nomask", "padded"])
def test_gradients(name):
    with np.load(official.FIXTURES / f"dev_encoder_grad_{name}.npz") as arrays:
        reference = dict(arrays)
    case = official.case(
        "dev_encoder", {"nomask": "batch_1s_nomask", "padded": "padded_3p27s"}[name]
    )
    np.testing.assert_array_equal(case["waveform"], reference["waveform"])  # so its fbank is that
    model, params = dev_encoder()
    mask = official_mask(case)

    def loss(params):
        x = model.apply({"params": params}, patchify(case["fbank"]), mask, zero_padding=False)
        return jnp.mean(jnp.square(x) * reference["loss_weights"])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, reference["loss"], rtol=1e-5)
    # a gradient of the official model is converted as its weights are; the table is shared
    state = {k.split("/")[1]: v for k, v in reference.items() if k.startswith("grad_nodecay/")}
    cfg, weights = official.state_dict("dev_encoder")
    tables = [key for key in weights if "relative_attention_bias" in key]
    assert tables[0] in state and len(tables) == 3
    state |= {key: state[tables[0]] for key in tables}
    _, wanted = encoder_from_official(state, cfg)

    def compare(path, got, want):
        name = jax.tree_util.keystr(path)
        # the softmax cancels it: what is there is rounding
        atol = 1e-7 if "k_proj']['bias" in name else 1e-4 * np.abs(want).max()
        assert_close(got, want, atol, name)

    jax.tree_util.tree_map_with_path(compare, grads, wanted)


@pytest.mark.parametrize("name", official.CASES)
def test_finetuned_probabilities(name):
    forward, head = dev_finetuned()
    case = official.case("dev_finetuned", name)
    case["fbank"] = official.case("dev_encoder", name)["fbank"]
    mask = official_mask(case)
    x = forward(patchify(case["fbank"]), mask)
    seen = np.ones(x.shape[:2], bool) if mask is None else ~np.asarray(mask)
    assert_close(x[seen], case["features"][seen], LAYERS)
    logits = np.asarray(x) @ head["weight"].T + head["bias"]
    mean = (logits * seen[..., None]).sum(1) / seen.sum(1)[:, None]
    assert_close(1 / (1 + np.exp(-mean)), case["probs"], PROBS)


@pytest.mark.parametrize("num_buckets, max_distance", [(320, 800), (320, 1280), (32, 128)])
def test_bucket_tables(num_buckets, max_distance):
    with np.load(official.FIXTURES / "relpos_buckets.npz") as tables:
        distance, want = tables["rel"], tables[f"buckets_{num_buckets}_{max_distance}"]
    assert len(distance) == 4001
    np.testing.assert_array_equal(
        relative_position_buckets(distance, num_buckets, max_distance), want
    )


def test_exact_mode_gives_a_padded_clip_what_it_gets_alone():
    case = official.case("dev_encoder", "padded_3p27s")
    model, params = dev_encoder()
    num_samples = (~case["padding_mask"]).sum(1)
    assert len(set(num_samples)) == 3
    patches = patchify(case["fbank"])
    mask = token_padding_mask(num_samples, patches.shape[1])
    apply = jax.jit(model.apply)
    together = apply({"params": params}, patches, mask)
    for row, n in enumerate(num_samples):
        tokens = num_tokens(int(n))
        alone = apply({"params": params}, patches[row : row + 1, :tokens])
        assert_close(together[row, :tokens], alone[0], 1e-5)
        np.testing.assert_array_equal(together[row, tokens:], 0.0)


# One case a departure from the released models, and one with all of them.
VARIANTS = {
    "pre-norm": dict(layer_norm_first=True, deep_norm=False),
    "post-norm without DeepNorm": dict(deep_norm=False),
    "relu": dict(activation_fn="relu"),
    "patch bias, no projection": dict(conv_bias=True, embed_dim=48),
    "ungated bias": dict(gru_rel_pos=False),
    "no bias": dict(relative_position_embedding=False, gru_rel_pos=False),
    "no bias, gates unused": dict(relative_position_embedding=False),
    "other buckets": dict(num_buckets=32, max_distance=128, conv_pos=32, conv_pos_groups=4),
    "all": dict(layer_norm_first=True, activation_fn="relu", conv_bias=True, gru_rel_pos=False),
}


def test_the_numpy_rendering_agrees_with_the_fixtures():
    cfg, state = official.state_dict("dev_encoder")
    case = official.case("dev_encoder", "batch_1s_nomask")
    got = official.features(state, cfg, case["fbank"])
    assert_close(got, case["features"], LAYERS)


@pytest.mark.parametrize("name", VARIANTS)
def test_other_official_configurations(name):
    cfg = official.state_dict("dev_encoder")[0] | VARIANTS[name]
    state = official.random_state(np.random.default_rng(3), cfg)
    fbank = official.case("dev_encoder", "readme_10000")["fbank"]
    kwargs, params = encoder_from_official(state, cfg)
    model: Any = BEATs(**kwargs)
    got = jax.jit(model.apply)({"params": params}, patchify(fbank))
    assert_close(got, official.features(state, cfg, fbank), LAYERS)
