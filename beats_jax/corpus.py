"""A model over many files: which files, in full batches, with results that outlive a stop.

What is asked of each is in `questions`, where it goes in `outputs`. A file that cannot be used
costs nothing but itself.
"""

from __future__ import annotations

import glob
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from beats_jax import windows
from beats_jax.data.audio import audio_blocks
from beats_jax.data.sources import list_source
from beats_jax.inference import Model
from beats_jax.outputs import open_store
from beats_jax.questions import Gather, Question, Result

AHEAD = 32  # windows read while the model computes


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
        question: of `questions`.
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
    store = open_store(out, question, key, files)
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
