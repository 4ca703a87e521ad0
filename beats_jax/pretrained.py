"""Trained models wherever they lie: stage folders, exported folders, official `.pt` files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from beats_jax import exported, paths
from beats_jax.checkpoint import load_params, tree_sha256
from beats_jax.convert import load_official
from beats_jax.fbank import BANDS, PATCH_SIZE
from beats_jax.models.beats import BEATs
from beats_jax.models.tokenizer import Tokenizer
from beats_jax.stages import Pretrained, model_arguments, named_key

KINDS = {"pretrain": "encoder", "tokenizer": "tokenizer", "finetune": "finetuned"}  # by stage


def load_model(path: epath.PathLike) -> Pretrained:
    """A trained model: an exported folder, a stage's checkpoint, or a file of the official code.

    Args:
      path: a folder that `beats-jax convert` wrote; `W/<iteration>/<stage>`, its newest checkpoint,
        or `…@STEP`; or a file `….pt`.

    Raises:
      FileNotFoundError: nothing there, or no checkpoint in it.
      ValueError: not a model of this package or of the official code.
    """
    where = epath.Path(path)
    single, whole = where.is_file(), (where / exported.WEIGHTS).is_file()
    if (single or whole) and paths.in_store(where):
        raise ValueError(f"{path}: only stage folders are read from a store; copy it here first")
    if single:
        return _official(Path(where))
    if whole:
        return exported.load_exported(Path(where))
    if not epath.Path(str(path).partition("@")[0]).is_dir():
        raise FileNotFoundError(
            f"{path} is not there; give an exported folder, a stage folder (W/iter1/pretrain, "
            "…@STEP for an older checkpoint) or an official .pt file"
        )
    return _stage(str(path))


def _official(path: Path) -> Pretrained:
    official = load_official(path)
    codebook, count = official.codebook, len(official.labels)
    arrays = official.params if codebook is None else {**official.params, "codebook": codebook}
    source = dict(kind=official.kind, params_sha256=tree_sha256(arrays), lineage={})
    return Pretrained(
        official.kind,
        BEATs(**official.model),
        official.params,
        codebook,
        official.mean,
        official.std,
        {"path": str(path.absolute()), "step": None, **source},
        labels=tuple(official.labels[i] for i in range(count)),
        task="multi-label" if official.kind == "finetuned" else "",
        official=official.leftovers,
    )


def _stage(path: str) -> Pretrained:
    params, meta = load_params(path)
    config: Any = ml_collections.ConfigDict(meta["config"])
    kind, codebook, arrays = KINDS[meta["stage"]], None, params
    folder, step = str(paths.absolute(path.partition("@")[0])), meta["step"]
    if kind == "tokenizer":  # of the same step, also while the run goes on
        codebook = load_params(f"{folder}@{step}", "model_state")[0]["codebook"]
        arrays = {**params, "codebook": codebook}
    source = dict(kind=kind, params_sha256=tree_sha256(arrays), lineage=meta["lineage"])
    source = {"path": folder, "step": step, **source}
    return Pretrained(
        *(kind, BEATs(**model_arguments(config)), params, codebook),
        *(config.data.mean, config.data.std, source),
        labels=tuple(meta.get("labels", ())),
        task=meta.get("task", ""),
    )


def untrained(stage_folder: str) -> Pretrained:
    """The encoder of a run as it was before step 1, drawn again from the run's seed.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: the run started from other weights.
    """
    model = load_model(stage_folder)
    _, meta = load_params(stage_folder)
    config = meta["config"]
    if config["init_from"] or config["resume"]:
        raise ValueError(f"{stage_folder} did not start from scratch: it has no untrained encoder")
    rng, patches = jax.random.key(config["seed"]), jnp.zeros((1, BANDS, PATCH_SIZE**2))
    if model.codebook is not None:
        tokenizer = Tokenizer(model.model, model.codebook.shape[1])
        return model._replace(
            params=jax.jit(tokenizer.init)(named_key(rng, "tokenizer"), patches)["params"]
        )
    encoder = jax.jit(model.model.init)(named_key(rng, "encoder"), patches)["params"]
    return model._replace(params={"encoder": encoder})


def lineage_lines(source: Mapping[str, Any], role: str = "", depth: int = 0) -> list[str]:
    """A model's family tree: what it is, and below it what it was made with, a line each."""
    parts = [source.get("path") or source["kind"], source["kind"] if "path" in source else ""]
    if source.get("step") is not None:
        parts.append(f"step {source['step']}")
    parts += [f"{key} {value}" for key, value in source.get("settings", {}).items()]
    if "params_sha256" in source:
        parts.append(f"sha256 {source['params_sha256'][:12]}")
    lines = ["   " * depth + (f"{role}: " if role else "") + "  ".join(filter(None, parts))]
    for name, parent in source.get("lineage", {}).items():
        lines += lineage_lines(parent, name, depth + 1)
    return lines
