"""Random masking at static shapes, and moving rows between the visible tokens and the full grid.

A batch keeps ``K = L / 4`` slots for visible tokens whatever its clips' lengths are: a clip with
fewer valid tokens leaves its last slots empty (``valid`` False). Rows are moved by gathers alone,
in both directions of differentiation: a scatter is slow on accelerators, and the two moves are each
other's transpose.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visible(NamedTuple):
    """The tokens the encoder sees.

    Attributes:
        index: int32 [B, K], their places in the grid of L tokens, ascending in each row.
        valid: bool [B, K], False in the empty slots, which come last.
    """

    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    valid: jax.Array


def random_masking(
    noise: jax.Array, padding_mask: jax.Array, keep: float = 0.25
) -> tuple[Visible, jax.Array]:
    """Keeps the tokens with the lowest noise, the same share of every clip's valid tokens.

    Args:
        noise: float [B, L], uniform in [0, 1).
        padding_mask: bool [B, L], True = padding.
        keep: the share of tokens that stay visible.

    Returns:
        The visible tokens, and mask: bool [B, L], True = hidden and to be predicted (padding is
        neither visible nor predicted).

    Reference: method.md section 6 (75 % of the patches hidden at random, one by one).
    """
    if noise.shape != padding_mask.shape:
        raise ValueError(f"noise is {noise.shape}, padding_mask {padding_mask.shape}; want equal")
    length = noise.shape[1]
    slots = round(keep * length)
    if not 0 < slots <= length:
        raise ValueError(
            f"keep {keep} of {length} tokens leaves {slots} visible; want 1 to {length}"
        )
    valid_tokens = jnp.sum(~padding_mask, axis=1).astype(jnp.float32)
    kept_tokens = jnp.minimum(jnp.round(valid_tokens * keep).astype(jnp.int32), slots)  # [B]
    order = jnp.argsort(jnp.where(padding_mask, jnp.inf, noise), axis=1)
    rank = jnp.argsort(order, axis=1)
    kept = rank < kept_tokens[:, None]
    places = jnp.arange(length, dtype=jnp.int32)[None]
    index = jnp.sort(jnp.where(kept, places, length), axis=1)[:, :slots]
    visible = Visible(jnp.minimum(index, length - 1), index < length)
    return visible, ~kept & ~padding_mask


def slot_of_token(visible: Visible, length: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of ``Visible.index``: each token's slot int32 [B, L], and whether it has one."""
    places = jnp.arange(length, dtype=jnp.int32)[None, None]
    match = visible.valid[:, :, None] & (visible.index[:, :, None] == places)  # [B, K, L]
    return jnp.argmax(match, axis=1), jnp.any(match, axis=1)


def _take(rows: jax.Array, index: jax.Array, present: jax.Array) -> jax.Array:
    taken = jnp.take_along_axis(rows, index[:, :, None], axis=1, mode="clip")
    return jnp.where(present[:, :, None], taken, jnp.zeros((), rows.dtype))


@jax.custom_vjp
def gather_rows(grid: jax.Array, visible: Visible) -> jax.Array:
    """Reads the visible rows of a grid: [B, L, D] -> [B, K, D], zeros in empty slots."""
    return _take(grid, visible.index, visible.valid)


def scatter_rows(rows: jax.Array, visible: Visible, length: int) -> jax.Array:
    """Puts visible rows back on their places: [B, K, D] -> [B, length, D], zeros elsewhere."""
    return _spread(rows, visible, *slot_of_token(visible, length))


@jax.custom_vjp
def _spread(rows: jax.Array, visible: Visible, slot: jax.Array, has_one: jax.Array) -> jax.Array:
    return _take(rows, slot, has_one)


def _gather_fwd(grid, visible):
    return gather_rows(grid, visible), (visible, grid.shape[1])


def _gather_bwd(residuals, cotangent):
    visible, length = residuals
    return scatter_rows(cotangent, visible, length), None


def _spread_fwd(rows, visible, slot, has_one):
    return _spread(rows, visible, slot, has_one), visible


def _spread_bwd(visible, cotangent):
    return gather_rows(cotangent, visible), None, None, None


gather_rows.defvjp(_gather_fwd, _gather_bwd)
_spread.defvjp(_spread_fwd, _spread_bwd)
