"""Official checkpoints to our parameters: strict about keys, shapes and settings."""

import pickle
import zipfile
from functools import partial
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import official
import pytest

from beats_jax import convert
from beats_jax.convert import encoder_from_official, load_official, official_weights
from beats_jax.fbank import MEAN, STD, patchify
from beats_jax.models.beats import PRESETS, BEATs, official_token_mask

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


KINDS = {"dev_encoder": "encoder", "dev_finetuned": "finetuned", "dev_tokenizer": "tokenizer"}


def assert_trees_equal(got, want):
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), got, want)


@pytest.mark.parametrize("name", KINDS)
def test_load_official(name):
    cfg, state = official.state_dict(name)
    loaded = load_official(official.FIXTURES / f"{name}.pt")
    own = {k: v for k, v in state.items() if not k.startswith(("predictor", "quantize"))}
    model, params = encoder_from_official(own, cfg)
    assert (loaded.kind, loaded.model, loaded.cfg) == (KINDS[name], model, cfg)
    assert_trees_equal(loaded.params["encoder"], params)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(loaded.params))
    layers = {"encoder": {}, "finetuned": {"head": "predictor"}}
    layers |= {"tokenizer": {f"quantize_layer_{i}": f"quantize_layer.{i}" for i in (0, 2)}}
    assert loaded.params.keys() == {"encoder", *layers[loaded.kind]}
    for ours, key in layers[loaded.kind].items():
        want = {"kernel": state[f"{key}.weight"].T, "bias": state[f"{key}.bias"]}
        assert_trees_equal(loaded.params[ours], want)


def test_what_only_some_kinds_have():
    encoder, finetuned, tokenizer = (load_official(official.FIXTURES / f"{k}.pt") for k in KINDS)
    assert encoder.labels == tokenizer.labels == {}
    assert list(finetuned.labels) == list(range(527))
    assert all(label.startswith("/m/") for label in finetuned.labels.values())
    assert encoder.codebook is finetuned.codebook is None
    want = official.state_dict("dev_tokenizer")[1]["quantize.embedding.weight"]
    np.testing.assert_array_equal(tokenizer.codebook, want, strict=True)


def test_the_legacy_format_is_the_same_encoder():
    new, old = (
        load_official(official.FIXTURES / f"dev_encoder{kind}.pt") for kind in ("", "_legacyformat")
    )
    assert (new.kind, new.model, new.cfg) == (old.kind, old.model, old.cfg)
    assert_trees_equal(new.params, old.params)


@pytest.mark.parametrize("name", official.CASES)
def test_tokenizer_features(name):
    """What the official tokenizer quantises, not yet normalised: within 3e-5, as its features."""
    case = official.case("dev_tokenizer", name)
    fbank = official.case("dev_encoder", name)["fbank"]
    loaded = load_official(official.FIXTURES / "dev_tokenizer.pt")
    mask = None
    if "padding_mask" in case:
        mask = official_token_mask(case["padding_mask"], fbank.shape[1])
    model: Any = BEATs(**loaded.model)
    with jax.default_matmul_precision("highest"):
        variables = {"params": loaded.params["encoder"]}
        x = jax.jit(partial(model.apply, zero_padding=False))(variables, patchify(fbank), mask)
    first, second = (loaded.params[f"quantize_layer_{i}"] for i in (0, 2))
    hidden = np.tanh(np.asarray(x) @ first["kernel"] + first["bias"])
    got = hidden @ second["kernel"] + second["bias"]
    seen = np.ones(x.shape[:2], bool) if mask is None else ~np.asarray(mask)
    np.testing.assert_allclose(x[seen], case["features"][seen], rtol=0, atol=3e-5)
    np.testing.assert_allclose(got[seen], case["quant_in"][seen], rtol=0, atol=3e-5)
    # and the codebook is the one that its ids are of
    assert loaded.codebook is not None
    cosines = got @ loaded.codebook.T
    sure = seen & (case["dist_margin"] > 1e-3)
    assert sure.sum() > 0.9 * seen.sum()
    np.testing.assert_array_equal(cosines.argmax(-1)[sure], case["ids"].reshape(sure.shape)[sure])


