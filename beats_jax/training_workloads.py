"""What `beats-jax benchmark` measures of training: the loop's own step, its start-up, its state.

A stage and its optimizer come from a config of the package, the model starts from scratch, what is
frozen has random weights, and the clips are noise (`workloads`).
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from beats_jax import sharding, start
from beats_jax.checkpoint import Checkpoints, TrainState
from beats_jax.data.pipeline import train_batches
from beats_jax.fbank import PATCH_SIZE, SAMPLE_RATE, num_tokens
from beats_jax.flops import encoder_flops
from beats_jax.masking import Visible, random_masking
from beats_jax.models.beats import BEATs
from beats_jax.models.quantizer import l2_normalise
from beats_jax.optim import make_optimizer
from beats_jax.roofline import cores
from beats_jax.stages import model_arguments
from beats_jax.train import STAGES, make_train_step
from beats_jax.workloads import (
    NUM_CODES,
    TRAINING,
    Settings,
    Workload,
    compiled,
    noise_clips,
    random_model,
    temporary_folder,
)


def training_config(settings: Settings) -> tuple[Any, str]:
    """The config of a training benchmark, with the settings in it, and the stage's name."""
    config_name, stage = TRAINING[settings.what]
    config = importlib.import_module(f"beats_jax.configs.{config_name}").get_config()
    config.model.preset, config.precision = settings.size, settings.dtype
    config.data.clip_seconds = settings.seconds
    config.mesh.update(settings.mesh)
    config[stage].batch_size = settings.batch_size
    workers = min(config.input.workers, cores())
    config.input.update(backend=settings.backend, workers=workers)
    return config, stage


class Training:
    """One stage's step, as the loop compiles it; pre-training's on this share of `visible` patches.

    Attributes:
        stage, frozen, like: the stage, what is frozen in it, shapes and layout of its state.
        init: makes the untrained state.
        step: the jitted step, (state, frozen, batch) -> state, sums; the state is given away.
    """

    def __init__(self, settings: Settings, mesh: Mesh, visible: float | None = None):
        self.settings, self.mesh = settings, mesh
        self.config, name = training_config(settings)
        if visible is not None:
            self.config.pretrain.visible = visible
        self.clips = noise_clips(settings)
        self.clip_samples = round(settings.seconds * SAMPLE_RATE)
        given: Any = self.clips.labels
        if settings.what == "distill":
            given = random_model(settings.size)
        elif settings.what == "pretrain":
            given = {
                "random": lambda: None,
                "distilled": lambda: random_model(settings.size, "tokenizer"),
                "stored": lambda: NUM_CODES,
            }[settings.tokens]()
        self.stage, self.frozen = STAGES[name](self.config, given)
        tx, schedule = make_optimizer(self.config[name], self.config.adamw)
        self.init = start.state_maker(self.stage, tx, self.config.seed, self.clip_samples)
        self.like = start.abstract_state(self.init, mesh)
        self.step = make_train_step(self.stage, tx, schedule, self.config.seed, 1, self.like, mesh)

    def state(self) -> TrainState:
        """The untrained state on the mesh; a codebook gets random rows, as if calibrated."""
        shardings = jax.tree.map(lambda x: x.sharding, self.like)
        state = jax.jit(self.init, out_shardings=shardings)()
        if "codebook" in state.model_state:
            rows = jax.random.normal(jax.random.key(1), state.model_state["codebook"].shape)
            rows = jax.device_put(l2_normalise(rows), shardings.model_state["codebook"])
            state = state._replace(model_state={**state.model_state, "codebook": rows})
        return state

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """Batches on the mesh, as `Data` gives them to the loop."""
        options = dict(self.config.input)
        options["frontend"] = "host" if options["backend"] == "tf" else "device"
        size = self.settings.batch_size
        made = train_batches(
            self.clips,
            seed=0,
            batch_size=size,
            clip_samples=self.clip_samples,
            rows=sharding.local_rows(size, self.mesh),
            mean=self.config.data.mean,
            std=self.config.data.std,
            **options,
        )
        return (sharding.global_batch(batch, size, self.mesh) for batch in made)

    def workload(self) -> Workload:
        """The step on one batch that is on the device already; `fed` takes the pipeline's."""
        batch = next(self.batches())
        frozen = jax.device_put(self.frozen, sharding.tree_shardings(self.frozen, self.mesh))
        program, figures = compiled(self.step, self.like, frozen, batch)
        state = self.state()

        def step(batch):
            nonlocal state
            state, sums = program(state, frozen, batch)
            return sums

        def fed(steps: int) -> float:
            feed, waited = self.batches(), 0.0
            jax.block_until_ready(step(next(feed)))  # the pipeline is running
            begin = time.perf_counter()
            for _ in range(steps):
                asked = time.perf_counter()
                batch = next(feed)
                waited += time.perf_counter() - asked
                jax.block_until_ready(step(batch))
            return waited / (time.perf_counter() - begin)

        settings, clips = self.settings, self.settings.batch_size
        tokens = f", {settings.tokens} tokens" if settings.what == "pretrain" else ""
        name = f"{settings.what} {settings.size}{tokens}"
        flops = clips * self.stage.flops_per_clip
        return Workload(name, lambda: step(batch), clips, flops, figures, fed)


