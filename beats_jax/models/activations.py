"""The activations of the official code."""

import math

import flax.linen as nn
import jax


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), by erf as PyTorch computes it.

    `jax.nn.gelu` takes erfc, whose tails it needs two more branches for: 1.4 times as long on a
    CPU, and a sixth of encoding on an H200.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS = {"gelu": gelu, "relu": nn.relu}
