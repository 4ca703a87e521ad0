"""From a listed file to the PCM that is stored of it, and what is to be said beside the sound."""

import contextlib
import hashlib
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beats_jax.data.audio import read_audio
from beats_jax.data.layouts import Listing
from beats_jax.data.pipeline import ordered
from beats_jax.fbank import FRAME_LENGTH, MIN_SAMPLES, SAMPLE_RATE

LABELS = ("category", "target", "label", "labels")


class Decoded(NamedTuple):
    """One file as `decode` hands it over; `pcm` is empty where it could not be read."""

    pcm: bytes
    source_sha256: str = ""
    reason: str = ""


class Outcome(NamedTuple):
    """What became of one listed file: all but its sound. A skipped one has no samples."""

    num_samples: int
    sha256: str  # of the PCM
    source_sha256: str
    modified: int  # the file's time, in ns
    padded: bool
    reason: str  # why it is unreadable


def decode(part: tuple[Path, tuple[float, float] | None]) -> Decoded:
    """A file, or its (start, end) in seconds. Runs in a worker: a broken file is an answer."""
    path, span = part
    try:
        waveform, _ = read_audio(path)
        if span:
            waveform = waveform[slice(*(round(second * SAMPLE_RATE) for second in span))]
        pcm = np.clip(np.round(waveform * 32768.0), -32768, 32767).astype("<i2")
        return Decoded(pcm.tobytes(), sha256(path))
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ")
        reason = reason or type(error).__name__
        with contextlib.suppress(OSError):
            return Decoded(b"", sha256(path), reason)
        return Decoded(b"", "", reason)


def decode_all(listing: Listing, jobs: int) -> Iterator[Decoded]:
    """Every listed file in its order, by a pool of processes.

    Raises:
        OSError: one of them died.
    """
    spans = map(listing.spans.get, listing.ids)
    parts = list(zip(listing.paths, spans, strict=True))
    jobs = min(jobs, len(parts))
    if jobs == 1:
        yield from map(decode, parts)
        return
    # Not forked: by now this process may have threads of TensorFlow and JAX, with their locks.
    context = multiprocessing.get_context("spawn")
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    try:
        with ProcessPoolExecutor(
            jobs,
            mp_context=context,
            initializer=signal.signal,
            initargs=ignore_interrupt,
        ) as pool:
            yield from ordered(pool, decode, parts, ahead=8 * jobs)
    except BrokenProcessPool as error:
        raise OSError(
            "a decoding process died (out of memory, or a crash in a decoder, or the calling script"
            ' has no `if __name__ == "__main__":`); jobs=1 decodes without processes'
        ) from error


def settle(decoded: Decoded, modified: int, labelled: bool) -> tuple[Outcome, bytes]:
    """What becomes of a decoded file, and the PCM to store, which is empty if it is skipped."""
    pcm, source_sha256, reason = decoded
    if reason or len(pcm) < 2 * FRAME_LENGTH:
        return Outcome(0, "", source_sha256, modified, False, reason), b""
    pad = labelled and len(pcm) < 2 * MIN_SAMPLES
    if pad:
        pcm = pcm.ljust(2 * MIN_SAMPLES, b"\0")
    digest = hashlib.sha256(pcm).hexdigest()
    return Outcome(len(pcm) // 2, digest, source_sha256, modified, pad, ""), pcm


def labelled(listing: Listing) -> list[bool]:
    """For each listed file: does it have a label?"""
    columns = [listing.columns[name] for name in LABELS if name in listing.columns]
    return [any(column[row] for column in columns) for row in range(len(listing.ids))]


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def modified(path: Path) -> int:
    """Time of a file's last change, in ns; 0 where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0
