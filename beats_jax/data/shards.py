"""Shards made one by one, in any order, anywhere: `prepare` on many machines (`beam`).

Each is a contiguous range of the listed files, made from start to end by one worker: decode, write
under a temporary name, rename. So record i is row i of the index, as from one machine; no sound
leaves a worker; and a shard that was finished stays finished, whatever ends the job. What became of
its files (lengths, digests, reasons) is written beside it, and the parent makes the index of that.

TFDS's own Beam writers can do none of the three: they bring the sound to its shard by a shuffle
(AudioSet's 640 GB once more through temporary storage, and each shard once whole in memory), keep
the order only so, and begin anew when killed; its `ShardBasedBuilder` keeps order, but nothing when
killed, and puts two transforms a shard into the job's graph. What is written here is TFDS's all the
same (names, examples, metadata): `tfds.builder_from_directory(OUT/shards/clips/1.0.0)` reads it.

While it is at work, OUT also holds

    work/plan.json          what is made here, to know it again
    work/rows-00012.json    the files of shard 12
    work/done-00012.json    what became of them: the shard is finished
"""

import contextlib
import functools
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from beats_jax.data.decode import Outcome, decode, labelled, modified, settle
from beats_jax.data.layouts import Listing
from beats_jax.data.prepare import WORK, builder_class, clear
from beats_jax.data.sources import encode_example

FOLDER = "shards/clips/1.0.0"  # as TFDS names it for this builder and version
MAX_SHARDS = 1024  # as many as TFDS makes of AudioSet
MIN_ROWS = 64  # of 10 s: 20 MB


def write_shards(
    out: Path,
    listing: Listing,
    identity: str,
    run: Callable[[Callable[[int], object], int], None],
) -> tuple[list[tuple[str, int]], list[Outcome]]:
    """Makes the shards that are not there yet.

    Args:
        out: the prepared folder to be.
        listing: what is to be in it.
        identity: a hash of that; what was made from anything else is removed.
        run: calls a picklable function with 0 to n - 1, wherever and in whatever order.

    Returns:
        (path in `out`, records) of every shard, and every listed file's outcome.

    Raises:
        ValueError: `out` holds something else.
        OSError: a shard cannot be written.
    """
    out = out.absolute()  # workers may have another working directory
    rows = max(MIN_ROWS, -(-len(listing.ids) // MAX_SHARDS))
    starts = range(0, len(listing.ids), rows)
    _plan(out, listing, {"identity": identity, "rows": rows}, starts)
    with _progress(out / WORK, len(starts)):
        run(functools.partial(make_shard, str(out), len(starts)), len(starts))
    lengths, outcomes = [], []
    for shard in range(len(starts)):
        done = json.loads((out / WORK / f"done-{shard:05d}.json").read_text())
        made = [Outcome(*outcome) for outcome in done["outcomes"]]
        lengths.append(sum(outcome.num_samples > 0 for outcome in made))
        outcomes += made
    for left in (out / FOLDER).glob("*.tmp"):  # of workers that were killed
        left.unlink()
    names = [f"{FOLDER}/{_name(shard, len(starts))}" for shard in range(len(starts))]
    _describe(out, names, lengths)
    return list(zip(names, lengths, strict=True)), outcomes


def _plan(out: Path, listing: Listing, plan: dict[str, Any], starts: range) -> None:
    """Says on disk what each shard is made from; keeps what was made by the same plan."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads((out / WORK / "plan.json").read_text()) == plan:
            return
    clear(out)
    (out / FOLDER).mkdir(parents=True)
    (out / WORK).mkdir()
    has_label = labelled(listing)
    for shard, start in enumerate(starts):
        rows = [
            (name, os.path.abspath(listing.paths[row]), listing.spans.get(name), has_label[row])
            for row, name in enumerate(listing.ids[start : start + starts.step], start)
        ]
        (out / WORK / f"rows-{shard:05d}.json").write_text(json.dumps(rows))
    _replace(out / WORK / "plan.json", plan)


@contextlib.contextmanager
def _progress(work: Path, num_shards: int) -> Iterator[None]:
    """Shows how many shards are there, whoever makes them."""
    stop = threading.Event()

    def watch() -> None:
        with tqdm(desc="prepare", total=num_shards, unit="shard", disable=None) as bar:
            while not stop.wait(1.0):
                bar.update(sum(1 for _ in work.glob("done-*.json")) - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _describe(out: Path, names: list[str], lengths: list[int]) -> None:
    """Writes TFDS's metadata, as its builder would have."""
    import tensorflow_datasets as tfds

    builder = builder_class()(data_dir=str(out / "shards"), file_format="array_record")
    size = sum((out / name).stat().st_size for name in names)
    template = builder._get_filename_template("train")
    split = tfds.core.SplitInfo("train", lengths, size, template)
    builder.info.set_splits(tfds.core.SplitDict([split]))
    builder.info.write_to_directory(out / FOLDER)


# --- on a worker ----------------------------------------------------------------------------------


def make_shard(out: str, num_shards: int, shard: int) -> None:
    """Makes one shard, unless it is there and its files are as they were.

    Raises:
        OSError: it cannot be written. A file that cannot be read is an outcome.
    """
    from array_record.python import array_record_module  # pyright: ignore

    path = Path(out, FOLDER, _name(shard, num_shards))
    done = Path(out, WORK, f"done-{shard:05d}.json")
    rows = json.loads(Path(out, WORK, f"rows-{shard:05d}.json").read_text())
    files = [Path(file) for _, file, _, _ in rows]
    times = [modified(file) for file in files]
    with contextlib.suppress(OSError):
        saved = json.loads(done.read_text())
        same = [Outcome(*outcome).modified for outcome in saved["outcomes"]] == times
        if same and path.stat().st_size == saved["bytes"]:
            return
    outcomes = []
    temporary = _temporary(path)  # a name of its own: a runner may try a shard twice at a time
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        for (name, _, span, has_label), file, time in zip(rows, files, times, strict=True):
            outcome, pcm = settle(decode((file, span)), time, has_label)
            outcomes.append(outcome)
            if pcm:
                writer.write(encode_example(name, pcm))
        writer.close()
        size = temporary.stat().st_size
        os.replace(temporary, path)
        _replace(done, {"bytes": size, "outcomes": outcomes})
    except (RuntimeError, OSError) as error:  # as the C++ writers report a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write the shards to {out}: {error}") from error


def _name(shard: int, num_shards: int) -> str:
    return f"clips-train.array_record-{shard:05d}-of-{num_shards:05d}"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def _replace(path: Path, content: Any) -> None:
    temporary = _temporary(path)
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
