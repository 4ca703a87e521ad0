"""A model over many files: which files, in full batches, with results that outlive a stop.

Results go into one table (`.npz`, `.jsonl`, `.csv`) or into a folder, a `.npz` a file. While a
table is made, what is done lies beside it in `OUT.partial`; the same command goes on from there. A
file that cannot be used costs nothing but itself.
"""

from __future__ import annotations

import base64
import csv
import glob
import io
import json
import os
import queue
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from beats_jax import windows
from beats_jax.data.audio import audio_blocks
from beats_jax.data.sources import list_source
from beats_jax.fbank import BANDS
from beats_jax.inference import Model, times

TABLES = (".npz", ".jsonl", ".csv")
SPOOL = 1 << 26  # bytes of one recording's columns held in memory: 64 MB
AHEAD = 32  # windows read while the model computes

Result = dict[str, Any]  # name -> array, of one file


class Outcome(NamedTuple):
    """What became of the files.

    Attributes:
        results: by file, in the files' order; empty where they went to a folder.
        done: how many have a result, earlier runs of the same command included.
        skipped: why the others have none.
    """

    results: dict[str, Result]
    done: int
    skipped: dict[str, str]


def find(inputs: Iterable[str]) -> list[str]:
    """The audio files meant by paths, folders (searched), manifests (.csv, .jsonl) and globs.

    Raises:
        FileNotFoundError: one of them is not there, or a glob matches nothing.
        ValueError: a folder without audio, or a manifest that cannot be read.
    """
    files: list[str] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir() or (path.suffix in (".csv", ".jsonl") and path.is_file()):
            files += map(str, list_source(path).paths)
        elif path.exists():
            files.append(given)
        elif not (matched := sorted(glob.glob(given, recursive=True))):
            raise FileNotFoundError(f"{given}: no such file or folder, and no file matches it")
        else:
            files += filter(os.path.isfile, matched)
    return list(dict.fromkeys(files))


# --- what is asked of every file ------------------------------------------------------------------


class Gather(Protocol):
    """Takes a recording's windows in their order; gives its result after the last."""

    def add(self, part: windows.Window, values: np.ndarray) -> None: ...

    def result(self) -> Result: ...

    def close(self) -> None: ...


class Question(NamedTuple):
    """What is asked of every file, and how answers are written.

    Attributes:
        what: of every window: see `Model.by_column`.
        layer: of the features.
        gather: makes a new `Gather`.
        header: the columns of a .csv, after `file`.
        rows: result -> rows of the .csv.
        line: result -> fields of a line of the .jsonl.
        stack: all results -> arrays of the .npz, beside `files`.
    """

    what: str
    layer: int | None
    gather: Callable[[], Gather]
    header: Sequence[str]
    rows: Callable[[Result], Iterable[Sequence[Any]]]
    line: Callable[[Result], dict[str, Any]]
    stack: Callable[[list[Result]], dict[str, np.ndarray]]


def embedding(model: Model, layer: int | None = None) -> Question:
    """One vector a file, the mean over its tokens: `embedding` float32 [D]."""
    return Question(
        "features",
        layer,
        _Mean,
        [f"x{i}" for i in range(model.embed_dim)],
        lambda r: [r["embedding"].tolist()],
        lambda r: {"embedding": r["embedding"].tolist()},
        lambda results: {"embeddings": np.stack([r["embedding"] for r in results])},
    )


def frames(model: Model, layer: int | None = None) -> Question:
    """All columns' features: `features` float32 [T', 8, D] and `times` [T']; for a folder only."""
    del model
    return _columns("features", layer, "features", np.dtype(np.float32))


def tokens(model: Model) -> Question:
    """Acoustic tokens: `ids` int32 [T', 8] and `times` float64 [T'], the columns' middles."""
    del model
    return _columns("ids", None, "ids", np.dtype(np.int32))


