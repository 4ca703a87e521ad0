"""`python -m beats_jax.main --config=configs/iter1.py --workdir=W` runs a config's stages in order.

Interrupted or killed, the same command goes on where it was. Flags override the config:
`--config.pretrain.steps=40`. Exit codes: 0 done, 2 wrong usage, input, a failed write or too little
memory, 75 another process was lost or this one hung: start all of them again, 130/143 stopped by
SIGINT/SIGTERM, while training with everything saved.
"""

from __future__ import annotations

import importlib.resources
import logging
import os
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

EXAMPLE = "python -m beats_jax.main --config=configs/smoke.py --workdir=/tmp/smoke"
_CONFIG = config_flags.DEFINE_config_file("config", None, "A config file: configs/smoke.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and plots go.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, on every host; auto: ask the cluster (TPU, Slurm, Kubernetes, MPI).",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes take part.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "An error shows its traceback, not one line.")

log = logging.getLogger("beats_jax")


def main(_: list[str]) -> None:
    """Sets up JAX as the config asks and runs its stages."""
    # Orbax logs every step, and on an error what our own line says too.
    absl_logging.set_verbosity(absl_logging.FATAL)
    config = _CONFIG.value
    if config is None or not _WORKDIR.value:
        raise ValueError(f"--config=FILE and --workdir=FOLDER are both needed, as in: {EXAMPLE}")
    if "://" in _WORKDIR.value.removeprefix("gs://"):  # epath: a local folder
        raise ValueError(f"--workdir={_WORKDIR.value}: want a folder, or gs://BUCKET/FOLDER")
    if config.deterministic:  # before JAX makes its backend
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
        )
    import jax
    from etils import epath

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", config.compilation_cache)
    if cache:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if config.precision == "float32":  # accelerators multiply in TF32 or bfloat16 otherwise
        jax.config.update("jax_default_matmul_precision", "highest")

    from beats_jax import folds, hosts, train

    hosts.connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    for name in config.stages:
        run = folds.run_folds if folds.wanted(config, name) else train.run_stage
        run(config, name, _WORKDIR.value)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; a config that is not here but came with the package is found there."""
    packaged = Path(str(importlib.resources.files("beats_jax.configs")))

    def resolve(arg: str) -> str:
        flag, _, path = arg.partition("=")
        if flag.lstrip("-") != "config" or not path or Path(path).exists():
            return arg
        inside = packaged / Path(path).with_suffix(".py").name
        if str(Path(path).parent) not in (".", "configs") or not inside.exists():
            known = sorted(p.stem for p in packaged.glob("[a-z]*.py"))
            raise ValueError(f"no config {path}; packaged ones: {', '.join(known)}")
        log.info("config: %s", inside)
        return f"{flag}={inside}"

    try:
        return flags.FLAGS([resolve(arg) for arg in argv])
    except (AttributeError, KeyError, TypeError) as error:  # ml_collections, on a wrong field
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(f"wrong flag: {reason}") from error


def _unraisable(unraisable) -> None:
    """Silences TensorStore's threads: after a failed write they all say this, by the hundred."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def run() -> None:
    """`main`, with whatever a user can cause told in one line."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    sys.unraisablehook = _unraisable
    try:
        app.run(main, flags_parser=_parse)
    except KeyboardInterrupt:
        print("beats_jax: interrupted before training", file=sys.stderr, flush=True)
        os._exit(130)
    except Exception as error:
        from beats_jax.hosts import lost_peer
        from beats_jax.watchdog import TRY_AGAIN

        if lost_peer(error) and not (_TRACEBACK.present and _TRACEBACK.value):
            lost = (
                "another process, or the way to it, is lost; start all of them again: they resume"
            )
            first = str(error).strip().partition("\n")[0][:300]
            print(f"beats_jax: {lost} ({first})", file=sys.stderr, flush=True)
            os._exit(TRY_AGAIN)
        full = "RESOURCE_EXHAUSTED" in str(error)
        told = full or isinstance(
            error, (ValueError, OSError, ImportError, FloatingPointError, flags.Error)
        )
        if not told or (_TRACEBACK.present and _TRACEBACK.value):
            raise
        message = " ".join(str(error).split())
        if full:
            message = (
                f"out of memory ({message[:200]}); take a smaller --config.STAGE.batch_size, or "
                "the same in parts, --config.STAGE.micro_batches=4"
            )
        print(f"beats_jax: {message} (--traceback shows where)", file=sys.stderr, flush=True)
        os._exit(2)  # not sys.exit: threads of a write that failed would have their say after it


if __name__ == "__main__":
    run()
