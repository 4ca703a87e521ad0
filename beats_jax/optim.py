"""AdamW with warm-up and decay (optax), as BEATs trains: betas 0.9/0.98, weight decay 0.01.

Fine-tuning adds a learning rate for each layer and a moving average of the weights.

Two deviations from the fairseq habits the paper inherits, both on purpose (method.md (b) 16, 17):
weight decay skips everything that is not a weight matrix, and Adam's eps is 1e-8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from beats_jax.models.beats import depths


def learning_rate(section: Any) -> optax.Schedule:
    """Linear warm-up from 0 to `lr`, then `schedule`: "linear" to 0 (the paper) or "cosine".

    The first update uses lr / warmup_steps, the last one a rate just above 0. A run shorter than
    its warm-up (a trial with few steps) only warms up.

    Args:
      section: a stage's config: `steps`, `lr`, `warmup_steps`, `schedule`.

    Raises:
      ValueError: an unknown schedule.
    """
    steps, warmup, peak = section.steps, section.warmup_steps, section.lr
    if section.schedule not in ("linear", "cosine"):
        raise ValueError(f'schedule "{section.schedule}" is unknown; use "linear" or "cosine"')
    if section.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
    else:
        decay = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    if not warmup:
        return decay
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup, decay], [warmup])


def decays(params: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices and the convolution's weights.

    Norms, biases, the relative-position table, gates (`grep_a`), mask tokens and weight norm's
    gains are left alone.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "weight_v"), params
    )


def layer_rates(params: Any, decay: float, trained_layers: int = -1) -> Any:
    """Factors of the learning rate: layer-wise decay and freezing.

    Layer i of N has decay^(N - 1 - i), what comes before the layers decay^N, the head 1
    (method.md (b) 15; BEiT and others fine-tune so). The official code scales *gradients* by these
    factors, which Adam undoes.

    Args:
      params: `encoder` and `head`.
      decay: in (0, 1].
      trained_layers: the head and this many layers from the top are trained, all else has rate 0;
        -1 = everything is trained.

    Returns:
      A tree like `params`, of floats.
    """

    def rate(depth: int) -> float:
        frozen = 0 <= trained_layers < depth
        return 0.0 if frozen else decay ** max(depth - 1, 0)

    return jax.tree.map(rate, depths(params))


class Average(NamedTuple):
    """A moving average of the weights and of 1, which divides it: no start value is in it."""

    total: Any
    weight: jax.Array


def weight_average(decay: float) -> optax.GradientTransformation:
    """Keeps a moving average of the weights after every update; the updates pass as they are.

    The last one in a chain: it has to see the updates that will be applied.
    """

    def init(params):
        return Average(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None):
        def move(old, new):
            return decay * old + (1 - decay) * new

        after = optax.apply_updates(params, updates)
        return updates, Average(jax.tree.map(move, state.total, after), move(state.weight, 1.0))

    return optax.GradientTransformation(init, update)


def averaged_weights(opt_state: Any) -> Any:
    """The params that `weight_average` has kept: Σ decay^(t-i) params_i over the sum of factors."""
    average = opt_state[-1]
    return jax.tree.map(lambda total: total / average.weight, average.total)


def make_optimizer(section: Any, adamw: Any) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping by the global norm, AdamW; in fine-tuning also layer-wise rates and an average.

    Args:
      section: a stage's config: see `learning_rate`; fine-tuning's has `layer_decay`,
        `trained_layers` (see `layer_rates`) and `ema_decay` besides.
      adamw: `b1`, `b2`, `eps`, `weight_decay`, `clip_norm` (0 = no clipping).

    Returns:
      The optax transformation and the schedule it follows (to be logged).
    """
    schedule = learning_rate(section)
    clip = optax.clip_by_global_norm(adamw.clip_norm) if adamw.clip_norm else optax.identity()
    moments = dict(b1=adamw.b1, b2=adamw.b2, eps=adamw.eps)
    decay = dict(weight_decay=adamw.weight_decay, mask=decays)
    chain = [clip, optax.adamw(schedule, **moments, **decay)]
    if "layer_decay" in section:

        def by_layer(updates, _):
            rates = layer_rates(updates, section.layer_decay, section.trained_layers)
            return jax.tree.map(lambda update, rate: rate * update, updates, rates)

        chain += [optax.stateless(by_layer), weight_average(section.ema_decay)]
    return optax.chain(*chain), schedule
