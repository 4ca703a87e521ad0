"""Token ids written once: one row for every window of a data set, so that no step tokenizes again.

A store is a folder with `ids.npy` (uint16, read by memory map) and `store.json`: the key (what the
ids were made from and with), the tokenizer's origin, and how many rows are done. A store that is
not complete is never read; writing goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE = "store.json"
PADDING = np.iinfo(np.uint16).max  # where a window has no token


class TokenStore(NamedTuple):
    """Token ids of every window of a data set.

    Attributes:
        path: the folder.
        ids: uint16 [windows, L]; 65535 = padding.
        key: tokenizer (sha256), dataset (fingerprint of its windows), clip_samples, mean, std,
            dtype.
        tokenizer: where the tokenizer comes from, as in a checkpoint's lineage.
        num_codes: size of its codebook.
    """

    path: Path
    ids: np.ndarray
    key: dict[str, Any]
    tokenizer: dict[str, Any]
    num_codes: int

    def check(self, **wanted: Any) -> None:
        """Raises ValueError where a part of the key is not what a run has."""
        for name, value in wanted.items():
            if self.key[name] != value:
                raise ValueError(
                    f"data.token_ids: the ids in {self.path} were made with {name} "
                    f"{self.key[name]}, this run has {value}; write them again "
                    "(`beats-jax tokenize --store`) or leave --config.data.token_ids empty"
                )


def open_store(path: str | os.PathLike[str]) -> TokenStore:
    """Opens a complete store.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not complete, or not what its record says.
    """
    folder = Path(path)
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"data.token_ids: no {FILE} in {folder}; see `beats-jax tokenize`")
    record = json.loads((folder / FILE).read_text())
    if record["done"] < record["rows"]:
        raise ValueError(
            f"data.token_ids: {folder} holds {record['done']} of {record['rows']} windows; run the "
            "`beats-jax tokenize` command that made it again: it goes on from there"
        )
    ids = np.load(folder / "ids.npy", mmap_mode="r")
    if ids.shape != (record["rows"], record["length"]):
        raise ValueError(f"data.token_ids: {folder}/ids.npy is {ids.shape}; delete the folder")
    return TokenStore(folder, ids, record["key"], record["tokenizer"], record["num_codes"])


class Writer:
    """Writes a store, row by row, from wherever it stopped.

    Args:
        path: the folder; made if missing.
        rows, length: windows, and tokens a window.
        key, tokenizer, num_codes: as in `TokenStore`.

    Raises:
        ValueError: the folder holds ids of another key.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        rows: int,
        length: int,
        key: Mapping[str, Any],
        tokenizer: Mapping[str, Any],
        num_codes: int,
    ):
        if num_codes >= PADDING:
            raise ValueError(f"a codebook of {num_codes} does not fit into uint16")
        self._folder = Path(path)
        self._folder.mkdir(parents=True, exist_ok=True)
        record = dict(rows=rows, length=length, num_codes=num_codes, key=dict(key))
        self._record = {**record, "tokenizer": dict(tokenizer), "done": 0}
        ids = self._folder / "ids.npy"
        if (self._folder / FILE).exists():
            before = json.loads((self._folder / FILE).read_text())
            for name in key:
                if before["key"][name] != key[name]:
                    raise ValueError(
                        f"{path} holds ids made with {name} {before['key'][name]}, these are of "
                        f"{key[name]}; write to another folder"
                    )
            self._record["done"] = before["done"]
            self._ids = np.lib.format.open_memmap(ids, "r+")
        else:
            self._ids = np.lib.format.open_memmap(ids, "w+", np.uint16, (rows, length))
            self._save()

    @property
    def done(self) -> int:
        """Rows that are on disk."""
        return self._record["done"]

    def write(self, first: int, batches: Iterable[np.ndarray]) -> None:
        """Writes batches of rows (int [n, L], -1 = padding) from row `first`, at most `done`, on.

        A batch's rows are on disk before they count as done.
        """
        for batch in batches:
            rows = batch[: len(self._ids) - first]
            self._ids[first : first + len(rows)] = np.where(rows < 0, PADDING, rows)
            self._ids.flush()
            first += len(rows)
            self._record["done"] = first
            self._save()

    def _save(self) -> None:
        draft = self._folder / f"{FILE}.draft"
        draft.write_text(json.dumps(self._record, indent=1))
        draft.replace(self._folder / FILE)
