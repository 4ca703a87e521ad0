"""An attention probe: one learned query picks what of a clip's tokens its class is read from.

A mean over the clip drowns a short event in what surrounds it. Here each token gets a weight, by
softmax over its product with one query, and a linear layer reads the weighted mean; query and layer
are trained, the features are not. The query begins at 0, so the probe begins as a mean.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = Any

STEPS, BATCH_SIZE = 400, 64
LEARNING_RATE = 1e-2  # at its peak; cosine to 0
WEIGHT_DECAY = 0.1  # of AdamW: there are many more weights than clips


class Attention(NamedTuple):
    """The probe's parameters.

    Attributes:
        query: [D] float32.
        kernel: [D, C] float32; bias: [C] float32.
    """

    query: Array
    kernel: Array
    bias: Array


def attention_weights(params: Attention, x: Array, padding: Array) -> Array:
    """Softmax over a clip's valid tokens, [B, L], of x [B, L, D]; 0 where `padding` [B, L]."""
    scores = jnp.einsum("bld,d->bl", x, params.query) / np.sqrt(x.shape[-1])
    # Finite, so that a clip without a token gives no nan; its weights are then all 0.
    weights = jax.nn.softmax(jnp.where(padding, -1e9, scores), axis=-1)
    return jnp.where(padding, 0.0, weights)


def attention_logits(params: Attention, x: Array, padding: Array) -> Array:
    """[B, C] of standardised tokens x [B, L, D] float32 and their mask [B, L], True = padding."""
    pooled = jnp.einsum("bl,bld->bd", attention_weights(params, x, padding), x)
    return pooled @ params.kernel + params.bias


def fit_attention(
    tokens: Array,
    padding: Array,
    labels: np.ndarray,
    train: np.ndarray,
    seed: int = 0,
    *,
    num_classes: int,
) -> np.ndarray:
    """Trains a probe on some clips; its logits for all.

    Args:
        tokens: [N, L, D] float, of all clips; what of them is not in `train` is only looked at
            after training.
        padding: bool [N, L], True = padding.
        labels: int [N], below num_classes; read in `train` only.
        train: int [n], the clips to train on.
        seed: of the order of the batches, which is all that is random.
        num_classes: C.

    Returns:
        float32 [N, C].
    """
    rng = np.random.default_rng(seed)
    epochs = -(-STEPS * BATCH_SIZE // len(train))
    order = np.concatenate([rng.permutation(train) for _ in range(epochs)])
    batches = order[: STEPS * BATCH_SIZE].reshape(STEPS, BATCH_SIZE)
    mean, std = _statistics(tokens, padding, train)
    seen = np.zeros_like(labels)
    seen[train] = labels[train]
    return np.asarray(_fit(tokens, padding, seen, batches, mean, std, num_classes=num_classes))


def _statistics(tokens: Array, padding: Array, train: np.ndarray) -> tuple[Array, Array]:
    """[D] mean and standard deviation over the valid tokens of the clips to train on."""
    total, square, count = 0.0, 0.0, 0
    for row in train:
        valid = np.asarray(tokens[row], np.float64)[~np.asarray(padding[row])]
        total, square = total + valid.sum(axis=0), square + (valid**2).sum(axis=0)
        count += len(valid)
    mean = total / max(count, 1)
    variance = np.maximum(square / max(count, 1) - mean**2, 0)
    std = np.sqrt(np.where(variance > 1e-10, variance, 1.0))  # a constant dimension says nothing
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


@functools.partial(jax.jit, static_argnames="num_classes")
def _fit(
    tokens: Array,
    padding: Array,
    labels: Array,
    batches: Array,
    mean: Array,
    std: Array,
    *,
    num_classes: int,
) -> Array:
    """Every step of the training as one program, and the logits of all clips after it."""
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=WEIGHT_DECAY
    )
    width = tokens.shape[-1]
    params = Attention(jnp.zeros(width), jnp.zeros((width, num_classes)), jnp.zeros(num_classes))

    def logits_of(params: Attention, rows: Array) -> Array:
        x = (tokens[rows].astype(jnp.float32) - mean) / std
        return attention_logits(params, x, padding[rows])

    def loss_of(params: Attention, rows: Array) -> Array:
        logits = logits_of(params, rows)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry: Any, rows: Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_of)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return jax.lax.map(lambda row: logits_of(params, row[None])[0], jnp.arange(len(tokens)))
