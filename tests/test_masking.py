"""Random masking and the moves between visible rows and the grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beats_jax.fbank import num_tokens
from beats_jax.masking import Visible, gather_rows, random_masking, scatter_rows, slot_of_token

pytestmark = pytest.mark.usefixtures("strict_promotion")


def padding(lengths, total):
    return jnp.arange(total)[None] >= jnp.asarray(lengths)[:, None]


def noise_for(mask, seed=0):
    return jax.random.uniform(jax.random.key(seed), mask.shape)


def ragged() -> tuple[Visible, jax.Array, jax.Array]:
    padding_mask = padding([48, 32, 8, 0], 48)
    visible, hidden = random_masking(noise_for(padding_mask), padding_mask)
    return visible, hidden, padding_mask


@pytest.mark.parametrize("seconds, kept", [(1, 12), (2, 24), (5, 62), (10, 124)])
def test_kept_counts(seconds, kept):
    tokens = num_tokens(16000 * seconds)
    padding_mask = padding([tokens], tokens)
    visible, hidden = random_masking(noise_for(padding_mask), padding_mask)
    assert visible.index.shape == (1, kept) and bool(visible.valid.all())
    assert int(hidden.sum()) == tokens - kept


def test_rows_keep_a_quarter_of_their_own_tokens():
    visible, hidden, padding_mask = ragged()
    assert visible.index.dtype == jnp.int32
    np.testing.assert_array_equal(visible.valid.sum(1), [12, 8, 2, 0])
    np.testing.assert_array_equal(hidden.sum(1), [36, 24, 6, 0])
    rows = zip(*(np.asarray(a) for a in (*visible, hidden, padding_mask)), strict=True)
    for index, valid, row_hidden, row_padding in rows:
        assert not np.any(np.diff(valid.astype(int)) > 0)  # the empty slots come last
        kept = index[valid]
        assert np.all(np.diff(kept) > 0)
        assert np.all((index >= 0) & (index < 48))
        state = np.zeros(48, int)  # every token is exactly one of kept, hidden, padding
        state[kept] += 1
        np.testing.assert_array_equal(state + row_hidden + row_padding, 1)


def test_lowest_noise_is_kept_whatever_the_padding_draws():
    padding_mask = padding([16], 24)
    noise = jnp.linspace(0.9, 0.1, 24)[None]  # falling: the last valid ones are the lowest
    visible, _ = random_masking(noise, padding_mask)
    np.testing.assert_array_equal(visible.index[0][visible.valid[0]], [12, 13, 14, 15])
    noise = noise.at[0, 3].set(0.0)
    visible, _ = random_masking(noise, padding_mask)
    np.testing.assert_array_equal(visible.index[0][visible.valid[0]], [3, 13, 14, 15])


def test_a_row_is_masked_as_it_would_be_alone():
    visible, hidden, padding_mask = ragged()
    noise = noise_for(padding_mask)[1:2, :32]
    alone, alone_hidden = random_masking(noise, jnp.zeros((1, 32), bool))
    np.testing.assert_array_equal(visible.index[1, :8], alone.index[0])
    np.testing.assert_array_equal(hidden[1, :32], alone_hidden[0])


def test_other_shares():
    padding_mask = padding([40, 16], 40)
    visible, _ = random_masking(noise_for(padding_mask), padding_mask, keep=0.2)
    assert visible.index.shape == (2, 8)
    np.testing.assert_array_equal(visible.valid.sum(1), [8, 3])  # round(0.2 x 16)
    everything, hidden = random_masking(noise_for(padding_mask), padding_mask, keep=1.0)
    np.testing.assert_array_equal(everything.valid.sum(1), [40, 16])
    assert not bool(hidden.any())


def test_round_trip():
    visible, hidden, padding_mask = ragged()
    grid = jax.random.normal(jax.random.key(1), (4, 48, 5))
    rows = gather_rows(grid, visible)
    np.testing.assert_array_equal(rows[~visible.valid], 0.0)
    kept = ~hidden & ~padding_mask
    np.testing.assert_array_equal(
        scatter_rows(rows, visible, 48), np.where(kept[..., None], grid, 0.0)
    )
    slot, has_one = slot_of_token(visible, 48)
    np.testing.assert_array_equal(has_one, kept)
    for row in range(4):
        tokens = np.flatnonzero(kept[row])
        np.testing.assert_array_equal(visible.index[row][slot[row][tokens]], tokens)


def test_gradients_are_gathers_and_right():
    visible, _, _ = ragged()
    key_grid, key_rows = jax.random.split(jax.random.key(2))
    grid = jax.random.normal(key_grid, (4, 48, 5))
    rows = jax.random.normal(key_rows, (4, 12, 5))

    _, pull = jax.vjp(lambda g: gather_rows(g, visible), grid)
    np.testing.assert_array_equal(pull(rows)[0], scatter_rows(rows, visible, 48))
    _, pull = jax.vjp(lambda r: scatter_rows(r, visible, 48), rows)
    np.testing.assert_array_equal(pull(grid)[0], gather_rows(grid, visible))
    # <gather(g), r> = <g, scatter(r)>
    left = jnp.vdot(gather_rows(grid, visible), rows)
    np.testing.assert_allclose(left, jnp.vdot(grid, scatter_rows(rows, visible, 48)), rtol=1e-6)

    def loss(grid):
        return jnp.sum(jnp.sin(scatter_rows(gather_rows(grid, visible), visible, 48)))

    assert "gather" in str(jax.make_jaxpr(jax.grad(loss))(grid))
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(grid))


def test_bad_arguments():
    with pytest.raises(ValueError, match="want equal"):
        random_masking(jnp.zeros((2, 8)), jnp.zeros((2, 16), bool))
    with pytest.raises(ValueError, match=r"keep 0\.01 of 8 tokens leaves 0 visible"):
        random_masking(jnp.zeros((2, 8)), jnp.zeros((2, 8), bool), keep=0.01)
