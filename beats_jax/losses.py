"""Losses on logits, one value per token or clip; the caller reduces (see `stages`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of integer labels in nats, computed in float32 whatever the logits' dtype.

    Args:
      logits: [..., K] float.
      labels: [...] int, 0 ≤ label < K.
      label_smoothing: share of the target spread evenly over the K classes. The paper is silent
        and ESPnet uses 0.1; 0 keeps the loss comparable to a unigram's cross-entropy.

    Returns:
      [...] float32.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    if not label_smoothing:
        return nll
    return (1 - label_smoothing) * nll - label_smoothing * jnp.mean(log_probs, axis=-1)
