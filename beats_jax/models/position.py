"""Where a token is: the relative position bias and the positional convolution.

Both know the true positions of tokens that are alone in a grid whose other tokens are hidden.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beats_jax.fbank import BANDS
from beats_jax.models.activations import gelu

DIRECT_BATCH = 2  # clips up to which a CPU convolves directly


def relative_position_buckets(
    distance: np.ndarray, num_buckets: int = 320, max_distance: int = 800
) -> np.ndarray:
    """T5's bidirectional buckets: one a distance when near, logarithmic when far.

    Args:
        distance: int [...], key position minus query position.
        num_buckets: half of them for each direction.
        max_distance: from here on, everything falls into the last bucket.

    Returns:
        int32 [...], in [0, num_buckets).
    """
    per_side = num_buckets // 2
    exact = per_side // 2
    far = np.maximum(np.abs(distance), exact)
    # in float32, like the reference: on a bucket's border the rounding decides
    log_ratio = np.log(far.astype(np.float32) / np.float32(exact)) / math.log(max_distance / exact)
    far_bucket = np.minimum(exact + (log_ratio * (per_side - exact)).astype(np.int64), per_side - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), far_bucket)
    return (bucket + per_side * (distance > 0)).astype(np.int32)


def local_bias_init(num_buckets: int, max_distance: int) -> nn.initializers.Initializer:
    """A bias table that starts local: it falls with the distance in time columns and bands.

    Ours, not the paper's: short trainings from a flat start were seen to collapse. Heads differ in
    slope, 1 to 1/16 a unit, so that some look next door and some look far.
    """
    distance = np.arange(-max_distance, max_distance + 1)
    # d tokens later is some bands up, or the remaining bands down in the column after: the nearer
    columns, up = np.divmod(distance, BANDS)
    steps = np.minimum(np.hypot(columns, up), np.hypot(columns + 1, BANDS - up))
    bucket = relative_position_buckets(distance, num_buckets, max_distance)
    members = np.bincount(bucket, minlength=num_buckets)
    mean_steps = np.bincount(bucket, steps, num_buckets) / np.maximum(members, 1)

    def init(key, shape, dtype=jnp.float32):
        slopes = 2.0 ** -np.linspace(0, 4, shape[1])
        fall = np.outer(mean_steps, slopes).astype(np.float32)
        return 0.02 * jax.random.normal(key, shape, dtype) - fall

    return init


class RelativePositionBias(nn.Module):
    """What every layer adds to its attention scores: one table, looked up by bucketed distance."""

    num_heads: int
    num_buckets: int = 320
    max_distance: int = 800
    bias_init: str = "normal"  # or "local" (local_bias_init)

    @nn.compact
    def __call__(self, length: int, positions: jax.Array | None = None) -> jax.Array:
        """Bias of a grid of `length` tokens, or of those at positions int32 [B, K].

        Returns:
            float32 [1, H, length, length], or [B, H, K, K]; last axis: keys.
        """
        if self.bias_init not in ("normal", "local"):
            raise ValueError(f"bias_init is {self.bias_init!r}; want 'normal' or 'local'")
        init = nn.initializers.normal(0.02)
        if self.bias_init == "local":
            init = local_bias_init(self.num_buckets, self.max_distance)
        table = self.param("embedding", init, (self.num_buckets, self.num_heads))
        distance = np.arange(1 - length, length)
        buckets = relative_position_buckets(distance, self.num_buckets, self.max_distance)
        by_distance = table[buckets].T  # [H, 2 length - 1]
        # Row i of the matrix is by_distance moved right by i. Repeating a period of 2 length and
        # cutting it into rows of 2 length - 1 does that, and its gradient is a sum, not a scatter.
        rows = jnp.pad(by_distance, ((0, 0), (0, 1)))[:, None]
        rows = jnp.broadcast_to(rows, (self.num_heads, length, 2 * length))
        rows = rows.reshape(self.num_heads, -1)[:, : length * (2 * length - 1)]
        bias = rows.reshape(self.num_heads, length, 2 * length - 1)[:, :, length - 1 :]
        if positions is None:
            return bias[None]
        queries = bias[:, positions]  # [H, B, K, length]
        keys = jax.nn.one_hot(positions, length)  # [B, K, length]
        # a product (exact at this precision): a second gather's gradient is a scatter of scalars
        return jnp.einsum("hbpj,bqj->bhpq", queries, keys, precision="highest")


@functools.lru_cache(maxsize=16)
def _waves(length: int, period: int, origin: int = 0) -> np.ndarray:
    """cos and sin of 2 pi p f / period for p = -origin .. length - origin - 1: [length, 2, F]."""
    turns = np.outer(np.arange(length) - origin, np.arange(period // 2 + 1)) % period
    angle = 2 * np.pi / period * turns
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


class PositionalConv(nn.Module):
    """Convolution over the token axis, to be added to its input as a position embedding.

    Conv1d(D -> D, kernel 128, padding 64, 16 groups) with weight norm over the taps (one gain a
    tap), the last output dropped, then exact GELU: output p sees inputs p - 64 ... p + 63.

    XLA's grouped convolution this long has a very slow gradient on a CPU (1 GFLOP/s), so it is done
    as discrete Fourier transforms written as matrix products. That needs about a fifth of the
    arithmetic, and tokens that are absent from the grid (zeros) cost nothing: only the rows of the
    transforms that belong to present tokens are used.

    Where K of L tokens are present the sum over them counts L / K times, as in (inverted) dropout:
    its mean is that over the whole grid, which a model that trains on a part is used on. Without
    this, a small classifier that was trained on a quarter of the patches had 47.5 % of ESC-10's
    first fold right on whole clips; with the sum on whole clips scaled to what it knew, 71 %.

    The kernel's own transform costs most of it for a single clip (base, 10 s, one core: 0.21
    CPU-seconds, directly 0.11), so a CPU convolves one or two clips directly where no gradient
    follows.
    """

    kernel_size: int = 128
    groups: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        length: int | None = None,
        forward_only: bool = False,
    ) -> jax.Array:
        """Convolves the grid that has x at its positions and zeros elsewhere; reads it at these.

        Args:
            x: [B, K, D].
            positions: int32 [B, K], places of x in the grid; None = 0 ... K-1. Then x is scaled by
                L / K, whatever rows are empty: each clip keeps the same share (`masking`).
            length: tokens in the grid; None = K.
            forward_only: a gradient is not wanted, or may be slow.

        Returns:
            [B, K, D], the embedding alone.
        """
        _, rows, dim = x.shape
        length = length or rows
        if dim % self.groups:
            raise ValueError(f"embed_dim {dim} does not divide into conv_pos_groups {self.groups}")
        size = dim // self.groups
        std = math.sqrt(4 / (self.kernel_size * dim))
        v = self.param("weight_v", nn.initializers.normal(std), (self.kernel_size, size, dim))
        norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2)))
        g = self.param("weight_g", lambda _: norm)  # starts with weight = v
        bias = self.param("bias", nn.initializers.zeros, (dim,))
        kernel = v * (g / norm)[:, None, None]  # [taps, D / groups, D]

        x = x.astype(jnp.float32)
        if positions is not None:
            x *= length / rows
        by_waves = functools.partial(
            convolve_by_waves, groups=self.groups, positions=positions, length=length
        )
        few = isinstance(x.shape[0], int) and x.shape[0] <= DIRECT_BATCH
        if forward_only and few and positions is None:
            directly = functools.partial(convolve_directly, groups=self.groups)
            out = jax.lax.platform_dependent(x, kernel, cpu=directly, default=by_waves)
        else:
            out = by_waves(x, kernel)
        return gelu((out + bias[None, None]).astype(self.dtype))


# Functions, not methods: Flax may capture what a method returns, here from inside a transform.


def convolve_directly(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """x [B, L, D], kernel [taps, D / groups, D] -> [B, L, D], as `PositionalConv` says."""
    before = len(kernel) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,),
        padding=[(before, len(kernel) - 1 - before)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
        precision="highest",
    )


def convolve_by_waves(
    x: jax.Array, kernel: jax.Array, groups: int, positions: jax.Array | None, length: int
) -> jax.Array:
    """The same by Fourier transforms, of x [B, K, D] at its positions in a grid of `length`."""
    batch, _, dim = x.shape
    size, num_taps = dim // groups, len(kernel)
    # Half a kernel beside the grid keeps the circular convolution from wrapping around.
    period = 2 * math.ceil((length + num_taps // 2) / 2)
    share = np.full((period // 2 + 1,), 2 / period, np.float32)  # of the inverse transform
    share[[0, -1]] = 1 / period
    taps = _waves(num_taps, period, num_taps // 2) * share
    real, imag = jnp.einsum("kcf,kio->cfio", taps, kernel)
    mix = jnp.array([[real, -imag], [imag, real]])  # [2 in, 2 out, F, D / groups, D]
    mix = mix.reshape(*mix.shape[:4], groups, size)  # i: inputs of a group, go: outputs

    waves = jnp.asarray(_waves(length, period))  # [length, 2, F]
    if positions is None:
        to_waves, from_waves = "pcf,bpd->bcfd", "pcf,bcfd->bpd"
    else:
        waves = waves[positions]  # [B, K, 2, F]
        to_waves, from_waves = "bpcf,bpd->bcfd", "bpcf,bcfd->bpd"
    spectrum = jnp.einsum(to_waves, waves, x)
    spectrum = spectrum.reshape(batch, 2, -1, groups, size)
    spectrum = jnp.einsum("bcfgi,cefigo->befgo", spectrum, mix)
    return jnp.einsum(from_waves, waves, spectrum.reshape(batch, 2, -1, dim))
