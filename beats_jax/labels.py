"""AudioSet's 527 classes: names of the MIDs that official checkpoints use, and the official order.

`data/audioset_labels.csv` is AudioSet's class_labels_indices.csv (Google, CC BY 4.0). A fine-tuned
official checkpoint has an order of its own, its `label_dict`: index of a logit -> MID.
"""

import csv
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np


@functools.cache
def audioset() -> dict[str, str]:
    """MID -> name, in the official order: 527 entries."""
    with (Path(__file__).parent / "data" / "audioset_labels.csv").open(encoding="utf-8") as file:
        return {row["mid"]: row["display_name"] for row in csv.DictReader(file)}


def names(labels: Sequence[str]) -> tuple[str, ...]:
    """Readable names of labels: a known MID becomes its name, all else stays."""
    return tuple(audioset().get(label, label) for label in labels)


def audioset_order(labels: Sequence[str]) -> np.ndarray:
    """Where a model's logits stand in the official order of AudioSet.

    Args:
        labels: MIDs or names, in the order of a model's logits.

    Returns:
        int [527]: `logits[..., audioset_order(labels)]` are in the official order.

    Raises:
        ValueError: these are not AudioSet's 527 classes.
    """
    mids = {name: mid for mid, name in audioset().items()}
    index = {mids.get(label, label): i for i, label in enumerate(labels)}
    if index.keys() != audioset().keys() or len(labels) != len(index):
        strange = sorted(index.keys() - audioset().keys())[:3]
        raise ValueError(
            f"{len(labels)} labels are not AudioSet's {len(audioset())} classes"
            + (f"; not among them: {strange}" if strange else "")
        )
    return np.array([index[mid] for mid in audioset()])
