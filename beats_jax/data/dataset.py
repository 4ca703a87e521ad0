"""From a config's `data` section to clips: prepared once, split by a hash of the group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from beats_jax.data.order import held_out
from beats_jax.data.sources import INDEX, Clips, open_clips
from beats_jax.data.synthetic import synthetic_clips


def open_data(data: Any, workdir: str | Path) -> tuple[Clips, Clips]:
    """Training and held-out clips.

    A folder of audio is prepared into `<workdir>/data/` by process 0, a prepared one is read where
    it is. Clips of one `group` (a metadata column, such as the source recording) are held out
    together; without that column, or with group "", each file is its own group.

    Args:
      data: `source` ("folder", "synthetic"), `dir`, `filter`, `group`, `val_fraction`,
        `clip_seconds`; for synthetic sounds `num_clips`.
      workdir: the run's.

    Raises:
      ValueError: no such source, no `dir`, no audio, a filter that leaves nothing.
      FileNotFoundError: `dir` is not there.
    """
    if data.source == "synthetic":
        clips = synthetic_clips(data.num_clips, data.clip_seconds, seed=0)
    elif data.source == "folder":
        clips = open_clips(_prepared(data.dir, Path(workdir) / "data"))
    else:
        raise ValueError(f'data.source "{data.source}" is unknown; use "folder" or "synthetic"')
    clips = clips.select(data.filter)
    val = held_out(clips.columns.get(data.group, clips.ids), data.val_fraction)
    return clips.select(keep=~val), clips.select(keep=val)


def _prepared(folder: str, cache: Path) -> Path:
    if not folder:
        raise ValueError("no audio named; set --config.data.dir=FOLDER")
    if (Path(folder) / INDEX).exists():
        return Path(folder)
    from beats_jax.data.prepare import prepare

    out = cache / Path(folder).resolve().name
    if jax.process_index() == 0:
        prepare(folder, out)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data prepared")
    return out
