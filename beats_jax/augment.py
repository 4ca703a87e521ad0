"""Augmentations as pure functions: arrays and what was drawn for them in, arrays out.

What is drawn is a function of (seed, counter): whole numbers for waveforms come from
`data.order` on the host, noise for log-mels from the step's key on the device. Only what runs there
imports JAX: reading data does not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from beats_jax.fbank import NUM_MELS, fbank, num_frames, patchify, unpatchify

if TYPE_CHECKING:
    import jax


def roll(waveform: np.ndarray, shift: int) -> np.ndarray:
    """A clip's samples [n] moved `shift` places later; what leaves at the end enters at the start.

    Only for the valid samples of a clip: its padding has to stay at its end.
    """
    return np.roll(waveform, shift)


def mixup(waveform: np.ndarray, partner: np.ndarray, weight: float) -> np.ndarray:
    """weight · waveform + (1 - weight) · partner, int16 as both are.

    Args:
      waveform: int16 [n].
      partner: int16 [m]; the shorter of the two is followed by silence.
      weight: in [0, 1]; a convex combination never leaves int16's range.

    Returns:
      int16 [max(n, m)], rounded to the nearest.
    """
    mixture = np.zeros(max(len(waveform), len(partner)), np.float64)
    mixture[: len(waveform)] += weight * waveform
    mixture[: len(partner)] += (1 - weight) * partner
    return np.rint(mixture).astype(np.int16)


def log_mel_patches(batch: Mapping[str, Any], mean: float, std: float) -> Any:
    """A batch's log-mel patches, mixed with its partners' where it has them.

    A mixture of log-mels, unlike one of waveforms, is no sound that could be recorded; mixup (Zhang
    et al., ICLR 2018) takes the model's inputs, which log-mels are.

    Args:
      batch: `waveform` [B, T]; with `partner` [B, T] and `share` [B] the mixture is
        share · own + (1 - share) · partner's. Arrays of NumPy, TensorFlow or JAX.
      mean, std: the log-mel's normalisation.

    Returns:
      float32 [B, L, 256], in the same library.
    """
    patches = patchify(fbank(batch["waveform"], mean=mean, std=std))
    if "partner" not in batch:
        return patches
    share = batch["share"][:, None, None]
    return share * patches + (1 - share) * patchify(fbank(batch["partner"], mean=mean, std=std))


def spec_augment(
    patches: jax.Array,
    num_samples: jax.Array,
    noise: jax.Array,
    time_masks: int,
    time_share: float,
    frequency_masks: int,
    frequency_share: float,
) -> jax.Array:
    """SpecAugment (Park et al., Interspeech 2019, without time warping) on log-mel patches.

    Every mask has a width drawn from 0 to a share of the clip's valid frames (or of the 128 mel
    bins) and a place where it fits. Masked pixels become 0, the mean of normalised log-mels.

    Args:
      patches: float [B, L, 256], normalised log-mel.
      num_samples: int [B], valid samples of each clip.
      noise: float [B, 2 · (time_masks + frequency_masks)] in [0, 1): a width and a place a mask.
      time_masks, frequency_masks: how many.
      time_share, frequency_share: greatest width, in 0 to 1.

    Returns:
      [B, L, 256].
    """
    import jax.numpy as jnp

    log_mel = unpatchify(patches)
    width, place = jnp.split(noise, 2, axis=1)
    frames = jnp.minimum(num_frames(num_samples), log_mel.shape[1])
    frames = frames.astype(jnp.float32)[:, None]
    in_time = _covered(
        width[:, :time_masks] * time_share, place[:, :time_masks], frames, log_mel.shape[1]
    )
    mels = jnp.full_like(frames, NUM_MELS)
    in_frequency = _covered(
        width[:, time_masks:] * frequency_share, place[:, time_masks:], mels, NUM_MELS
    )
    masked = in_time[:, :, None] | in_frequency[:, None, :]
    return patchify(jnp.where(masked, jnp.zeros((), log_mel.dtype), log_mel))


def _covered(width: jax.Array, place: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """bool [B, size]: indices under any of M masks, `width` and `place` [B, M], `length` [B, 1]."""
    import jax.numpy as jnp

    span = jnp.floor(width * length)
    first = jnp.floor(place * (length - span + 1))[..., None]
    index = jnp.arange(size, dtype=jnp.float32)[None, None]
    return jnp.any((index >= first) & (index < first + span[..., None]), axis=1)
