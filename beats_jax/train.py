"""The one training loop: every stage, every mesh, resumable to the bit.

`run_stage` reads top to bottom: data, stage, optimizer, starting state, loop. What is frozen (a
tokenizer, a teacher) is an argument of the compiled step. Nothing random is stored: the batch of a
step is a function of (seed, step), every random number of (seed, step, name).
"""

from __future__ import annotations

import importlib.resources
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from beats_jax import plots, sharding, start
from beats_jax.checkpoint import Checkpoints, TrainState
from beats_jax.data.dataset import Data
from beats_jax.data.sources import Clips
from beats_jax.fbank import unpatchify
from beats_jax.labels import names as audioset_names
from beats_jax.metrics import Histogram, summarize
from beats_jax.optim import make_optimizer
from beats_jax.selection import final_weights, results, score
from beats_jax.stages import Stage, batch_patches, finetune, pretrain, tokenizer
from beats_jax.watch import Clock, Interrupted, Report, Signals
from beats_jax.watchdog import Watchdog
from beats_jax.writers import read_metrics

log = logging.getLogger("beats_jax")

# Name of a stage -> (config, what it is built on: an earlier model, or the labels to learn) -> the
# stage, and what is frozen in it.
STAGES: dict[str, Callable[[Any, Any], tuple[Stage, Any]]] = {
    "tokenizer": tokenizer.from_config,
    "pretrain": pretrain.from_config,
    "finetune": finetune.from_config,
}


