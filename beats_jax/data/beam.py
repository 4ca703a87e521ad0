"""Apache Beam makes the shards (`shards`): processes on this machine, Dataflow, Flink, Spark.

Needs the extra `beam`, and is the only module that imports it. The job is `Create` (the numbers of
the shards), `Reshuffle` (spread over the workers) and `Map` (make one); the workers answer by files
in OUT, as few runners hand a result back. So they read SOURCE and write OUT under the paths that
the parent knows them by (one machine's disk, one that a cluster shares, a bucket mounted on all),
and they have this package installed.
"""

import contextlib
import importlib.util
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def runner(options: Sequence[str], jobs: int) -> Callable[[Callable[[int], object], int], None]:
    """What calls a function with 0 to n - 1 on Beam's workers: run(function, n).

    Args:
        options: Beam's, e.g. ["--runner=FlinkRunner", "--flink_master=localhost:8081"]. Without a
            runner, and with the DirectRunner, processes on this machine.
        jobs: how many of these, unless --direct_num_workers says; 1 is this process.

    Returns:
        run, which raises OSError if the job fails, with the worker's last line.

    Raises:
        ImportError: Apache Beam is not installed, or the runner wants something that is not.
        ValueError: there is no such runner or option, or it lacks one.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise ImportError("Apache Beam is not installed; pip install 'beats_jax[beam]'")
    with _silence():  # on being imported it says which clouds it has no client for
        import apache_beam  # pyright: ignore
        from apache_beam.options import pipeline_options  # pyright: ignore

        known = pipeline_options.PipelineOptions([f"--direct_num_workers={jobs}", *options])
        taken = known.get_all_options()
        unknown = known.get_all_options(retain_unknown_options=True).keys() - taken.keys()
    if unknown:
        raise ValueError(f"Beam has no option --{min(unknown)}; check its spelling")
    name = known.view_as(pipeline_options.StandardOptions).runner or "DirectRunner"
    local = name.lower().removesuffix("runner") == "direct"
    engine = _this_machine(taken["direct_num_workers"]) if local else name
    if local:  # any other mode would put Beam's own processes, or threads, in the place of ours
        known.view_as(pipeline_options.DirectOptions).direct_running_mode = "in_memory"
    pipeline = apache_beam.Pipeline(runner=engine, options=known)

    def run(function: Callable[[int], object], n: int) -> None:
        numbers = pipeline | "shards" >> apache_beam.Create(range(n))
        spread = numbers | "spread" >> apache_beam.Reshuffle()
        _ = spread | "make" >> apache_beam.Map(function)
        died: list[str] = []
        try:
            with _silence(died.append) if local else contextlib.nullcontext():
                pipeline.run().wait_until_finish()
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not died:
                raise
            # A worker's whole traceback is the message, and what went wrong is its last line.
            cause = (*died, *str(error).strip().splitlines()[-1:], type(error).__name__)[0]
            cause = cause.removesuffix(" [while running 'make']").removeprefix("OSError: ")
            raise OSError(f"the Beam job failed: {cause}; finished shards are kept") from error

    return run


def _this_machine(jobs: int) -> Any:
    """The DirectRunner's own engine, whose processes say nothing.

    The DirectRunner itself would first try Prism, which it downloads, and which decodes in threads
    of one process.
    """
    from apache_beam.runners.portability.fn_api_runner import fn_runner  # pyright: ignore
    from apache_beam.transforms import environments  # pyright: ignore

    if jobs == 1:
        return fn_runner.FnApiRunner()
    command = f"exec {shlex.quote(sys.executable)} -m {__name__}"  # of a shell, which goes
    worker = environments.SubprocessSDKEnvironment.from_command_string(command)
    return fn_runner.FnApiRunner(worker)


@contextlib.contextmanager
def _silence(died: Callable[[str], object] = str) -> Iterator[None]:
    """Lets nothing be logged: Beam and its threads would say five times over what is raised.

    Beam waits for ever for a process that died; here `died` is told, and Ctrl-C ends the waiting.
    """

    def lost(thread: threading.ExceptHookArgs) -> None:
        if thread.thread and thread.thread.name == "run_worker":
            died("one of its processes died (out of memory, or a crash in a decoder)")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = logging.root.manager.disable, threading.excepthook
    logging.disable(logging.CRITICAL)
    threading.excepthook = lost
    try:
        yield
    finally:
        logging.disable(before[0])
        threading.excepthook = before[1]


if __name__ == "__main__":  # a worker on the parent's machine
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # Ctrl-C: the parent says so
    logging.disable(logging.CRITICAL)
    sys.stderr = open(os.devnull, "w")  # the parent raises what matters
    from apache_beam.runners.worker import sdk_worker_main  # pyright: ignore

    sdk_worker_main.main(sys.argv)
