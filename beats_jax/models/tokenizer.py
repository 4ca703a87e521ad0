"""Patches to acoustic tokens: by random projection (iteration 1), by a distilled encoder (later).

The random projection is a frozen matrix and codebook from a seed. Its arrays come from numpy's
RandomState, whose streams are frozen for good: a seed means the same tokens on every machine and
under every version.

The distilled tokenizer (paper, section 3.2) is an encoder, a projection to the codebook's space
and the nearest code; in training an `Estimator` has to tell the teacher's output from the codes
alone. Either way the arrays are arguments of the functions, not constants in the compiled step.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beats_jax.fbank import MEL_BANKS, PATCH_SIZE, patchify, unpatchify
from beats_jax.models.beats import BEATs, dense
from beats_jax.models.encoder import Transformer, normalise
from beats_jax.models.quantizer import quantize

MODES = ("bestrq", "paper", "espnet")
_ESPNET_PATCH_DIM = 512


def init_random_projection(
    seed: int, codebook_size: int = 1024, dim: int = 16, pool: int = 1, mode: str = "bestrq"
) -> dict[str, np.ndarray]:
    """Draws the tokenizer's arrays.

    Args:
        seed: 0 to 2**32 - 1.
        codebook_size: number of tokens.
        dim: of the codes; 16 in BEST-RQ, 256 in BEATs and ESPnet.
        pool: side of the box of pixels averaged first, 1 or 4.
        mode: "bestrq", "paper" (BEATs Eq. 1 as written) or "espnet".

    Returns:
        float32 arrays: projection [pixels, dim], codebook [codebook_size, dim] (unit rows for
        "bestrq"); "espnet" also patch_embedding [256, 512], and its projection is [512, dim].
    """
    if mode not in MODES:
        raise ValueError(f"tokenizer mode is {mode!r}; want one of {', '.join(MODES)}")
    if pool not in (1, 4) or (pool != 1 and mode != "bestrq"):
        raise ValueError(f"pool is {pool} with mode {mode!r}; want 1, or 4 with 'bestrq'")
    rng = np.random.RandomState(seed)
    pixels = (PATCH_SIZE // pool) ** 2
    params = {}
    if mode == "espnet":
        # Xavier of a Conv2d weight: the kernel's area counts in both fans
        params["patch_embedding"] = _xavier(rng, pixels, _ESPNET_PATCH_DIM, area=pixels)
        pixels = _ESPNET_PATCH_DIM
    params["projection"] = _xavier(rng, pixels, dim)
    codebook = rng.standard_normal((codebook_size, dim))
    if mode == "bestrq":
        codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    params["codebook"] = codebook.astype(np.float32)
    return params


def _xavier(rng: np.random.RandomState, fan_in: int, fan_out: int, area: int = 1) -> np.ndarray:
    std = math.sqrt(2 / (fan_in + fan_out * area))
    return (std * rng.standard_normal((fan_in, fan_out))).astype(np.float32)


def level_mel_bins(patches: jax.Array, std: float) -> jax.Array:
    """Takes the mel filters' own gain out of log-mel patches: white noise gives flat patches.

    At 128 filters the lowest are narrower than an FFT bin: bin 3 is empty and always reads the
    floor, bins 1, 5, 7 and 9 weigh under 0.2. Once a patch's loudness is scaled down, that fixed
    comb is most of what is left of the lowest band, and one code takes half of its patches. Ours,
    for "bestrq" tokens only (the encoder's input stays Kaldi's). On 250 clips of ESC-50: lowest
    band's most used code 51 % -> 12 %; perplexity 249 -> 357, with pool 4 122 -> 152.

    Args:
        patches: [..., L, 256], L a multiple of 8, normalised as ``fbank`` does with `std`.
        std: of the log-mel.

    Returns:
        The same shape, float32; the empty bin is the mean of its neighbours.
    """
    log_mel = unpatchify(patches.astype(jnp.float32))
    weight = MEL_BANKS.sum(axis=0)
    gain = np.log(np.where(weight > 0, weight, 1)) / (2 * std)
    log_mel = log_mel - gain.astype(np.float32).reshape((1,) * (log_mel.ndim - 1) + (-1,))
    between = 0.5 * (jnp.roll(log_mel, 1, axis=-1) + jnp.roll(log_mel, -1, axis=-1))
    empty = jnp.broadcast_to(weight == 0, log_mel.shape)
    return patchify(jnp.where(empty, between, log_mel))


def random_projection_ids(
    params: Mapping[str, jax.Array | np.ndarray],
    patches: jax.Array,
    *,
    mode: str = "bestrq",
    loudness_weight: float = 0.1,
    std: float | None = None,
) -> jax.Array:
    """Labels patches with the nearest random code.

    In "bestrq" mode a patch's mean m is scaled down first, x - m + loudness_weight m: with its full
    loudness the 1024 codes collapse to a few dozen. (The corpus mean is 0 once the log-mel is
    normalised by its own statistics: `beats-jax stats`.) Then l2 norm on both sides. "paper"
    projects the patch as it is; "espnet" normalises after each of its two projections. In float32
    at the highest precision, because a code's margin can be small.

    Args:
        params: of init_random_projection, for the same mode; the pooling follows from their shapes.
        patches: [..., 256], normalised log-mel as ``fbank.patchify`` gives it.
        mode: as in init_random_projection.
        loudness_weight: weight of the patch mean ("bestrq").
        std: of the log-mel, to level its bins first (`level_mel_bins`; "bestrq", [..., L, 256]);
            None = as they are.

    Returns:
        int32 [...], in [0, codebook_size).
    """
    x = patches.astype(jnp.float32)
    if mode == "bestrq":
        x = x if std is None else level_mel_bins(x, std)
        x = _scale_loudness(_pool(x, params["projection"].shape[0]), loudness_weight)
        # the codes have unit length, so the largest product is the largest cosine
        scores = _matmul(_matmul(x, params["projection"]), params["codebook"].T)
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if mode == "espnet":
        x = _standardise(_matmul(x, params["patch_embedding"]))
        x = _standardise(_matmul(x, params["projection"]))
    elif mode == "paper":
        x = _matmul(x, params["projection"])
    else:
        raise ValueError(f"tokenizer mode is {mode!r}; want one of {', '.join(MODES)}")
    # the smallest |x - v|^2 is the largest x.v - |v|^2 / 2
    half_norms = 0.5 * jnp.sum(jnp.square(jnp.asarray(params["codebook"])), axis=-1)
    scores = _matmul(x, params["codebook"].T)
    scores -= half_norms.reshape((1,) * (scores.ndim - 1) + half_norms.shape)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _pool(x: jax.Array, pixels: int) -> jax.Array:
    """[..., 256] -> [..., pixels]: means over boxes of the 16 x 16 patch."""
    side = math.isqrt(pixels)
    box = PATCH_SIZE // side
    boxes = x.reshape(*x.shape[:-1], side, box, side, box)
    return boxes.mean((-3, -1)).reshape(*x.shape[:-1], pixels)


def _scale_loudness(x: jax.Array, weight: float) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return x - mean + weight * mean


def _standardise(x: jax.Array) -> jax.Array:
    """LayerNorm without parameters."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)


