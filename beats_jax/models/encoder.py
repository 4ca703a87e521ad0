"""The BEATs Transformer: positional convolution, gated relative position bias, DeepNorm.

Parameter names follow the official code (microsoft/unilm, ``beats/backbone.py``); its formulas are
in method.md section 4. Parameters, softmax, LayerNorm and the layers' activations are float32
whatever ``dtype`` is.
"""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beats_jax.masking import Visible
from beats_jax.models.activations import ACTIVATIONS
from beats_jax.models.dropout import Dropout
from beats_jax.models.fused_attention import MASKED_SCORE, SAVED, fused_attend, supported
from beats_jax.models.position import PositionalConv, RelativePositionBias

SCORES_AT_ONCE = 2**20  # of `attend_in_parts`: 4 MB


def normalise(name: str, x: jax.Array, dtype: Any) -> jax.Array:
    """LayerNorm in float32 (eps 1e-5, PyTorch's), given back in the compute dtype."""
    layer_norm = nn.LayerNorm(1e-5, jnp.float32, use_fast_variance=False, name=name)
    return layer_norm(x.astype(jnp.float32)).astype(dtype)


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for a Linear's weight and bias: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class SelfAttention(nn.Module):
    """Multi-head attention whose relative position bias is gated by the raw query projection."""

    num_heads: int
    dropout: float = 0.0
    gated: bool = True
    deep_norm_beta: float | None = None
    dtype: Any = jnp.float32
    fused: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        padding_mask: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """x [B, K, D], bias [1 or B, H, K, K], padding_mask [B, K] (True = no key) -> [B, K, D]."""
        batch, length, dim = x.shape
        head_dim = dim // self.num_heads
        if head_dim * self.num_heads != dim:
            raise ValueError(f"embed_dim {dim} does not divide into {self.num_heads} heads")

        def project(name: str, gain: float | None) -> jax.Array:
            dense = nn.Dense(dim, dtype=self.dtype, kernel_init=linear_init(gain), name=name)
            return dense(x).reshape(batch, length, self.num_heads, head_dim)

        beta = self.deep_norm_beta
        unit = None if beta is None else 1.0
        q = project("q_proj", unit)
        k = project("k_proj", unit)
        v = project("v_proj", beta)
        gate = self._gate(q) if self.gated and bias is not None else None
        q = q * head_dim**-0.5
        inputs = q, k, v, gate, bias, padding_mask
        if self.fused and bias is not None and supported(q, bias):
            rate, seed = (0.0 if deterministic else self.dropout), None
            if rate:
                seed = jax.random.bits(
                    self.make_rng("dropout"), (batch, self.num_heads), jnp.uint32
                )
            out = fused_attend(q, k, v, gate, bias, padding_mask, seed, rate)
        elif deterministic:
            out = jax.lax.platform_dependent(*inputs, cpu=attend_in_parts, default=attend)
        else:
            drop = Dropout(self.dropout)
            out = attend(*inputs, functools.partial(drop, deterministic=False))
        out = out.reshape(batch, length, dim)
        return nn.Dense(dim, dtype=self.dtype, kernel_init=linear_init(beta), name="out_proj")(out)

    def _gate(self, q: jax.Array) -> jax.Array:
        """q [B, K, H, d], before any scaling -> [B, H, K]. WavLM takes the layer's input here."""
        a = self.param("grep_a", nn.initializers.ones, (self.num_heads,))
        parts = nn.Dense(8, dtype=self.dtype, kernel_init=linear_init(None), name="grep_linear")(q)
        parts = parts.astype(jnp.float32).reshape(*q.shape[:3], 2, 4).sum(-1)  # [B, K, H, 2]
        gate_a, gate_b = jnp.moveaxis(jax.nn.sigmoid(parts), -1, 0)
        return jnp.swapaxes(gate_a * (gate_b * a[None, None] - 1.0) + 2.0, 1, 2)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array | None,
    bias: jax.Array | None,
    padding_mask: jax.Array | None,
    drop: Callable[[jax.Array], jax.Array] = lambda probs: probs,
) -> jax.Array:
    """Attention of every head.

    Args:
        q: [B, K, H, d], scaled.
        k, v: [B, K, H, d].
        gate: float32 [B, H, K], a factor of each query's bias.
        bias: float32 [1 or B, H, K, K].
        padding_mask: bool [B, K], True = no key.
        drop: of the probabilities.

    Returns:
        [B, K, H, d].
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias if gate is None else gate[..., None] * bias
    if padding_mask is not None:
        scores = jnp.where(padding_mask[:, None, None, :], MASKED_SCORE, scores)
    probs = drop(jax.nn.softmax(scores, axis=-1).astype(q.dtype))
    return jnp.einsum("bhqk,bkhd->bqhd", probs, v)


def attend_in_parts(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array | None,
    bias: jax.Array | None,
    padding_mask: jax.Array | None,
) -> jax.Array:
    """`attend` for a CPU: clip by clip and a few heads at a time, whose scores stay in its cache.

    Base size, a clip of 10 s, one core: 0.018 CPU-seconds a layer, where `attend` takes 0.026; with
    its layout, heads after tokens, parts gain nothing.
    """
    batch, length, heads, _ = q.shape
    if not isinstance(batch, int) or not isinstance(length, int):  # an export for any batch size
        return attend(q, k, v, gate, bias, padding_mask)
    wanted = max(SCORES_AT_ONCE // length**2, 1)
    if batch * heads <= wanted:
        return attend(q, k, v, gate, bias, padding_mask)
    size = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= wanted)

    def by_group(x: jax.Array) -> jax.Array:
        """[b, H, …] -> [b, H / size, size, …]."""
        return x.reshape(len(x), heads // size, size, *x.shape[2:])

    clips = {name: by_group(jnp.swapaxes(x, 1, 2)) for name, x in {"q": q, "k": k, "v": v}.items()}
    if gate is not None:
        clips["gate"] = by_group(gate)
    shared = {}
    if bias is not None:
        (clips if len(bias) == batch else shared)["bias"] = by_group(bias)

    def of_group(x: dict[str, jax.Array], mask: jax.Array | None) -> jax.Array:
        """What `attend` does, of one clip's few heads: q, k, v [size, K, d] and so on."""
        scores = jnp.einsum("hqd,hkd->hqk", x["q"], x["k"], preferred_element_type=jnp.float32)
        if bias is not None:
            scores += x["bias"] if gate is None else x["gate"][..., None] * x["bias"]
        if mask is not None:
            scores = jnp.where(mask[None, None], MASKED_SCORE, scores)
        return jnp.einsum("hqk,hkd->hqd", jax.nn.softmax(scores, axis=-1).astype(q.dtype), x["v"])

    def of_clip(x: tuple[dict[str, jax.Array], jax.Array | None]) -> jax.Array:
        groups, mask = x
        own = {name: value[0] for name, value in shared.items()}
        return jax.lax.map(lambda group: of_group(group, mask), {**groups, **own})

    out = jax.lax.map(of_clip, (clips, padding_mask))  # [B, H / size, size, K, d]
    return jnp.swapaxes(out.reshape(batch, heads, length, -1), 1, 2)


