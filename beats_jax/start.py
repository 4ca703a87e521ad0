"""Where a run starts: its weights, and the record of what made them."""

from __future__ import annotations

import itertools
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import beats_jax
from beats_jax import sharding
from beats_jax.checkpoint import Checkpoints, TrainState, load_params
from beats_jax.data.sources import Clips
from beats_jax.stages import Stage


def state_maker(
    stage: Stage, tx: optax.GradientTransformation, seed: int, clip_samples: int
) -> Callable[[], TrainState]:
    """A function that makes the untrained state: pure, so that it can be traced for shapes."""
    example = {
        "waveform": np.zeros((1, clip_samples), np.int16),
        "num_samples": np.full(1, clip_samples, np.int32),
        "counter": np.zeros(1, np.uint32),
    }

    def init() -> TrainState:
        params, model_state = stage.init(jax.random.key(seed), example)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), model_state)

    return init


def abstract_state(init: Callable[[], TrainState], mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def starting_state(
    config: Any,
    init: Callable[[], TrainState],
    like: TrainState,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
) -> tuple[TrainState, bool]:
    """Where the weights come from, decided here and nowhere else.

    In this order: the newest checkpoint of the own workdir; `config.resume`, a stage folder (or
    `…@STEP`) whose whole state is taken over, also onto other data; `config.init_from`, one whose
    weights start a new run; scratch.

    Returns:
      The state, and whether it was restored (so that nothing is calibrated or logged anew).

    Raises:
      ValueError: the checkpoint was made with another seed, batch size or dataset, or with other
        tokens or another front end.
    """
    step = checkpoints.latest_step()
    if step is not None:
        keys = ("seed", "batch_size", "dataset_fingerprint")
        _check_same_run(checkpoints, step, meta, keys)
        return checkpoints.restore(step, like), True
    if config.resume:
        path, _, wanted = config.resume.partition("@")
        if not (Path(path) / "checkpoints").is_dir():
            raise FileNotFoundError(f"config.resume: {path} is no stage folder (W/iter1/pretrain)")
        other = Checkpoints(Path(path) / "checkpoints", read_only=True)
        if (step := int(wanted) if wanted else other.latest_step()) is None:
            raise FileNotFoundError(f"config.resume: no checkpoint in {other.folder}")
        _check_same_run(other, step, meta, ("seed", "batch_size"))
        return other.restore(step, like), True
    shardings = jax.tree.map(lambda x: x.sharding, like)
    state = jax.jit(init, out_shardings=shardings)()
    if config.init_from:
        loaded, _ = load_params(config.init_from)
        params = {**state.params, **{k: v for k, v in loaded.items() if k in state.params}}
        if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, state.params):
            raise ValueError(f"config.init_from: {config.init_from} holds another model's shapes")
        state = state._replace(params=jax.device_put(params, shardings.params))
    return state, False


# What the targets and the inputs are made with: a run that changed them would be another run.
FIXED = ("tokenizer", "data.clip_seconds", "data.mean", "data.std")


def _check_same_run(
    checkpoints: Checkpoints, step: int, meta: dict[str, Any], keys: tuple[str, ...]
) -> None:
    before = checkpoints.meta(step)
    for key in keys:
        if before[key] != meta[key]:
            raise ValueError(
                f"{checkpoints.folder} was trained with {key} {before[key]}, this run has "
                f"{meta[key]}: the order of the data would change; take the old value back or "
                f"another --workdir"
            )
    for name in FIXED:
        old, new = before["config"], meta["config"]
        for part in name.split("."):
            old, new = old[part], new[part]
        if old != new:
            raise ValueError(
                f"{checkpoints.folder} was trained with config.{name} {old}, this run has {new}: "
                f"take the old value back or another --workdir"
            )


def calibrate(
    stage: Stage,
    state: TrainState,
    like: TrainState,
    frozen: Any,
    batches: Iterator[dict[str, jax.Array]],
    section: Any,
    config: Any,
) -> tuple[TrainState, dict[str, float]]:
    """The stage's one look at the data before step 1, if it wants one; and what it saw."""
    if stage.calibrate is None:
        return state, {}
    chosen = itertools.islice(batches, section.calibration_batches)
    rng = jax.random.key(config.seed)
    model_state, seen = stage.calibrate(state.params, state.model_state, frozen, chosen, rng)
    where = jax.tree.map(lambda x: x.sharding, like.model_state)
    return state._replace(model_state=jax.device_put(model_state, where)), seen


def describe(config: Any, section: Any, clips: Clips) -> dict[str, Any]:
    """All that is needed to know what made a stage folder: its `config.json`."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    in_clone = (root / ".git").exists() and shutil.which("git")
    git = in_clone and subprocess.run(command, capture_output=True, text=True)
    return {
        "seed": config.seed,
        "batch_size": section.batch_size,
        "dataset_fingerprint": clips.fingerprint,
        "config": json.loads(config.to_json_best_effort()),
        "versions": {
            "beats_jax": beats_jax.__version__,
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
            "python": platform.python_version(),
        },
        "git_commit": git.stdout.strip() if git else "",
    }