@pytest.fixture
def load_changed(monkeypatch):
    """load_official of a fixture whose content is changed first: change(checkpoint) -> anything."""

    def load(name, change):
        content = convert.read_torch_file(official.FIXTURES / f"{name}.pt")
        monkeypatch.setattr(convert, "read_torch_file", lambda path: change(content))
        return load_official("its/path.pt")

    return load


def set_weights(**values):
    """Sets keys of "model" (dots as __); None takes a key away."""

    def change(checkpoint):
        for key, value in values.items():
            key = key.replace("__", ".")
            checkpoint["model"].pop(key, None)
            if value is not None:
                checkpoint["model"][key] = np.asarray(value, np.float32)
        return checkpoint

    return change


def set_cfg(**values):
    return lambda checkpoint: checkpoint | {"cfg": checkpoint["cfg"] | values}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("name", KINDS)
def test_other_precisions(load_changed, name, dtype):
    def change(checkpoint):
        model = {key: value.astype(dtype) for key, value in checkpoint["model"].items()}
        return checkpoint | {"model": model}

    want = load_official(official.FIXTURES / f"{name}.pt")
    got = load_changed(name, change)
    for tree, reference in ((got.params, want.params), (got.codebook, want.codebook)):
        rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), reference)
        assert_trees_equal(tree, rounded)


def test_counters_may_be_missing(load_changed):
    want = load_official(official.FIXTURES / "dev_tokenizer.pt")
    gone = dict.fromkeys(
        (
            "quantize__cluster_size",
            "quantize__embedding__cluster_size",
            "quantize__embedding__embed_avg",
        )
    )
    got = load_changed("dev_tokenizer", set_weights(**gone))
    np.testing.assert_array_equal(got.codebook, want.codebook)


def test_labels_may_be_missing(load_changed):
    loaded = load_changed("dev_finetuned", lambda x: {k: x[k] for k in ("cfg", "model")})
    assert (loaded.kind, loaded.labels) == ("finetuned", {})


BAD_ROWS = np.eye(64, 16, dtype=np.float32) + np.eye(64, 16, -16) + np.eye(64, 16, -32)  # 16 zeros
NAN_ROWS = np.full((64, 16), np.nan)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "dev_encoder",
            lambda x: x["model"],
            r"holds \['post_extr.* and 65 more; want the dicts",
        ),
        ("dev_encoder", lambda x: [], "holds list; want the dicts 'cfg' and 'model'"),
        ("dev_encoder", lambda x: {"cfg": x["cfg"]}, r"holds \['cfg'\]; want the dicts"),
        ("dev_encoder", lambda x: x | {"cfg": None}, r"holds \['cfg', 'model'\]; want the dicts"),
        (
            "dev_encoder",
            lambda x: x | {"model": {f"encoder.{k}": v for k, v in x["model"].items()}},
            r"missing: \['encoder\.layers\.0.* more; unknown: \['encoder\.encoder\..* more$",
        ),
        (
            "dev_encoder",
            lambda x: {f"encoder.{k}": v for k, v in x["model"].items()},
            r"holds \['encoder\.post.*ESPnet has to be exported",
        ),
        ("dev_encoder", set_cfg(fbank_std=0), "fbank_mean 15.41663 and fbank_std 0; want two"),
        ("dev_encoder", set_cfg(fbank_mean=None), "fbank_mean None and .*; want two numbers"),
        ("dev_encoder", set_cfg(fbank_mean=float("nan")), "fbank_mean nan and .*; want two"),
        ("dev_encoder", set_cfg(finetuned_model=True), "finetuned_model True, but .* no predictor"),
        ("dev_tokenizer", set_cfg(finetuned_model=True), "True, but the model has no predictor"),
        ("dev_finetuned", set_cfg(finetuned_model=False), "False, but the model has a predictor"),
        (
            "dev_finetuned",
            set_cfg(predictor_class=10),
            r"predictor.weight is \(527, 48\); want \(10",
        ),
        ("dev_finetuned", set_weights(predictor__bias=None), "lacks predictor.bias"),
        ("dev_finetuned", set_weights(predictor__scale=[1]), r"unknown: \['predictor\.scale'\]"),
        ("dev_finetuned", lambda x: x | {"label_dict": {0: "a"}}, "the classes 0 to 526"),
        ("dev_finetuned", lambda x: x | {"label_dict": ["a"]}, "the classes 0 to 526"),
        ("dev_finetuned", set_weights(quantize__cluster_size=[1]), "both predictor.* and quantize"),
        ("dev_tokenizer", set_cfg(quant_n=65), r"\(64, 16\); want \(65, 16\)"),
        ("dev_tokenizer", set_cfg(quant_dim=8), r"\(16, 48\); want \(8, 48\)"),
        ("dev_tokenizer", set_weights(quantize_layer__2__bias=None), "lacks quantize_layer.2.bias"),
        ("dev_tokenizer", set_weights(quantize__embedding__weight=None), "embedding.weight"),
        ("dev_tokenizer", set_weights(quantize__embedding__initted=None), "lacks .*initted"),
        ("dev_tokenizer", set_weights(quantize__embedding__initted=[0]), "initted is 0; want 1"),
        ("dev_tokenizer", set_weights(quantize__embedding__weight=BAD_ROWS), "off by 1; want unit"),
        ("dev_tokenizer", set_weights(quantize__embedding__weight=NAN_ROWS), "off by nan"),
        ("dev_tokenizer", set_weights(quantize__other=[1]), r"unknown: \['quantize\.other'\]"),
        ("dev_tokenizer", set_weights(quantize_layer__1__bias=[1]), "unknown: .*quantize_layer.1"),
        (
            "dev_encoder",
            lambda x: x | {"model": x["model"] | {"layer_norm.bias": np.arange(32)}},
            "'layer_norm.bias' of the model is int64; want an array of floats",
        ),
        (
            "dev_encoder",
            lambda x: x | {"model": x["model"] | {"layer_norm.bias": 0.5}},
            "'layer_norm.bias' of the model is float; want an array of floats",
        ),
    ],
)
def test_a_file_that_is_not_what_its_cfg_says(load_changed, name, change, message):
    with pytest.raises(ValueError, match=rf"^its/path\.pt: .*{message}"):
        load_changed(name, change)


