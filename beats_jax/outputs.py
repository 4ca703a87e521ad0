"""Where the results of a corpus go: memory, one table, or a folder; and what of it is done already.

While a table is made its results lie beside it, in `OUT.partial`, a line a file; a folder has a
finished `.npz` a file from the start. Both know the model and settings that they were begun with.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beats_jax.questions import Question, Result, Spooled

TABLES = (".npz", ".jsonl", ".csv")


class Memory:
    """Results kept for the caller; also the base of what keeps them on disk."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.added = 0

    def __contains__(self, file: str) -> bool:
        return file in self.results

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def add(self, file: str, result: Result) -> None:
        self.results[file] = {
            name: x.array() if isinstance(x, Spooled) else x for name, x in result.items()
        }
        self.added += 1

    def finish(self, files: list[str]) -> dict[str, Result]:
        return {file: self.results[file] for file in files}


class _Table(Memory):
    """One file for all results, written at the end; until then a journal, a line a file."""

    def __init__(self, out: Path, question: Question, key: dict[str, Any]) -> None:
        super().__init__()
        self._out, self._question = out, question
        self._journal = out.with_name(out.name + ".partial")
        if out.exists():
            raise ValueError(f"{out} is there already; delete it or give another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        end = 0
        if self._journal.exists():
            *lines, _ = self._journal.read_bytes().split(b"\n")  # the last may be torn
            if lines:
                _check_key(self._journal, json.loads(lines[0]), key)
            for line in lines[1:]:
                file, arrays = json.loads(line)
                self.results[file] = {name: _decoded(text) for name, text in arrays.items()}
            end = sum(len(line) + 1 for line in lines)
        self._lines = self._journal.open("r+b" if self._journal.exists() else "w+b")
        self._lines.truncate(end)
        self._lines.seek(end)
        if not end:
            self._write(key)

    def _write(self, entry: Any) -> None:
        self._lines.write(json.dumps(entry).encode() + b"\n")
        self._lines.flush()

    def __exit__(self, *_: Any) -> None:
        self._lines.close()

    def add(self, file: str, result: Result) -> None:
        super().add(file, result)
        self._write([file, {name: _encoded(x) for name, x in self.results[file].items()}])

    def finish(self, files: list[str]) -> dict[str, Result]:
        results = super().finish(files)
        if results:
            draft = self._out.with_name(f".{self._out.name}.draft")
            WRITERS[self._out.suffix](draft, self._question, results)
            draft.replace(self._out)
        self._journal.unlink()
        return results


class _Folder(Memory):
    """A `.npz` a file, in the files' own folders; nothing is kept in memory."""

    def __init__(self, out: Path, key: dict[str, Any], files: Sequence[str]) -> None:
        super().__init__()
        out.mkdir(parents=True, exist_ok=True)
        record = out / "settings.json"
        if record.exists():
            _check_key(out, json.loads(record.read_text()), key)
        else:
            record.write_text(json.dumps(key, indent=1))
        common = os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in files])
        self._paths = {
            f: out / (os.path.relpath(os.path.abspath(f), common) + ".npz") for f in files
        }

    def __contains__(self, file: str) -> bool:
        return self._paths[file].exists()

    def add(self, file: str, result: Result) -> None:
        path = self._paths[file]
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        _save_npz(draft, result)
        draft.replace(path)
        self.added += 1

    def finish(self, files: list[str]) -> dict[str, Result]:
        del files
        return {}


def open_store(
    out: str | Path | None, question: Question, key: dict[str, Any], files: Sequence[str]
) -> Memory:
    """Where results go, with what an earlier call left there: `in`, `add`, and `finish` at the end.

    Args:
        out: a table, `X.npz`, `X.jsonl` or `X.csv`; any other name is a folder; None = memory.
        question: says how a table is written.
        key: all that the results depend on, JSON.
        files: that will be asked.

    Raises:
        ValueError: `out` is finished, has another suffix, or was begun with another key.
    """
    if out is None:
        return Memory()
    out = Path(out)
    if out.suffix in TABLES:
        return _Table(out, question, key)
    if out.suffix and not out.is_dir():
        raise ValueError(f"{out}: want a table ({', '.join(TABLES)}) or a folder's name")
    return _Folder(out, key, files)


def _check_key(where: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{where} was begun with {name} {before.get(name)}, now it is {now.get(name)}: delete "
            "it, or give another --out"
        )


def _encoded(x: Any) -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(x), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def _decoded(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def _save_npz(path: Path, arrays: Result) -> None:
    """As `np.savez`, but an array may be `Spooled`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                if not isinstance(x, Spooled):
                    np.lib.format.write_array(member, np.asarray(x), allow_pickle=False)
                    continue
                header = dict(
                    descr=np.lib.format.dtype_to_descr(x.dtype), fortran_order=False, shape=x.shape
                )
                np.lib.format.write_array_header_1_0(member, header)
                x.file.seek(0)
                shutil.copyfileobj(x.file, member)


def _write_npz(path: Path, question: Question, results: dict[str, Result]) -> None:
    _save_npz(path, {"files": np.array(list(results)), **question.stack(list(results.values()))})


def _write_jsonl(path: Path, question: Question, results: dict[str, Result]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for file, result in results.items():
            entry = {"file": file, **question.line(result)}
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write_csv(path: Path, question: Question, results: dict[str, Result]) -> None:
    with path.open("w", encoding="utf-8", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(["file", *question.header])
        for file, result in results.items():
            table.writerows([file, *row] for row in question.rows(result))


WRITERS = {".npz": _write_npz, ".jsonl": _write_jsonl, ".csv": _write_csv}
