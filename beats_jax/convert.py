"""Official BEATs checkpoints to our parameters, and back (method.md section 4.7).

Every leaf of our tree names the official key it comes from, so a missing key, an unknown key, a
wrong shape and bias tables that differ between layers are all errors, not warnings. What an
official file holds besides is kept, so that writing it again gives the same to the bit.
"""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from beats_jax.fbank import MEAN, PATCH_SIZE, STD
from beats_jax.models.beats import BEATs
from beats_jax.stages import Pretrained
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
_FIRST_TABLE = "encoder.layers.0.self_attn.relative_attention_bias.weight"
_BIAS_TABLE = re.compile(r"encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.weight")
# A tokenizer's keys, and those of its counters: of use to its training alone, and partly stale.
_QUANTIZE = {"quantize", "quantize_layer"}
_COUNTERS = re.compile(r"quantize\.(cluster_size|embedding\.(cluster_size|embed_avg))")
_GATE = re.compile(r".*\.self_attn\.grep_(a|linear\.(weight|bias))")
# Linear layers beside the encoder, by our name; all else in our params was of use in training only.
LINEARS = {
    "head": "predictor",
    "quantize_layer_0": "quantize_layer.0",
    "quantize_layer_2": "quantize_layer.2",
}


class Leftovers(NamedTuple):
    """What it takes, beside a model's own arrays, to write its official file again.

    Attributes:
        cfg: the file's "cfg", as it is, fields unknown to us included.
        dtypes: every key of its "model", in its order and spelling, and the name of its dtype.
        arrays: those entries that the model's arrays do not give back to the bit: a quantizer's
            counters, ESPnet's helpers, gates without a bias, float64.
        label_dict: as it is; None where the file has none.
        others: names of what the file holds beside these, which is not kept.
    """

    cfg: dict[str, Any]
    dtypes: dict[str, str]
    arrays: dict[str, np.ndarray]
    label_dict: dict[int, str] | None
    others: tuple[str, ...]


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
        mean, std: the log-mel's normalisation: cfg's fbank_mean and fbank_std, which ESPnet and
            `to_official` write, or the official code's.
        leftovers: what else the file holds.
    """

    kind: str
    model: dict[str, Any]
    params: dict[str, Any]
    codebook: np.ndarray | None
    labels: dict[int, str]
    mean: float
    std: float
    leftovers: Leftovers

    @property
    def cfg(self) -> dict[str, Any]:
        """The checkpoint's "cfg", as it is."""
        return self.leftovers.cfg


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
    mean, std = _front_end(cfg)
    leftovers = _leftovers(parts, official_weights(params, codebook))
    return Official(kind, model, params, codebook, labels, mean, std, leftovers)


def _front_end(cfg: Mapping[str, Any]) -> tuple[float, float]:
    mean, std = cfg.get("fbank_mean", MEAN), cfg.get("fbank_std", STD)
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in (mean, std)) or std <= 0:
        raise ValueError(f"cfg has fbank_mean {mean!r} and fbank_std {std!r}; want two numbers")
    return float(mean), float(std)