@pytest.mark.parametrize("name", KINDS)
def test_leftovers_are_what_the_model_does_not_use(name):
    loaded = load_official(official.FIXTURES / f"{name}.pt")
    _, state = official.state_dict(name)
    rest = loaded.leftovers
    content = convert.read_torch_file(official.FIXTURES / f"{name}.pt")
    assert list(rest.dtypes) == list(content["model"])
    assert set(rest.dtypes.values()) == {"float32"}
    counters = (
        "cluster_size",
        "embedding.cluster_size",
        "embedding.embed_avg",
        "embedding.initted",
    )
    unused = {f"quantize.{key}" for key in counters} if loaded.kind == "tokenizer" else set()
    assert rest.arrays.keys() == unused
    for key in unused:
        np.testing.assert_array_equal(rest.arrays[key], state[key], strict=True)
    assert (rest.label_dict is None) == (loaded.kind != "finetuned") and rest.others == ()


@pytest.mark.parametrize("name", KINDS)
def test_official_weights_is_the_inverse_and_copies_nothing(name):
    loaded = load_official(official.FIXTURES / f"{name}.pt")
    weights = official_weights(loaded.params, loaded.codebook)
    _, state = official.state_dict(name)
    assert weights.keys() == state.keys() - loaded.leftovers.arrays.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(value, state[key], key, strict=True)
    for leaf in jax.tree.leaves((loaded.params, loaded.codebook)):
        assert any(np.shares_memory(leaf, view) for view in weights.values())


@pytest.mark.parametrize(
    "fields, want",
    [
        ({}, (MEAN, STD)),
        (dict(fbank_mean=11, fbank_std=10.5), (11.0, 10.5)),
        (dict(fbank_std=3.5), (MEAN, 3.5)),
    ],
)
def test_statistics_of_the_log_mel_may_be_in_the_cfg(load_changed, fields, want):
    loaded = load_changed("dev_encoder", set_cfg(**fields))
    assert (loaded.mean, loaded.std) == want
    assert loaded.cfg.items() >= fields.items()


def test_a_file_that_asks_for_more_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"cfg": {}, "model": print}, 2))
    with pytest.raises(ValueError, match=r"x\.pt .* asks for __builtin__\.print"):
        load_official(path)