def _columns(what: str, layer: int | None, name: str, dtype: np.dtype) -> Question:
    return Question(
        what,
        layer,
        lambda: _All(name, dtype, pick=what == "ids"),
        ["time", *(f"band{b}" for b in range(BANDS))],
        lambda r: ([f"{t:.4f}", *row] for t, row in zip(r["times"], r[name].tolist(), strict=True)),
        lambda r: {name: r[name].tolist()},
        lambda results: {
            name: np.concatenate([r[name] for r in results]),
            "columns": np.array([len(r[name]) for r in results]),
        },
    )


def classes(model: Model, top: int = 5) -> Question:
    """Class scores of the file and of its windows: the fields of `windows.Scores`."""

    def best(probs: np.ndarray) -> list[dict[str, Any]]:
        order = np.argsort(-probs, kind="stable")[:top]
        return [{"label": model.labels[i], "prob": round(float(probs[i]), 6)} for i in order]

    def rows(r: Result) -> Iterator[list[Any]]:
        start, end = r["spans"][0][0], r["spans"][-1][1]
        yield ["all", f"{start:.3f}", f"{end:.3f}", *r["probs"].tolist()]
        for i, ((start, end), probs) in enumerate(zip(r["spans"], r["window_probs"], strict=True)):
            yield [i, f"{start:.3f}", f"{end:.3f}", *probs.tolist()]

    def line(r: Result) -> dict[str, Any]:
        spans = zip(r["spans"].round(3).tolist(), r["window_probs"], strict=True)
        parts = [{"start": s, "end": e, "top": best(p)} for (s, e), p in spans]
        return {"top": best(r["probs"]), "windows": parts}

    def stack(results: list[Result]) -> dict[str, np.ndarray]:
        names = ("logits", "probs"), ("spans", "window_probs")
        return {
            "labels": np.array(model.labels),
            **{name: np.stack([r[name] for r in results]) for name in names[0]},
            **{name: np.concatenate([r[name] for r in results]) for name in names[1]},
            "windows": np.array([len(r["spans"]) for r in results]),
        }

    header = ["window", "start", "end", *model.labels]
    return Question("logits", None, lambda: _Scores(model), header, rows, line, stack)


class _Mean:
    def __init__(self) -> None:
        self._merger, self._total, self._columns = windows.Merger(), 0.0, 0

    def add(self, part: windows.Window, values: np.ndarray) -> None:
        for ready in _final(self._merger, part, values):
            self._total = self._total + ready.sum(axis=(0, 1), dtype=np.float64)
            self._columns += len(ready)

    def result(self) -> Result:
        return {"embedding": np.asarray(self._total / (BANDS * self._columns), np.float32)}

    def close(self) -> None:
        """Holds nothing open."""


class _All:
    """Keeps every column: in memory, and from `SPOOL` on in a temporary file."""

    def __init__(self, name: str, dtype: np.dtype, pick: bool) -> None:
        self._name, self._dtype, self._merger = name, dtype, windows.Merger(pick)
        self._file, self._shape = tempfile.SpooledTemporaryFile(SPOOL), (0,)

    def add(self, part: windows.Window, values: np.ndarray) -> None:
        for ready in _final(self._merger, part, values):
            self._file.write(np.ascontiguousarray(ready, self._dtype).data)
            self._shape = (self._shape[0] + len(ready), *ready.shape[1:])

    def result(self) -> Result:
        columns = Spooled(self._file, self._dtype, self._shape)
        return {self._name: columns, "times": times(self._shape[0])}

    def close(self) -> None:
        self._file.close()


class _Scores:
    def __init__(self, model: Model) -> None:
        self._scorer = windows.Scorer(model)

    def add(self, part: windows.Window, values: np.ndarray) -> None:
        self._scorer.add(part.first, values)

    def result(self) -> Result:
        return self._scorer.scores()._asdict()

    def close(self) -> None:
        """Holds nothing open."""


def _final(
    merger: windows.Merger, part: windows.Window, values: np.ndarray
) -> Iterator[np.ndarray]:
    """The columns that a window brings to their final value."""
    yield merger.add(part.first, values)
    if part.last:
        yield merger.rest()


