"""What watches a running stage: the clock, the signals, and the lines a person reads."""

from __future__ import annotations

import contextlib
import datetime
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from beats_jax.watchdog import COMPILING, Watchdog
from beats_jax.writers import Writer

log = logging.getLogger("beats_jax")

# Dense bf16 peak in FLOP/s by the vendors' datasheets, for MFU; other devices report none.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}

# What goes into the progress line, in this order, where a stage has it.
SHOWN = (
    *("loss", "unigram_loss", "masked_accuracy", "unigram_accuracy", "code_perplexity"),
    *(
        "teacher_cosine",
        "constant_cosine",
        "codes_used",
        "most_used_code",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "val_mAP",
        "val_masked_accuracy",
        "clips_per_s",
        "mfu",
    ),
)


class Interrupted(SystemExit):
    """The run was asked to stop, has saved its state and can go on: exit code 128 + signal."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(128 + signal_number)
        if jax.process_index() == 0:
            log.warning("stopped and saved at step %d; run the same command to go on", step)


class Signals:
    """Remembers a SIGTERM or SIGINT until the loop has finished its step; a second one kills.

    With several processes the coordination service watches for SIGTERM, so that all of them save
    the same step.
    """

    def __enter__(self) -> Signals:
        self._number, self._before = 0, {}
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # not in the main thread: nothing to watch
                for number in (signal.SIGTERM, signal.SIGINT):
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _) -> None:
        self._number = number
        signal.signal(number, signal.SIG_DFL)
        log.warning("%s: saving after this step", signal.Signals(number).name)

    def received(self, reached_preemption: Callable[[int], bool], step: int) -> int:
        """The signal to stop for at `step`, 0 for none; the same on every process."""
        if jax.process_count() > 1:
            return signal.SIGTERM if reached_preemption(step) else 0
        return self._number


class Clock:
    """Rates since the last report, without the time spent on evaluation and saving.

    Tells the watchdog what the loop is at.

    Args:
      start: the step the run starts from.
      batch_size: clips in the global batch.
      clip_seconds: length of a clip.
      flops_per_clip: analytic cost of one step per clip.
      watchdog: what ends the process if nothing moves.
    """

    def __init__(
        self,
        start: int,
        batch_size: int,
        clip_seconds: float,
        flops_per_clip: float,
        watchdog: Watchdog,
    ):
        kind = jax.devices()[0].device_kind
        peak = next((f for name, f in PEAK_FLOPS.items() if kind.startswith(name)), None)
        self._peak = peak and peak * jax.device_count()
        self._batch_size, self._clip_seconds = batch_size, clip_seconds
        self._flops_per_clip, self._watchdog = flops_per_clip, watchdog
        self.restart(start)

    def restart(self, step: int) -> None:
        """Forgets the time up to `step`."""
        self._step, self._since, self._paused, self._waited = step, time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Around what is not training: "evaluating" (which may compile), "saving"."""
        begin = time.perf_counter()
        with self._watchdog.phase(phase, 1.0 if phase == "saving" else COMPILING):
            yield
        self._paused += time.perf_counter() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        begin = time.perf_counter()
        with self._watchdog.phase("waiting for data"):
            yield
        self._waited += time.perf_counter() - begin

    def rates(self, step: int) -> dict[str, float]:
        """clips_per_s, audio_hours_per_hour, input_wait (share of the time) and, where the
        device's peak is known, mfu (analytic FLOPs over the bf16 peak)."""
        now = time.perf_counter()
        seconds = max(now - self._since - self._paused, 1e-9)
        clips_per_s = (step - self._step) * self._batch_size / seconds
        rates = {
            "clips_per_s": clips_per_s,
            "audio_hours_per_hour": clips_per_s * self._clip_seconds,
            "input_wait": self._waited / seconds,
        }
        if self._peak and self._flops_per_clip:
            rates["mfu"] = clips_per_s * self._flops_per_clip / self._peak
        self.restart(step)
        return rates


class Report:
    """metrics.jsonl, TensorBoard, progress bar (or log lines) and warnings; silent off process 0.

    Args:
      folder: the stage's folder.
      name: the stage.
      start, steps: where the run stands and where it ends.
      restored: whether `start` is a restored step, to which the old log is cut back.
      warn: the stage's health check.
    """

    def __init__(
        self,
        folder: epath.Path,
        name: str,
        start: int,
        steps: int,
        restored: bool,
        warn: Callable[[Mapping[str, float]], str | None],
    ):
        self._name, self._steps, self._warn, self._warned = name, steps, warn, False
        self._start, self._began = start, time.monotonic()
        chief = jax.process_index() == 0
        self._writer = Writer(folder, start if restored else None) if chief else None
        # disable=None: no bar where stderr is no terminal; the lines below take its place.
        self._bar = tqdm(initial=start, total=steps, desc=name, disable=None if chief else True)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """One step further; writes its figures, if there are any, and shows the main ones."""
        self._bar.update(step - self._bar.n)
        if self._writer is None or not record:
            return
        self._writer.write(step, record)
        line = " ".join(f"{k} {record[k]:.4g}" for k in SHOWN if k in record)
        if self._bar.disable:
            per_step = (time.monotonic() - self._began) / max(step - self._start, 1)
            eta = datetime.timedelta(seconds=round(per_step * (self._steps - step)))
            left = f" eta {eta}" if step > self._start else ""
            log.info("%s %d/%d %s%s", self._name, step, self._steps, line, left)
        else:
            self._bar.set_postfix_str(line)
        # Nothing is learned at first: a quarter into the run it should be, and once is enough.
        due = step == 0 or (step >= self._steps / 4 and not self._warned)
        if due and (problem := self._warn(record)):
            self._warned = step > 0
            log.warning("step %d: %s", step, problem)
