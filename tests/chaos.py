"""A small run on several processes, disturbed again and again: it must end as if nothing had been.

    python tests/chaos.py --rounds 12 --processes 4 --seed 0 [--elastic] [--workdir FOLDER]

First the run is made undisturbed. Then it is made anew with a fault in every round: at a random
step a random process is killed (in a step, or while a checkpoint is written), asked to stop,
stopped so that it hangs, or finds the disk full; or a shard of the data is cut under all of them
(and put back for the next round); or all are killed and a file of the newest checkpoint is cut or
deleted. Every process has to end by itself, with the exit code that the fault calls for; all are
started again, as the launchers do. In the end every array of the last checkpoints, and the metrics,
are those of the undisturbed run, bit for bit; with `--elastic`, where the rounds run on 1, 2, 4, 2,
1, … processes, what design section 6 promises. The last line is a summary in JSON; the exit code is
0 only if all of this held. `test_chaos.py` runs a short series.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from runs import (
    FIXTURES,
    ROOT,
    Forked,
    assert_trees_equal,
    environment,
    final_state,
    free_port,
    tiny_flags,
    without_timing,
)

from beats_jax.data.prepare import prepare
from beats_jax.watchdog import TRY_AGAIN
from beats_jax.writers import read_metrics

STAGES = ("iter1/pretrain", "iter2/tokenizer")
FAULTS = ("kill", "kill in a save", "stop", "hang", "full disk", "cut shard", "damage")
AS_USERS_DO = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # the other tests compile less
Process = subprocess.Popen[bytes] | Forked
Launch = Callable[[list[str], Path], Process]
Started = list[Process]
# How long any process may take: a start on a busy machine, or a hang until it is noticed.
PATIENCE = 600.0
# After a peer is lost: 75 by our own hand, or SIGABRT from JAX's coordination service.
LOST = (TRY_AGAIN, -signal.SIGABRT)
USAGE = 2  # what a full disk and unreadable data end with
SMALL_FILE = 16_384  # bytes: less than any process's part of the parameters


class Slow(Exception):
    """This machine is too slow for the time until a process that waits gives up."""


def as_users_do(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a process that writes to `log`."""
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env={**environment(), **AS_USERS_DO}, cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip


def forked(command: list[str], log: Path) -> Forked:
    """The same in a third of the time: what is imported is there, and less is optimized."""
    return Forked(command, log, log)


