"""Checkpoints: exact, apart by item, the newest and the best kept, never half of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_trees_equal

from beats_jax import checkpoint
from beats_jax.checkpoint import Checkpoints, TrainState, load_params


def state_at(step: int, size: int = 4) -> TrainState:
    params = {"layer": {"kernel": jnp.full((size, size), step / 3), "bias": jnp.arange(3.0)}}
    return TrainState(jnp.int32(step), params, {"mu": params}, {"counts": jnp.ones((8, 5)) * step})


def like(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def steps_in(folder) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_a_state_comes_back_to_the_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step() is None
    checkpoints.save(state_at(7), {"seed": 3})
    checkpoints.close()

    again = Checkpoints(tmp_path / "checkpoints")
    assert again.latest_step() == 7 and again.meta(7) == {"seed": 3}
    assert_trees_equal(again.restore(7, like(state_at(0))), state_at(7))
    params, meta = load_params(tmp_path)
    assert_trees_equal(params, jax.device_get(state_at(7).params))
    assert meta == {"seed": 3, "step": 7}


def test_the_saved_values_are_those_of_the_moment_of_saving(tmp_path):
    """The next step donates the arrays while the save is still being written."""
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
    state = jax.tree.map(jnp.copy, state_at(0, size=1500))
    for step in range(3):
        checkpoints.save(state, {})
        for _ in range(2):
            state = bump(state)
        state = state._replace(step=jnp.int32(step + 1))
    checkpoints.close()
    kernels = [load_params(f"{tmp_path}@{step}")[0]["layer"]["kernel"] for step in range(3)]
    assert [float(k[0, 0]) for k in kernels] == [0.0, 2.0, 4.0]
    assert all(np.ptp(k) == 0 for k in kernels)


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_best="val_loss")
    losses = {1: 3.0, 2: 1.0, 4: 2.0, 6: 2.5}
    for step in range(1, 8):
        figures = {"val_loss": losses[step], "loss": 0.0} if step in losses else {"loss": 0.0}
        checkpoints.save(state_at(step), {}, figures)
    checkpoints.close()
    assert steps_in(tmp_path / "checkpoints") == [2, 6, 7]


def test_another_models_checkpoint_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state_at(1), {})
    checkpoints.wait()
    with pytest.raises(ValueError, match="does not fit this config's model"):
        checkpoints.restore(1, like(state_at(1, size=6)))


def test_no_checkpoint_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a stage folder such as W/iter1/pretrain"):
        load_params(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state_at(5), {})
    checkpoints.close()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 6 in .*found: \[5\]"):
        load_params(f"{tmp_path}@6")


def test_a_process_whose_write_failed_waits_for_no_other(monkeypatch):
    """The others wait for its part at another barrier; `chaos.py` has it with real processes."""
    waited = []
    monkeypatch.setattr(
        checkpoint.ocp.multihost, "get_barrier_sync_fn", lambda: lambda **at: waited.append(at)
    )
    checkpoint._barrier(key="saved", timeout_ms=1)
    with pytest.raises(OSError, match="disk full"):
        try:  # as Orbax's background thread ends a save
            raise OSError("disk full")
        finally:
            checkpoint._barrier(key="finalized", timeout_ms=1)
    assert waited == [{"key": "saved", "timeout_ms": 1}]
