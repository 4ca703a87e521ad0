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
import optax
from jax.sharding import Mesh

import beats_jax
from beats_jax import sharding
from beats_jax.checkpoint import Checkpoints, TrainState, load_params
from beats_jax.data.sources import Clips
from beats_jax.stages import Stage


def state_maker(
    stage: Stage, tx: optax.GradientTransformation, seed: int, example: dict[str, jax.Array]
) -> Callable[[], TrainState]:
    """A function that makes the untrained state: pure, so that it can be traced for shapes."""

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

    In this order: the newest checkpoint of the own workdir; `config.resume`, a stage folder whose
    whole state is taken over; `config.init_from`, a stage folder whose weights start a new run;
    scratch.

    Returns:
      The state, and whether it was restored (so that nothing is calibrated or logged anew).

    Raises:
      ValueError: the checkpoint was made with another seed, batch size or dataset.
    """
    step = checkpoints.latest_step()
    if step is not None:
        before = checkpoints.meta(step)
        for key in ("seed", "batch_size", "dataset_fingerprint"):
            if before[key] != meta[key]:
                raise ValueError(
                    f"{checkpoints.folder} was trained with {key} {before[key]}, this run has "
                    f"{meta[key]}: the order of the data would change; take the old value back "
                    f"or another --workdir"
                )
        return checkpoints.restore(step, like), True
    if config.resume:
        other = Checkpoints(Path(config.resume) / "checkpoints")
        if (step := other.latest_step()) is None:
            raise FileNotFoundError(f"config.resume: no checkpoint in {other.folder}")
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


def describe(config: Any, section: Any, clips: Clips, folder: Path) -> dict[str, Any]:
    """Writes `config.json`: all that is needed to know what made this folder. Returns the meta."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = shutil.which("git") and subprocess.run(command, capture_output=True, text=True)
    meta = {
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
    if jax.process_index() == 0:
        (folder / "config.json").write_text(json.dumps(meta, indent=1))
    return meta