def masking(settings: Settings, mesh: Mesh) -> list[Workload]:
    """What masking saves: on the patches that the config leaves visible, and on all of them.

    Two rows of pre-training's encoder alone, forward and backward (the gradients are of the mean
    square of the features), and two of its whole step; the predictor runs on all patches in both.
    """
    settings = settings._replace(what="pretrain")
    config, _ = training_config(settings)
    encoder = BEATs(**model_arguments(config))
    tokens = int(num_tokens(round(settings.seconds * SAMPLE_RATE)))
    shape = (settings.batch_size, tokens)
    sharded = NamedSharding(mesh, sharding.BATCH)
    patches = jax.random.normal(jax.random.key(0), (*shape, PATCH_SIZE**2), jnp.float32)
    patches = jax.device_put(patches, sharded)
    params = random_model(settings.size).params["encoder"]
    params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    padding_mask = jax.device_put(jnp.zeros(shape, bool), sharded)
    noise = jax.device_put(jax.random.uniform(jax.random.key(1), shape), sharded)
    visible, _ = random_masking(noise, padding_mask, config.pretrain.visible)

    def workload(name: str, visible: Visible | None) -> Workload:
        @jax.jit
        def gradients(params, patches, visible):
            def loss(params):
                rngs = {name: jax.random.key(2) for name in ("dropout", "layerdrop")}
                features: Any = encoder.apply(
                    {"params": params}, patches, visible=visible, deterministic=False, rngs=rngs
                )
                return jnp.mean(jnp.square(features.astype(jnp.float32)))

            return jax.grad(loss)(params)

        program, figures = compiled(gradients, params, patches, visible)
        seen = tokens if visible is None else visible.index.shape[1]
        flops = 3 * settings.batch_size * encoder_flops(encoder, tokens, seen)
        name = f"encoder {settings.size}, {name}"
        return Workload(name, lambda: program(params, patches, visible), shape[0], flops, figures)

    share = f"{config.pretrain.visible:.0%} of the patches"
    steps = [
        Training(settings, mesh, seen)
        .workload()
        ._replace(name=f"step {settings.size}, {name}", fed=None)
        for name, seen in ((share, None), ("all patches", 1.0))
    ]
    return [workload(share, visible), workload("all patches", None), *steps]


def compilations(settings: Settings, mesh: Mesh) -> list[Workload]:
    """Pre-training's step: traced, compiled, and taken from the compilation cache; its state made.

    Nothing is run but the initialisation.
    """
    from jax.experimental.compilation_cache import compilation_cache

    training = Training(settings._replace(what="pretrain"), mesh)
    batch = next(training.batches())
    folder = str(temporary_folder(training))

    @contextlib.contextmanager
    def cache(where: str | None) -> Iterator[None]:
        """A compilation cache in this folder, or none; the process's own one comes back."""
        wanted = {
            "jax_enable_compilation_cache": where is not None,
            "jax_compilation_cache_dir": where,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
        before = {name: getattr(jax.config, name) for name in wanted}
        for values in (wanted, before):
            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            jax.clear_caches()
            if values is wanted:
                yield

    def trace():
        jax.clear_caches()
        return training.step.lower(training.like, training.frozen, batch)

    def cold():
        with cache(None):
            trace().compile()

    def warm():
        with cache(folder):
            trace().compile()

    def init():
        with cache(None):
            return training.state()

    return [
        Workload("trace and lower", lambda: trace() and None, 0),
        Workload("trace and compile", cold, 0),
        Workload("trace and load from the cache", warm, 0),
        Workload("make the state, compilation included", init, 0),
    ]


def checkpointing(settings: Settings, mesh: Mesh) -> list[Workload]:
    """Pre-training's state to disk and back: until the loop may go on, until it is on disk."""
    training = Training(settings._replace(what="pretrain"), mesh)
    state, step = training.state(), 0
    manager = Checkpoints(temporary_folder(training) / "checkpoints", keep=1)
    size = {"gigabytes": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9}

    def save():
        nonlocal step
        step += 1
        manager.save(state._replace(step=jnp.asarray(step)), {})

    def finish():
        manager.wait()

    def restore():
        return manager.restore(step, training.like)

    return [
        Workload("save, until the loop goes on", save, 0, figures=size),
        Workload("save, the rest in the background", finish, 0, figures=size),
        Workload("restore", restore, 0, figures=size),
    ]