def run_stage(config: Any, name: str, workdir: epath.PathLike) -> None:
    """Trains one stage of `config` to its last step, from wherever it was.

    Args:
      config: an `ml_collections.ConfigDict`; see `configs/`.
      name: the stage, a section of the config: "tokenizer", "pretrain" or "finetune"; of another
        iteration than the config's as "iter1/pretrain".
      workdir: results go to `<workdir>/<iteration>/<stage>/`; earlier iterations are found there.

    Raises:
      ValueError: the config does not fit the data, the devices or the checkpoint found.
      FileNotFoundError: no data, or no model where one is named.
      OSError: something could not be written.
      FloatingPointError: the loss is not finite, or the stage's alarm went off (a codebook
        collapsed); nothing was saved after the last good step.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    config, name, section = checked(config, name)
    if name == "tokenizer" and section.path:
        return log.info("tokenizer: nothing to train, %s is given", section.path)
    folder = epath.Path(workdir) / config.iteration / name
    folder.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(section.batch_size, section.micro_batches, mesh, name)
    earlier = start.earlier(config, name, workdir)
    finetuning = section if name == "finetune" else None
    data = Data.open(config, section.batch_size, mesh, workdir, finetuning)
    given = data.train_clips.labels if finetuning else earlier.given
    stage, frozen = STAGES[name](config, given)
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    tx, schedule = make_optimizer(section, config.adamw)
    num_best = section.average_best if finetuning else 1
    checkpoints = Checkpoints(folder / "checkpoints", section.keep, section.keep_best, num_best)
    meta = start.describe(config, name, section, data.train_clips, earlier.lineage)
    init = start.state_maker(stage, tx, config.seed, data.clip_samples)
    like = start.abstract_state(init, mesh)
    state, restored = start.starting_state(config, init, like, checkpoints, meta, earlier.start)
    done, chief = int(state.step), jax.process_index() == 0
    title = f"{config.iteration}/{name}"
    if restored:
        log.info("%s goes on from step %d of %d", title, done, section.steps)
    if chief:
        (folder / "config.json").write_text(json.dumps(meta, indent=1))

    train_step = make_train_step(
        stage, tx, schedule, config.seed, section.micro_batches, like, mesh
    )
    eval_step = jax.jit(
        sharding.on(mesh, stage.eval_fn), out_shardings=sharding.metrics_and_rows(mesh)
    )
    feed = data.training(done)
    watchdog = Watchdog(config.get("hang_timeout_s", 0), done)
    clip_seconds = config.data.clip_seconds
    clock = Clock(done, section.batch_size, clip_seconds, stage.flops_per_clip, watchdog)
    report = Report(folder, title, done, section.steps, restored, stage.warn)
    reference = reference_curves(config, title)

    def save(state: TrainState, step: int, figures: dict[str, float]) -> None:
        seen = {"examples_seen": step * section.batch_size}
        with clock.paused("saving"):
            checkpoints.save(state, {**meta, **seen}, figures)

    def figures_of(params: Any, batches: Iterator[dict[str, jax.Array]]) -> dict[str, float]:
        batches = watchdog.watched(batches)
        return score(eval_step, params, state.model_state, frozen, batches).figures

    def check_good(step: int, batch: dict, sums: dict) -> None:
        if not sums["finite"]:
            bad = bad_clips(eval_step(state.params, state.model_state, frozen, batch)[1], batch)
            raise FloatingPointError(blame(step, sums, data.train_clips, bad, folder))
        if reason := stage.alarm(sums["metrics"]):
            raise FloatingPointError(f"step {step}: {reason}")
        watchdog.finished(step)

    with watchdog, Signals() as signals, report, checkpoints:
        if not restored:
            batches = watchdog.watched(data.calibration())
            state, summary = start.calibrate(stage, state, like, frozen, batches, section, config)
            report.write(0, summary)
            save(state, 0, {})
            if finetuning and chief:
                draw_augmentations(data, config, section, folder)
        before = None
        clock.restart(done)
        for step in range(done + 1, section.steps + 1):
            with clock.waiting():
                batch = next(feed)
            with jax.transfer_guard("disallow"):
                state, sums = train_step(state, frozen, batch)
            if before:  # one step late, so that the device never waits for the host
                check_good(*before)
            before = (step, batch, sums)

            last = step == section.steps
            interrupted = signals.received(checkpoints.reached_preemption, step)
            record: dict[str, float] = {}
            if step % section.log_every == 0 or last:
                record = {**floats(sums), **clock.rates(step)}
            evaluated = len(data.val_clips) > 0 and (step % section.eval_every == 0 or last)
            if evaluated:
                with clock.paused("evaluating"):
                    batches = watchdog.watched(data.validation())
                    record |= evaluate(eval_step, state, frozen, batches, folder, step)
            if finetuning and last:
                with clock.paused("evaluating"):
                    weights = final_weights(state, checkpoints, like, record, num_best)
                    record |= results(weights, figures_of, data, section.keep_best, meta, folder)
            report.write(step, record)
            if chief and (evaluated or last):
                with clock.paused("drawing"):
                    curves = folder / "plots" / "curves.png"
                    plots.plot_curves(read_metrics(folder), curves, reference)
            best_wanted = evaluated and section.keep_best
            if step % section.save_every == 0 or last or interrupted or best_wanted:
                check_good(*before)
                save(state, step, record)
            if step == done + 1:
                clock.restart(step)  # it compiled: no rate to go by
            if interrupted or last:
                with clock.paused("saving"):
                    checkpoints.wait()
            if interrupted:
                raise Interrupted(step, interrupted)


def checked(config: Any, name: str) -> tuple[Any, str, Any]:
    """A copy of the config for one stage (its own to change), the stage's name and its section.

    Raises:
      ValueError: no such stage, or a number that no run can have.
    """
    config = config.copy_and_resolve_references()
    iteration, _, stage = name.rpartition("/")
    config.iteration = iteration or config.iteration
    if stage not in STAGES or stage not in config:
        known = ", ".join(stage for stage in STAGES if stage in config)
        raise ValueError(f'config.stages names "{name}"; this config can run: {known}')
    if config.resume:
        this = f"{config.iteration}/{stage}"
        known = [s if "/" in s else f"{config.iteration}/{s}" for s in config.stages]
        of = "/".join(Path(config.resume.partition("@")[0]).parts[-2:])
        if of not in (this, *known):
            raise ValueError(f"config.resume: {of} is none of this config's stages, {known}")
        config.resume = config.resume if of == this else ""
    for field in ("steps", "batch_size", "micro_batches", "save_every", "log_every", "eval_every"):
        if config[stage][field] < 1:
            raise ValueError(f"{stage}.{field} is {config[stage][field]}; want at least 1")
    best = config[stage].keep_best
    if best and not best.startswith("val_"):
        raise ValueError(f'{stage}.keep_best "{best}" is no held-out figure; use "val_loss"')
    return config, stage, config[stage]


def reference_curves(config: Any, title: str) -> list[dict[str, float]]:
    """Lines of another run's metrics.jsonl for the plots to lie over: one that came with a config.

    `config.reference` is a JSON file beside the configs: lines by "iteration/stage".
    """
    if not config.reference:
        return []
    for root in (Path("configs"), Path(str(importlib.resources.files("beats_jax.configs")))):
        if (root / config.reference).exists():
            return json.loads((root / config.reference).read_text()).get(title, [])
    raise FileNotFoundError(f"config.reference: no {config.reference} beside the configs")


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
    out_shardings = shardings, sharding.replicated(mesh)
    return jax.jit(sharding.on(mesh, train_step), donate_argnums=0, out_shardings=out_shardings)


def evaluate(
    eval_step: Callable,
    state: TrainState,
    frozen: Any,
    batches: Iterator[dict[str, jax.Array]],
    folder: epath.Path,
    step: int,
) -> dict[str, float]:
    """Figures of the held-out clips, prefixed `val_`; draws the first clip and the code usage."""
    scored = score(eval_step, state.params, state.model_state, frozen, batches)
    usage = {name: m.counts for name, m in scored.sums.items() if isinstance(m, Histogram)}
    if jax.process_index() == 0:
        if "token_ids" in scored.first:
            draw_example(scored.first, folder / "plots" / f"example_{step:07d}.png")
        if usage:
            plots.plot_code_usage(usage, folder / "plots" / f"code_usage_{step:07d}.png")
    return {f"val_{name}": value for name, value in scored.figures.items()}


def draw_augmentations(data: Data, config: Any, section: Any, folder: epath.Path) -> None:
    """The first training examples, as they were and as the model sees them."""
    local: list[dict[str, Any]] = [
        {name: np.asarray(x.addressable_data(0))[:3] for name, x in next(batches).items()}
        for batches in (data.unaugmented(), data.training(0))
    ]
    mean, std = config.data.mean, config.data.std
    before, after = (jnp.asarray(batch_patches(batch, mean, std)) for batch in local)
    rng = jax.random.fold_in(jax.random.key(config.seed), 0)
    masks = finetune.SpecAugment(**section.spec_augment)
    after = finetune.masked(after, local[1]["num_samples"], local[1]["counter"], rng, masks)
    assert data.train_clips.labels is not None
    names = audioset_names(data.train_clips.labels.names)
    titles = [
        ", ".join(f"{share:.2f} {name}" for share, name in zip(row, names, strict=True) if share)
        for row in local[1]["labels"]
    ]
    path = folder / "plots" / "augmentations.png"
    plots.plot_augmentations(unpatchify(before), unpatchify(after), titles, path)


def draw_example(clip: dict[str, np.ndarray], path: epath.Path) -> None:
    """One held-out clip: its tokens, and where they were predicted, the guesses."""
    log_mel, ids, padding = unpatchify(clip["patches"]), clip["token_ids"], clip["padding_mask"]
    if "predicted_ids" in clip:
        plots.plot_example(log_mel, clip["valid"], ids, clip["predicted_ids"], padding, path)
    else:
        plots.plot_token_map(log_mel, ids, padding, path)


def floats(sums: dict[str, Any]) -> dict[str, float]:
    """What `train_step` returned beside the state, as numbers for the log."""
    sums = jax.device_get(sums)
    figures = summarize(sums["metrics"])
    return {**figures, "lr": float(sums["lr"]), "grad_norm": float(sums["grad_norm"])}


def bad_clips(outputs: dict[str, jax.Array], batch: dict[str, jax.Array]) -> np.ndarray:
    """Positions in the data of the batch's clips whose own loss is not finite."""
    nll, valid, index = (
        multihost_utils.process_allgather(x, tiled=True)
        for x in (outputs["nll"], outputs["valid"], batch["index"])
    )
    return index[~np.isfinite(np.where(valid, nll, 0.0)).all(axis=1)]


def blame(
    step: int, sums: dict[str, Any], clips: Clips, bad: np.ndarray, folder: epath.Path
) -> str:
    """The message for a step whose loss was not finite."""
    figures = floats(sums)
    names = ", ".join(clips.ids[i] for i in bad[:8])
    return (
        f"loss {figures['loss']} at step {step} (learning rate {figures['lr']:.3g}, gradient norm "
        f"{figures['grad_norm']:.3g}); "
        + (f"clips with a non-finite loss of their own: {names}" if names else "no clip stands out")
        + "; the newest checkpoint is good: lower the learning rate and run the same command "
        f"again, or leave clips out with --workdir=NEW --config.resume={folder}"
    )
