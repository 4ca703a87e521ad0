"""From a checkpoint to a model, and from a model to features, tokens and a family tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from beats_jax.checkpoint import load_params, tree_sha256
from beats_jax.convert import load_official
from beats_jax.data.pipeline import eval_batches
from beats_jax.data.sources import Clips
from beats_jax.fbank import (
    BANDS,
    FRAME_SHIFT,
    MEAN,
    MIN_SAMPLES,
    PATCH_SIZE,
    STD,
    num_tokens,
)
from beats_jax.models.beats import BEATs, token_padding_mask
from beats_jax.models.tokenizer import Tokenizer
from beats_jax.stages import (
    Pretrained,
    batch_patches,
    model_arguments,
    named_key,
)

KINDS = {"pretrain": "encoder", "tokenizer": "tokenizer", "finetune": "finetuned"}  # by stage


def load_model(path: str | Path) -> Pretrained:
    """A trained model: of a stage's checkpoint, or of an official `.pt` file.

    Args:
      path: `W/<iteration>/<stage>`, its newest checkpoint; `…@STEP`; or a file `….pt`, whose
        log-mel has the official mean and deviation.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: not a checkpoint of this package or of the official code.
    """
    path = str(path)
    if path.endswith(".pt"):
        official = load_official(path)
        arrays = official.params
        if official.codebook is not None:
            arrays = {**arrays, "codebook": official.codebook}
        source = dict(kind=official.kind, params_sha256=tree_sha256(arrays), lineage={})
        source = {"path": str(Path(path).absolute()), "step": None, **source}
        model = BEATs(**official.model)
        return Pretrained(
            official.kind, model, official.params, official.codebook, MEAN, STD, source
        )
    params, meta = load_params(path)
    config: Any = ml_collections.ConfigDict(meta["config"])
    kind, codebook, arrays = KINDS[meta["stage"]], None, params
    if kind == "tokenizer":
        codebook = load_params(path, "model_state")[0]["codebook"]
        arrays = {**params, "codebook": codebook}
    folder, step = str(Path(path.partition("@")[0]).absolute()), meta["step"]
    source = dict(kind=kind, params_sha256=tree_sha256(arrays), lineage=meta["lineage"])
    source = {"path": folder, "step": step, **source}
    model = BEATs(**model_arguments(config))
    return Pretrained(kind, model, params, codebook, config.data.mean, config.data.std, source)


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


def pooled_features(
    encoder: Pretrained, clips: Clips, layer: int | None = None, batch_size: int = 16
) -> np.ndarray:
    """Mean of each clip's features over its valid tokens (exact mode).

    Args:
      encoder: of `load_model`.
      clips: what to read; padded to the longest of them.
      layer: 0 = input of the first block, N = last output; the last by default.
      batch_size: clips at a time.

    Returns:
      [len(clips), D] float32; zeros for a clip under 2800 samples, which has no token.

    Raises:
      ValueError: the model has no such layer.
    """
    last = encoder.model.num_layers
    layer = last if layer is None else layer
    if not 0 <= layer <= last:
        raise ValueError(f"layer {layer} is not one of 0 (input) to {last} (last output)")

    @jax.jit
    def pool(params, batch):
        patches = batch_patches(batch, encoder.mean, encoder.std)
        padding_mask = token_padding_mask(batch["num_samples"], patches.shape[1])
        layers: Any = encoder.model.apply(
            {"params": params}, patches, padding_mask, all_layers=True
        )
        valid = jnp.maximum(jnp.sum(~padding_mask, axis=1), 1)
        return jnp.sum(layers[layer].astype(jnp.float32), axis=1) / valid[:, None]

    longest = int(clips.num_samples.max())
    columns = max(int(num_tokens(longest)) // BANDS, 1)
    batches = eval_batches(
        clips,
        batch_size=batch_size,
        clip_samples=MIN_SAMPLES + (columns - 1) * PATCH_SIZE * FRAME_SHIFT,
        backend="numpy",
        frontend="device",
    )
    rows = [np.asarray(pool(encoder.params["encoder"], batch)) for batch in batches]
    return np.concatenate(rows)[: len(clips)]


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
