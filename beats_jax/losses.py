"""Losses on logits, one value per token or clip; the caller reduces (see `stages`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


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


def soft_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    label_smoothing: float = 0.0,
    class_weights: np.ndarray | None = None,
) -> jax.Array:
    """Cross-entropy of target distributions in nats, such as a mixture's labels; in float32.

    Args:
      logits: [B, C] float.
      targets: [B, C] float, rows that sum to 1.
      label_smoothing: share of the target spread evenly over the C classes.
      class_weights: [C], factors of the classes' terms; None = 1.

    Returns:
      [B] float32.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    targets = (1 - label_smoothing) * targets + label_smoothing / targets.shape[-1]
    return -jnp.sum(_weighted(targets * log_probs, class_weights), axis=-1)


def binary_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    label_smoothing: float = 0.0,
    class_weights: np.ndarray | None = None,
) -> jax.Array:
    """Mean over classes of the sigmoid's cross-entropy with targets in [0, 1]; in float32.

    Args:
      logits: [B, C] float.
      targets: [B, C] float.
      label_smoothing: moves the targets towards 1/2: 1 becomes 1 - label_smoothing / 2.
      class_weights: [C], factors of the classes' terms; None = 1.

    Returns:
      [B] float32.
    """
    logits = logits.astype(jnp.float32)
    targets = (1 - label_smoothing) * targets + label_smoothing / 2
    likelihood = jax.nn.log_sigmoid(logits) - (1 - targets) * logits
    return -jnp.mean(_weighted(likelihood, class_weights), axis=-1)


def _weighted(terms: jax.Array, class_weights: np.ndarray | None) -> jax.Array:
    return terms if class_weights is None else terms * class_weights[None]