def _matmul(x: jax.Array, weight: jax.Array | np.ndarray) -> jax.Array:
    return jnp.matmul(x, jnp.asarray(weight), precision="highest")


class Tokenizer(nn.Module):
    """An encoder and the projection of its features to the codebook's space."""

    encoder: BEATs
    codebook_dim: int = 256

    @nn.compact
    def __call__(
        self,
        patches: jax.Array,
        padding_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        zero_padding: bool = True,
    ) -> jax.Array:
        """patches [B, L, 256], padding_mask bool [B, L] -> float32 [B, L, codebook_dim].

        The official `quantize_layer`: Linear, tanh, Linear; in float32, because codes can lie close
        together. Not normalised yet: `quantize` does that. `zero_padding` as in `BEATs`.
        """
        x = self.encoder(
            patches, padding_mask, deterministic=deterministic, zero_padding=zero_padding
        )
        dim = self.encoder.embed_dim
        x = nn.tanh(dense(dim, dim, "quantize_layer_0", jnp.float32)(x.astype(jnp.float32)))
        return dense(self.codebook_dim, dim, "quantize_layer_2", jnp.float32)(x)


class Estimator(Transformer):
    """Tells the teacher's output at every patch from the codes; used in training only.

    Layers as the encoder's with their own relative bias and no positional convolution. The paper
    says three layers; the Linear before and the LayerNorm after them are ESPnet's. The last Linear
    is there where the target is no feature of the same width: the logits of a supervised teacher.
    """

    num_layers: int = 3
    target_dim: int | None = None  # of the last Linear; None = no Linear

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        padding_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """codes [B, L, codebook_dim], padding_mask bool [B, L] -> float32 [B, L, target_dim]."""
        x = dense(self.embed_dim, codes.shape[-1], "connector", self.dtype)(codes)
        x = self.run_layers(x, padding_mask, None, x.shape[1], deterministic)[-1]
        x = normalise("layer_norm", x, jnp.float32)
        if self.target_dim is None:
            return x
        return dense(self.target_dim, self.embed_dim, "head", jnp.float32)(x)


def distilled_ids(
    model: Tokenizer,
    params: Any,
    codebook: jax.Array,
    patches: jax.Array,
    padding_mask: jax.Array | None = None,
) -> jax.Array:
    """Labels patches [B, L, 256] with the nearest learned code: int32 [B, L]; changes nothing."""
    vectors: Any = model.apply({"params": params}, patches, padding_mask)
    return quantize(vectors, codebook).ids
