"""Whether a checkpoint can still be read, and where to put it if not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

# Orbax's own records of a step and its items, all JSON.
RECORDS = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "array_metadatas/*")


def damage(folder: Path, items: Sequence[str]) -> str | None:
    """Reads all of one step's checkpoint, on this process alone.

    Args:
      folder: `…/checkpoints/<step>`.
      items: the names of the trees of arrays that must be there.

    Returns:
      The first thing that is wrong, in a line; None if every array and the meta can be read.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="damage",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    item = "meta"
    try:
        json.loads((folder / "meta" / "metadata").read_text())
        for item in RECORDS:  # the manager reads them too; where one is missing it does without
            for record in folder.rglob(item):
                json.loads(record.read_text())
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            for item in items:
                tree = reader.metadata(folder / item).item_metadata.tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                reader.restore(folder / item, restore_args=as_numpy)
    except Exception as error:  # ValueError, KeyError, OSError: as the layers below please
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"{item}: {reason[0][:200]}"
    return None


def set_aside(folder: Path) -> Path:
    """Moves a step's folder out of `checkpoints/`, to `checkpoints_damaged/<step>` beside it."""
    places = folder.parents[1] / f"{folder.parent.name}_damaged"
    places.mkdir(exist_ok=True)
    taken = len(list(places.glob(f"{folder.name}*")))
    return folder.rename(places / (f"{folder.name}-{taken}" if taken else folder.name))
