"""A checkpoint with a file cut or gone is known as such, put aside, and the one before is taken."""

import logging
import shutil

import jax
import pytest
from runs import assert_trees_equal
from test_checkpoint import like, state_at, steps_in

from beats_jax.checkpoint import ITEMS, Checkpoints
from beats_jax.damage import damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(state_at(step, size=40), {"seed": 3})
    return folder


def test_whatever_file_is_cut_or_deleted_is_found(saved, tmp_path):
    """What is not found (some of Orbax's notes about itself) changes nothing that is read."""
    files = sorted(p.relative_to(saved / "6") for p in (saved / "6").rglob("*") if p.is_file())
    assert len(files) > 10
    missed = set()
    for how in ("cut", "deleted"):
        for name in files:
            step = tmp_path / "checkpoints" / "6"
            shutil.rmtree(step, ignore_errors=True)
            shutil.copytree(saved / "6", step)
            if how == "deleted":
                (step / name).unlink()
            else:
                content = (step / name).read_bytes()
                (step / name).write_bytes(content[: len(content) // 2])
            if damage(step, ITEMS) is None:
                missed.add((how, str(name)))
                with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
                    state = checkpoints.restore(6, like(state_at(0, size=40)))
                assert_trees_equal(jax.device_get(state), state_at(6, size=40))
    print("MISSED", len(files), *sorted(missed), sep="\n")


@pytest.mark.parametrize("how", ["cut", "deleted", "an item gone"])
def test_the_one_before_is_taken_and_the_damaged_one_put_aside(saved, tmp_path, caplog, how):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    files = [p for p in (folder / "6" / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    if how == "cut":
        largest.write_bytes(largest.read_bytes()[:-100])
    elif how == "deleted":
        largest.unlink()
    else:
        shutil.rmtree(folder / "6" / "opt_state")
    with caplog.at_level(logging.WARNING, "beats_jax"), Checkpoints(folder, keep=5) as checkpoints:
        assert checkpoints.newest_intact(like(state_at(0, size=40))) == 4
        assert checkpoints.latest_step() == 4
        assert_trees_equal(checkpoints.restore(4, like(state_at(0, 40))), state_at(4, size=40))
        checkpoints.save(state_at(6, size=40), {})  # the place is free again
    (line,) = [r.getMessage() for r in caplog.records if r.name == "beats_jax"]
    assert "checkpoints/6 is damaged" in line and "going on from step 4" in line
    assert steps_in(folder) == [2, 4, 6] and steps_in(tmp_path / "checkpoints_damaged") == [6]


def test_none_is_moved_where_all_are_damaged(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for step in (2, 4, 6):
        shutil.rmtree(folder / str(step) / "params")
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.newest_intact(like(state_at(0, size=40)))
    assert steps_in(folder) == [2, 4, 6]
