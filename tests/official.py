"""The official code's stored outputs, its random weights, and its formulas once more in numpy.

The fixtures come from microsoft/unilm ``beats/`` run on weights that are drawn from a seed, so no
weights are stored: ``state_dict`` draws them again. ``features`` is an independent rendering of the
same forward pass in float64; the tests hold it against the fixtures, and use it for configurations
that no fixture covers.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
CASES = (
    "one_1s",
    "batch_1s_nomask",
    "batch_1s_falsemask",
    "padded_3p27s",
    "odd_mask_1p6s",
    "one_patch_2800",
    "readme_10000",
)


def state_dict(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The cfg and the weights behind fixture `name`; raises if they are not the reference's."""
    spec = json.loads((FIXTURES / f"{name}.spec.json").read_text())
    state, overrides = {}, {}
    if "overrides" in spec:
        with np.load(FIXTURES / spec["overrides"]) as arrays:
            overrides = {key: arrays[key].astype(np.float32) for key in arrays.files}
    for key, entry in spec["params"].items():
        if key in overrides:
            state[key] = overrides[key]
        elif entry["kind"] == "alias":
            state[key] = state[entry["of"]]
        else:
            state[key] = _draw(spec["seed"], key, entry)
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].tobytes())
    if digest.hexdigest() != spec["sha256"]:
        raise RuntimeError(f"the weights of {name} are not those of its spec")
    return spec["cfg"], state


def _draw(seed: int, key: str, entry: dict) -> np.ndarray:
    if entry["kind"] == "one":
        return np.ones(entry["shape"], np.float32)
    stream = np.random.SeedSequence([seed, zlib.crc32(key.encode())])
    unit = np.random.Generator(np.random.PCG64(stream)).random(tuple(entry["shape"]))
    value = entry["mean"] + entry["std"] * math.sqrt(3.0) * (2.0 * unit - 1.0)
    if entry["kind"] == "abs":
        value = np.abs(value)
    elif entry["kind"] == "l2":
        value = value / np.sqrt(np.sum(value * value, axis=-1, keepdims=True))
    elif entry["kind"] != "plain":
        raise RuntimeError(f"{key} is of kind {entry['kind']!r}, which no fixture uses")
    return value.astype(np.float32)


def case(name: str, case_name: str) -> dict[str, np.ndarray]:
    """The arrays of one case, by their short names."""
    prefix = case_name + "/"
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {k[len(prefix) :]: arrays[k] for k in arrays.files if k.startswith(prefix)}


