"""Official BEATs checkpoints to our parameters (method.md section 4.7).

Every leaf of our tree names the official key it comes from, so a missing key, an unknown key, a
wrong shape and bias tables that differ between layers are all errors, not warnings.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from beats_jax.fbank import PATCH_SIZE
from beats_jax.models.beats import BEATs
from beats_jax.torch_file import read_torch_file

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
# A tokenizer's keys, and those of its counters: of use to its training alone, and partly stale.
_QUANTIZE = {"quantize", "quantize_layer"}
_COUNTERS = re.compile(r"quantize\.(cluster_size|embedding\.(cluster_size|embed_avg))")
_GATE = re.compile(r".*\.self_attn\.grep_(a|linear\.(weight|bias))")


class Official(NamedTuple):
    """An official checkpoint in our terms.

    Attributes:
        kind: "encoder", "finetuned" or "tokenizer".
        model: keyword arguments of BEATs.
        params: float32 numpy arrays: "encoder", the params of BEATs; "finetuned" also "head", of
            the features' classes; "tokenizer" also "quantize_layer_0" and "quantize_layer_2", with
            a tanh between them. Those three are {"kernel": [in, out], "bias": [out]}.
        codebook: float32 [K, Dq], unit rows (tokenizers, else None).
        labels: class index to name, where a fine-tuned file has them, else {}.
        cfg: the checkpoint's "cfg", as it is.
    """

    kind: str
    model: dict[str, Any]
    params: dict[str, Any]
    codebook: np.ndarray | None
    labels: dict[int, str]
    cfg: dict[str, Any]


def load_official(path: str | Path) -> Official:
    """Reads a checkpoint file of the official code: encoder, fine-tuned model or tokenizer.

    Args:
        path: the .pt file, read without PyTorch and without running anything in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no official checkpoint, or its keys, shapes and cfg disagree.
    """
    checkpoint = read_torch_file(path)
    try:
        return _from_checkpoint(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_checkpoint(checkpoint: Any) -> Official:
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    cfg, state = parts.get("cfg"), parts.get("model")
    if not isinstance(cfg, dict) or not isinstance(state, dict):
        there = _few(parts) if parts else type(checkpoint).__name__
        raise ValueError(
            f"the file holds {there}; want the dicts 'cfg' and 'model' of an official checkpoint "
            "(one of ESPnet has to be exported to that form first)"
        )
    for key, value in state.items():
        array = isinstance(key, str) and isinstance(value, np.ndarray)
        if not array or not jnp.issubdtype(value.dtype, jnp.floating):
            kind = value.dtype if array else type(value).__name__
            raise ValueError(f"{key!r} of the model is {kind}; want an array of floats")

    prefixes = {key.partition(".")[0] for key in state}
    finetuned, tokenizer = "predictor" in prefixes, not prefixes.isdisjoint(_QUANTIZE)
    if finetuned and tokenizer:
        raise ValueError("the model has both predictor.* and quantize.* keys; want one at most")
    if finetuned != bool(cfg.get("finetuned_model", False)):
        raise ValueError(
            f"cfg has finetuned_model {cfg.get('finetuned_model')}, but the model has "
            f"{'a' if finetuned else 'no'} predictor"
        )

    rest = dict(state)  # what is used is taken out; the encoder accepts no leftovers
    dim, params, codebook, labels = cfg.get("encoder_embed_dim", 768), {}, None, {}
    if finetuned:
        num_classes = cfg.get("predictor_class", 527)
        params["head"] = _take_linear(rest, "predictor", dim, num_classes)
        labels = _labels(parts.get("label_dict", {}), num_classes)
    if tokenizer:
        size, code_dim = cfg.get("quant_n", 1024), cfg.get("quant_dim", 256)
        params["quantize_layer_0"] = _take_linear(rest, "quantize_layer.0", dim, dim)
        params["quantize_layer_2"] = _take_linear(rest, "quantize_layer.2", dim, code_dim)
        codebook = _take_codebook(rest, size, code_dim)
    model, params["encoder"] = encoder_from_official(rest, cfg)
    kind = "tokenizer" if tokenizer else "finetuned" if finetuned else "encoder"
    return Official(kind, model, params, codebook, labels, cfg)


def _few(keys: Collection[Any]) -> str:
    """The first of these keys: a file of another kind differs in hundreds."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{list(keys)[:5]}{more}" if keys else "none"


def _take(rest: dict[str, np.ndarray], key: str, *shape: int) -> np.ndarray:
    if key not in rest:
        raise ValueError(f"the model lacks {key}")
    value = rest.pop(key)
    if value.shape != shape:
        raise ValueError(f"{key} is {value.shape}; want {shape} by its cfg")
    return value


def _take_linear(
    rest: dict[str, np.ndarray], key: str, fan_in: int, out: int
) -> dict[str, np.ndarray]:
    weight, bias = _take(rest, f"{key}.weight", out, fan_in), _take(rest, f"{key}.bias", out)
    return {"kernel": weight.T.astype(np.float32), "bias": bias.astype(np.float32)}


def _take_codebook(rest: dict[str, np.ndarray], size: int, dim: int) -> np.ndarray:
    name = "quantize.embedding"
    stored = _take(rest, f"{name}.weight", size, dim)
    initted = float(_take(rest, f"{name}.initted", 1)[0])
    if initted != 1:
        raise ValueError(f"{name}.initted is {initted:g}; want 1, a codebook that was initialised")
    for key in [key for key in rest if _COUNTERS.fullmatch(key)]:
        del rest[key]
    codebook = stored.astype(np.float32)
    error = np.abs(np.linalg.norm(codebook, axis=1) - 1)
    # bfloat16 alone is coarser; the comparison is written so that NaN fails it
    if not np.all(error <= max(1e-3, float(jnp.finfo(stored.dtype).eps))):
        raise ValueError(
            f"{name}.weight has rows whose length is off by {error.max():.3g}; want unit rows"
        )
    return codebook


def _labels(label_dict: Any, num_classes: int) -> dict[int, str]:
    if not isinstance(label_dict, dict) or label_dict.keys() not in (set(), {*range(num_classes)}):
        raise ValueError(f"label_dict does not name the classes 0 to {num_classes - 1}")
    return {index: str(name) for index, name in label_dict.items()}


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
            f"missing: {_few(missing)}; unknown: {_few(unknown)}"
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