class Spooled(NamedTuple):
    """An array that may be too large for memory: its bytes are in a file."""

    file: Any
    dtype: np.dtype
    shape: tuple[int, ...]

    def array(self) -> np.ndarray:
        self.file.seek(0)
        return np.frombuffer(self.file.read(), self.dtype).reshape(self.shape)


# --- running --------------------------------------------------------------------------------------


def ask(
    model: Model,
    question: Question,
    files: Sequence[str],
    out: str | Path | None = None,
    *,
    window: int = windows.WINDOW,
    hop: int = windows.HOP,
    batch_size: int = windows.BATCH_SIZE,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Asks a question of every file; what an earlier call to the same `out` did is not done again.

    Args:
        model: of `load`.
        question: `embedding`, `frames`, `tokens` or `classes`.
        files: of `find`.
        out: a table, `X.npz`, `X.jsonl` or `X.csv`; any other name is a folder; None = nowhere.
        window, hop: in columns of 0.16 s (`windows`).
        batch_size: windows at a time.
        settings: what else the results depend on, for a later call to compare.

    Raises:
        ValueError: `out` holds results of another model or other settings, or is finished.
        OSError: it cannot be written.
    """
    key = dict(model=model.source["params_sha256"], what=question.what, layer=question.layer)
    key = {**key, "window": window, "hop": hop, **(settings or {})}
    if not 1 <= hop <= window:
        raise ValueError(f"window is {window} and hop {hop} columns; give 1 <= hop <= window")
    store = _store(out, question, key, files)
    todo, skipped = [file for file in files if file not in store], {}
    gathers: dict[str, Gather] = {}
    parts = _ahead(_windows(todo, window, hop, skipped))
    answers = windows.run(model, question.what, parts, batch_size, question.layer)
    try:
        with store, tqdm(desc="files", total=len(todo), unit="", disable=None) as bar:
            for file, part, values in answers:
                if (gather := gathers.get(file)) is None:
                    gather = gathers[file] = question.gather()
                gather.add(part, values)
                if part.last:
                    store.add(file, gather.result())
                    gathers.pop(file).close()
                bar.update(store.added + len(skipped) - bar.n)
            results = store.finish([file for file in files if file in store])
    finally:
        for gather in gathers.values():  # of files that failed half-way
            gather.close()
    return Outcome(results, len(files) - len(skipped), skipped)


def _windows(
    files: Iterable[str], window: int, hop: int, skipped: dict[str, str]
) -> Iterator[tuple[str, windows.Window]]:
    """Every file's windows; why one has none, or no more, goes into `skipped`."""
    for file in files:
        try:
            for part in windows.cut(audio_blocks(file), window, hop, file):
                yield file, part
        except (OSError, ValueError) as error:
            skipped[file] = str(error)


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, made in a thread of their own."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def put(more: bool, item: Any) -> bool:
        while not stopped.is_set():
            try:
                made.put((more, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(True, item):
                    return
            put(False, None)
        except BaseException as error:  # raised again where the items are taken
            put(False, error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while (taken := made.get())[0]:
            yield taken[1]
        if taken[1] is not None:
            raise taken[1]
    finally:
        stopped.set()
        thread.join()


# --- where results go -----------------------------------------------------------------------------


class _Memory:
    """Results kept for the caller; also the base of what keeps them on disk."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.added = 0

    def __contains__(self, file: str) -> bool:
        return file in self.results

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def add(self, file: str, result: Result) -> None:
        self.results[file] = {
            name: x.array() if isinstance(x, Spooled) else x for name, x in result.items()
        }
        self.added += 1

    def finish(self, files: list[str]) -> dict[str, Result]:
        return {file: self.results[file] for file in files}


class _Table(_Memory):
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


class _Folder(_Memory):
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


def _store(
    out: str | Path | None, question: Question, key: dict[str, Any], files: Sequence[str]
) -> _Memory:
    if out is None:
        return _Memory()
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
