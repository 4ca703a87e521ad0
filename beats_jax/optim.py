"""AdamW with warm-up and decay (optax), as BEATs trains: betas 0.9/0.98, weight decay 0.01.

Two deviations from the fairseq habits the paper inherits, both on purpose (method.md (b) 16, 17):
weight decay skips everything that is not a weight matrix, and Adam's eps is 1e-8.
"""

from __future__ import annotations

from typing import Any

import jax
import optax


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


def make_optimizer(section: Any, adamw: Any) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping by the global norm, then AdamW.

    Args:
      section: a stage's config: see `learning_rate`.
      adamw: `b1`, `b2`, `eps`, `weight_decay`, `clip_norm` (0 = no clipping).

    Returns:
      The optax transformation and the schedule it follows (to be logged).
    """
    schedule = learning_rate(section)
    clip = optax.clip_by_global_norm(adamw.clip_norm) if adamw.clip_norm else optax.identity()
    moments = dict(b1=adamw.b1, b2=adamw.b2, eps=adamw.eps)
    decay = dict(weight_decay=adamw.weight_decay, mask=decays)
    return optax.chain(clip, optax.adamw(schedule, **moments, **decay)), schedule
