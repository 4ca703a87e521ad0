"""Where a run starts: the models of earlier stages, its weights, and the record of both."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import beats_jax
from beats_jax import sharding
from beats_jax.checkpoint import Checkpoints, TrainState
from beats_jax.data.sources import Clips
from beats_jax.data.token_store import open_store
from beats_jax.pretrained import load_model
from beats_jax.results import git_commit
from beats_jax.stages import Pretrained, Stage, compute_dtype
from beats_jax.stages.finetune import extend_head

# Whose encoder an iteration's tokenizer learns from, where `config.teacher` does not say.
TEACHERS = {"iter2": "iter1/pretrain", "iter3": "iter2/pretrain", "iter3plus": "iter2/finetune"}
# What of a model is its architecture; the rest (dropout, say) is the training's.
ARCHITECTURE = (
    *("num_layers", "embed_dim", "ffn_dim", "num_heads", "patch_dim", "conv_bias", "activation"),
    *("layer_norm_first", "deep_norm", "conv_pos", "conv_pos_groups", "relative_position"),
    *("num_buckets", "max_distance", "gated"),
)


class Earlier(NamedTuple):
    """What a stage takes over from earlier ones.

    Attributes:
      given: what it is built on: the tokenizer stage's teacher; pre-training's tokenizer, None for
        the random projection, or the number of codes where the ids are stored.
      start: the model whose weights it starts from, if any.
      lineage: where all these come from, by role.
    """

    given: Pretrained | int | None
    start: Pretrained | None
    lineage: dict[str, Any]


def earlier(config: Any, name: str, workdir: epath.PathLike) -> Earlier:
    """Finds and reads the models of earlier stages; no path here is known to anything below.

    Where `config.init_from` names a model, its architecture replaces the config's. Fine-tuning
    starts from its iteration's pre-training if it does not; from nothing with "scratch".

    Raises:
      FileNotFoundError: a model is not there.
      ValueError: one is of the wrong kind, or its file cannot be read.
    """
    start, lineage = None, {}
    path, field = config.init_from, "config.init_from"
    if name == "finetune" and not path:
        iteration = config.iteration.partition("/")[0]  # the folds of one share its encoder
        path, field = str(epath.Path(workdir) / iteration / "pretrain"), "the encoder to fine-tune"
        field += " (--config.init_from=PATH names one, =scratch is none)"
    if path and path != "scratch":
        start = _load(field, path)
        lineage["init_from"] = start.source
        with config.unlocked():
            config.model.update({field: getattr(start.model, field) for field in ARCHITECTURE})
    given: Pretrained | int | None = None
    if name == "tokenizer":
        given = _teacher(config, workdir)
        lineage["teacher"] = given.source
    elif name == "pretrain":
        given, lineage["tokenizer"] = _tokenizer(config, workdir)
    return Earlier(given, start, lineage)


def _teacher(config: Any, workdir: epath.PathLike) -> Pretrained:
    path, field = config.teacher, "config.teacher"
    if not path:
        if config.iteration not in TEACHERS:
            raise ValueError(
                f"{config.iteration} has no teacher of its own; give one: --config.teacher=PATH "
                f"(by themselves: {', '.join(f'{k} <- {v}' for k, v in TEACHERS.items())})"
            )
        path, field = str(epath.Path(workdir) / TEACHERS[config.iteration]), "the teacher"
    model = _load(field, path)
    if model.kind == "tokenizer":
        raise ValueError(f"{field}: {path} is a tokenizer; want an encoder or a fine-tuned model")
    return model


def _tokenizer(
    config: Any, workdir: epath.PathLike
) -> tuple[Pretrained | int | None, dict[str, Any]]:
    """What labels the patches, and where it comes from."""
    path, own = config.tokenizer.path, ""
    if config.iteration != "iter1":
        own = str(epath.Path(workdir) / config.iteration / "tokenizer")
    if config.data.token_ids:
        store = open_store(config.data.token_ids)
        store.check(dtype=compute_dtype(config.precision).__name__)
        if path or (own and epath.Path(own).exists()):
            wanted = _load("the tokenizer", path or own).source["params_sha256"]
            store.check(tokenizer=wanted)
        return store.num_codes, store.tokenizer
    if not path and not own:
        return None, {"kind": "random projection", "settings": dict(config.random_projection)}
    model = _load("config.tokenizer.path" if path else "the tokenizer", path or own)
    if model.kind != "tokenizer":
        raise ValueError(f"config.tokenizer.path: {path or own} is no tokenizer: {model.kind}")
    return model, model.source


def _load(field: str, path: str) -> Pretrained:
    try:
        return load_model(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{field}: {error}") from error


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
    start: Pretrained | None,
) -> tuple[TrainState, bool]:
    """Where the weights come from, decided here and nowhere else.

    In this order: the newest checkpoint of the own workdir that is intact; `config.resume`, a stage
    folder (or `…@STEP`) whose whole state is taken over, also onto other data; `start`, the model
    of `config.init_from`, whose weights start a new run; scratch.

    Returns:
      The state, and whether it was restored (so that nothing is calibrated or logged anew).

    Raises:
      ValueError: the checkpoint was made with another seed, batch size or dataset, with another
        teacher, tokenizer or front end; or none of those that are there can be read.
    """
    step = checkpoints.newest_intact(like)
    if step is not None:
        keys = ("seed", "batch_size", "dataset_fingerprint")
        _check_same_run(checkpoints, step, meta, keys)
        return checkpoints.restore(step, like), True
    if config.resume:
        path, _, wanted = config.resume.partition("@")
        if not (epath.Path(path) / "checkpoints").is_dir():
            raise FileNotFoundError(f"config.resume: {path} is no stage folder (W/iter1/pretrain)")
        other = Checkpoints(epath.Path(path) / "checkpoints", read_only=True)
        if (step := int(wanted) if wanted else other.latest_step()) is None:
            raise FileNotFoundError(f"config.resume: no checkpoint in {other.folder}")
        _check_same_run(other, step, meta, ("seed", "batch_size"))
        return other.restore(step, like), True
    shardings = jax.tree.map(lambda x: x.sharding, like)
    state = jax.jit(init, out_shardings=shardings)()
    if start:
        params = dict(state.params)
        for part, weights in start.params.items():
            # A predictor of other tokens is of no use; an encoder always fits (ARCHITECTURE).
            if part == "head" and part in params:
                fresh = multihost_utils.process_allgather(params[part], tiled=True)
                params[part] = extend_head(fresh, weights, meta["labels"], start.labels)
            elif part in params and _shapes(params[part]) == _shapes(weights):
                params[part] = weights
        state = state._replace(params=jax.device_put(params, shardings.params))
    return state, False


def _shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


# What the inputs are made with: a run that changed them would be another run.
FIXED = ("data.clip_seconds", "data.crop", "data.mean", "data.std")
FIXED_IN_FINETUNING = (
    *("data.label", "data.classes", "data.test_filter", "data.val_filter"),
    *("finetune.task", "finetune.roll", "finetune.balanced_sampling"),
    *("finetune.mixup", "finetune.mixup_of", "finetune.mixup_alpha"),
)


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
    for name in FIXED + (FIXED_IN_FINETUNING if meta["stage"] == "finetune" else ()):
        old, new = before["config"], meta["config"]
        for part in name.split("."):
            old, new = old[part], new[part]
        if old != new:
            raise ValueError(
                f"{checkpoints.folder} was trained with config.{name} {old}, this run has {new}: "
                f"take the old value back or another --workdir"
            )
    for role, now in meta["lineage"].items():
        then = before["lineage"].get(role, {})
        if role != "init_from" and _content(then) != _content(now):
            raise ValueError(
                f"{checkpoints.folder} was trained with the {role} {_name(then)}, this run has "
                f"{_name(now)}: it changed under the run; take the old one back (…@STEP names "
                f"an older checkpoint) or another --workdir"
            )


def _content(source: dict[str, Any]) -> Any:
    """What a model of the lineage is, wherever it lies."""
    return source.get("params_sha256", source.get("settings"))


def _name(source: dict[str, Any]) -> str:
    if "params_sha256" not in source:
        return " ".join(f"{key} {value}" for key, value in source.get("settings", {}).items())
    step = "" if source["step"] is None else f"@{source['step']}"
    return f"{source['path']}{step} (sha256 {source['params_sha256'][:12]})"


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


def describe(
    config: Any, name: str, section: Any, clips: Clips, lineage: dict[str, Any]
) -> dict[str, Any]:
    """All that is needed to know what made a stage folder: its `config.json`.

    Of fine-tuning also its classes, in the order of the logits, and its task.
    """
    classes = {"labels": clips.labels.names, "task": section.task} if clips.labels else {}
    return {
        "iteration": config.iteration,
        "stage": name,
        "lineage": lineage,
        **classes,
        "seed": config.seed,
        "batch_size": section.batch_size,
        "dataset_fingerprint": clips.fingerprint,
        "config": json.loads(config.to_json_best_effort()),
        "versions": {
            "beats_jax": beats_jax.__version__,
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
            "python": platform.python_version(),
        },
        "git_commit": git_commit() or "",
    }
