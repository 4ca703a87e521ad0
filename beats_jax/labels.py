"""Class labels: from a column of text to the rows of a head; and AudioSet's own 527 classes.

`data/audioset_labels.csv` is AudioSet's class_labels_indices.csv (Google, CC BY 4.0). A fine-tuned
official checkpoint has an order of its own, its `label_dict`: index of a logit -> MID.
"""

import csv
import functools
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

TASKS = ("single-label", "multi-label")  # one class a clip (softmax), or any number (sigmoid)
SEPARATORS = ";|,"  # of a multi-label cell: the first of these that the column has


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


class Labels(NamedTuple):
    """Which classes every clip of a set belongs to.

    Attributes:
        names: the classes, C, in the order of a head's logits.
        ids: int16 [n, M], each clip's classes, filled up with -1: two million clips of AudioSet
            take 64 MB, where [n, C] would take a gigabyte.
    """

    names: tuple[str, ...]
    ids: np.ndarray

    def multi_hot(self, positions: np.ndarray) -> np.ndarray:
        """float32 [b, C] of the clips at integer positions [b]; zeros where a position is -1."""
        positions = np.asarray(positions)
        hot = np.zeros((len(positions), len(self.names) + 1), np.float32)
        ids = np.where(positions[:, None] < 0, -1, self.ids[positions])
        np.put_along_axis(hot, ids.astype(np.int64) % hot.shape[1], 1.0, axis=1)
        return hot[:, :-1]  # the last column took the -1s

    def counts(self) -> np.ndarray:
        """int [C]: clips of each class."""
        return np.bincount(self.ids[self.ids >= 0], minlength=len(self.names))

    def balanced_cdf(self) -> np.ndarray:
        """float64 [n], for class-balanced sampling (`order.weighted_positions`).

        A clip's weight is the sum of 1 / (clips of the class) over its classes: rare classes are
        drawn about as often as frequent ones (as AudioSet-2M is trained: method.md, 9.2).
        """
        weight = np.append(1 / np.maximum(self.counts(), 1), 0.0)  # the last is that of -1
        cdf = np.cumsum(weight[self.ids].sum(axis=1))
        return cdf / cdf[-1]


def read_labels(
    cells: Sequence[str], ids: Sequence[str], task: str, classes: str = "", column: str = "label"
) -> Labels:
    """The labels of a set, from a column of text.

    Args:
        cells: text [n]: a class, or for "multi-label" several, with one of `SEPARATORS` in between.
        ids: the clips' names, for messages.
        task: one of `TASKS`.
        classes: "" = those that occur, in AudioSet's official order if all are AudioSet's (MIDs or
            names), else sorted; "audioset" = its 527 MIDs; or the classes themselves, in their
            order, with commas in between.
        column: where the cells come from, for messages.

    Raises:
        ValueError: an unknown task; cells that are empty or name no class of `classes`, with their
            number and what to type.
    """
    if task not in TASKS:
        raise ValueError(f'finetune.task "{task}" is unknown; use {" or ".join(TASKS)}')
    sets = (
        split_cells(cells)
        if task == "multi-label"
        else [[c.strip()] if c.strip() else [] for c in cells]
    )
    if empty := [name for name, found in zip(ids, sets, strict=True) if not found]:
        raise ValueError(
            f"{len(empty)} of {len(ids)} clips have no label in column {column!r} (such as "
            f"{empty[0]}); leave them out with --config.data.filter={column}!="
        )
    occurring = Counter(label for found in sets for label in found)
    names = _class_names(occurring, classes)
    index = {name: i for i, name in enumerate(names)}
    if strange := {label: n for label, n in occurring.items() if label not in index}:
        listed = ", ".join(f"{label} ({n})" for label, n in sorted(strange.items())[:5])
        raise ValueError(
            f"{sum(strange.values())} labels in column {column!r} are none of the {len(names)} "
            f"classes of data.classes: {listed}; add them there, or leave their clips out with "
            f"--config.data.filter={column}!={'|'.join(sorted(strange)[:5])}"
        )
    width = max(len(found) for found in sets)
    table = np.full((len(sets), width), -1, np.int16)
    for row, found in zip(table, sets, strict=True):
        row[: len(found)] = sorted(index[label] for label in found)
    return Labels(names, table)


def split_cells(cells: Sequence[str], classes: Collection[str] = ()) -> list[list[str]]:
    """Each multi-label cell's labels; a cell that is a class as it stands stays whole."""
    separator = next((s for s in SEPARATORS if any(s in cell for cell in cells)), SEPARATORS[0])
    parts = ([cell] if cell in classes else cell.split(separator) for cell in cells)
    return [sorted({part.strip() for part in found if part.strip()}) for found in parts]


def _class_names(occurring: Counter[str], classes: str) -> tuple[str, ...]:
    if classes == "audioset":
        return tuple(audioset())
    if classes:
        return tuple(dict.fromkeys(name.strip() for name in classes.split(",") if name.strip()))
    for official in (tuple(audioset()), tuple(audioset().values())):
        if occurring.keys() <= set(official):
            return tuple(name for name in official if name in occurring)
    return tuple(sorted(occurring))
