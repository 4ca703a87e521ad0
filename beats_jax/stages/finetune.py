"""Fine-tuning (paper, section 3.4 and method.md 4.5): the encoder and a linear head on labels.

The head gives logits for every patch; a clip's logits are their mean over its unpadded patches, and
only then comes the sigmoid (multi-label, binary cross-entropy) or the softmax (single-label,
cross-entropy). The encoder comes from pre-training, its predictor is dropped, it sees all patches.

What a healthy run looks like: `accuracy` leaves 1 / C behind within the warm-up, and `val_accuracy`
or `val_mAP` follows; augmentation makes the training figures the worse ones of the two.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beats_jax import labels as class_labels
from beats_jax.augment import spec_augment
from beats_jax.fbank import SAMPLE_RATE, num_tokens
from beats_jax.flops import encoder_flops
from beats_jax.labels import Labels
from beats_jax.losses import binary_cross_entropy, soft_cross_entropy
from beats_jax.masking import random_masking
from beats_jax.metrics import Mean
from beats_jax.models.beats import BEATs, dense, depths, token_padding_mask
from beats_jax.models.dropout import Dropout
from beats_jax.stages import (
    Stage,
    batch_patches,
    example_noise,
    model_arguments,
    named_key,
    no_alarm,
)


class SpecAugment(NamedTuple):
    """How log-mels are masked (`augment.spec_augment`): numbers of masks, greatest widths."""

    time_masks: int = 0
    time_share: float = 0.0
    frequency_masks: int = 0
    frequency_share: float = 0.0


NO_MASKS = SpecAugment()
# What the fields of the config's section may be: least and greatest value.
RANGES = {
    "layer_decay": (1e-6, 1.0),
    "ema_decay": (0.0, 1 - 1e-9),
    "head_dropout": (0.0, 1 - 1e-9),
    "label_smoothing": (0.0, 1.0),
    "mixup": (0.0, 1.0),
    "mixup_alpha": (1e-3, 1e3),
    "visible": (0.01, 1.0),
    "spec_augment.time_share": (0.0, 1.0),
    "spec_augment.frequency_share": (0.0, 1.0),
}


def masked(
    patches: jax.Array,
    num_samples: jax.Array,
    counters: jax.Array,
    rng: jax.Array,
    masks: SpecAugment,
) -> jax.Array:
    """`patches` [B, L, 256] under the masks that belong to the step (`rng`) and the examples."""
    number = 2 * (masks.time_masks + masks.frequency_masks)
    noise = example_noise(named_key(rng, "spec_augment"), counters, number)
    return spec_augment(patches, num_samples, noise, *masks)


def make(
    encoder: BEATs,
    num_classes: int,
    task: str,
    *,
    mean: float,
    std: float,
    label_smoothing: float = 0.0,
    class_weights: np.ndarray | None = None,
    head_dropout: float = 0.0,
    masks: SpecAugment = NO_MASKS,
    keep: float = 1.0,
    trained_layers: int = -1,
    flops_per_clip: float = 0.0,
) -> Stage:
    """Fine-tuning as a `Stage`.

    Args:
      encoder: the model to train.
      num_classes: C.
      task: "single-label" or "multi-label".
      mean, std: the log-mel's normalisation.
      label_smoothing: of the targets (`losses`).
      class_weights: float32 [C], weights of the classes in the loss; None = all 1.
      head_dropout: of the features that the head sees.
      masks: SpecAugment.
      keep: share of the patches that the encoder sees while it trains, drawn anew for every
        example (patchout: Koutini et al., Interspeech 2022): 0.25 is what pre-training showed it,
        for a third of the cost. It is always tested on all patches.
      trained_layers: train only the head and this many layers from the top; -1 = everything.
      flops_per_clip: analytic cost of one training step per clip, for MFU.
    """
    single, head = (
        task == "single-label",
        dense(num_classes, encoder.embed_dim, "head", jnp.float32),
    )

    def forward(params, patches, padding_mask, visible=None, rngs=None):
        deterministic = rngs is None
        x: Any = encoder.apply(
            {"params": params["encoder"]},
            patches,
            padding_mask,
            visible=visible,
            deterministic=deterministic,
            rngs=rngs,
        )
        x = Dropout(head_dropout).apply(
            {}, jnp.asarray(x, jnp.float32), deterministic=deterministic, rngs=rngs
        )
        # Padded patches are zeros. The head is linear: logits of the mean = mean of the logits.
        seen = ~padding_mask if visible is None else visible.valid
        count = jnp.sum(seen, axis=1, dtype=jnp.float32)
        pooled = jnp.sum(x, axis=1) / jnp.maximum(count, 1)[:, None]
        logits: Any = head.apply({"params": params["head"]}, pooled)
        return logits, count > 0

    def measure(logits, targets, valid, smoothing=0.0, weights=None):
        loss = soft_cross_entropy if single else binary_cross_entropy
        nll = loss(logits, targets, smoothing, weights)
        metrics = {"loss": Mean.of(nll, valid)}
        if single:
            right = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
            metrics["accuracy"] = Mean.of(right, valid)
        return nll, metrics

    def trained(params):
        """`params` without gradients where they are frozen: nothing is computed for those."""
        if trained_layers < 0:
            return params
        return jax.tree.map(
            lambda x, depth: x if depth <= trained_layers else jax.lax.stop_gradient(x),
            params,
            depths(params),
        )

    def init(rng, batch):
        patches = batch_patches(batch, mean, std)
        padding_mask = token_padding_mask(batch["num_samples"], patches.shape[1])
        features, params = encoder.init_with_output(
            named_key(rng, "encoder"), patches, padding_mask
        )
        head_params = head.init(named_key(rng, "head"), features)
        return {"encoder": params["params"], "head": head_params["params"]}, {}

    def loss_fn(params, model_state, frozen, batch, rng):
        del model_state, frozen
        patches = batch_patches(batch, mean, std)
        patches = masked(patches, batch["num_samples"], batch["counter"], rng, masks)
        padding_mask = token_padding_mask(batch["num_samples"], patches.shape[1])
        visible = None
        if keep < 1:
            noise = example_noise(named_key(rng, "visible"), batch["counter"], patches.shape[1])
            visible, _ = random_masking(noise, padding_mask, keep)
        # The first example's counter tells micro-batches of one step apart.
        dropout = jax.random.fold_in(named_key(rng, "dropout"), batch["counter"][0])
        rngs = {"dropout": dropout, "layerdrop": named_key(rng, "layerdrop")}
        logits, valid = forward(trained(params), patches, padding_mask, visible, rngs)
        _, metrics = measure(logits, batch["labels"], valid, label_smoothing, class_weights)
        return *metrics["loss"], ({}, metrics)

    def update_fn(model_state, stats):
        del stats
        return model_state

    def eval_fn(params, model_state, frozen, batch):
        del model_state, frozen
        patches = batch_patches(batch, mean, std)
        padding_mask = token_padding_mask(batch["num_samples"], patches.shape[1])
        logits, valid = forward(params, patches, padding_mask)
        nll, metrics = measure(logits, batch["labels"], valid)
        outputs = {"nll": nll[:, None], "valid": valid[:, None], "logits": logits}
        return metrics, outputs | {name: batch[name] for name in ("labels", "index")}

    def warn(metrics):
        if metrics.get("accuracy", 1.0) > 1.2 / num_classes:
            return None
        return (
            f"accuracy {metrics['accuracy']:.3f} is that of guessing among {num_classes} classes; "
            "raise --config.finetune.lr, train longer, or start from a pre-trained model "
            "(--config.init_from)"
        )

    return Stage(init, None, loss_fn, update_fn, eval_fn, warn, no_alarm, flops_per_clip)


def inverse_frequency(counts: np.ndarray) -> np.ndarray:
    """Class weights float32 [C] from clips a class [C]: 1 / count, with mean 1 over the classes.

    A class without clips has weight 1: all that is learned of it is that it is not there.
    """
    weights = 1 / np.maximum(counts, 1)
    seen = counts > 0
    return np.where(seen, weights / weights[seen].mean(), 1.0).astype(np.float32)


def extend_head(
    fresh: Any, trained: Any, labels: tuple[str, ...], known: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """A head for `labels` that keeps what a trained one knows of them.

    Args:
      fresh: kernel [D, C] and bias [C] of an untrained head.
      trained: kernel [D, C'] and bias [C'].
      labels: the C classes wanted, by name or MID.
      known: the C' classes of the trained head.

    Returns:
      kernel [D, C] and bias [C]: the trained rows where a class has the same name, else fresh ones.
    """
    place = {name: i for i, name in enumerate(class_labels.names(known))}
    pairs = [(i, place[name]) for i, name in enumerate(class_labels.names(labels)) if name in place]
    kernel, bias = np.array(fresh["kernel"]), np.array(fresh["bias"])
    if pairs:
        new, old = np.array(pairs).T
        kernel[:, new], bias[new] = trained["kernel"][:, old], trained["bias"][old]
    return {"kernel": kernel, "bias": bias}


def from_config(config: Any, labels: Labels) -> tuple[Stage, dict[str, Any]]:
    """The stage of a config, and what is frozen in it: nothing.

    Args:
      config: of the run.
      labels: of the training clips.

    Raises:
      ValueError: an unknown preset; a number that makes no sense.
    """
    section = config.finetune
    for field, (low, high) in RANGES.items():
        value = functools.reduce(getattr, field.split("."), section)
        if not low <= value <= high:
            raise ValueError(f"finetune.{field} is {value}; want {low:g} to {high:g}")
    if section.mixup_of not in ("waveform", "log-mel"):
        raise ValueError(
            f'finetune.mixup_of "{section.mixup_of}" is unknown; use "waveform" or "log-mel"'
        )
    model, num_classes = BEATs(**model_arguments(config)), len(labels.names)
    tokens = int(num_tokens(round(config.data.clip_seconds * SAMPLE_RATE)))
    seen, head_flops = round(section.visible * tokens), 2 * model.embed_dim * num_classes
    stage = make(
        model,
        num_classes,
        section.task,
        mean=config.data.mean,
        std=config.data.std,
        label_smoothing=section.label_smoothing,
        class_weights=inverse_frequency(labels.counts()) if section.class_weights else None,
        head_dropout=section.head_dropout,
        masks=SpecAugment(**section.spec_augment),
        keep=section.visible,
        trained_layers=section.trained_layers,
        flops_per_clip=3 * (encoder_flops(model, tokens, seen) + head_flops),
    )
    return stage, {}
