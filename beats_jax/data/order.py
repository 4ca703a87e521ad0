"""Which example comes when: pure functions of (seed, counter).

The counter numbers every example a run ever reads: counter = batch * batch_size + row. Nothing
here keeps state, so starting at example 10^9 costs what starting at 0 costs, a resumed run reads
what the killed one would have read, and H hosts that each take their rows read what one host reads.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv


@functools.lru_cache(maxsize=4)  # a batch touches two epochs at most; threads may be a few apart
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    permutation = np.random.default_rng([seed, epoch]).permutation(size)
    permutation.setflags(write=False)
    return permutation


def dataset_positions(seed: int, counters: np.ndarray, size: int) -> np.ndarray:
    """Position in a data set of `size` clips for each example: every epoch is a new permutation.

    Args:
        seed: non-negative; the run's.
        counters: integers [n], the examples' numbers, >= 0.
        size: number of clips.

    Returns:
        int64 [n], permutation number counter // size at place counter % size.
    """
    if size < 1:
        raise ValueError("the data set is empty: no clip is left to draw from; check the filter")
    epochs, places = np.divmod(np.asarray(counters, np.int64), size)
    positions = np.empty_like(places)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        positions[rows] = _permutation(seed, int(epoch), size)[places[rows]]
    return positions


def uniform(seed: int, name: str, counters: np.ndarray) -> np.ndarray:
    """Random numbers for each example from a named stream, by counter and not by sequence.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) evaluated at arbitrary places of its sequence,
    which starts at a hash of (seed, name).

    Args:
        seed: the run's.
        name: the stream: one for each use, e.g. "crop".
        counters: integers [n].

    Returns:
        float64 [n] in [0, 1), multiples of 2^-53.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    # Arrays, not scalars: NumPy warns when uint64 scalars wrap around, as they are meant to here.
    z = np.atleast_1d(np.asarray(counters)).astype(np.uint64) + np.uint64(1)
    z = z * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(key, "<u8")
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


def crop_starts(
    seed: int,
    counters: np.ndarray,
    num_samples: np.ndarray,
    clip_samples: int,
    name: str = "crop",
) -> np.ndarray:
    """First sample of each example's crop, uniform over the places where the crop fits.

    Args:
        seed: the run's.
        counters: integers [n], the examples' numbers.
        num_samples: integers [n], the clips' lengths in samples.
        clip_samples: the crop's length in samples.
        name: of the random stream.

    Returns:
        int64 [n] in [0, num_samples - clip_samples], 0 where the clip is no longer than the crop.
    """
    places = np.maximum(np.asarray(num_samples, np.int64) - clip_samples, 0) + 1
    # u <= 1 - 2^-53, so u * places never rounds up to places.
    return (uniform(seed, name, counters) * places).astype(np.int64)


def weighted_positions(seed: int, counters: np.ndarray, cdf: np.ndarray, name: str) -> np.ndarray:
    """Position of each example's clip, drawn with replacement by the clips' weights.

    Args:
        seed: the run's.
        counters: integers [n], the examples' numbers.
        cdf: float64 [size], cumulative weights, the last one 1.
        name: of the random stream.

    Returns:
        int64 [n] in [0, size).
    """
    # u < 1 = cdf[-1], so "right" never returns `size`, and never a clip of weight 0.
    return np.searchsorted(cdf, uniform(seed, name, counters), side="right")


def roll_shifts(seed: int, counters: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
    """How far each crop is rolled in time, in samples: uniform, int64 [n] in [0, num_samples)."""
    return (uniform(seed, "roll", counters) * np.asarray(num_samples, np.int64)).astype(np.int64)


def mixup_weights(seed: int, counters: np.ndarray, probability: float, alpha: float) -> np.ndarray:
    """How much of the example's own clip is in its mixture.

    Args:
        seed: the run's.
        counters: integers [n], the examples' numbers.
        probability: of a mixture at all; in the other examples the weight is 1.
        alpha: of the Beta(alpha, alpha) that a mixture's weight is drawn from, by inversion.

    Returns:
        float64 [n] in [0, 1].
    """
    mixed = uniform(seed, "mixup", counters) < probability
    weights = betaincinv(alpha, alpha, uniform(seed, "mixup/weight", counters))
    return np.where(mixed, weights, 1.0)


def held_out(keys: Sequence[str], fraction: float) -> np.ndarray:
    """Which clips are kept for validation: by a hash of the key, so equal keys stay together.

    A key's side does not depend on its neighbours (clips may be added later), but for one rule: the
    key with the smallest hash is always held out, so a small data set has something to validate on.

    Args:
        keys: text [n]: file names, or groups that must not be split (source recording, speaker).
        fraction: expected share of the keys held out, in [0, 1); 0 holds out nothing.

    Returns:
        bool [n], True = held out.

    Raises:
        ValueError: if the fraction is out of range, or all clips share one key.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction is {fraction}; give a number from 0 to below 1")
    if fraction == 0 or not len(keys):
        return np.zeros(len(keys), bool)
    hashes = {k: int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") for k in set(keys)}
    if len(hashes) == 1:
        raise ValueError(
            f"all {len(keys)} clips belong to one group ({keys[0]!r}): nothing can be held out;"
            " group by another column, or set the held-out fraction to 0"
        )
    limit = max(min(hashes.values()) + 1, round(fraction * 2**64))
    return np.array([hashes[k] < limit for k in keys])