class Series:
    """One series of faults.

    Args:
      workdir: a folder of its own.
      flags: of the run, as keywords of `tiny_flags`.
      seed: of victims, and of what is spoiled.
      launch: starts a process, `as_users_do` or `forked`.
    """

    def __init__(self, workdir: Path, flags: dict[str, Any], seed: int, launch: Launch):
        self.workdir, self.flags, self.launch = workdir, flags, launch
        self.random, self.launches = random.Random(seed), 0

    def start(self, run: Path, processes: int, cramped: int | None = None) -> Started:
        """Starts all processes; number `cramped` cannot write a file of any size."""
        flags = tiny_flags(run, **self.flags)
        self.launches, port, started = self.launches + 1, free_port(), []
        for i in range(processes):
            many = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}")
            many = (*many, f"--process_id={i}") if processes > 1 else ()
            process = self.launch([*flags, *many], self.log(i))
            if i == cramped:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))
            started.append(process)
        return started

    def log(self, process: int) -> Path:
        """What a process of the latest launch wrote."""
        logs = self.workdir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return logs / f"{self.launches:03d}_{process}.txt"

    def finish(self, run: Path, processes: int) -> None:
        """Runs undisturbed to the end, starting anew when a process says so (a slow machine)."""
        for _ in range(3):
            started = self.start(run, processes)
            try:
                codes = wait(started)
            finally:
                for process in started:
                    process.kill()
            if codes == [0] * processes:
                return
            assert TRY_AGAIN in codes, self.told(codes)
        raise AssertionError(self.told(codes))

    def told(self, codes: list[int]) -> str:
        """Exit codes and last lines of the latest launch."""
        ends = [self.log(i).read_text(errors="replace")[-1500:] for i in range(len(codes))]
        return f"exit codes {codes}\n" + "\n---\n".join(ends)

    def disturb(self, run: Path, fault: str, moment: tuple[str, int], processes: int) -> list[int]:
        """Starts the run, brings about a fault once `moment` (stage, step) is logged, and waits.

        Returns:
          The exit codes, which are those that the fault calls for.

        Raises:
          Slow: a watchdog went off before the fault.
        """
        victim = self.random.randrange(processes)
        if fault == "full disk":
            victim = processes - 1  # it writes nothing but its part of the checkpoints
        started = self.start(run, processes, victim if fault == "full disk" else None)
        stage, step = moment
        checkpoints = run / stage / "checkpoints"
        try:
            if fault != "full disk":
                self.until(trains_past(run / stage, step), started)
            if fault == "kill in a save":
                self.until(lambda: any(checkpoints.glob("*.orbax-checkpoint-tmp*")), started)
            if fault == "damage":  # there has to be one to fall back to
                self.until(lambda: len(finished(checkpoints)) > 1, started)
            if fault.startswith("kill"):
                started[victim].kill()
            elif fault == "stop":
                started[victim].send_signal(signal.SIGTERM)
            elif fault == "hang":
                started[victim].send_signal(signal.SIGSTOP)
                wait([p for i, p in enumerate(started) if i != victim])
                started[victim].kill()
            elif fault == "damage":
                for process in started:
                    process.kill()
            if fault == "cut shard":
                codes = self.without_half_the_data(started)
            else:
                codes = wait(started)
        finally:
            for process in started:
                process.kill()  # a stopped one too
        wanted: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # of the victim, of others
            "kill": ((-signal.SIGKILL,), LOST),
            "kill in a save": ((-signal.SIGKILL,), LOST),
            "stop": ((128 + signal.SIGTERM,), (128 + signal.SIGTERM,)),
            "hang": ((-signal.SIGKILL,), LOST),
            "full disk": ((USAGE,), LOST),
            "cut shard": ((USAGE, *LOST), (USAGE, *LOST)),  # who reads it first says so
            "damage": ((-signal.SIGKILL,), (-signal.SIGKILL,)),
        }
        for i, code in enumerate(codes):
            assert code in wanted[fault][i != victim], f"{fault} of {victim}: {self.told(codes)}"
        if fault == "stop":
            stopped = f"stopped and saved at step {finished(checkpoints)[-1].name};"
            assert stopped in self.log(0).read_text(), f"{stopped} {self.told(codes)}"
        if fault == "cut shard":
            assert USAGE in codes, self.told(codes)
        if fault == "damage":
            self.spoil(finished(checkpoints)[-1])
        return codes

    def without_half_the_data(self, started: Started) -> list[int]:
        """Cuts the largest shard until all processes have ended; returns their exit codes."""
        shards = self.flags["data__dir"].glob("shards/**/*array_record*")
        shard = max(shards, key=lambda path: path.stat().st_size)
        whole = shard.read_bytes()
        os.truncate(shard, len(whole) // 2)
        try:
            return wait(started)
        finally:
            shard.write_bytes(whole)

    def until(self, seen: Callable[[], bool], started: Started) -> None:
        """Waits for something to be seen while all processes run."""
        end = time.monotonic() + PATIENCE
        while not seen():
            if any(process.poll() is not None for process in started):
                codes = wait(started)
                if TRY_AGAIN in codes:
                    raise Slow(self.told(codes))
                raise AssertionError(f"before the fault: {self.told(codes)}")
            assert time.monotonic() < end, "nothing came"
            time.sleep(0.005)

    def spoil(self, checkpoint: Path) -> None:
        """Cuts or deletes the largest file of an item's arrays."""
        item = checkpoint / self.random.choice(("params", "opt_state"))
        file = max((item / "d").iterdir(), key=lambda p: p.stat().st_size)  # the merged arrays
        if self.random.random() < 0.5:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:100])


def wait(started: Started) -> list[int]:
    """The exit codes; a process that does not end is the failure looked for."""
    end = time.monotonic() + PATIENCE
    return [process.wait(timeout=max(end - time.monotonic(), 1)) for process in started]


def trains_past(folder: Path, step: int) -> Callable[[], bool]:
    """Asks whether a run that starts now has logged a step of its own, and got as far as `step`.

    What an earlier start has logged is there from the beginning; a fault at that time would come
    before the processes have met.
    """
    path, now, least = folder / "metrics.jsonl", time.time(), [sys.maxsize]

    def asked() -> bool:
        if not path.exists() or path.stat().st_mtime < now:
            return False
        last = logged(folder)
        least[0] = min(least[0], last)  # where the log was cut back to
        return last > least[0] and last >= step

    return asked