def linear_init(gain: float | None) -> nn.initializers.Initializer:
    """N(0, 0.02), or with a gain (DeepNorm) Xavier normal."""
    if gain is None:
        return nn.initializers.normal(0.02)
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "normal")


def deep_norm_constants(num_layers: int) -> tuple[float, float]:
    """alpha, of the residual, and beta, gain of the value, output and feed-forward weights."""
    return (2 * num_layers) ** 0.25, (8 * num_layers) ** -0.25


class EncoderLayer(nn.Module):
    """Attention and feed-forward with residuals: post-norm (DeepNorm-scaled) or pre-norm."""

    num_heads: int
    ffn_dim: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    activation: str = "gelu"
    layer_norm_first: bool = False
    deep_norm_layers: int = 0  # depth of the stack for DeepNorm's constants; 0 = no DeepNorm
    gated: bool = True
    dtype: Any = jnp.float32
    fused: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        padding_mask: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Arguments and result as SelfAttention's."""
        depth = self.deep_norm_layers
        alpha, beta = deep_norm_constants(depth) if depth else (1.0, None)
        attention = SelfAttention(
            self.num_heads,
            self.attention_dropout,
            self.gated,
            beta,
            self.dtype,
            self.fused,
            name="self_attn",
        )
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=linear_init(beta))

        def attend(y):
            y = attention(y, bias, padding_mask, deterministic)
            return Dropout(self.dropout)(y, deterministic=deterministic)

        def feed_forward(y):
            y = dense(self.ffn_dim, name="fc1")(y).astype(jnp.float32)
            y = ACTIVATIONS[self.activation](y).astype(self.dtype)
            y = Dropout(self.activation_dropout)(y, deterministic=deterministic)
            y = dense(x.shape[-1], name="fc2")(y)
            return Dropout(self.dropout)(y, deterministic=deterministic)

        norm = functools.partial(normalise, dtype=self.dtype)
        if self.layer_norm_first:
            x = x + attend(norm("self_attn_layer_norm", x))
            return x + feed_forward(norm("final_layer_norm", x))
        x = norm("self_attn_layer_norm", _residual(x, attend(x), alpha))
        return norm("final_layer_norm", _residual(x, feed_forward(x), alpha))


def _residual(x: jax.Array, update: jax.Array, alpha: float) -> jax.Array:
    return alpha * x.astype(jnp.float32) + update.astype(jnp.float32)


