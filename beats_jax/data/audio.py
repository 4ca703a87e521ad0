"""Sound from anywhere: files of any container, rate and channels, and arrays given from Python.

Everything becomes 16 kHz mono float32 in [-1, 1]. A file is decoded, mixed to its channels' mean
and resampled as a stream, so an hour needs no more memory than ten seconds; the blocks joined are
bit-equal to a resampling of the whole. Nothing is clipped: float audio may pass full scale.
"""

import contextlib
import math
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import soundfile
import soxr

from beats_jax.fbank import FRAME_LENGTH, SAMPLE_RATE

CHUNK = 1 << 20  # samples of all channels decoded at once: 4 MB of float32
# Full scale of the integers of PCM: a power of two, so that dividing by it is exact.
FULL_SCALE = {"int8": 2**7, "uint8": 2**7, "int16": 2**15, "int32": 2**31}
FLOATS = ("float16", "bfloat16", "float32", "float64")
# Peaks above 1 are legal in float audio, and a hot mix may be several times over; 64 is 36 dB over.
# 16-bit PCM under 64 is below -54 dB, so what was recorded as integers is seldom missed.
MAX_PEAK = 64.0


def read_audio(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """Reads a whole file; `audio_blocks` says what it takes and raises.

    Returns:
        float32 [n], the mean of the channels at 16 kHz, n = ceil(samples * 16000 / rate), which is
        0 for a header without sound; and that rate, 16000.
    """
    return np.concatenate([np.empty(0, np.float32), *audio_blocks(path)]), SAMPLE_RATE


def audio_blocks(path: str | os.PathLike[str], seconds: float = 10.0) -> Iterator[np.ndarray]:
    """Reads a file in any container, at any rate, of any number of channels, block by block.

    Memory does not grow with the file. What libsndfile cannot open is decoded by ffmpeg, if that
    is installed, to a temporary file (in $TMPDIR; about 1.4 GB for an hour of stereo). Of a file
    that was cut off, as much comes as libsndfile finds.

    Args:
        path: the file. That it is there is checked at once, its content as it is read.
        seconds: length of a block.

    Yields:
        float32 [round(seconds * 16000)], the mean of the channels at 16 kHz; the last is shorter.
        Joined they are the same bits whatever `seconds` is, and the same as those of
        `librosa.resample(..., res_type="soxr_hq")` of the whole file.

    Raises:
        OSError: if it is not there, is a folder or may not be read.
        ValueError: if it is empty, cannot be decoded, or has samples that are not finite or that
            are integers kept as floats.
    """
    if not math.isfinite(seconds) or round(seconds * SAMPLE_RATE) < 1:
        raise ValueError(f"seconds is {seconds}; give the length of a block, e.g. 10.0")
    name = os.fsdecode(path)
    _check_file(name)
    return _cut(_resampled(name), round(seconds * SAMPLE_RATE))


def as_waveform(x: Any) -> np.ndarray:
    """A waveform given from Python as float32 in [-1, 1].

    Args:
        x: [T] or [B, T] at 16 kHz, mono: an array of any library, or lists of floats. Floats are
            taken as they are, integers as PCM: int16 / 32768 (as `fbank` does), int32 / 2**31,
            int8 / 128, (uint8 - 128) / 128.

    Returns:
        float32, of the same shape; float32 is not copied.

    Raises:
        ValueError: another dtype or shape, samples that are not finite, or integers kept as floats.
    """
    if isinstance(x, (str, bytes, os.PathLike)):
        raise ValueError(f"waveform is the path {os.fsdecode(x)}; read it first with read_audio")
    try:
        x = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:  # torch: on a GPU, bfloat16, in a graph
        raise ValueError(
            f"waveform is a {type(x).__name__} that numpy cannot take ({error}); pass a numpy array"
            " (of a torch tensor: x.detach().cpu().float().numpy())"
        ) from error
    dtype = x.dtype.name
    if dtype not in FLOATS and dtype not in FULL_SCALE:
        raise ValueError(f"waveform is {dtype}; {_INSTEAD.get(dtype, _WANTED)}")
    # No batch has clips under one frame by the hundred: that is [T, C], as soundfile.read gives it.
    if x.ndim not in (1, 2) or (x.ndim == 2 and 0 < x.shape[1] < FRAME_LENGTH <= x.shape[0]):
        raise ValueError(
            f"waveform has shape {x.shape}; pass [T] or [B, T], of channels their mean:"
            " waveform.mean(axis=...)"
        )
    with np.errstate(over="ignore"):  # a float64 too large for float32 is reported below
        waveform = x.astype(np.float32, copy=False)
    if dtype in FULL_SCALE:
        offset = np.float32(128 if dtype == "uint8" else 0)
        return (waveform - offset) / np.float32(FULL_SCALE[dtype])
    if not np.isfinite(waveform).all():
        raise ValueError("waveform has samples that are not finite (NaN or Inf); take them out")
    if (peak := np.abs(waveform).max(initial=0.0)) > MAX_PEAK:
        raise ValueError(f"waveform is {dtype} with a peak of {peak:g}, {_TOO_LOUD}")
    return waveform


_TOO_LOUD = (
    "which looks like integer PCM stored as floats; divide by 32768 (or by the full scale it was"
    " recorded with)"
)
_WANTED = "pass floats in [-1, 1], or PCM as int16, int32, int8 or uint8"
_INSTEAD = {
    "int64": "int64 has no full scale: divide by it yourself, or give int16",
    "bool": f"true and false are no samples; {_WANTED}",
    "object": f"its rows differ in length or are no numbers; {_WANTED}",
} | dict.fromkeys(("complex64", "complex128"), "pass the signal, not its spectrum (or x.real)")


# --- from file to blocks --------------------------------------------------------------------------


class _Forward(soundfile.SoundFile):
    """A file that is only read onwards.

    soundfile seeks to where it is after each read, and a seek in an MP3 loses the bits that a frame
    borrows from earlier ones: the next samples are wrong (by half of full scale in our test).
    """

    def seekable(self) -> bool:
        return False


def _check_file(path: str) -> None:
    """Raises what the system has against reading a path, in our words: soundfile says little."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror}; check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path}: is a folder; give the path of an audio file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: is a pipe or a device; save the sound as a file, and give that")
    if status.st_size == 0:
        raise ValueError(f"{path}: the file is empty; copy or download it again")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: Permission denied; make it readable (chmod +r)")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[soundfile.SoundFile]:
    """Opens a file with libsndfile or, failing that, what ffmpeg makes of it."""
    with contextlib.ExitStack() as stack:
        try:
            encoded: Any = os.fsencode(path)  # soundfile cannot encode a name that is not UTF-8
            file = _Forward(encoded)
        except TypeError:  # soundfile wants to be told the rate of anything that ends in .raw
            raise ValueError(
                f"{path}: .raw is sound without a header, of unknown rate and width; convert it to"
                " WAV, or pass the samples as an array"
            ) from None
        except soundfile.LibsndfileError as error:
            decoded = stack.enter_context(tempfile.TemporaryFile())
            _through_ffmpeg(path, error.error_string, decoded)
            decoded.seek(0)
            try:
                file = _Forward(decoded.fileno(), closefd=False)
            except soundfile.LibsndfileError as wrong:
                raise ValueError(
                    f"{path}: what ffmpeg makes of it cannot be read ({wrong.error_string});"
                    " convert it to WAV or FLAC"
                ) from None
        yield stack.enter_context(file)


def _through_ffmpeg(path: str, why: str, out: Any) -> None:
    """Decodes to the open file `out` at the file's own rate and channels.

    As AU, whose header needs no length: through a pipe, a WAV is cut off at 4 GB when read again.

    Args:
        why: what soundfile objected to, for the message.
    """
    command = ["ffmpeg", "-v", "error", "-nostdin", "-i", f"file:{path}", "-map", "0:a:0"]
    command += ["-c:a", "pcm_f32be", "-f", "au", "-"]
    try:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE)
    except (FileNotFoundError, PermissionError):
        raise ValueError(
            f"{path}: soundfile cannot decode it ({why}), and ffmpeg, which might, is not"
            " installed; install it, or convert the file to WAV or FLAC"
        ) from None
    if done.returncode or not os.fstat(out.fileno()).st_size:
        # The first line has the cause, behind a "[demuxer @ address] "; the rest are its echoes.
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        cause = re.sub(r"^\[.*?\] ", "", said[0])
        raise ValueError(
            f"{path}: cannot be decoded; soundfile: {why}; ffmpeg: {cause}; check that it is an"
            " audio file"
        )


def _mono(path: str, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """The mean of the channels, float32 at the file's own rate, in chunks."""
    rate = file.samplerate
    # At most 10 s: what an absurdly low rate in a header expands to stays small too.
    frames = max(1, min(10 * rate, CHUNK // file.channels))
    position = 0
    while True:
        try:
            samples = file.read(frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{path}: is damaged somewhere after {position / rate:.1f} s"
                f" ({error.error_string}); copy or download it again, or save its good part as WAV"
            ) from None
        if not len(samples):
            return
        chunk = samples.mean(axis=1)
        finite = np.isfinite(chunk)
        if not finite.all():
            where = (position + int(finite.argmin())) / rate
            raise ValueError(
                f"{path}: has samples that are not finite (NaN or Inf), the first at {where:.3f} s;"
                " save it without them"
            )
        if (peak := np.abs(chunk).max()) > MAX_PEAK:
            raise ValueError(f"{path}: has a peak of {peak:g}, {_TOO_LOUD}")
        position += len(chunk)
        yield chunk


def _resampled(path: str) -> Iterator[np.ndarray]:
    """A file at 16 kHz, in pieces as they come."""
    with _opened(path) as file:
        rate = file.samplerate
        chunks = _mono(path, file)
        if rate == SAMPLE_RATE:
            yield from chunks
            return
        stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        read = made = 0
        for chunk in chunks:
            piece = stream.resample_chunk(chunk)
            read, made = read + len(chunk), made + len(piece)
            yield piece
        # soxr rounds the length, librosa rounds it up, in just this arithmetic: one zero at most.
        missing = max(0, math.ceil(read * (SAMPLE_RATE / rate)) - made)
        tail = stream.resample_chunk(np.empty(0, np.float32), last=True)[:missing]
        yield np.pad(tail, (0, missing - len(tail)))


def _cut(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Joins pieces of any length into blocks of `size` samples; the last is shorter."""
    parts: list[np.ndarray] = []
    have = 0
    for piece in pieces:
        while len(piece):
            part, piece = piece[: size - have], piece[size - have :]
            parts.append(part)
            have += len(part)
            if have == size:
                yield np.concatenate(parts)
                parts, have = [], 0
    if parts:
        yield np.concatenate(parts)
