"""From any folder of audio to shards, once: decode, mono, 16 kHz, int16, ArrayRecord by TFDS.

A pool of processes decodes, and one TFDS builder writes what it is handed, whatever the layout of
the source (`list_source`). The finished folder:

    shards/        written by TFDS: one tf.train.Example a clip, with `id` and `audio`
    report.json    what was kept, padded and skipped, and why
    source.json    what it was made from, to know it again
    index.json     everything but the sound (`sources`); written last
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from beats_jax.data.decode import Decoded, Outcome, decode_all, labelled, modified, settle, sha256
from beats_jax.data.pipeline import import_tensorflow
from beats_jax.data.sources import INDEX, Clips, Listing, list_source
from beats_jax.data.synthetic import synthetic_clips
from beats_jax.fbank import FRAME_LENGTH, SAMPLE_RATE, fbank

SYNTHETIC_CLIPS = 560  # 40 of each category, 8 in each fold
WORK = "work"  # in the folder, while its shards are made one by one (`shards`)


class Report(NamedTuple):
    """What `prepare` did; also in report.json."""

    source: str  # the layout: folder, manifest, esc50, audioset, …, or synthetic
    filter: str
    listed: int  # files that passed the filter
    clips: int  # of them kept
    hours: float
    padded: list[str]  # labelled clips of 400 to 2799 samples, filled up with zeros to 2800
    too_short: list[str]  # under 400 samples: skipped
    unreadable: dict[str, str]  # file -> reason: skipped
    notes: list[str]  # what is not as the set's own lists have it (`layouts`)
    coverage: dict[str, dict[str, list[int]]]  # split -> class -> [clips there, clips listed]

    @property
    def skipped(self) -> int:
        return len(self.too_short) + len(self.unreadable)


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    filter: str = "",
    beam: Sequence[str] | None = None,
) -> Report:
    """Makes the prepared folder `out` of a source; at once if it is there already.

    Files that cannot be read and clips under 400 samples (no log-mel frame) are skipped and
    reported. A run that was killed is started afresh by the next call; with `beam`, by keeping the
    shards that were finished.

    Args:
        source: a folder, a manifest (see `list_source`) or "synthetic".
        out: the folder to write; new, empty, or made by an earlier call.
        jobs: processes that decode; by default one for each CPU.
        filter: rows to take, e.g. "esc10=True,fold!=4|5" (see `matches`).
        beam: options of Apache Beam, to decode and write on its workers (see `data.beam`); ()
            for Beam's `jobs` processes on this machine.

    Raises:
        FileNotFoundError: if the source is not there.
        ValueError: if it has no usable audio, or `out` holds something else.
        BlockingIOError: if another call is writing to `out`.
        ImportError: `beam` is given, and Apache Beam is not installed.
    """
    jobs = (os.cpu_count() or 1) if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; give at least 1")
    run = None
    if beam is not None:
        from beats_jax.data.beam import runner

        if str(source) == "synthetic":
            raise ValueError("the synthetic clips are not decoded; prepare them without Beam")
        run = runner(beam, jobs)
    if str(source) == "synthetic":
        made = synthetic_clips(SYNTHETIC_CLIPS).select(filter)
        listing = Listing("synthetic", made.ids, [], made.columns)
        identity = made.fingerprint
        decoded = (Decoded(made.read(int(record)).tobytes()) for record in made.records)
    else:
        listing = list_source(source, filter)
        identity = _identity(listing, filter)
        decoded = decode_all(listing, jobs)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        if (out / INDEX).exists():
            _check_same(out, listing, identity)
            saved = json.loads((out / "report.json").read_text())
            return Report(**{"notes": [], "coverage": {}, **saved})  # older ones lack these two
        if run:
            from beats_jax.data.shards import write_shards

            shards, outcomes = write_shards(out, listing, identity, run)
        else:
            clear(out)
            shards, outcomes = _write(out, listing, decoded)
        return _finish(out, listing, identity, filter, shards, outcomes)


# --- is it there already? -------------------------------------------------------------------------


def _identity(listing: Listing, filter: str) -> str:
    """Hash of the source as far as a directory listing shows it: names, sizes and metadata."""
    sizes = [path.stat().st_size if path.is_file() else -1 for path in listing.paths]
    content = json.dumps([listing.ids, sizes, sorted(listing.columns.items()), filter])
    return hashlib.sha256(content.encode()).hexdigest()


def _check_same(out: Path, listing: Listing, identity: str) -> None:
    """Raises if the data set in `out` was made from anything but this listing's content."""
    saved = json.loads((out / "source.json").read_text())
    same = saved["identity"] == identity and all(
        modified(path) == time or sha256(path) == digest  # a copy has new times only
        for path, (time, digest) in zip(listing.paths, saved["files"], strict=False)
    )
    if not same:
        raise ValueError(
            f"{out} holds a data set made from other files, other metadata or another filter"
            f" (it has {saved['listed']} files and the filter {saved['filter']!r});"
            " give another folder, or delete this one"
        )


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keeps a second `prepare` out; the system lets go of it even if the process is killed."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{out}: another prepare is at work on this folder") from None
        yield


def clear(out: Path) -> None:
    """Removes what a killed run left, and nothing else."""
    own = {".lock", "shards", WORK, "report.json", "source.json", INDEX + ".tmp"}
    if foreign := sorted(set(os.listdir(out)) - own):
        raise ValueError(f"{out} is not empty ({foreign[0]} is in it); give a new folder")
    for name in ("shards", WORK):
        shutil.rmtree(out / name, ignore_errors=True)


# --- writing --------------------------------------------------------------------------------------


