"""The learned codebook: nearest code by cosine, straight-through, updated by moving averages.

Everything is a pure function of arrays in float32. What the update needs of a batch are sums
(`code_statistics`), so that micro-batches, devices and hosts add up, padding left out; lookups use
the codebook as it was before the update. Reference: the official `quantizer.py`
(`NormEMAVectorQuantizer`), method.md section 5.2. Unlike there, looking up never changes state.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
    """What `quantize` gives for vectors [..., D].

    Attributes:
        codes: float32 [..., D], each vector's code; its gradient is the vector's own
            (straight-through).
        ids: int32 [...], in [0, K).
        distance: float32 [...], squared distance of the normalised vector to its code: the
            commitment loss in the paper's units (a sum over D, where the official code takes the
            mean). Its gradient moves the vector, not the code.
        unit: float32 [..., D], the normalised vectors.
    """

    codes: jax.Array
    ids: jax.Array
    distance: jax.Array
    unit: jax.Array


def l2_normalise(x: jax.Array) -> jax.Array:
    """x [..., D] in float32 at unit length; the zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    safe = jnp.where(square > 0, square, 1.0)
    return x / jnp.maximum(jnp.sqrt(safe), 1e-12)  # PyTorch's eps


def quantize(vectors: jax.Array, codebook: jax.Array) -> Quantized:
    """Replaces each vector by the code of the largest cosine.

    Args:
        vectors: [..., D].
        codebook: float32 [K, D], unit rows.
    """
    unit = l2_normalise(vectors)
    # Unit rows: the largest product is the smallest distance. A code's margin can be small.
    ids = jnp.argmax(jnp.matmul(unit, codebook.T, precision="highest"), axis=-1).astype(jnp.int32)
    code = jax.lax.stop_gradient(codebook[ids])
    distance = jnp.sum(jnp.square(code - unit), axis=-1)
    codes = unit + jax.lax.stop_gradient(code - unit)
    return Quantized(codes, ids, distance, unit)


def code_statistics(
    unit: jax.Array, ids: jax.Array, where: jax.Array, num_codes: int
) -> dict[str, jax.Array]:
    """How often each code was taken in a batch, and the sum of the vectors that took it.

    Args:
        unit: float32 [N, D], normalised vectors.
        ids: int32 [N].
        where: bool [N], False = padding.
        num_codes: K.

    Returns:
        `counts` [K] and `sums` [K, D], float32.
    """
    weight = where.astype(jnp.float32)
    counts = jnp.zeros(num_codes, jnp.float32).at[ids].add(weight)
    sums = jnp.zeros((num_codes, unit.shape[-1]), jnp.float32)
    return {"counts": counts, "sums": sums.at[ids].add(unit * weight[:, None])}


def move_codes(
    codebook: jax.Array, counts: jax.Array, sums: jax.Array, decay: float = 0.99
) -> jax.Array:
    """Moves every code a little towards the mean direction of the vectors that took it.

    w <- l2(decay w + (1 - decay) l2(sum)); a code that no vector took stays where it is.

    Args:
        codebook: float32 [K, D], unit rows.
        counts, sums: of `code_statistics`, over the whole global batch.
        decay: of the moving average.
    """
    target = jnp.where((counts > 0)[:, None], l2_normalise(sums), codebook)
    return l2_normalise(decay * codebook + (1 - decay) * target)


def move_usage(usage: jax.Array, counts: jax.Array, decay: float = 0.99) -> jax.Array:
    """The moving average [K] of each code's count a batch, one batch (its `counts`) later."""
    return decay * usage + (1 - decay) * counts


def kmeans(
    rng: jax.Array, unit: jax.Array, where: jax.Array, num_codes: int, iterations: int = 10
) -> tuple[jax.Array, jax.Array]:
    """Spherical k-means from random distinct vectors.

    Args:
        rng: decides which vectors it starts from.
        unit: float32 [N, D], normalised vectors.
        where: bool [N], False = padding. With fewer than K vectors some codes start equal.
        num_codes: K.
        iterations: of the official code.

    Returns:
        The codebook [K, D], and how many vectors each code held in the last iteration [K].
    """
    noise = jnp.where(where, jax.random.uniform(rng, where.shape), 2.0)
    first = jnp.argsort(noise)[jnp.arange(num_codes) % jnp.maximum(jnp.sum(where), 1)]
    return kmeans_from(unit[first], unit, where, iterations)


def kmeans_from(
    means: jax.Array, unit: jax.Array, where: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """`kmeans` from given means [K, D]; one that loses all its vectors stays where it is."""

    def iteration(_, carry):
        means, _ = carry
        ids = quantize(unit, means).ids
        sums = code_statistics(unit, ids, where, len(means))
        moved = jnp.where((sums["counts"] > 0)[:, None], l2_normalise(sums["sums"]), means)
        return moved, sums["counts"]

    return jax.lax.fori_loop(0, iterations, iteration, (means, jnp.zeros(len(means), jnp.float32)))


def candidate_sums(
    noise: jax.Array, unit: jax.Array, where: jax.Array, num_codes: int, num_vectors: int
) -> jax.Array:
    """Throws vectors into K places, about one into each, and adds what falls together: [K, D].

    Their directions are where dead codes may start again. Sums, unlike a draw of K vectors, add
    over micro-batches and devices. Most vectors fall beside the places: sums of many would all
    point to the vectors' common mean.

    Args:
        noise: float32 [N] in [0, 1): the throw.
        unit: float32 [N, D].
        where: bool [N], False = padding.
        num_codes: K.
        num_vectors: in the whole global batch.
    """
    place = (noise * max(num_vectors, num_codes)).astype(jnp.int32)
    inside = where & (place < num_codes)
    return code_statistics(unit, jnp.minimum(place, num_codes - 1), inside, num_codes)["sums"]


def revive(
    codebook: jax.Array, usage: jax.Array, candidates: jax.Array, below: float
) -> tuple[jax.Array, jax.Array]:
    """Moves codes that are hardly used to where vectors are.

    Args:
        codebook: float32 [K, D].
        usage: float32 [K], moving average of each code's count a batch.
        candidates: [K, D] of `candidate_sums`; a place that nothing fell into revives nothing.
        below: usage under which a code counts as dead. A revived one starts with this usage.

    Returns:
        The codebook and the usage.
    """
    found = jnp.sum(jnp.square(candidates), axis=-1) > 0
    dead = (usage < below) & found
    codebook = jnp.where(dead[:, None], l2_normalise(candidates), codebook)
    return codebook, jnp.where(dead, below, usage)
