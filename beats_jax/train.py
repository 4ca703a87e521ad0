"""The one training loop: every stage, every mesh, resumable to the bit.

`run_stage` reads top to bottom: stage, data, optimizer, starting state, loop. What is frozen (a
tokenizer, a teacher) is an argument of the compiled step. Nothing random is stored: the batch of a
step is a function of (seed, step), every random number of (seed, step, name).
"""

from __future__ import annotations

import json
import logging
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import beats_jax
from beats_jax import plots, sharding
from beats_jax.checkpoint import Checkpoints, TrainState, load_params
from beats_jax.data.dataset import open_data
from beats_jax.data.pipeline import eval_batches, train_batches
from beats_jax.data.sources import Clips
from beats_jax.fbank import SAMPLE_RATE, unpatchify
from beats_jax.metrics import Histogram, summarize
from beats_jax.optim import make_optimizer
from beats_jax.stages import Stage, pretrain
from beats_jax.watch import Clock, Interrupted, Report, Signals
from beats_jax.writers import read_metrics

log = logging.getLogger("beats_jax")

STAGES: dict[str, Callable[[Any], tuple[Stage, Any]]] = {"pretrain": pretrain.from_config}


def run_stage(config: Any, name: str, workdir: str | Path) -> None:
    """Trains one stage of `config` to its last step, from wherever it was.

    Args:
      config: an `ml_collections.ConfigDict`; see `configs/`.
      name: the stage, a section of the config: "pretrain".
      workdir: results go to `<workdir>/<iteration>/<stage>/`.

    Raises:
      ValueError: the config does not fit the data, the devices or the checkpoint found.
      FileNotFoundError: no data, or no checkpoint where one is named.
      OSError: something could not be written.
      FloatingPointError: the loss is not finite; nothing was saved after the last good step.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    section, folder = config[name], Path(workdir) / config.iteration / name
    folder.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(section.batch_size, section.micro_batches, mesh, name)
    stage, frozen = STAGES[name](config)
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    data = Data.open(config, section.batch_size, mesh, workdir)
    tx, schedule = make_optimizer(section)
    checkpoints = Checkpoints(folder / "checkpoints", section.keep)
    meta = _describe(config, section, data.train_clips, folder)

    init = state_maker(stage, tx, config.seed, data.calibration())
    like = abstract_state(init, mesh)
    state, restored = starting_state(config, init, like, checkpoints, meta)
    start = int(state.step)
    report = Report(folder, name, start, section.steps, restored, stage.warn)
    if not restored:
        state, summary = calibrate(stage, state, like, frozen, data, section, config.seed)
        report.write(0, summary)
        checkpoints.save(state, meta)

    train_step = make_train_step(
        stage, tx, schedule, config.seed, section.micro_batches, like, mesh
    )
    eval_step = jax.jit(stage.eval_fn, out_shardings=sharding.replicated(mesh))
    feed = data.training(start)
    clock = Clock(start, section.batch_size, config.data.clip_seconds, stage.flops_per_clip)
    before = None  # the step before this one, not yet looked at
    with Signals() as signals:
        for step in range(start + 1, section.steps + 1):
            with clock.waiting():
                batch = next(feed)
            with jax.transfer_guard("disallow"):
                state, sums = train_step(state, frozen, batch)
            last = step == section.steps
            interrupted = signals.received(checkpoints.reached_preemption, step)
            save = step % section.save_every == 0 or last or interrupted
            # One step late, so that the device never waits for the host; at once before a save.
            for late in [before, (step, batch, sums)] if save else [before]:
                if late and not late[2]["finite"]:
                    raise FloatingPointError(
                        _blame(*late, eval_step, state, frozen, data.train_clips)
                    )
            before = (step, batch, sums)

            record: dict[str, float] = {}
            if step % section.log_every == 0 or last:
                record = {**_floats(sums), **clock.rates(step)}
            if len(data.val_clips) and (step % section.eval_every == 0 or last):
                with clock.paused():
                    record |= evaluate(eval_step, state, frozen, data.validation(), folder, step)
            if record:
                report.write(step, record)
            if save:
                with clock.paused():
                    checkpoints.save(state, meta)
            report.advance()
            if interrupted and not last:
                checkpoints.wait()
                raise Interrupted(step, interrupted)
    report.close()
    checkpoints.close()
    if jax.process_index() == 0:
        plots.plot_curves(read_metrics(folder), folder / "plots" / "curves.png")


class Data(NamedTuple):
    """The batches of a stage, already on the mesh; each method starts a new iterator."""

    train_clips: Clips
    val_clips: Clips
    training: Callable[[int], Iterator[dict[str, jax.Array]]]  # from a step on, endless
    calibration: Callable[[], Iterator[dict[str, jax.Array]]]  # a counter stream of its own
    validation: Callable[[], Iterator[dict[str, jax.Array]]]  # once through the held-out clips

    @classmethod
    def open(cls, config: Any, batch_size: int, mesh: Mesh, workdir: str | Path) -> Data:
        """Opens (and, the first time, prepares) the config's data."""
        train_clips, val_clips = open_data(config.data, workdir)
        common = dict(
            batch_size=batch_size,
            clip_samples=round(config.data.clip_seconds * SAMPLE_RATE),
            rows=sharding.local_rows(batch_size, mesh),
            mean=config.data.mean,
            std=config.data.std,
            **config.input,
        )

        def on_mesh(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, jax.Array]]:
            return (sharding.global_batch(batch, batch_size, mesh) for batch in batches)

        def stream(seed: int, start: int = 0):
            return on_mesh(train_batches(train_clips, seed=seed, start=start, **common))

        return cls(
            train_clips,
            val_clips,
            training=lambda start: stream(config.seed, start),
            calibration=lambda: stream(config.seed + 1_000_003),
            validation=lambda: on_mesh(eval_batches(val_clips, **common)),
        )


