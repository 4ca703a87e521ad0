"""Metrics that add: sums inside the jitted step, division once, at the end, on the host.

A mean of batch means is wrong as soon as batches differ in size, and a perplexity cannot be
averaged at all. So every metric here is a pytree of *sums*: `jax.tree.map(operator.add, a, b)`
combines micro-batches, batches and hosts, and `summarize` divides once. The `of` methods make them,
under `jax.jit` over sharded arrays too, where a sum over the batch is a sum over all devices.

A metric over nothing (weight 0: a batch that is all padding) is nan, "not measured", which neither
raises nor looks like a value; `writers` stores it as null.

What cannot be added, such as mAP, is in `scores`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from beats_jax.scores import mean_average_precision as mean_average_precision  # looked for here

Array = Any  # numpy inside tests and on the host, jax under jit


class Mean(NamedTuple):
    """A weighted mean, e.g. the loss over masked positions.

    Attributes:
        total: scalar float32, the weighted sum.
        weight: scalar float32, the sum of the weights.
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, where: Array | None = None) -> Mean:
        """The mean of `values`, or of those where the bool array `where` (same shape) is True."""
        values = jnp.asarray(values, jnp.float32)
        if where is None:
            return cls(values.sum(), jnp.asarray(values.size, jnp.float32))
        # Selected, not multiplied: a nan at a padded place must not spread.
        return cls(jnp.where(where, values, 0.0).sum(), where.sum(dtype=jnp.float32))

    def summary(self, name: str) -> dict[str, float]:
        return {name: _ratio(self.total, self.weight)}


class Histogram(NamedTuple):
    """How often each of K codes occurred, e.g. the acoustic tokens of a batch.

    Attributes:
        counts: [K], int32 or float32.
    """

    counts: Array

    @classmethod
    def of(cls, token_ids: Array, num_codes: int, where: Array | None = None) -> Histogram:
        """Counts int32 `token_ids` of any shape; ids outside 0..num_codes-1 (-1 is padding) are not
        counted, nor are places where the bool array `where` is False."""
        counted = token_ids >= 0 if where is None else where & (token_ids >= 0)
        # Negative indices count from the end in JAX: only those past the end are dropped.
        slots = jnp.where(counted, token_ids, num_codes)
        return cls(jnp.zeros(num_codes, jnp.int32).at[slots.ravel()].add(1, mode="drop"))

    def summary(self, name: str) -> dict[str, float]:
        """`{name}_entropy` in nats, `{name}_perplexity` = exp(entropy) and `{name}s_used`, the
        number of codes seen at all: "code" gives code_entropy, code_perplexity and codes_used."""
        counts = np.asarray(self.counts, np.float64).ravel()
        seen = counts[counts > 0]
        p = seen / seen.sum()
        entropy = float(-(p * np.log(p)).sum()) if seen.size else float("nan")
        return {
            f"{name}_perplexity": float(np.exp(entropy)),
            f"{name}_entropy": abs(entropy),  # one code only: 0.0 rather than -0.0
            f"{name}s_used": float(seen.size),
        }


class Spread(NamedTuple):
    """How far examples lie apart: the standard deviation over examples, averaged over dimensions.

    Of pooled features across clips it falls to 0 when the encoder collapses. The variance is a
    difference of two float32 sums, so a spread below about 1e-3 of the features' mean reads as
    noise near 0: far below what any collapse check asks for.

    Attributes:
        total: [D] float32, the sum over examples.
        square: [D] float32, the sum of squares over examples.
        count: scalar float32, the number of examples.
    """

    total: Array
    square: Array
    count: Array

    @classmethod
    def of(cls, features: Array, where: Array | None = None) -> Spread:
        """From `features` [B, D], or its rows where the bool array `where` [B] is True."""
        features = jnp.asarray(features, jnp.float32)
        if where is None:
            where = jnp.ones(features.shape[0], bool)
        features = jnp.where(where[:, None], features, 0.0)
        return cls(features.sum(0), (features**2).sum(0), where.sum(dtype=jnp.float32))

    def summary(self, name: str) -> dict[str, float]:
        """The population standard deviation (division by the count): 0 for a single example."""
        count = float(np.asarray(self.count))
        if count == 0:
            return {name: float("nan")}
        mean = np.asarray(self.total, np.float64) / count
        variance = np.asarray(self.square, np.float64) / count - mean**2
        # Rounding can leave a variance just below 0; nan passes through `maximum` unchanged.
        return {name: float(np.sqrt(np.maximum(variance, 0.0)).mean())}


class Resultant(NamedTuple):
    """Length of the mean of unit vectors: the largest mean cosine that one fixed vector can have.

    What a tokenizer's cosine to its teacher must be held against, as a loss against the unigram's:
    a teacher's features may all point one way.

    Attributes:
        total: [D] float32, the sum over examples.
        weight: scalar float32, the number of examples.
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, unit: Array, where: Array) -> Resultant:
        """From `unit` [..., D] where the bool array `where` [...] is True."""
        kept = jnp.where(where[..., None], jnp.asarray(unit, jnp.float32), 0.0)
        return cls(kept.reshape(-1, unit.shape[-1]).sum(0), where.sum(dtype=jnp.float32))

    def summary(self, name: str) -> dict[str, float]:
        return {name: _ratio(np.linalg.norm(np.asarray(self.total, np.float64)), self.weight)}


Metric = Mean | Histogram | Spread | Resultant


def summarize(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Finalises metrics on the host, in float64.

    Args:
        metrics: name -> metric, already added up over whatever is to be summarised.

    Returns:
        name -> plain float, in the order of `metrics`; a `Histogram` gives three names.
    """
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        values.update(metric.summary(name))
    return values


def _ratio(total: Array, weight: Array) -> float:
    weight = float(np.asarray(weight))
    return float(np.asarray(total)) / weight if weight else float("nan")
