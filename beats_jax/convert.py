"""Official BEATs checkpoints to our parameters.

Every leaf of our tree names the official key it comes from, so a missing key, an unknown key, a
wrong shape and bias tables that differ between layers are all errors, not warnings.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from beats_jax.fbank import PATCH_SIZE
from beats_jax.models.beats import BEATs

# Official cfg key -> BEATs argument, and the official class's default where a file does not say.
CONFIG = {
    "encoder_layers": ("num_layers", 12),
    "encoder_embed_dim": ("embed_dim", 768),
    "encoder_ffn_embed_dim": ("ffn_dim", 3072),
    "encoder_attention_heads": ("num_heads", 12),
    "embed_dim": ("patch_dim", 512),
    "conv_bias": ("conv_bias", False),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "encoder_layerdrop": ("layerdrop", 0.0),
    "activation_fn": ("activation", "gelu"),
    "layer_norm_first": ("layer_norm_first", False),
    "deep_norm": ("deep_norm", False),
    "conv_pos": ("conv_pos", 128),
    "conv_pos_groups": ("conv_pos_groups", 16),
    "relative_position_embedding": ("relative_position", False),
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_distance", 1280),
    "gru_rel_pos": ("gated", False),
}
# Constants ESPnet stores beside the weights; the tokens' own bias table is stored once a layer.
_IGNORED = re.compile(r"(patch_embedding|raw2fbank)_pad\.weight")
_BIAS_TABLE = re.compile(r"encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.weight")
_GATE = re.compile(r".*\.self_attn\.grep_(a|linear\.(weight|bias))")


def encoder_from_official(
    state_dict: Mapping[str, np.ndarray], cfg: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Converts the encoder of an official checkpoint.

    Args:
        state_dict: the encoder's entries of the checkpoint's "model" (without a fine-tuned model's
            predictor.* and a tokenizer's quantize*).
        cfg: the checkpoint's "cfg"; its dropout_input and gradient decay are not the model's.

    Returns:
        Keyword arguments for BEATs, and its params (float32 numpy arrays).

    Raises:
        ValueError: a setting is not supported, or the keys or shapes are not this model's.
    """
    kwargs = {ours: cfg.get(key, default) for key, (ours, default) in CONFIG.items()}
    if cfg.get("input_patch_size") != PATCH_SIZE:
        raise ValueError(f"input_patch_size is {cfg.get('input_patch_size')}; want {PATCH_SIZE}")
    if kwargs["activation"] not in ("gelu", "relu"):
        raise ValueError(
            f"activation_fn {kwargs['activation']!r} is not supported; want gelu or relu"
        )

    state = {_canonical(key): np.asarray(value, np.float32) for key, value in state_dict.items()}
    state = {key: value for key, value in state.items() if not _IGNORED.fullmatch(key)}
    if not kwargs[
        "relative_position"
    ]:  # the official code makes gates all the same, and skips them
        state = {key: value for key, value in state.items() if not _GATE.fullmatch(key)}
    state = _with_one_bias_table(state)

    patches = jax.ShapeDtypeStruct((1, 8, PATCH_SIZE**2), jnp.float32)
    tree = jax.eval_shape(BEATs(**kwargs).init, jax.random.key(0), patches)["params"]
    wanted: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(tree)
    keys = {path: _official_key(path) for path in wanted}
    missing = sorted(set(keys.values()) - set(state))
    unknown = sorted(set(state) - set(keys.values()))
    if missing or unknown:
        raise ValueError(
            "the checkpoint does not fit its cfg; "
            f"missing: {missing or 'none'}; unknown: {unknown or 'none'}"
        )
    params = {}
    for path, leaf in wanted.items():
        params[path] = _to_ours(state[keys[path]], path)
        if params[path].shape != leaf.shape:
            shape = state[keys[path]].shape
            raise ValueError(
                f"{keys[path]} is {shape}, which does not give {leaf.shape} by its cfg"
            )
    return kwargs, flax.traverse_util.unflatten_dict(params)


def _canonical(key: str) -> str:
    """Newer torch's name of the weight norm's parts, as the old one."""
    key = key.replace(".parametrizations.weight.original0", ".weight_g")
    return key.replace(".parametrizations.weight.original1", ".weight_v")


def _with_one_bias_table(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keeps the first layer's bias table, after checking that the others are equal to it."""
    copies = [key for key in state if _BIAS_TABLE.fullmatch(key)]
    if not copies:
        return state
    first = min(copies, key=lambda key: int(key.split(".")[2]))
    for key in copies:
        if not np.array_equal(state[key], state[first]):
            raise ValueError(f"{key} differs from {first}; the layers must share one bias table")
    rest = {key: value for key, value in state.items() if key not in copies}
    return {**rest, "encoder.layers.0.self_attn.relative_attention_bias.weight": state[first]}


def _official_key(path: tuple[str, ...]) -> str:
    """encoder/layers_3/fc1/kernel -> encoder.layers.3.fc1.weight, and so on."""
    key = re.sub(r"\.layers_(\d+)\.", r".layers.\1.", ".".join(path))
    key = re.sub(r"\.(kernel|scale|embedding)$", ".weight", key)
    key = key.replace("encoder.pos_conv.", "encoder.pos_conv.0.")
    return key.replace("encoder.relative", "encoder.layers.0.self_attn.relative")


def _to_ours(value: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """Reorders an official array for the leaf at `path`."""
    if path[-1] == "kernel":  # [out, in] or, the patch embedding, [out, 1, 16, 16]
        return value.reshape(value.shape[0], -1).T
    if path[-1] == "weight_v":  # [out, in / groups, taps]
        return value.transpose(2, 1, 0)
    if path[-1] in ("weight_g", "grep_a"):  # [1, 1, taps], [1, heads, 1, 1]
        return value.reshape(-1)
    return value
