"""A checkpoint with a file cut or gone is known as such, put aside, and the one before is taken."""

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from runs import assert_trees_equal
from test_checkpoint import like, steps_in

from beats_jax.checkpoint import ITEMS, Checkpoints, TrainState
from beats_jax.damage import damage


def noisy(step: int) -> TrainState:
    """Arrays that do not compress and are too large to be kept in Orbax's index."""
    params = {"kernel": jax.random.normal(jax.random.key(step), (40, 40))}
    return TrainState(jnp.int32(step), params, {"mu": params}, {"counts": jnp.ones(5) * step})


def size(path: Path) -> int:
    return path.stat().st_size


def largest_of(item: Path) -> Path:
    """The file of an item's arrays; those of a process alone are read no more once merged."""
    return max((item / "d").iterdir(), key=size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(noisy(step), {"seed": 3})
    return folder


def test_whatever_file_is_cut_or_deleted_is_found(saved, tmp_path):
    """What is not found (Orbax's notes about itself, data since written anew) is not missed."""
    files = [p.relative_to(saved / "6") for p in sorted((saved / "6").rglob("*")) if p.is_file()]
    files = [f for f in files if f.parts[0] not in ("opt_state", "model_state")]  # as `params`
    missed = []
    for how in ("cut", "deleted"):
        for name in files:
            step = tmp_path / "checkpoints" / "6"
            shutil.rmtree(step, ignore_errors=True)
            shutil.copytree(saved / "6", step)
            if how == "deleted":
                (step / name).unlink()
            else:
                (step / name).write_bytes((step / name).read_bytes()[: size(step / name) // 2])
            if damage(step, ITEMS) is None:
                missed.append(name)
                with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
                    assert_trees_equal(
                        jax.device_get(checkpoints.restore(6, like(noisy(0)))), noisy(6)
                    )
    found = {name.name for name in files} - {name.name for name in missed}
    assert {"metadata", "_METADATA", largest_of(saved / "6" / "params").name} <= found


@pytest.mark.parametrize("how", ["cut", "deleted", "an item gone"])
def test_the_one_before_is_taken_and_the_damaged_one_put_aside(saved, tmp_path, caplog, how):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    largest = largest_of(folder / "6" / "params")
    if how == "cut":
        largest.write_bytes(largest.read_bytes()[:-100])
    elif how == "deleted":
        largest.unlink()
    else:
        shutil.rmtree(folder / "6" / "opt_state")
    with caplog.at_level(logging.WARNING, "beats_jax"), Checkpoints(folder, keep=5) as checkpoints:
        assert checkpoints.newest_intact(like(noisy(0))) == 4
        assert checkpoints.latest_step() == 4
        assert_trees_equal(checkpoints.restore(4, like(noisy(0))), noisy(4))
        checkpoints.save(noisy(6), {})  # the place is free again
    (line,) = [r.getMessage() for r in caplog.records if r.name == "beats_jax"]
    assert "checkpoints/6 is damaged" in line and "going on from step 4" in line
    assert steps_in(folder) == [2, 4, 6] and steps_in(tmp_path / "checkpoints_damaged") == [6]
    assert (tmp_path / "checkpoints_damaged" / "reasons.txt").read_text().startswith("6: ")


def test_none_is_moved_where_all_are_damaged(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for step in (2, 4, 6):
        shutil.rmtree(folder / str(step) / "params")
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.newest_intact(like(noisy(0)))
    assert steps_in(folder) == [2, 4, 6]
