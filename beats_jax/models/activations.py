"""The activations of the official code."""

import math

import flax.linen as nn
import jax


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), by erf as PyTorch computes it.

    `jax.nn.gelu` takes erfc, which has branches for its tails: 1.4 times as long on a CPU, twice as
    long on an H200, where that was a sixth of encoding.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS = {"gelu": gelu, "relu": nn.relu}
