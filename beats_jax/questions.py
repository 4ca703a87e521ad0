"""What is asked of every file of a corpus: how its windows become one result, and how that is told.

A recording comes in overlapping windows (`windows`); a `Gather` takes them in their order and keeps
as little as it can: sums, scores, or columns that go to a temporary file when they grow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from beats_jax import windows
from beats_jax.fbank import BANDS
from beats_jax.inference import Model, times

SPOOL = 1 << 26  # bytes of one recording's columns held in memory: 64 MB

Result = dict[str, Any]  # name -> array, of one file


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