class Transformer(nn.Module):
    """The settings all models here share, and the stack of layers they describe. Defaults: base."""

    num_layers: int = 12
    embed_dim: int = 768
    ffn_dim: int = 3072
    num_heads: int = 12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    activation: str = "gelu"  # or "relu"
    layer_norm_first: bool = False
    deep_norm: bool = True
    conv_pos: int = 128
    conv_pos_groups: int = 16
    relative_position: bool = True
    num_buckets: int = 320
    max_distance: int = 800
    gated: bool = True
    bias_init: str = "normal"  # or "local" (local_bias_init)
    dtype: Any = jnp.float32  # of the computation; parameters are float32
    remat: str = ""  # name of a jax.checkpoint_policies policy; "" = store everything
    fused_attention: bool = True  # by GPU kernels where they run (fused_attention.py)

    def settings(self) -> dict[str, Any]:
        """The fields above, to build another module from."""
        own = {field.name for field in fields(Transformer)} - {"parent", "name"}
        return {name: getattr(self, name) for name in own}

    def run_layers(
        self,
        x: jax.Array,
        padding_mask: jax.Array | None,
        visible: Visible | None,
        length: int,
        deterministic: bool,
    ) -> list[jax.Array]:
        """Runs x [B, K, D] through the layers; returns the input and every layer's output."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is not supported; want {' or '.join(ACTIVATIONS)}"
            )
        positions = None if visible is None else visible.index
        bias = None
        if self.relative_position:
            table = RelativePositionBias(
                self.num_heads,
                self.num_buckets,
                self.max_distance,
                self.bias_init,
                name="relative_attention_bias",
            )
            bias = table(length, positions)
        layer_class = EncoderLayer
        if self.remat:
            policy = getattr(jax.checkpoint_policies, self.remat, None)
            if policy is None:
                raise ValueError(
                    f"remat {self.remat!r} is unknown; want the name of a policy in "
                    'jax.checkpoint_policies, such as "dots_with_no_batch_dims_saveable", or ""'
                )
            attended = jax.checkpoint_policies.save_only_these_names(SAVED)
            policy = jax.checkpoint_policies.save_from_both_policies(policy, attended)
            layer_class = nn.remat(EncoderLayer, policy=policy, static_argnums=(4,))
        outputs = [x]
        # Unrolled: by a scan, a base model's forward and backward pass took 1.2 times as long on a
        # CPU and was not compiled sooner (3.9 + 0.5 s with tracing, this 2.4 + 1.4).
        for i in range(self.num_layers):
            y = layer_class(
                self.num_heads,
                self.ffn_dim,
                self.dropout,
                self.attention_dropout,
                self.activation_dropout,
                self.activation,
                self.layer_norm_first,
                self.num_layers if self.deep_norm else 0,
                self.gated,
                self.dtype,
                self.fused_attention,
                name=f"layers_{i}",
            )(x, bias, padding_mask, deterministic)
            if self.layerdrop and not deterministic:
                kept = jax.random.bernoulli(self.make_rng("layerdrop"), 1 - self.layerdrop)
                y = jnp.where(kept, y, x)
            x = y
            outputs.append(x)
        return outputs


class Encoder(Transformer):
    """Positional convolution, input norm and layers (the official ``TransformerEncoder``)."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        padding_mask: jax.Array | None = None,
        *,
        visible: Visible | None = None,
        length: int | None = None,
        deterministic: bool = True,
        all_layers: bool = False,
        zero_padding: bool = True,
    ) -> jax.Array:
        """Encodes tokens.

        Args:
            x: [B, K, D].
            padding_mask: bool [B, K], True = padding: zeroed before the convolution, never a key.
            visible: x holds only these tokens of a grid of `length`: the convolution runs on the
                grid with zeros in the other places, and distances are the true ones. Empty slots
                must be padding. None = x is the grid.
            length: tokens in the grid, where `visible` is given.
            deterministic: False = dropout (rng "dropout") and layerdrop (rng "layerdrop").
            all_layers: return the input of the first layer and every layer's output.
            zero_padding: return zeros at padding (exact mode); False keeps what the official code
                computes there.

        Returns:
            [B, K, D], or [num_layers + 1, B, K, D], the last after a pre-norm model's final norm.
        """
        x = x.astype(self.dtype)
        if padding_mask is not None:
            x = _zero_rows(x, padding_mask)
        length = length or x.shape[1]
        if self.conv_pos:
            conv = PositionalConv(self.conv_pos, self.conv_pos_groups, self.dtype, name="pos_conv")
            places = None if visible is None else visible.index
            x = x + conv(x, places, length, forward_only=deterministic)
        if not self.layer_norm_first:
            x = normalise("layer_norm", x, self.dtype)
        x = Dropout(self.dropout)(x, deterministic=deterministic)
        outputs = self.run_layers(x, padding_mask, visible, length, deterministic)
        if self.layer_norm_first:
            outputs[-1] = normalise("layer_norm", outputs[-1], self.dtype)
        result = jnp.stack(outputs) if all_layers else outputs[-1]
        if padding_mask is not None and zero_padding:
            result = _zero_rows(result, padding_mask)
        return result


def _zero_rows(x: jax.Array, padding_mask: jax.Array) -> jax.Array:
    """x [..., B, K, D] with zeros where padding_mask [B, K] is True."""
    mask = padding_mask[..., None].reshape((1,) * (x.ndim - 3) + padding_mask.shape + (1,))
    return jnp.where(mask, jnp.zeros((), x.dtype), x)
