"""The log of a stage: `metrics.jsonl` and TensorBoard events, both cut back when a run resumes.

One JSON object a line, `{"step": 10, "loss": 5.1, ...}`, in the order of the steps. A run that is
killed and resumed must leave the log of one that was not (design, section 6): on opening, whatever
is later than the restored step, and a last line torn by a kill -9, is cut away, from the event
files as well, so that TensorBoard shows no ghosts. JSON knows neither nan nor inf: both are written
as null and read back as nan.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from beats_jax import paths

METRICS_FILE = "metrics.jsonl"


class Writer:
    """Appends metrics of one stage to `folder`/metrics.jsonl and to TensorBoard events beside it.

    For process 0 only. What was written is in the hands of the operating system when `write`
    returns: a kill of the process loses nothing.

    Args:
        folder: the stage folder; made if it is not there.
        restored_step: the step of the restored checkpoint: later lines and events are removed.
            None: nothing was restored and the run starts anew, with an empty log.

    Raises:
        OSError: the folder or a file in it cannot be written (permissions, disk full).
    """

    def __init__(self, folder: epath.PathLike, restored_step: int | None = None):
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        keep = -1 if restored_step is None else int(restored_step)
        self.path = folder / METRICS_FILE
        _cut_lines(self.path, keep)
        _cut_events(folder, keep)
        # The name of an event file holds whole seconds: without a number at the end, a run resumed
        # within one would write into the older file.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        name = f"{name}.{len(_event_files(folder))}"
        # Unbuffered, so that a kill tears the last record at worst. tensorboardX's SummaryWriter
        # hands events to a thread: a kill loses what is queued, a full disk goes unnoticed.
        self._lines = paths.opened_to_append(self.path)
        self._events = paths.opened_to_append(folder / name)
        self._add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line and one event.

        Args:
            step: the training step, not below that of the last line.
            metrics: name -> a number or a 0-d array (numpy, jax).

        Raises:
            OSError: the file cannot be written (disk full, a limit on the file size).
            TypeError: a value is not a single number.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        try:
            _write_all(self._lines, encode_line(step, values))
            self._add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        except OSError as error:
            reason = f"{error.strerror}; make room and start the same command again: it resumes"
            raise OSError(error.errno, reason, str(self.path)) from error

    def _add_event(self, event: Event) -> None:
        """Appends a TFRecord: length (uint64), its CRC, the event, its CRC."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        crcs = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        _write_all(self._events, length + crcs[0] + data + crcs[1])

    def close(self) -> None:
        """Closes both files; every line is already written."""
        self._lines.close()
        self._events.close()


def read_metrics(path: epath.PathLike) -> list[dict[str, float]]:
    """Reads `metrics.jsonl`, while a run writes it too: a torn last line is left out.

    Args:
        path: the file, or the stage folder that holds it.

    Returns:
        One dict a line: `step` as int, the rest as float; null as nan.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is not a JSON object with a step.
    """
    path = epath.Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    *lines, _ = path.read_bytes().split(b"\n")  # after the last newline: nothing or a torn line
    metrics = []
    for number, line in enumerate(lines, start=1):
        values = _decode_line(line)
        if values is None:
            raise ValueError(
                f"{path}:{number} is not a JSON object with a step: {line[:60]!r}; "
                "remove that line, or start the run again: it cuts its log back by itself"
            )
        metrics.append(values)
    return metrics


def encode_line(step: int, values: Mapping[str, float]) -> bytes:
    """The line of one step: step first, then the metrics in their order, in full precision."""
    plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": int(step), **plain}, allow_nan=False).encode() + b"\n"


def _decode_line(line: bytes) -> dict[str, float] | None:
    try:
        values = json.loads(line)
        return {name: math.nan if value is None else value for name, value in values.items()} | {
            "step": int(values["step"])
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _cut_lines(path: epath.Path, keep: int) -> None:
    """Cuts the file off before the first line that is torn, unreadable or later than `keep`."""
    if not path.exists():
        return
    content = path.read_bytes()
    *lines, _ = content.split(b"\n")
    end = 0
    for line in lines:
        values = _decode_line(line)
        if values is None or values["step"] > keep:
            break
        end += len(line) + 1
    if end < len(content):
        _replace(path, content[:end])


def _cut_events(folder: epath.Path, keep: int) -> None:
    """Rewrites every event file without the events later than `keep`; removes empty ones."""
    for path in _event_files(folder):
        records = list(_records(path.read_bytes()))
        # The header, without a summary, stays.
        kept = [r for event, r in records if event.step <= keep or not event.HasField("summary")]
        if not any(event.HasField("summary") and event.step <= keep for event, _ in records):
            path.unlink()
            continue
        _replace(path, b"".join(kept))


def _replace(path: epath.Path, content: bytes) -> None:
    """A new file in the old one's place: a TensorBoard that has the old one open reads on."""
    draft = path.with_name(f"draft-{path.name.replace('tfevents', 'cut')}")
    draft.write_bytes(content)
    draft.replace(path)


def _event_files(folder: epath.Path) -> list[epath.Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def _records(content: bytes) -> Iterator[tuple[Event, bytes]]:
    """The events of an event file, each with the bytes of its record, up to a torn end."""
    start = 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 12 + length + 4
        if end > len(content):
            return
        yield Event.FromString(content[start + 12 : end - 4]), content[start:end]
        start = end


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        shape = getattr(value, "shape", None)
        got = f"{type(value).__name__}{'' if shape is None else f' of shape {shape}'}"
        raise TypeError(f"metric {name!r} is {got}, wanted a single number") from error


def _write_all(file: Any, data: bytes) -> None:
    """Writes all of `data`; a raw file may take a part only, and fails on the rest when full."""
    while data:
        data = data[file.write(data) :]
