"""A tokenizer's ids of many clips: stored for training, or tried against noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from beats_jax import sharding
from beats_jax.data.pipeline import eval_batches
from beats_jax.data.sources import Clips, windows
from beats_jax.data.token_store import Writer
from beats_jax.fbank import SAMPLE_RATE, num_tokens
from beats_jax.models.beats import token_padding_mask
from beats_jax.pretrained import load_model
from beats_jax.stages import Pretrained, batch_patches, compute_dtype, pretrain


def load_tokenizer(path: str | Path) -> Pretrained:
    """`load_model` of a tokenizer.

    Raises:
      ValueError: it is another kind of model.
    """
    model = load_model(path)
    if model.kind != "tokenizer":
        raise ValueError(
            f"{path} is no tokenizer but of kind {model.kind}; W/iter2/tokenizer is one"
        )
    return model


def store_tokens(
    tokenizer: Pretrained,
    clips: Clips,
    out: str | Path,
    *,
    clip_seconds: float,
    precision: str = "auto",
    mean: float | None = None,
    std: float | None = None,
    batch_size: int = 16,
) -> float:
    """Writes the tokens of every window of a data set, for `config.data.token_ids`; resumes.

    Args:
      tokenizer: of `load_tokenizer`.
      clips: the whole data set, before any filter.
      out: the store's folder.
      clip_seconds: of the windows: the config's.
      precision: "float32", "bfloat16" or "auto", as in a config.
      mean, std: of the run's log-mel; the tokenizer's own by default.
      batch_size: windows at a time, over all devices.

    Returns:
      The share of ids equal to those of float32 on the first batch: 1 in float32.

    Raises:
      ValueError: `out` holds ids of another tokenizer, data set, window, front end or precision.
    """
    clip_samples = round(clip_seconds * SAMPLE_RATE)
    grid = windows(clips, clip_samples)
    mean = tokenizer.mean if mean is None else mean
    std = tokenizer.std if std is None else std
    dtype = compute_dtype(precision).__name__
    key = dict(clip_samples=clip_samples, mean=mean, std=std, dtype=dtype)
    key |= dict(tokenizer=tokenizer.source["params_sha256"], dataset=grid.fingerprint)
    mesh = sharding.make_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    writer = Writer(
        *(out, len(grid), int(num_tokens(clip_samples)), key),
        *(tokenizer.source, tokenizer.num_codes),
    )

    def batches(start: int) -> Iterator[dict[str, jax.Array]]:
        host = eval_batches(
            grid,
            batch_size=batch_size,
            clip_samples=clip_samples,
            start=start,
            backend="numpy",
            frontend="device",
        )
        return (sharding.global_batch(batch, batch_size, mesh) for batch in host)

    tokens = tokens_of(tokenizer, mean, std, precision)
    todo = range(writer.done // batch_size * batch_size, len(grid), batch_size)
    bar = tqdm(batches(todo.start // batch_size), "batches", len(todo), disable=None)
    writer.write(todo.start, (np.asarray(tokens(batch)) for batch in bar))
    if dtype == "float32":
        return 1.0
    first = next(batches(0))
    exact = np.asarray(tokens_of(tokenizer, mean, std, "float32")(first))
    return float(np.mean(np.asarray(tokens(first))[exact >= 0] == exact[exact >= 0]))


def tokens_of(
    tokenizer: Pretrained, mean: float, std: float, precision: str = "auto"
) -> Callable[[Mapping[str, jax.Array]], jax.Array]:
    """A compiled function: batch (`waveform`, `num_samples`) -> ids int32 [B, L], -1 = padding.

    Args:
      tokenizer: of `load_tokenizer`.
      mean, std: of the log-mel.
      precision: as in a config.
    """
    config: Any = ml_collections.ConfigDict(
        dict(precision=precision, data=dict(mean=mean, std=std))
    )
    tokenize, arrays, _ = pretrain.distilled(config, tokenizer)
    # As `main` does for a run: accelerators multiply in TF32 or bfloat16 otherwise.
    matmul = "highest" if compute_dtype(precision) == jnp.float32 else None

    def as_in_a_run(*args):
        with jax.default_matmul_precision(matmul):
            return tokenize(*args)

    return functools.partial(_batch_ids(as_in_a_run, mean, std), arrays)


def _batch_ids(tokenize: Callable, mean: float, std: float) -> Callable:
    @jax.jit
    def ids(arrays, batch):
        patches = batch_patches(batch, mean, std)
        padding_mask = token_padding_mask(batch["num_samples"], patches.shape[1])
        return jnp.where(padding_mask, -1, tokenize(arrays, patches, padding_mask))

    return ids


def token_agreement(
    tokenizer: Pretrained,
    random_projection: Any,
    clips: Clips,
    snrs_db: Sequence[float],
    clip_seconds: float,
    batch_size: int = 16,
) -> dict[str, dict[str, Any]]:
    """How many tokens stay the same when white noise is added: the paper's robustness argument.

    Args:
      tokenizer: of `load_tokenizer`.
      random_projection: such a config section, for the tokenizer to compare with.
      clips: cut or padded to `clip_seconds`; digital silence has no signal-to-noise ratio and is
        left out.
      snrs_db: signal-to-noise ratios of whole clips.

    Returns:
      By name ("random projection", "distilled"): `agreement` [S] in 0..1; `chance`, how often two
      tokens drawn at random are equal; `perplexity` of the tokens.
    """
    mean, std = tokenizer.mean, tokenizer.std
    config: Any = ml_collections.ConfigDict(
        dict(random_projection=dict(random_projection), data=dict(mean=mean, std=std))
    )
    tokenize, arrays, num_codes = pretrain.random_projection(config)
    functions = {
        "random projection": (
            functools.partial(_batch_ids(tokenize, mean, std), arrays),
            num_codes,
        ),
        "distilled": (tokens_of(tokenizer, mean, std), tokenizer.num_codes),
    }
    same = {name: np.zeros((len(snrs_db), 2)) for name in functions}
    counts = {name: np.zeros(number) for name, (_, number) in functions.items()}
    clip_samples = round(clip_seconds * SAMPLE_RATE)
    rng = np.random.default_rng(0)
    for batch in eval_batches(
        clips,
        batch_size=batch_size,
        clip_samples=clip_samples,
        backend="numpy",
        frontend="device",
    ):
        waveform = batch["waveform"].astype(np.float32) / 32768
        rows = np.flatnonzero(np.any(waveform != 0, axis=1))
        power = np.sum(waveform**2, axis=1) / np.maximum(batch["num_samples"], 1)
        noise = rng.standard_normal(waveform.shape).astype(np.float32)
        for name, (ids_of, number) in functions.items():
            clean = np.asarray(ids_of({**batch, "waveform": waveform}))[rows]
            counts[name] += np.bincount(clean[clean >= 0], minlength=number)
            for i, snr in enumerate(snrs_db):
                level = np.sqrt(power * 10 ** (-snr / 10)).astype(np.float32)
                noisy = waveform + level[:, None] * noise
                ids = np.asarray(ids_of({**batch, "waveform": noisy}))[rows]
                same[name][i] += np.sum((ids == clean) & (clean >= 0)), np.sum(clean >= 0)
    result = {}
    for name in functions:
        share = counts[name] / counts[name].sum()
        used = share[share > 0]
        result[name] = {
            "agreement": same[name][:, 0] / same[name][:, 1],
            "chance": float(np.sum(share**2)),
            "perplexity": float(np.exp(-np.sum(used * np.log(used)))),
        }
    return result