def state_maker(
    stage: Stage, tx: optax.GradientTransformation, seed: int, batches: Iterator[dict]
) -> Callable[[], TrainState]:
    """A function that makes the untrained state: pure, so that it can be traced for shapes."""
    example = next(batches)

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
    data: Data,
    section: Any,
    seed: int,
) -> tuple[TrainState, dict[str, float]]:
    """Runs the stage's one look at the data before step 1, if it wants one."""
    if stage.calibrate is None:
        return state, {}
    stream = data.calibration()
    batches = (next(stream) for _ in range(section.calibration_batches))
    rng = jax.random.key(seed)
    model_state, summary = stage.calibrate(state.params, state.model_state, frozen, batches, rng)
    where = jax.tree.map(lambda x: x.sharding, like.model_state)
    return state._replace(model_state=jax.device_put(model_state, where)), summary


def make_train_step(
    stage: Stage,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    micro_batches: int,
    like: TrainState,
    mesh: Mesh,
) -> Callable[[TrainState, Any, dict[str, jax.Array]], tuple[TrainState, dict[str, Any]]]:
    """Compiles (state, frozen, batch) -> state, sums: one update, whatever the stage.

    The loss's sum, weight, statistics and metrics are added over `micro_batches` and divided once.
    If the loss or a gradient is not finite the state stays as it was, and `sums["finite"]` says so.
    """

    def micro(batch):
        # Rows j, j + n, …: every device keeps its own rows.
        return jax.tree.map(
            lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch
        )

    def train_step(state: TrainState, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params, part):
            loss, *rest = stage.loss_fn(params, state.model_state, frozen, part, rng)
            return loss, rest

        def sums_of(part):
            (loss, (weight, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, part
            )
            return loss, weight, aux, grads

        if micro_batches == 1:
            sums = sums_of(batch)
        else:
            parts = micro(batch)
            zeros = jax.eval_shape(sums_of, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)
            sums, _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, sums_of(part)), None),
                zeros,
                parts,
            )
        loss, weight, (stats, metrics), grads = sums
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        after = TrainState(
            state.step + 1,
            optax.apply_updates(state.params, updates),
            opt_state,
            stage.update_fn(state.model_state, stats),
        )
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        sums = {"metrics": metrics, "lr": schedule(state.step), "grad_norm": grad_norm}
        return after, {**sums, "finite": finite}

    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh))
    )


def evaluate(
    eval_step: Callable,
    state: TrainState,
    frozen: Any,
    batches: Iterator[dict[str, jax.Array]],
    folder: Path,
    step: int,
) -> dict[str, float]:
    """Figures of the held-out clips, prefixed `val_`; draws the first clip and the code usage."""
    total = None
    for batch in batches:
        metrics, outputs = eval_step(state.params, state.model_state, frozen, batch)
        metrics = jax.device_get(metrics)
        if total is None and jax.process_index() == 0:
            first = jax.tree.map(lambda x: np.asarray(x[0]), outputs)
            plots.plot_example(
                unpatchify(first["patches"]),
                first["valid"],
                first["token_ids"],
                first["predicted_ids"],
                first["padding_mask"],
                folder / "plots" / f"example_{step:07d}.png",
            )
        total = metrics if total is None else jax.tree.map(np.add, total, metrics)
    total = total or {}
    usage = {name: m.counts for name, m in total.items() if isinstance(m, Histogram)}
    if usage and jax.process_index() == 0:
        plots.plot_code_usage(usage, folder / "plots" / f"code_usage_{step:07d}.png")
    return {f"val_{name}": value for name, value in summarize(total).items()}


def _floats(sums: dict[str, Any]) -> dict[str, float]:
    sums = jax.device_get(sums)
    figures = summarize(sums["metrics"])
    return {**figures, "lr": float(sums["lr"]), "grad_norm": float(sums["grad_norm"])}


def _blame(
    step: int, batch: dict, sums: dict, eval_step: Callable, state: TrainState, frozen: Any, clips
) -> str:
    """The message for a step whose loss was not finite, with the clips whose own loss is not."""
    figures = _floats(sums)
    _, outputs = eval_step(state.params, state.model_state, frozen, batch)
    bad = ~np.isfinite(np.where(outputs["valid"], outputs["nll"], 0.0)).all(axis=1)
    index = multihost_utils.process_allgather(batch["index"], tiled=True)
    names = ", ".join(clips.ids[i] for i in index[bad][:8])
    return (
        f"loss {figures['loss']} at step {step} (learning rate {figures['lr']:.3g}, gradient norm "
        f"{figures['grad_norm']:.3g}); "
        + (f"clips with a non-finite loss of their own: {names}" if names else "no clip stands out")
        + "; the newest checkpoint is good: lower the learning rate or remove those clips, "
        "then run the same command again"
    )


def _describe(config: Any, section: Any, clips: Clips, folder: Path) -> dict[str, Any]:
    """Writes `config.json`: all that is needed to know what made this folder. Returns the meta."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
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
        "git_commit": commit.stdout.strip(),
    }
    if jax.process_index() == 0:
        (folder / "config.json").write_text(json.dumps(meta, indent=1))
    return meta