def logged(folder: Path) -> int:
    """The last step in a stage's metrics, -1 before there is any."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return int(lines[-1]["step"]) if lines else -1


def finished(checkpoints: Path) -> list[Path]:
    """The folders of the finished checkpoints, the newest last."""
    return sorted((p for p in checkpoints.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def compare(
    run: Path, undisturbed: Path, stages: tuple[str, ...], steps: int, same_layout: bool
) -> None:
    """Asserts that both runs ended alike (design, section 6)."""
    for stage in stages:
        lines, wanted = (without_timing(w / stage) for w in (run, undisturbed))
        assert [line["step"] for line in lines] == [line["step"] for line in wanted]
        ends = [
            w / stage / "checkpoints" / str(steps) / "meta" / "metadata" for w in (run, undisturbed)
        ]
        mine, theirs = (json.loads(path.read_text()) for path in ends)
        assert mine["examples_seen"] == theirs["examples_seen"]
        if same_layout:
            assert lines == wanted
            assert_trees_equal(*(final_state(w, stage, steps) for w in (run, undisturbed)))
        else:
            losses = [[line["loss"] for line in part[1:]] for part in (lines, wanted)]
            np.testing.assert_allclose(*losses, rtol=1e-3)


def chaos(
    workdir: Path, rounds: int, processes: int, seed: int, elastic: bool = False,
    faults: tuple[str, ...] = FAULTS, steps: int | None = None, hang_timeout: float = 20.0,
    stages: tuple[str, ...] = STAGES, eval_every: int = 2, launch: Launch = as_users_do,
) -> list[dict]:  # fmt: skip
    """Runs a series; returns what was done, a dict a round.

    Raises:
      AssertionError: a process ended with another exit code, or the end differs.
      subprocess.TimeoutExpired: a process did not end.
    """
    steps = steps or max(12, 2 * rounds)
    flags: dict[str, Any] = {"stages": stages, "input__backend": "numpy"}
    flags |= {"hang_timeout_s": hang_timeout}
    flags |= {"teacher": FIXTURES / "dev_encoder.pt"}
    for stage in ("pretrain", "tokenizer"):
        flags |= {f"{stage}__steps": steps, f"{stage}__eval_every": eval_every}
    if "cut shard" in faults:
        flags |= {"data__source": "folder", "data__dir": workdir / "data"}
        prepare("synthetic", workdir / "data")
    series = Series(workdir, flags, seed, launch)
    undisturbed, run = workdir / "undisturbed", workdir / "disturbed"
    series.finish(undisturbed, processes)
    done = []
    # Moments in order over the stages, so that each is still ahead when its round starts; a save
    # (every 2 steps) and a stop need some steps after them.
    moments = [(stage, step) for stage in stages for step in range(1, steps - 5)]
    chosen = sorted(series.random.sample(range(len(moments)), rounds))
    kinds = [faults[i % len(faults)] for i in range(rounds)]
    series.random.shuffle(kinds)
    for kind, index in zip(kinds, chosen, strict=True):
        began, moment = time.monotonic(), moments[index]
        count = min((1, 2, 4, 2)[len(done) % 4], processes) if elastic else processes
        try:
            codes = series.disturb(run, kind, moment, count)
        except Slow:  # once more: what was trained is saved
            codes = series.disturb(run, kind, moment, count)
        done.append({"fault": kind, "stage": moment[0], "step": moment[1], "exit_codes": codes})
        print(json.dumps(done[-1]), f"{time.monotonic() - began:.0f} s", flush=True)
    series.finish(run, processes)
    compare(run, undisturbed, stages, steps, same_layout=not elastic)
    aside = len(list(run.glob("*/*/checkpoints_damaged/[0-9]*")))
    assert aside == kinds.count("damage"), f"{aside} damaged checkpoints were put aside"
    return done


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="faults, one after the other")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of faults, victims and moments")
    parser.add_argument(
        "--elastic", action="store_true", help="another number of processes a round"
    )
    parser.add_argument("--hang_timeout", type=float, default=20.0, help="seconds")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, with commas between")
    parser.add_argument("--workdir", help="kept, with the logs; a temporary folder if not given")
    args = parser.parse_args()
    workdir = Path(args.workdir or tempfile.mkdtemp(prefix="chaos-")).absolute()
    began, faults = time.monotonic(), tuple(args.faults.split(","))
    done = chaos(
        workdir, args.rounds, args.processes, args.seed, args.elastic, faults,
        hang_timeout=args.hang_timeout,
    )  # fmt: skip
    result = {"rounds": len(done), "processes": args.processes, "seed": args.seed}
    result |= {"faults": {name: sum(d["fault"] == name for d in done) for name in faults}}
    result |= {"end": "section 6" if args.elastic else "bit-equal"}
    print(json.dumps({**result, "seconds": round(time.monotonic() - began)}))
    if not args.workdir:
        shutil.rmtree(workdir)


if __name__ == "__main__":
    sys.exit(main())
