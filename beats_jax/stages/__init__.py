"""A training stage is a handful of pure functions; the one loop in `train.py` does the rest.

A stage knows nothing of files, flags, optimizers or meshes. `params` is what gradients change,
`model_state` what they do not (code counts, an EMA codebook), `frozen` what comes from an earlier
stage (a teacher, a tokenizer) and is an argument of the compiled step: swapping one frozen input
for another of its kind compiles nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beats_jax.augment import log_mel_patches
from beats_jax.models.beats import PRESETS, BEATs

Batch = Mapping[str, jax.Array]
Metrics = Mapping[str, Any]  # name -> metrics.Mean | Histogram | Spread: they add


class Stage(NamedTuple):
    """What the loop needs to know of a stage.

    `loss_sum`, `weight`, `stats` and `metrics` are sums over the batch's examples: the loop adds
    them over micro-batches and divides once, so that n micro-batches are one big batch.
    """

    # (rng, batch) -> params, model_state
    init: Callable
    # (params, model_state, frozen, batches, rng) -> model_state, report; once, before step 1
    calibrate: Callable | None
    # (params, model_state, frozen, batch, rng) -> loss_sum, weight, (stats, metrics)
    loss_fn: Callable
    # (model_state, stats) -> model_state
    update_fn: Callable
    # (params, model_state, frozen, batch) -> metrics, outputs ("nll" and "valid" are [B, L])
    eval_fn: Callable
    # (floats by name) -> None, or what is unhealthy and what to change
    warn: Callable
    # (one step's metrics) -> None, or why the run must not go on and what to change
    alarm: Callable
    # analytic cost of one training step
    flops_per_clip: float


class Pretrained(NamedTuple):
    """A model of an earlier stage, or of an official file: a teacher, a tokenizer, a start.

    Attributes:
      kind: "encoder", "finetuned" or "tokenizer".
      model: the encoder.
      params: numpy arrays: `encoder`; of a fine-tuned model also `head` (kernel, bias); of a
        tokenizer also `quantize_layer_0` and `_2`; whatever else was trained with them.
      codebook: float32 [K, Dq], a tokenizer's.
      mean, std: the log-mel's normalisation that it was trained with.
      source: where it comes from: path, kind, step, params_sha256, lineage.
      labels: a fine-tuned model's classes in the order of its logits: names, or official MIDs.
      task: of a fine-tuned model, "multi-label" (sigmoid) or "single-label" (softmax).
      official: of an official file, what it holds besides (`convert.Leftovers`), to write it again.
    """

    kind: str
    model: BEATs
    params: Any
    codebook: np.ndarray | None
    mean: float
    std: float
    source: dict[str, Any]
    labels: tuple[str, ...] = ()
    task: str = ""
    official: Any = None

    @property
    def num_codes(self) -> int:
        """Size of a tokenizer's codebook, K; 0 of any other model."""
        return 0 if self.codebook is None else len(self.codebook)


def renormalisation(model: Pretrained, config: Any) -> np.ndarray:
    """[2] float32: factor and offset that turn the config's normalised log-mel into the model's."""
    factor = config.data.std / model.std
    return np.asarray([factor, (config.data.mean - model.mean) / (2 * model.std)], np.float32)


def no_alarm(metrics: Metrics) -> str | None:
    """Of a stage that nothing stops but a loss that is not finite."""
    del metrics


def named_key(rng: jax.Array, name: str) -> jax.Array:
    """An independent key for each use, by name: the same on every machine and in every run."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def example_noise(rng: jax.Array, counters: jax.Array, length: int) -> jax.Array:
    """Uniform noise that belongs to the example, not to its place in the batch.

    Args:
      rng: the step's key.
      counters: uint32 [B], each example's counter.
      length: numbers per example.

    Returns:
      [B, length] float32 in [0, 1).
    """
    keys = jax.vmap(lambda c: jax.random.fold_in(rng, c))(counters)
    return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)


def batch_patches(batch: Batch, mean: float, std: float) -> jax.Array:
    """The batch's log-mel patches [B, L, 256]: the host's if it made them, else computed here."""
    if "patches" in batch:
        return batch["patches"]
    return log_mel_patches(batch, mean, std)


def model_arguments(config: Any) -> dict[str, Any]:
    """The arguments of `BEATs`: the config's preset, its other `model` fields, and the dtype.

    Raises:
      ValueError: unknown preset or precision.
    """
    given = dict(config.model)
    preset = given.pop("preset")
    if preset not in PRESETS:
        raise ValueError(f'model.preset "{preset}" is unknown; use one of {", ".join(PRESETS)}')
    dtype = compute_dtype(config.precision)
    return {**PRESETS[preset], **given, "dtype": dtype, "remat": config.remat}


def compute_dtype(precision: str) -> Any:
    """float32 or bfloat16; "auto" is bfloat16 on accelerators and float32 on a CPU.

    Raises:
      ValueError: another word.
    """
    precisions = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    precisions["auto"] = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if precision not in precisions:
        raise ValueError(f'precision "{precision}" is unknown; use {", ".join(precisions)}')
    return precisions[precision]
