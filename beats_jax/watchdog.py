"""What ends a run that hangs: no step for `config.hang_timeout_s` seconds, and the process leaves.

A process that is stuck (a dead disk, a lost network, a peer that stands still) would hold all the
others, and the machines they run on, for ever. Each process therefore watches itself in a thread
and ends with exit code 75 ("try again"), on which the launchers start all of them anew. A peer that
is gone altogether is noticed sooner: see `hosts`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import jax

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h

# The first step and the first evaluation compile, calibration reads far more than a batch.
COMPILING = 5.0

T = TypeVar("T")


class Watchdog:
    """Ends this process when nothing has moved for `timeout` seconds.

    What counts is a finished step, a batch evaluated, or the start or end of a phase. Until the
    first step has finished everything compiles, and in phases that may compile: `COMPILING` times
    the timeout is allowed there. Time in which the process itself did not run (stopped from the
    keyboard, a machine asleep) does not count.

    Args:
      timeout: seconds; 0 = off.
      step: the step the run starts from.
    """

    def __init__(self, timeout: float, step: int):
        self._timeout, self._step = timeout, step
        self._phase, self._allowance = "compiling", COMPILING
        self._idle = 0.0
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def finished(self, step: int) -> None:
        """A step is done, on the device as well."""
        self._step, self._phase, self._allowance, self._idle = step, "step", 1.0, 0.0

    @contextlib.contextmanager
    def phase(self, name: str, allowance: float = 1.0) -> Iterator[None]:
        """Names what happens inside, for the line that is written if it never ends."""
        before = self._phase, self._allowance
        self._phase, self._allowance = name, max(allowance, self._allowance)
        self._idle = 0.0
        try:
            yield
        finally:
            self._phase, self._allowance = before
            self._idle = 0.0

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, each a sign of life."""
        for batch in batches:
            self._idle = 0.0
            yield batch

    def hangs(self, elapsed: float) -> bool:
        """Whether too much time has gone by, `elapsed` seconds after it was asked last."""
        self._idle += elapsed
        return self._idle > self._timeout * self._allowance

    def _watch(self) -> None:
        tick = min(self._timeout / 20, 5.0)
        last = time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            hangs = self.hangs(min(now - last, 2 * tick))
            last = now
            if hangs:
                print(
                    f"beats_jax: process {jax.process_index()} of {jax.process_count()} hangs: "
                    f"nothing moved for {self._idle:.3g} s after step {self._step} "
                    f"({self._phase}); leaving with exit code {TRY_AGAIN}: start all processes "
                    "again, they resume (--config.hang_timeout_s allows more)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(TRY_AGAIN)  # sys.exit would wait for what hangs
