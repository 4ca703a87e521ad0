"""What can be read: `Clips`, the prepared shards behind them, and the layouts of audio on disk.

A prepared folder holds int16 PCM in ArrayRecord shards written by TFDS and `index.json`, which has
everything but the sound: so filters, labels, lengths and the fingerprint never read audio, and
neither TensorFlow nor TFDS is needed to train from it.
"""

import bisect
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import resource
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beats_jax.data.layouts import AUDIO_SUFFIXES, Listing, audio_files, published
from beats_jax.fbank import MIN_SAMPLES
from beats_jax.labels import Labels

INDEX = "index.json"  # written last and in one piece: a folder without it is not finished


@dataclasses.dataclass(frozen=True, eq=False)
class Clips:
    """A list of mono 16 kHz clips that can be read in any order, from any thread.

    Attributes:
        ids: file names, relative to their source.
        num_samples: int64 [n], the clips' lengths.
        columns: every metadata column as text, one value a clip: fold, category, target, ...
        digests: sha256 of each clip's PCM bytes.
        read: record number -> int16 [n_i].
        records: int64 [n], the record number of each clip.
        token_ids: uint16 [records, L], stored tokens by record number (see `token_store`), if any.
        labels: which classes each clip belongs to, where it is to be classified.
    """

    ids: list[str]
    num_samples: np.ndarray
    columns: dict[str, list[str]]
    digests: list[str]
    read: Callable[[int], np.ndarray]
    records: np.ndarray
    token_ids: np.ndarray | None = None
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 of sounds, names and metadata in their order; the folder's path has no part."""
        content = json.dumps([self.ids, self.digests, sorted(self.columns.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    def fetch(self, positions: np.ndarray) -> list[np.ndarray]:
        """Whole clips at integer positions [n], as n arrays int16 [n_i]."""
        return [self.read(int(record)) for record in self.records[positions]]

    def select(self, filter: str = "", keep: np.ndarray | None = None) -> "Clips":
        """The clips that pass a row filter (see `matches`) and, if given, a bool array [n]."""
        chosen = matches(filter, self.columns, len(self))
        if keep is not None:
            chosen = chosen & np.asarray(keep, bool)
        rows = np.flatnonzero(chosen)
        return Clips(
            ids=[self.ids[i] for i in rows],
            num_samples=self.num_samples[rows],
            columns=_take(self.columns, rows),
            digests=[self.digests[i] for i in rows],
            read=self.read,
            records=self.records[rows],
            token_ids=self.token_ids,
            labels=self.labels and self.labels._replace(ids=self.labels.ids[rows]),
        )


def join(parts: Mapping[str, Clips]) -> Clips:
    """Several sets as one, in their order; a clip's id gets its set's name in front.

    A column that a set does not have is empty text there.
    """
    sets = list(parts.values())
    names = dict.fromkeys(name for clips in sets for name in clips.columns)
    ends = np.cumsum([len(clips) for clips in sets])

    def read(record: int) -> np.ndarray:
        which = int(np.searchsorted(ends, record, side="right"))
        clips, first = sets[which], (ends[which - 1] if which else 0)
        return clips.read(int(clips.records[record - first]))

    return Clips(
        ids=[f"{name}/{i}" for name, clips in parts.items() for i in clips.ids],
        num_samples=np.concatenate([clips.num_samples for clips in sets]),
        columns={
            name: [v for clips in sets for v in clips.columns.get(name, [""] * len(clips))]
            for name in names
        },
        digests=[digest for clips in sets for digest in clips.digests],
        read=read,
        records=np.arange(ends[-1]),
    )


def windows(clips: Clips, clip_samples: int) -> Clips:
    """Every clip cut at multiples of `clip_samples`: the fixed grid, in the place of random crops.

    A window keeps its clip's id and metadata. The last one of a clip is shorter; it is left out
    where it would not hold a token (under 2800 samples), unless it is the only one.
    """
    counts = 1 + np.maximum(clips.num_samples - MIN_SAMPLES, 0) // clip_samples
    clip = np.repeat(np.arange(len(clips)), counts)
    start = (np.arange(len(clip)) - (np.cumsum(counts) - counts)[clip]) * clip_samples

    def read(window: int) -> np.ndarray:
        first = start[window]
        return clips.read(int(clips.records[clip[window]]))[first : first + clip_samples]

    return Clips(
        ids=[clips.ids[i] for i in clip],
        num_samples=np.minimum(clips.num_samples[clip] - start, clip_samples),
        columns=_take(clips.columns, clip),
        digests=[f"{clips.digests[i]}@{s}" for i, s in zip(clip, start, strict=True)],
        read=read,
        records=np.arange(len(clip)),
    )


def matches(filter: str, columns: dict[str, list[str]], num_rows: int) -> np.ndarray:
    """Rows that pass a filter such as "esc10=True,fold!=4|5".

    A comma means AND, | separates the values that a column may (=) or may not (!=) have; values are
    compared as text, and an empty one is a value too ("split=" keeps rows without a split).

    Returns:
        bool [num_rows]; all True for an empty filter.

    Raises:
        ValueError: if a term cannot be read, a column is unknown, or no row passes.
    """
    passed = np.ones(num_rows, bool)
    terms = [term.strip() for term in filter.split(",")] if filter.strip() else []
    for term in terms:
        column, equals, values = term.partition("=")
        wanted = not column.endswith("!")
        column = column.removesuffix("!").strip()
        if not equals:
            raise ValueError(f"filter term {term!r} has no '='; write COLUMN=VALUE|VALUE or !=")
        if column not in columns:
            known = ", ".join(columns) or "none"
            raise ValueError(f"filter: no column {column!r}; the columns are: {known}")
        accepted = {value.strip() for value in values.split("|")}
        passed &= np.array([(value in accepted) == wanted for value in columns[column]], bool)
        if not passed.any():
            some = sorted(set(columns[column]))[:8]
            raise ValueError(f"filter {filter!r} leaves no clip; {column} has values like {some}")
    return passed


def _take(columns: dict[str, list[str]], rows: Iterable[int]) -> dict[str, list[str]]:
    rows = list(rows)
    return {name: [values[i] for i in rows] for name, values in columns.items()}


# --- prepared folders -----------------------------------------------------------------------------


def open_clips(path: str | os.PathLike[str]) -> Clips:
    """Clips of a folder written by `prepare`, read by random access.

    Raises:
        FileNotFoundError: if the folder or one of its shards is not there.
        ValueError: if the folder is not a finished data set.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} is not a prepared data set (no {INDEX} in it);"
            f" make one with: beats-jax prepare SOURCE {folder}"
        )
    index = json.loads((folder / INDEX).read_text())
    for name, _ in index["shards"]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: this shard of the data set is missing")
    return Clips(
        ids=index["id"],
        num_samples=np.array(index["num_samples"], np.int64),
        columns=index["columns"],
        digests=index["sha256"],
        read=_Shards(folder, index["shards"]),
        records=np.arange(len(index["id"])),
    )


class _Shards:
    """Record number -> PCM, from raw ArrayRecord files, without TensorFlow or TFDS.

    One reader a shard, opened at the first use and shared by all threads. Measured on one core
    with 10 s clips: 23k audio-seconds a CPU-second, 1.1 times what TFDS's `as_data_source` gives
    record by record and 2 times what it gives for a list of records.
    """

    def __init__(self, folder: Path, shards: list[tuple[str, int]]):
        self._folder = folder
        self._paths = [folder / name for name, _ in shards]
        self._ends = list(itertools.accumulate(length for _, length in shards))
        self._readers: list[Any] = [None] * len(shards)
        self._lock = threading.Lock()
        # AudioSet is 1024 shards, and as many files are what most systems let a process open at
        # first; the reader of one more would find it empty. Room for a few such sets:
        wanted = 256 + 4 * len(shards)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < wanted:  # negative: no limit
            limit = wanted if hard < 0 else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    def __call__(self, record: int) -> np.ndarray:
        shard = bisect.bisect_right(self._ends, record)
        first = self._ends[shard - 1] if shard else 0
        try:
            reader = self._readers[shard] or self._open(shard, self._ends[shard] - first)
            (data,) = reader.read([record - first])
            entries = _example_class().FromString(data).features.feature
            (audio,) = (e.value.bytes_list.value[0] for e in entries if e.key == b"audio")
            return np.frombuffer(audio, "<i2")
        except Exception as error:  # RuntimeError, DecodeError, ValueError: as the layers please
            raise OSError(
                f"{self._paths[shard]}: record {record - first} cannot be read ({error});"
                f" delete {self._folder} and prepare it again"
            ) from error

    def _open(self, shard: int, length: int) -> Any:
        from array_record.python import array_record_module  # pyright: ignore

        with self._lock:
            if self._readers[shard] is None:
                path = str(self._paths[shard])
                # No read-ahead, no threads of its own: reads are random, and callers are threads.
                reader = array_record_module.ArrayRecordReader(
                    path,
                    "readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=32768,
                )
                # A missing or cut file does not raise: it opens, with nothing in it.
                if not os.path.exists(path):
                    raise FileNotFoundError("no such file")
                if reader.num_records() != length:
                    raise ValueError(f"it has {reader.num_records()} records, not {length}")
                self._readers[shard] = reader
            return self._readers[shard]


def encode_example(id: str, audio: bytes) -> bytes:
    """A record as TFDS writes it, made without TensorFlow: a tf.train.Example."""
    features = {"audio": audio, "id": id.encode("utf-8", "surrogateescape")}
    entries = [{"key": k.encode(), "value": _bytes(v)} for k, v in features.items()]
    return _example_class()(features={"feature": entries}).SerializeToString()


def _bytes(value: bytes) -> dict[str, Any]:
    return {"bytes_list": {"value": [value]}}


@functools.cache
def _example_class() -> Any:
    """A message class of tf.train.Example as far as bytes features go, without TensorFlow.

    Reference: tensorflow/core/example/{example,feature}.proto. A map is on the wire a list of
    entries, and text is bytes. It lives in a pool of its own, apart from TensorFlow's.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    messages = {
        "BytesList": [("value", many, "")],
        "Feature": [("bytes_list", one, "BytesList")],
        "Entry": [("key", one, ""), ("value", one, "Feature")],
        "Features": [("feature", many, "Entry")],
        "Example": [("features", one, "Features")],
    }
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, (key, label, kind) in enumerate(fields, start=1):
            typed = {"type": field.TYPE_MESSAGE, "type_name": f".tf.{kind}"}
            typed = typed if kind else {"type": field.TYPE_BYTES}
            message.field.add(name=key, number=number, label=label, **typed)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


# --- audio on disk --------------------------------------------------------------------------------


def list_source(source: str | os.PathLike[str], filter: str = "") -> Listing:
    """Finds the audio of a source, in whichever of these layouts it is; rows that pass a filter.

    * a manifest `X.csv` or `X.jsonl` with a `filename` column, relative to the manifest's folder
      or to `audio/` in it;
    * a folder with `metadata.csv`, which is such a manifest; or ESC-50's own, `meta/esc50.csv`;
    * AudioSet (segment lists and clips), Speech Commands or IEMOCAP as they come (`layouts`);
    * any other folder: every audio file below it; its sub-folders, if it has any, are the classes
      (column `category`).

    Raises:
        FileNotFoundError: if the source is not there.
        ValueError: if a manifest cannot be read, there is no audio, or the filter is wrong.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        listing = _manifest("manifest", path, path.parent)
    elif (path / "metadata.csv").is_file():
        listing = _manifest("manifest", path / "metadata.csv", path)
    elif (path / "meta" / "esc50.csv").is_file():
        listing = _manifest("esc50", path / "meta" / "esc50.csv", path)
    else:
        listing = published(path) or _folder(path)
    rows = np.flatnonzero(matches(filter, listing.columns, len(listing.ids)))
    ids, paths = [listing.ids[i] for i in rows], [listing.paths[i] for i in rows]
    columns = _take(listing.columns, rows)
    return dataclasses.replace(listing, ids=ids, paths=paths, columns=columns)


def _folder(root: Path) -> Listing:
    paths = audio_files(root)
    if not paths:
        suffixes = " ".join(sorted(AUDIO_SUFFIXES))
        raise ValueError(f"{root}: no audio in it (looked for {suffixes})")
    ids = [path.relative_to(root).as_posix() for path in paths]
    classes = [i.split("/")[0] if "/" in i else "" for i in ids]
    return Listing("folder", ids, paths, {"category": classes} if any(classes) else {})


def _manifest(kind: str, path: Path, root: Path) -> Listing:
    rows = _read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if "filename" not in names:
        raise ValueError(f"{path}: no column 'filename'; the columns are: {', '.join(names)}")
    columns = {name: [row.get(name) or "" for row in rows] for name in names}
    ids = columns.pop("filename")
    if "" in ids:
        raise ValueError(f"{path}: row {ids.index('') + 1} has no filename")
    candidates = ((root / i, root / "audio" / i) for i in ids)
    paths = [direct if direct.exists() else below for direct, below in candidates]
    if not any(p.exists() for p in paths):
        raise ValueError(f"{path}: none of its {len(ids)} files is in {root} or {root / 'audio'}")
    return Listing(kind, ids, paths, columns)


def _read_rows(path: Path) -> Sequence[dict[str, str]]:
    """Rows of a .csv or .jsonl file, all values as text."""
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
            return [{key: _text(value) for key, value in row.items()} for row in rows]
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(csv.DictReader(lines, strict=True))
            if ragged := [number for number, row in enumerate(rows, 2) if None in row]:
                raise csv.Error(f"line {ragged[0]} has more fields than the header")
            return rows
    except (
        UnicodeDecodeError,
        json.JSONDecodeError,
        AttributeError,
        csv.Error,
    ) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from error
    raise ValueError(f"{path}: a manifest ends in .csv or .jsonl")


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def write_folds(
    source: str | os.PathLike[str],
    manifest: str | os.PathLike[str],
    label: str = "category",
    folds: int = 5,
    seed: int = 0,
) -> Path:
    """Writes a manifest of a source that has no folds: with a column `fold`, "1" to "5".

    Every fold gets its share of every class. Clips of one recording or one speaker should share a
    fold; this knows nothing of them: where you do, write the column yourself.

    Args:
        source: as for `list_source`.
        manifest: the .csv to write; a source itself.
        label: the column of the class.
        folds: how many, at least 2.
        seed: of the draw.

    Raises:
        FileNotFoundError, ValueError: as `list_source`; no such column.
    """
    listing, rng = list_source(source), np.random.default_rng(seed)
    if label not in listing.columns or folds < 2:
        known = ", ".join(listing.columns) or "none"
        raise ValueError(f"{source}: {folds} folds by column {label!r}; the columns are: {known}")
    cells, fold = np.array(listing.columns[label]), np.zeros(len(listing.ids), np.int64)
    for name in np.unique(cells):
        rows = rng.permutation(np.flatnonzero(cells == name))
        fold[rows] = 1 + (np.arange(len(rows)) + rng.integers(folds)) % folds
    columns = {**listing.columns, "fold": [str(k) for k in fold]}
    manifest = Path(manifest)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with manifest.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", *columns])
        paths = [str(path.absolute()) for path in listing.paths]
        table.writerows(zip(paths, *columns.values(), strict=True))
    return manifest