def _write(
    out: Path, listing: Listing, decoded: Iterable[Decoded]
) -> tuple[list[tuple[str, int]], list[Outcome]]:
    """Writes the clips; returns (path in `out`, records) of every shard, and all outcomes."""
    outcomes: list[Outcome] = []
    has_label = labelled(listing)

    def examples() -> Iterator[dict[str, Any]]:
        rows = tqdm(decoded, "prepare", len(listing.ids), unit="clip", disable=None)
        for row, file in enumerate(rows):
            time = modified(listing.paths[row]) if listing.paths else 0
            outcome, pcm = settle(file, time, has_label[row])
            outcomes.append(outcome)
            if pcm:
                yield {"id": listing.ids[row], "audio": pcm}

    try:
        return _write_shards(out, examples(), len(listing.ids)), outcomes
    except AssertionError:  # TFDS's word for a generator that yielded nothing
        if any(outcome.num_samples for outcome in outcomes):
            raise
        return [], outcomes


def _finish(
    out: Path,
    listing: Listing,
    identity: str,
    filter: str,
    shards: list[tuple[str, int]],
    outcomes: Sequence[Outcome],
) -> Report:
    """Writes the report and, last, the index."""
    rows = list(zip(listing.ids, outcomes, strict=True))
    kept = [row for row, outcome in enumerate(outcomes) if outcome.num_samples]
    num_samples = [outcomes[row].num_samples for row in kept]
    unreadable = {name: outcome.reason for name, outcome in rows if outcome.reason}
    short = [name for name, outcome in rows if not outcome.num_samples and not outcome.reason]
    if not kept:
        reasons = unreadable or dict.fromkeys(short, f"under {FRAME_LENGTH} samples")
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"none of the {len(rows)} files can be used; {name}: {reason}")
    report = Report(
        source=listing.kind,
        filter=filter,
        listed=len(listing.ids),
        clips=len(kept),
        hours=round(sum(num_samples) / SAMPLE_RATE / 3600, 4),
        padded=[name for name, outcome in rows if outcome.padded],
        too_short=short,
        unreadable=unreadable,
        notes=list(listing.notes),
        coverage={
            split: {label: list(counts) for label, counts in classes.items()}
            for split, classes in listing.coverage.items()
        },
    )
    source = {
        "identity": identity,
        "filter": filter,
        "listed": len(listing.ids),
        "files": [(o.modified, o.source_sha256) for o in outcomes] if listing.paths else [],
    }
    index = {
        "shards": shards,
        "id": [listing.ids[row] for row in kept],
        "num_samples": num_samples,
        "sha256": [outcomes[row].sha256 for row in kept],
        "columns": {n: [values[row] for row in kept] for n, values in listing.columns.items()},
    }
    (out / "report.json").write_text(json.dumps(report._asdict(), indent=1))
    (out / "source.json").write_text(json.dumps(source))
    (out / (INDEX + ".tmp")).write_text(json.dumps(index))
    os.replace(out / (INDEX + ".tmp"), out / INDEX)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return report


@functools.cache
def builder_class() -> Any:
    """The TFDS builder of prepared clips; made at the first use, as TFDS takes long to import."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder):
        """int16 PCM as bytes: TFDS's Audio feature would store every sample as an int64 varint."""

        name = "clips"
        VERSION = tfds.core.Version("1.0.0")
        examples: Iterable[tuple[int, dict[str, Any]]] = ()

        def _info(self) -> Any:
            features = {"id": tfds.features.Text(), "audio": tfds.features.Scalar(np.object_)}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # record i is row i of the index
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from self.examples

    return Builder


def _write_shards(
    out: Path, examples: Iterator[dict[str, Any]], at_most: int
) -> list[tuple[str, int]]:
    """Writes clips in their order. Returns (path in `out`, number of records) of every shard."""
    tf = import_tensorflow()
    import tensorflow_datasets as tfds

    # TFDS sorts by key in 1000 temporary files that split the 128-bit keys evenly: spreading the
    # keys over that range keeps the order and keeps any one file small enough for memory.
    step = 2**128 // at_most
    builder = builder_class()(data_dir=str(out / "shards"), file_format="array_record")
    builder.examples = ((i * step, example) for i, example in enumerate(examples))
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints where it downloads to
            builder.download_and_prepare()
    except (RuntimeError, tf.errors.OpError) as error:  # as the C++ writers report a full disk
        raise OSError(f"cannot write the shards to {out}: {error}") from error
    shutil.rmtree(out / "shards" / "downloads", ignore_errors=True)  # made, and empty
    split = builder.info.splits["train"]
    paths = [Path(path).absolute().relative_to(out.absolute()) for path in split.filepaths]
    return [(p.as_posix(), length) for p, length in zip(paths, split.shard_lengths, strict=True)]


# --- statistics -----------------------------------------------------------------------------------


class Stats(NamedTuple):
    """Of the log-mel before it is normalised: what `mean` and `std` of `fbank` expect."""

    mean: float
    std: float
    frames: int


def dataset_stats(clips: Clips) -> Stats:
    """Mean and standard deviation over all frames and all 128 bins of all clips."""
    count, total, square = 0, 0.0, 0.0
    for position in tqdm(range(len(clips)), "stats", unit="clip", disable=None):
        (waveform,) = clips.fetch(np.array([position]))
        logmel = fbank(waveform, mean=0.0, std=0.5).astype(np.float64)  # (x - 0) / (2 * 0.5)
        count += logmel.size
        total += logmel.sum()
        square += np.square(logmel).sum()
    if not count:
        raise ValueError("there are no frames to take statistics of")
    mean = total / count
    return Stats(float(mean), float(np.sqrt(square / count - mean**2)), count // 128)
