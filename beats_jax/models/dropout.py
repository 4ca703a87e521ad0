"""Dropout that draws bytes: a quarter of the random numbers, which are a tenth of a step's work."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

LEVELS = 256  # of a byte


class Dropout(nn.Module):
    """Zeroes elements at random and scales the others, so that the mean stays (rng "dropout").

    The rate is rounded to 256ths (0.1 drops 26 of them, 10.2 %); what is kept is scaled by the
    probability it is kept with.

    Attributes:
        rate: share of elements to drop, 0 to 1.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> jax.Array:
        """x of any shape and dtype -> the same; untouched where `deterministic`."""
        dropped = round(self.rate * LEVELS)
        if deterministic or not dropped:
            return x
        if dropped == LEVELS:
            return jnp.zeros_like(x)
        kept = random_bytes(self.make_rng("dropout"), x.shape) >= dropped
        return jnp.where(kept, x * (LEVELS / (LEVELS - dropped)), jnp.zeros((), x.dtype))


def random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint8 [*shape], uniform; four neighbours on the last axis share a 32-bit number."""
    *lead, last = shape
    words = jax.random.bits(key, (*lead, -(-last // 4)), jnp.uint32)
    parts = jax.lax.bitcast_convert_type(words, jnp.uint8)  # [..., words, 4]
    return parts.reshape(*lead, -1)[..., :last]
