"""Folders of runs, on a disk or in an object store: `gs://bucket/W` through etils' `epath`.

An object store has no appending, no renaming of folders in one go and no empty folders: what a run
writes there is whole objects. `pip install gcsfs` (or TensorFlow, which has its own client) and
credentials are what it takes; Orbax brings TensorStore's.
"""

from __future__ import annotations

import os
from typing import Any

from etils import epath


def in_store(path: epath.PathLike) -> bool:
    """True for `gs://bucket/…` and its like, False for a path of this machine."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The same place whatever the working directory; of an object store it is that already."""
    return epath.Path(path if in_store(path) else os.path.abspath(path))


def opened_to_append(path: epath.Path) -> Any:
    """An unbuffered binary file, written at its end: what `write` took survives this process."""
    return _Object(path) if in_store(path) else open(path, "ab", buffering=0)


class _Object:
    """An object that grows: every write puts the whole of it anew."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._content = path.read_bytes() if path.exists() else b""

    def write(self, data: bytes) -> int:
        try:
            self._path.write_bytes(self._content + data)
        except OSError:
            raise
        except Exception as error:  # each client has its own
            raise OSError(None, f"{type(error).__name__}: {error}", str(self._path)) from error
        self._content += data
        return len(data)

    def close(self) -> None:
        pass