def random_state(rng: np.random.Generator, cfg: dict) -> dict[str, np.ndarray]:
    """Random weights in the official layout for any cfg, to try what no fixture covers."""
    dim, ffn, heads = (
        cfg[f"encoder_{k}"] for k in ("embed_dim", "ffn_embed_dim", "attention_heads")
    )
    state = {}

    def add(key, *shape, mean=0.0, std=0.15):
        state[key] = rng.normal(mean, std, shape).astype(np.float32)

    def add_linear(key, out, fan_in):
        add(f"{key}.weight", out, fan_in, std=fan_in**-0.5)
        add(f"{key}.bias", out)

    def add_norm(key, size):
        add(f"{key}.weight", size, mean=1.0)
        add(f"{key}.bias", size)

    add("patch_embedding.weight", cfg["embed_dim"], 1, 16, 16, std=0.06)
    if cfg["conv_bias"]:
        add("patch_embedding.bias", cfg["embed_dim"])
    add_norm("layer_norm", cfg["embed_dim"])
    if cfg["embed_dim"] != dim:
        add_linear("post_extract_proj", dim, cfg["embed_dim"])
    add("encoder.pos_conv.0.bias", dim)
    add("encoder.pos_conv.0.weight_g", 1, 1, cfg["conv_pos"], mean=0.4)
    add("encoder.pos_conv.0.weight_v", dim, dim // cfg["conv_pos_groups"], cfg["conv_pos"])
    add_norm("encoder.layer_norm", dim)
    for i in range(cfg["encoder_layers"]):
        layer = f"encoder.layers.{i}"
        for part in "qkv":
            add_linear(f"{layer}.self_attn.{part}_proj", dim, dim)
        add_linear(f"{layer}.self_attn.out_proj", dim, dim)
        if cfg["gru_rel_pos"]:
            add_linear(f"{layer}.self_attn.grep_linear", 8, dim // heads)
            add(f"{layer}.self_attn.grep_a", 1, heads, 1, 1, mean=1.0)
        if cfg["relative_position_embedding"]:
            table = f"{layer}.self_attn.relative_attention_bias.weight"
            add(table, cfg["num_buckets"], heads, std=1.0)
            state[table] = state[table.replace(layer, "encoder.layers.0")]
        add_norm(f"{layer}.self_attn_layer_norm", dim)
        add_linear(f"{layer}.fc1", ffn, dim)
        add_linear(f"{layer}.fc2", dim, ffn)
        add_norm(f"{layer}.final_layer_norm", dim)
    return state


def features(state: dict, cfg: dict, fbank: np.ndarray) -> np.ndarray:
    """The official forward pass without padding, float64: fbank [B, F, 128] -> [B, L, D]."""
    w = {key: value.astype(np.float64) for key, value in state.items()}

    def linear(x, key):
        return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    def norm(x, key):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{key}.weight"] + w[f"{key}.bias"]

    def act(x):
        return np.maximum(x, 0) if cfg["activation_fn"] == "relu" else _gelu(x)

    batch, frames = len(fbank), len(fbank[0]) // 16 * 16
    patches = fbank[:, :frames].astype(np.float64).reshape(batch, -1, 16, 8, 16).swapaxes(2, 3)
    x = np.einsum("btfij,oij->btfo", patches, w["patch_embedding.weight"][:, 0])
    x = x.reshape(batch, -1, cfg["embed_dim"]) + w.get("patch_embedding.bias", 0.0)
    x = norm(x, "layer_norm")
    if "post_extract_proj.weight" in w:
        x = linear(x, "post_extract_proj")
    x = x + _pos_conv(x, w, cfg["conv_pos_groups"])
    pre_norm = cfg["layer_norm_first"]
    if not pre_norm:
        x = norm(x, "encoder.layer_norm")
    alpha = (2 * cfg["encoder_layers"]) ** 0.25 if cfg["deep_norm"] else 1.0
    for i in range(cfg["encoder_layers"]):
        layer = f"encoder.layers.{i}"
        for sub, norm_key in (("self_attn", "self_attn_layer_norm"), ("ffn", "final_layer_norm")):
            y = norm(x, f"{layer}.{norm_key}") if pre_norm else x
            if sub == "self_attn":
                y = _attention(y, w, f"{layer}.self_attn", cfg, linear)
            else:
                y = linear(act(linear(y, f"{layer}.fc1")), f"{layer}.fc2")
            x = x + y if pre_norm else norm(alpha * x + y, f"{layer}.{norm_key}")
    return norm(x, "encoder.layer_norm") if pre_norm else x


def _gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _pos_conv(x, w, groups):
    v = w["encoder.pos_conv.0.weight_v"]  # [D, D / groups, taps]
    kernel = w["encoder.pos_conv.0.weight_g"] * v / np.sqrt((v**2).sum((0, 1)))
    dim, size, taps = kernel.shape
    padded = np.pad(x, ((0, 0), (taps // 2, taps // 2), (0, 0)))
    out = np.zeros_like(x)
    for k in range(taps):
        shifted = padded[:, k : k + x.shape[1]].reshape(*x.shape[:2], groups, size)
        tap = kernel[:, :, k].reshape(groups, dim // groups, size)
        out += np.einsum("blgi,goi->blgo", shifted, tap).reshape(x.shape)
    return _gelu(out + w["encoder.pos_conv.0.bias"])


def _attention(x, w, key, cfg, linear):
    batch, length, dim = x.shape
    heads = cfg["encoder_attention_heads"]
    q, k, v = (
        linear(x, f"{key}.{part}_proj").reshape(batch, length, heads, -1).swapaxes(1, 2)
        for part in "qkv"
    )
    scores = q @ k.swapaxes(2, 3) / math.sqrt(dim // heads)
    if cfg["relative_position_embedding"]:
        bias = w[f"{key}.relative_attention_bias.weight"][_buckets(length, cfg)]
        bias = np.moveaxis(bias, -1, 0)  # [H, L, L]
        if cfg["gru_rel_pos"]:
            gates = linear(q, f"{key}.grep_linear").reshape(batch, heads, length, 2, 4).sum(-1)
            a, b = np.moveaxis(1 / (1 + np.exp(-gates)), -1, 0)[..., None]
            bias = (a * (b * w[f"{key}.grep_a"] - 1) + 2) * bias
        scores = scores + bias
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return linear((probs @ v).swapaxes(1, 2).reshape(batch, length, dim), f"{key}.out_proj")


def _buckets(length, cfg):
    """From the stored tables, so that nothing here leans on our own bucket function."""
    with np.load(FIXTURES / "relpos_buckets.npz") as tables:
        table = tables[f"buckets_{cfg['num_buckets']}_{cfg['max_distance']}"]
        zero = int(np.flatnonzero(tables["rel"] == 0)[0])
    return table[zero + np.arange(length)[None] - np.arange(length)[:, None]]
