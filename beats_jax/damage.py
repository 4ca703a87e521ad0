"""Whether a checkpoint can still be read, and where to put it if not."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

# Orbax's own records of a step and its items, all JSON.
RECORDS = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "array_metadatas/*")


def damage(folder: epath.Path, items: Sequence[str]) -> str | None:
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
            for record in (*folder.glob(item), *folder.glob(f"*/{item}")):
                json.loads(record.read_text())
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            for item in items:
                metadata = reader.metadata(folder / item).item_metadata
                if metadata is None:
                    return f"{item}: missing, or nothing in it"
                tree = metadata.tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                reader.restore(folder / item, restore_args=as_numpy)
    except Exception as error:  # ValueError, KeyError, OSError: as the layers below please
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"{item}: {reason[0][:200]}"
    return None


def set_aside(folder: epath.Path, reason: str) -> epath.Path:
    """Moves a step's folder out of `checkpoints/`, to `checkpoints_damaged/<step>` beside it.

    `reasons.txt` there gets a line (and makes the folder, which in an object store is not empty).
    """
    places = folder.parents[1] / f"{folder.parent.name}_damaged"
    places.mkdir(exist_ok=True)
    taken = len(list(places.glob(f"{folder.name}*")))
    place = places / (f"{folder.name}-{taken}" if taken else folder.name)
    reasons = places / "reasons.txt"
    before = reasons.read_text() if reasons.exists() else ""
    reasons.write_text(f"{before}{place.name}: {reason}\n")
    return folder.rename(place)
