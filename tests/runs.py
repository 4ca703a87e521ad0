"""Small runs of the real loop, for the tests that need one."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from beats_jax.writers import read_metrics

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
TIMING = {"clips_per_s", "audio_hours_per_hour", "input_wait", "mfu"}

# A run of seconds: `smoke`'s model on few, short clips, looked at and saved often.
TINY = {
    "stages": ("iter1/pretrain",),
    "data.num_clips": 40,
    "data.clip_seconds": 1.0,
    "pretrain.predictor_layers": 1,
    "pretrain.steps": 8,
    "pretrain.batch_size": 8,
    "pretrain.warmup_steps": 2,
    "pretrain.calibration_batches": 2,
    "pretrain.save_every": 2,
    "pretrain.log_every": 1,
    "pretrain.eval_every": 4,
    "pretrain.keep": 10,
    "tokenizer.estimator_layers": 1,
    "tokenizer.steps": 8,
    "tokenizer.batch_size": 8,
    "tokenizer.warmup_steps": 2,
    "tokenizer.codebook_size": 32,
    "tokenizer.calibration_batches": 2,
    "tokenizer.save_every": 2,
    "tokenizer.log_every": 1,
    "tokenizer.eval_every": 4,
    "tokenizer.keep": 10,
}


def load_config(name: str) -> Any:
    """`configs/<name>.py` as the command line would load it."""
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


def tiny_config(**overrides: Any) -> Any:
    """`smoke`, made small; override fields by `a__b=value`."""
    config = load_config("smoke")
    changes = TINY | {name.replace("__", "."): value for name, value in overrides.items()}
    config.update_from_flattened_dict(changes)
    return config


# `configs/iter2.py` made as small; its teacher is a file of the official code.
TINY_ITER2 = {
    "config": "configs/iter2.py",
    "stages": ("tokenizer", "pretrain"),
    "teacher": FIXTURES / "dev_encoder.pt",
    "model__preset": "tiny",
    "data__source": "synthetic",
    "data__val_fraction": 0.1,
    "input__workers": 1,
    "input__backend": "numpy",  # starts sooner; its batches are the tf input's
    "input__frontend": "host",
}


def tiny_flags(
    workdir: Path | str, config: str = "configs/smoke.py", **overrides: Any
) -> list[str]:
    """The command line of the same run."""
    changes = TINY | {name.replace("__", "."): value for name, value in overrides.items()}
    return [
        *(sys.executable, "-m", "beats_jax.main", f"--config={config}", f"--workdir={workdir}"),
        *(f"--config.{name}={value}" for name, value in changes.items()),
    ]


def environment(devices: int = 1) -> dict[str, str]:
    """For child processes: CPU, `devices` of them, the tests' compilation cache.

    What they compile they run a few times only: with fewer optimizations a run takes two thirds of
    the CPU time.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    fewer = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **fewer}


def run(command: list[str], devices: int = 1, **kwargs) -> subprocess.CompletedProcess[str]:
    """Runs to the end, with the output captured."""
    return subprocess.run(
        command, env=environment(devices), cwd=ROOT, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=600, **kwargs,
    )  # fmt: skip


def run_forked(
    command: list[str], folder: Path, devices: int = 1
) -> subprocess.CompletedProcess[str]:
    """`run` of a `tiny_flags` command in a fork of a process that has imported everything already.

    As fresh as `run` (no JAX backend, no parsed flags), for a fraction of a second. The output goes
    through files in `folder`.
    """
    stdout, stderr = folder / "stdout", folder / "stderr"
    process = Forked(command, stdout, stderr, devices)
    try:
        code = process.wait(300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, code, stdout.read_text(), stderr.read_text())


class Forked:
    """A `tiny_flags` command in a fork of a process that has imported everything: as a `Popen`."""

    def __init__(self, command: list[str], stdout: Path, stderr: Path, devices: int = 1):
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["beats_jax.main", "beats_jax.train"])
        words = command[command.index("-m") + 1 :]
        self.command = command
        self.process = server.Process(target=_run_main, args=(words, stdout, stderr, devices))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_main(words: list[str], stdout: Path, stderr: Path, devices: int) -> None:
    from beats_jax import main

    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment(devices))
    jax.config.update("jax_disable_most_optimizations", True)  # imported: it has read its variables
    os.chdir(ROOT)
    sys.argv = words
    try:
        main.run()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out: processes part in one of them


def stop_after(command: list[str], metrics: Path, step: int, with_signal: signal.Signals) -> int:
    """Starts a run, sends it a signal once it has logged `step`, returns its exit code.

    A run that goes on gets it after a step that none before it has logged. Its output is in the
    workdir's file `log`.
    """
    logged = read_metrics(metrics) if metrics.exists() else []
    step = max(step, *(1 + int(m["step"]) for m in logged)) if logged else step
    log = metrics.parents[2] / "log"
    process = Forked(command, log, log)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and any(m["step"] >= step for m in read_metrics(metrics)):
            process.send_signal(with_signal)
            break
        time.sleep(0.005)
    try:
        return process.wait(60)
    finally:
        process.kill()


def free_port() -> int:
    """A port of this machine that nobody listens on, for process 0 of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def final_state(workdir: Path, stage: str = "iter1/pretrain", step: int = 8) -> dict[str, Any]:
    """Every array of a checkpoint, by item."""
    folder = workdir / stage / "checkpoints" / str(step)
    with ocp.PyTreeCheckpointer() as reader:
        state = {}
        for item in ("params", "opt_state", "model_state"):
            tree = reader.metadata(folder / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            state[item] = reader.restore(folder / item, restore_args=as_numpy)
        return state


def without_timing(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl, less what depends on the machine's speed."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


def assert_trees_equal(a, b) -> None:
    """Bit for bit, leaf by leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def assert_gradients_close(a, b, tolerance: float) -> None:
    """Leaf by leaf, relative to each tensor's largest value.

    A key projection's bias has no gradient (it shifts all scores of a query alike, which softmax
    does not see): what is there is rounding, at most 1e-7.
    """
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if name.endswith("k_proj/bias"):
            assert max(np.max(np.abs(x)), np.max(np.abs(y))) <= 1e-7, name
        else:
            # A tensor whose gradient nearly cancels is left with rounding of its terms: 1e-10.
            atol = tolerance * np.max(np.abs(y)) + 1e-10
            np.testing.assert_allclose(x, y, atol=atol, rtol=0, err_msg=name)
