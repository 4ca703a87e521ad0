"""From a trained stage to features: what a probe (and everything built on features) calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from beats_jax.checkpoint import load_params
from beats_jax.data.pipeline import eval_batches
from beats_jax.data.sources import Clips
from beats_jax.fbank import BANDS, FRAME_SHIFT, MIN_SAMPLES, PATCH_SIZE, num_tokens
from beats_jax.models.beats import BEATs, token_padding_mask
from beats_jax.stages import batch_patches, model_arguments, named_key


class Encoder(NamedTuple):
    """A BEATs encoder with its weights and the normalisation of its log-mel input."""

    model: BEATs
    params: Any
    mean: float
    std: float


def load_encoder(stage_folder: str, untrained: bool = False) -> Encoder:
    """The encoder of a stage's checkpoint.

    Args:
      stage_folder: `W/<iteration>/<stage>`, its newest checkpoint, or `…@STEP`.
      untrained: its weights as they were before step 1, drawn again from the run's seed.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: `untrained`, and the run started from other weights.
    """
    params, meta = load_params(stage_folder)
    config: Any = ml_collections.ConfigDict(meta["config"])
    model = BEATs(**model_arguments(config))
    weights = params["encoder"]
    if untrained and (config.init_from or config.resume):
        raise ValueError(f"{stage_folder} did not start from scratch: it has no untrained encoder")
    if untrained:
        rng = named_key(jax.random.key(config.seed), "encoder")
        weights = jax.jit(model.init)(rng, jnp.zeros((1, BANDS, PATCH_SIZE**2)))["params"]
    return Encoder(model, weights, config.data.mean, config.data.std)


def pooled_features(
    encoder: Encoder, clips: Clips, layer: int | None = None, batch_size: int = 16
) -> np.ndarray:
    """Mean of each clip's features over its valid tokens (exact mode).

    Args:
      encoder: of `load_encoder`.
      clips: what to read; padded to the longest of them.
      layer: 0 = input of the first block, N = last output; the last by default.
      batch_size: clips at a time.

    Returns:
      [len(clips), D] float32; zeros for a clip under 2800 samples, which has no token.

    Raises:
      ValueError: the model has no such layer.
    """
    last = encoder.model.num_layers
    layer = last if layer is None else layer
    if not 0 <= layer <= last:
        raise ValueError(f"layer {layer} is not one of 0 (input) to {last} (last output)")

    @jax.jit
    def pool(params, batch):
        patches = batch_patches(batch, encoder.mean, encoder.std)
        padding_mask = token_padding_mask(batch["num_samples"], patches.shape[1])
        layers: Any = encoder.model.apply(
            {"params": params}, patches, padding_mask, all_layers=True
        )
        valid = jnp.maximum(jnp.sum(~padding_mask, axis=1), 1)
        return jnp.sum(layers[layer].astype(jnp.float32), axis=1) / valid[:, None]

    longest = int(clips.num_samples.max())
    columns = max(int(num_tokens(longest)) // BANDS, 1)
    batches = eval_batches(
        clips,
        batch_size=batch_size,
        clip_samples=MIN_SAMPLES + (columns - 1) * PATCH_SIZE * FRAME_SHIFT,
        backend="numpy",
        frontend="device",
    )
    rows = [np.asarray(pool(encoder.params, batch)) for batch in batches]
    return np.concatenate(rows)[: len(clips)]
