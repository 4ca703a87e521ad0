"""The watchdog ends a process in which nothing moves, and no other."""

import subprocess
import sys

import pytest
from runs import ROOT, environment

from beats_jax.watchdog import COMPILING, Watchdog

HANGS = """
import time
from beats_jax.watchdog import Watchdog
with Watchdog(0.5, 3) as watchdog:
    watchdog.finished(7)
    with watchdog.phase("waiting for data"):
        time.sleep(100)
"""


def test_a_hang_is_one_line_and_exit_75():
    done = subprocess.run(
        [sys.executable, "-c", HANGS], env=environment(), cwd=ROOT, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "process 0 of 1 hangs: nothing moved for 0." in line
    assert "after step 7 (waiting for data); leaving with exit code 75: start all" in line


def test_until_the_first_step_is_done_and_in_phases_that_compile_more_is_allowed():
    watchdog = Watchdog(10.0, 0)
    assert not watchdog.hangs(10 * COMPILING - 1) and watchdog.hangs(2)
    watchdog.finished(1)
    assert not watchdog.hangs(9) and watchdog.hangs(2)
    with watchdog.phase("evaluating", COMPILING):
        assert not watchdog.hangs(10 * COMPILING - 1) and watchdog.hangs(2)
    assert not watchdog.hangs(9) and watchdog.hangs(2)


@pytest.mark.parametrize("sign", ["step", "batch", "phase begins", "phase ends"])
def test_signs_of_life_start_it_anew(sign):
    watchdog = Watchdog(10.0, 0)
    watchdog.finished(1)
    batches, phase = watchdog.watched(iter("abc")), watchdog.phase("saving")
    if sign == "phase ends":
        phase.__enter__()
    assert not watchdog.hangs(9)
    if sign == "step":
        watchdog.finished(2)
    elif sign == "batch":
        assert next(batches) == "a"
    elif sign == "phase begins":
        phase.__enter__()
    else:
        phase.__exit__(None, None, None)
    assert not watchdog.hangs(9) and watchdog.hangs(2)
