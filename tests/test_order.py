"""Order, crops and held-out groups are functions of (seed, counter) and of nothing else."""

import numpy as np
import pytest

from beats_jax.data.order import crop_starts, dataset_positions, held_out, uniform


def test_each_epoch_is_a_new_permutation():
    size = 97
    positions = dataset_positions(3, np.arange(3 * size), size).reshape(3, size)
    assert positions.dtype == np.int64
    for epoch, row in enumerate(positions):
        assert sorted(row) == list(range(size))
        expected = np.random.default_rng([3, epoch]).permutation(size)
        np.testing.assert_array_equal(row, expected)
    assert not np.array_equal(positions[0], positions[1])
    assert not np.array_equal(positions[0], dataset_positions(4, np.arange(size), size))


def test_any_subset_of_counters_reads_what_the_whole_reads():
    counters = np.arange(40, 240)
    lengths = np.arange(200) * 37 + 1000
    positions = dataset_positions(0, counters, 77)
    starts = crop_starts(0, counters, lengths, 2000)
    some = np.random.default_rng(0).permutation(200)[:50]
    np.testing.assert_array_equal(dataset_positions(0, counters[some], 77), positions[some])
    np.testing.assert_array_equal(crop_starts(0, counters[some], lengths[some], 2000), starts[some])


def test_uniform_is_uniform_and_its_streams_are_independent():
    u = uniform(0, "crop", np.arange(100_000))
    assert u.min() >= 0 and u.max() < 1
    # Chi-square of 100 bins: mean 99, standard deviation 14.
    counts = np.histogram(u, 100, (0, 1))[0]
    assert np.sum((counts - 1000.0) ** 2 / 1000) < 99 + 4 * 14
    others = [uniform(0, "mixup", np.arange(100_000)), uniform(1, "crop", np.arange(100_000))]
    for other in [*others, np.roll(u, 1)]:
        assert abs(np.corrcoef(u, other)[0, 1]) < 4 / np.sqrt(100_000)


def test_uniform_never_changes():
    """Resumed runs depend on these very numbers."""
    expected = np.array([0.41873570965045537, 0.9684065303694085, 0.2768795139248147])
    np.testing.assert_array_equal(uniform(0, "crop", np.array([0, 1, 10**9])), expected)


def test_crops_reach_both_ends_and_short_clips_start_at_zero():
    starts = crop_starts(0, np.arange(2000), np.full(2000, 1003), 1000)
    assert sorted(set(starts.tolist())) == [0, 1, 2, 3]
    assert not crop_starts(0, np.arange(50), np.full(50, 999), 1000).any()


def test_held_out_keeps_groups_together_and_is_stable():
    groups = [f"speaker{i % 200}" for i in range(1000)]
    out = held_out(groups, 0.2)
    assert 0.1 < out.mean() < 0.3
    for group in set(groups):
        assert len({bool(o) for o, g in zip(out, groups, strict=True) if g == group}) == 1
    more = held_out([*groups, *(f"new{i}" for i in range(500))], 0.2)
    np.testing.assert_array_equal(more[:1000], out)
    assert out[held_out(groups, 0.1)].all()  # a larger share only adds


def test_held_out_is_never_empty_by_chance():
    assert not held_out(list("abc"), 0.0).any()
    assert held_out(list("abc"), 1e-9).sum() == 1


@pytest.mark.parametrize(("keys", "fraction"), [(["a", "a"], 0.1), (["a", "b"], 1.0)])
def test_held_out_refuses(keys, fraction):
    with pytest.raises(ValueError, match=r"held[- ]out"):
        held_out(keys, fraction)


def test_no_clips():
    with pytest.raises(ValueError, match="empty"):
        dataset_positions(0, np.arange(3), 0)