def _leftovers(checkpoint: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Leftovers:
    arrays = {}
    for key, stored in checkpoint["model"].items():
        ours = weights.get(_canonical(key))
        if ours is None or ours.astype(stored.dtype).tobytes() != stored.tobytes():
            arrays[key] = stored
    dtypes = {key: stored.dtype.name for key, stored in checkpoint["model"].items()}
    others = tuple(str(key) for key in checkpoint if key not in ("cfg", "model", "label_dict"))
    return Leftovers(checkpoint["cfg"], dtypes, arrays, checkpoint.get("label_dict"), others)


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

    wanted = encoder_leaves(BEATs(**kwargs))
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


def encoder_leaves(model: BEATs) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Path and shape of every parameter of `model`, without making them."""
    patches = jax.ShapeDtypeStruct((1, 8, PATCH_SIZE**2), jnp.float32)
    tree: Any = jax.eval_shape(model.init, jax.random.key(0), patches)["params"]
    leaves: Any = flax.traverse_util.flatten_dict(tree)
    return leaves


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
    return {**rest, _FIRST_TABLE: state[first]}


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


def to_official(pretrained: Pretrained) -> tuple[dict[str, Any], list[str]]:
    """A model as the official code stores it: what it loads strictly, by its own cfg.

    Args:
        pretrained: any model; one that comes from an official file becomes that file again, to the
            bit.

    Returns:
        The checkpoint, "cfg", "model" and, where classes have names, "label_dict", for
        `write_torch_file`; and a line for everything that it cannot say.

    Raises:
        ValueError: the architecture has no counterpart in the official code.
    """
    weights = official_weights(pretrained.params, pretrained.codebook)
    lines, leftovers = left_out(pretrained.params), pretrained.official
    if leftovers is not None:
        lines += [f"{name} of the official file: no part of a model" for name in leftovers.others]
        model, labels = _restored(weights, leftovers), leftovers.label_dict
        checkpoint = {"cfg": leftovers.cfg, "model": model}
    else:
        labels = dict(enumerate(pretrained.labels)) or None
        checkpoint = {"cfg": _official_cfg(pretrained), "model": weights}
        if pretrained.codebook is not None:
            checkpoint["model"] = weights | _quantizer_state(pretrained.codebook)
    if (pretrained.mean, pretrained.std) != (MEAN, STD):
        method = "extract_labels" if pretrained.kind == "tokenizer" else "extract_features"
        lines.append(
            "the log-mel's mean and std, which the official code does not read from cfg: call "
            f"{method}(…, fbank_mean={pretrained.mean}, fbank_std={pretrained.std})"
        )
    if pretrained.task == "single-label":
        lines.append("the softmax of a single-label model: the official code takes the sigmoid")
    return checkpoint | ({} if labels is None else {"label_dict": labels}), lines


def iteration(pretrained: Pretrained) -> str:
    """The iteration that made a model: "iter2", say; "" where nothing tells.

    A stage folder is `W/<iteration>/<stage>`. The cfg of released official files does not say.
    """
    source, official = pretrained.source, pretrained.official
    if official is not None:
        return str(official.cfg.get("iteration", ""))
    if "iteration" in source:  # an exported folder
        return source["iteration"]
    name = Path(source["path"]).parent.name
    return name if re.fullmatch(r"iter\w+", name) else ""


def left_out(params: Mapping[str, Any]) -> list[str]:
    """A line for each part of `params` that was of use in training only, as a label predictor."""
    sizes = {
        name: sum(np.size(leaf) for leaf in jax.tree.leaves(part))
        for name, part in params.items()
        if name != "encoder" and name not in LINEARS
    }
    return [
        f"{name} ({size:,} parameters), of use in training only" for name, size in sizes.items()
    ]


def official_weights(
    params: Mapping[str, Any], codebook: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The model's arrays in the official layout, by official key: views, none of them copied.

    Args:
        params: as in `Official`; parts of use in training only are not looked at.
        codebook: a tokenizer's.
    """
    weights = {}
    leaves: Any = flax.traverse_util.flatten_dict(params["encoder"])
    for path, leaf in leaves.items():
        weights[_official_key(path)] = _to_official(np.asarray(leaf), path)
    if _FIRST_TABLE in weights:  # one array for all layers: the file's entries share their storage
        for i in range(sum(name.startswith("layers_") for name in params["encoder"]["encoder"])):
            weights[_FIRST_TABLE.replace(".0.", f".{i}.")] = weights[_FIRST_TABLE]
    for name, key in LINEARS.items():
        if name in params:
            weights[f"{key}.weight"] = np.asarray(params[name]["kernel"]).T
            weights[f"{key}.bias"] = np.asarray(params[name]["bias"])
    if codebook is not None:
        weights["quantize.embedding.weight"] = np.asarray(codebook)
    return weights


def _to_official(value: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """The inverse of `_to_ours`."""
    if path == ("patch_embedding", "kernel"):
        return value.T.reshape(-1, 1, PATCH_SIZE, PATCH_SIZE)
    if path[-1] == "kernel":
        return value.T
    if path[-1] == "weight_v":
        return value.transpose(2, 1, 0)
    if path[-1] == "weight_g":
        return value.reshape(1, 1, -1)
    if path[-1] == "grep_a":
        return value.reshape(1, -1, 1, 1)
    return value


def _restored(weights: Mapping[str, np.ndarray], leftovers: Leftovers) -> dict[str, np.ndarray]:
    """The file's "model": its keys, order and dtypes."""
    model, cast = {}, {}  # one array for what was one: aliases stay aliases in another dtype
    for key, dtype in leftovers.dtypes.items():
        if key in leftovers.arrays:
            model[key] = leftovers.arrays[key]
        else:
            ours = weights[_canonical(key)]
            model[key] = cast.setdefault((id(ours), dtype), ours.astype(dtype, copy=False))
    return model


def _official_cfg(pretrained: Pretrained) -> dict[str, Any]:
    """The inverse of CONFIG, and what else the official constructors ask for."""
    model = pretrained.model
    if not model.conv_pos:
        raise ValueError("conv_pos is 0: the official code has no model without that convolution")
    cfg = {key: getattr(model, ours) for key, (ours, _) in CONFIG.items()}
    cfg["input_patch_size"] = PATCH_SIZE
    # Without a bias there is nothing to gate, and our model has no gates to fill theirs with. A
    # pre-norm layer does not use DeepNorm's constants, and the official code refuses both at once.
    cfg["gru_rel_pos"] = model.gated and model.relative_position
    cfg["deep_norm"] = model.deep_norm and not model.layer_norm_first
    if pretrained.kind == "finetuned":
        num_classes = len(pretrained.params["head"]["bias"])
        cfg |= dict(finetuned_model=True, predictor_class=num_classes, predictor_dropout=0.0)
    if pretrained.codebook is not None:
        cfg["quant_n"], cfg["quant_dim"] = pretrained.codebook.shape
    if name := iteration(pretrained):
        cfg["iteration"] = (
            name  # this and the next two are ours: the official code passes over them
        )
    if (pretrained.mean, pretrained.std) != (MEAN, STD):
        cfg |= dict(fbank_mean=float(pretrained.mean), fbank_std=float(pretrained.std))
    return cfg


def _quantizer_state(codebook: np.ndarray) -> dict[str, np.ndarray]:
    """The official quantizer's buffers beside the codebook; nothing of its output depends on them.

    As in a quantizer that starts from a given codebook: no use counted yet (`cluster_size`, moved
    on by every call), k-means done (`initted`, else the first batch would overwrite the codebook),
    and what that class makes and never reads again (the embedding's `cluster_size`, `embed_avg`).
    """
    none = np.zeros(len(codebook), np.float32)
    return {
        "quantize.cluster_size": none,
        "quantize.embedding.cluster_size": none.copy(),
        "quantize.embedding.embed_avg": np.array(codebook),
        "quantize.embedding.initted": np.ones(1, np.float32),
    }
