"""From a config to batches on the mesh: clips prepared once, split by a hash of their group."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from beats_jax import sharding
from beats_jax.data.order import held_out
from beats_jax.data.pipeline import eval_batches, train_batches
from beats_jax.data.sources import INDEX, Clips, join, open_clips, windows
from beats_jax.data.synthetic import synthetic_clips
from beats_jax.data.token_store import open_store
from beats_jax.fbank import SAMPLE_RATE

log = logging.getLogger("beats_jax")

CALIBRATION = 1_000_003  # what calibration saw says nothing about the order of training


class Data(NamedTuple):
    """The batches of a stage, already on the mesh; each method starts a new iterator."""

    train_clips: Clips
    val_clips: Clips
    clip_samples: int
    training: Callable[[int], Iterator[dict[str, jax.Array]]]  # from a step on, endless
    calibration: Callable[[], Iterator[dict[str, jax.Array]]]  # a counter stream of its own
    validation: Callable[[], Iterator[dict[str, jax.Array]]]  # once through the held-out clips

    @classmethod
    def open(cls, config: Any, batch_size: int, mesh: Mesh, workdir: str | Path) -> Data:
        """Opens (and, the first time, prepares) the config's data."""
        train_clips, val_clips = open_data(config.data, workdir)
        clip_samples = round(config.data.clip_seconds * SAMPLE_RATE)
        options = dict(config.input)
        if options["frontend"] == "auto":  # TensorFlow on the host, or JAX where the model runs
            options["frontend"] = "host" if options["backend"] == "tf" else "device"
        common: dict[str, Any] = dict(
            batch_size=batch_size,
            clip_samples=clip_samples,
            rows=sharding.local_rows(batch_size, mesh),
            mean=config.data.mean,
            std=config.data.std,
            **options,
        )

        def on_mesh(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, jax.Array]]:
            return (sharding.global_batch(batch, batch_size, mesh) for batch in batches)

        def stream(seed: int, start: int = 0):
            return on_mesh(train_batches(train_clips, seed=seed, start=start, **common))

        return cls(
            train_clips,
            val_clips,
            clip_samples,
            training=lambda start: stream(config.seed, start),
            calibration=lambda: stream(config.seed + CALIBRATION),
            validation=lambda: on_mesh(eval_batches(val_clips, **common)),
        )


def open_data(data: Any, workdir: str | Path) -> tuple[Clips, Clips]:
    """Training and held-out clips.

    A folder of audio is prepared into `<workdir>/data/` by process 0, a prepared one is read where
    it is; several, with commas between them, are one set. Clips of one `group` (a metadata column,
    such as the source recording) are held out together; without it each file is its own group.

    Args:
      data: `source` ("folder", "synthetic"), `dir`, `filter`, `group`, `val_fraction`,
        `clip_seconds`; `crop`: "random", or "grid" for windows that lie side by side; `token_ids`,
        a folder of stored tokens, which belong to the grid; for synthetic sounds `num_clips`.
      workdir: the run's.

    Raises:
      ValueError: no such source, no `dir`, no audio, a filter that leaves nothing; stored tokens
        with random crops, or of other windows than these.
      FileNotFoundError: `dir` is not there.
    """
    if data.crop not in ("random", "grid"):
        raise ValueError(f'data.crop "{data.crop}" is unknown; use "random" or "grid"')
    if data.token_ids and data.crop != "grid":
        raise ValueError(
            f'data.token_ids holds ids of fixed windows, but data.crop is "{data.crop}": set '
            "--config.data.crop=grid, or leave --config.data.token_ids empty"
        )
    if data.source == "synthetic":
        clips = synthetic_clips(data.num_clips, data.clip_seconds, seed=0)
    elif data.source == "folder":
        clips = open_folders(data.dir, Path(workdir) / "data")
    else:
        raise ValueError(f'data.source "{data.source}" is unknown; use "folder" or "synthetic"')
    clips = _grid(clips, data) if data.crop == "grid" else clips
    clips = clips.select(data.filter)
    groups = clips.columns.get(data.group, clips.ids)
    groups = [group or own for group, own in zip(groups, clips.ids, strict=True)]
    val = held_out(groups, data.val_fraction)
    return clips.select(keep=~val), clips.select(keep=val)


def _grid(clips: Clips, data: Any) -> Clips:
    """The windows of all clips, with their stored tokens if there are any."""
    clip_samples = round(data.clip_seconds * SAMPLE_RATE)
    clips = windows(clips, clip_samples)
    if not data.token_ids:
        return clips
    store = open_store(data.token_ids)
    store.check(clip_samples=clip_samples, mean=data.mean, std=data.std, dataset=clips.fingerprint)
    return dataclasses.replace(clips, token_ids=store.ids)


def open_folders(folders: str, cache: Path | None = None) -> Clips:
    """One folder, or several with commas between them as one set.

    Args:
      folders: prepared ones; where `cache` is given also audio, which is prepared into it.

    Raises:
      ValueError: none named, two of one name, or not prepared.
      FileNotFoundError: one is not there.
    """
    paths = [Path(folder.strip()) for folder in folders.split(",") if folder.strip()]
    names = [path.resolve().name for path in paths]
    if not paths:
        raise ValueError("no audio named; set --config.data.dir=FOLDER (or FOLDER,FOLDER)")
    if len(set(names)) < len(names):
        raise ValueError(f"data.dir: folders need different names, got {', '.join(names)}")
    sets = {
        name: open_clips(_prepared(path, cache / name) if cache else path)
        for name, path in zip(names, paths, strict=True)
    }
    return join(sets) if len(sets) > 1 else sets[names[0]]


def _prepared(folder: Path, out: Path) -> Path:
    if (folder / INDEX).exists():
        return folder
    if not folder.exists() and (out / INDEX).exists():
        log.warning("%s is gone; going on with what was prepared from it in %s", folder, out)
        return out
    from beats_jax.data.prepare import prepare

    if jax.process_index() == 0:
        report = prepare(folder, out)
        if report.skipped:
            log.warning(
                "%s: %d of %d files skipped, listed in %s",
                *(folder, report.skipped, report.listed, out / "report.json"),
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data prepared")
    return out
