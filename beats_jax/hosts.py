"""Many processes as one run: how they find each other, and how the loss of one is told.

`jax.distributed` does the work: it finds a cluster by its environment, and its coordination service
(in process 0) ends every process once one of them stops answering.
"""

from __future__ import annotations

import jax

# Whose failures say that a peer is gone, also where a checkpoint's writer tells them as its own.
COLLECTIVES = ("Gloo ", "NCCL ", "coordination service", "CoordinationService")
EXPLICIT = "--coordinator=HOST:PORT (of process 0) --num_processes=N --process_id=0…N-1"


class NotMet(OSError):
    """The processes of a run did not find each other in time."""


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run; nothing to do where no flag is given.

    Args:
      coordinator: "host:port" of process 0, the same on every host; or "auto": `jax.distributed`
        knows TPU pods (GCE and GKE, several slices too), Slurm (`srun`), Open MPI (`mpirun`) and
        Kubernetes (an Indexed Job or JobSet, with `pip install 'jax[k8s]'`).
      num_processes, process_id: how many, and which of them this one is; with "auto" unset.

    Raises:
      ValueError: flags that do not belong together, or no cluster that jax knows.
      NotMet: the others did not come.
    """
    numbers = {"--num_processes": num_processes, "--process_id": process_id}
    given = [name for name, value in numbers.items() if value is not None]
    if not coordinator:
        if given:
            raise ValueError(
                f"{' and '.join(given)} without --coordinator; give {EXPLICIT}, or "
                "--coordinator=auto alone on a TPU pod, Slurm, Open MPI or Kubernetes"
            )
        return
    if coordinator == "auto" and given:
        raise ValueError(
            f"--coordinator=auto takes {' and '.join(given)} from the cluster; leave them out, or "
            f"give {EXPLICIT}"
        )
    if coordinator != "auto":
        _check_explicit(coordinator, num_processes, process_id)
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        raise ValueError(
            f"--coordinator=auto found no cluster ({error}); it knows TPU pods, Slurm under srun, "
            "Open MPI under mpirun, and Kubernetes Indexed Jobs with jax[k8s] installed; elsewhere "
            f"give {EXPLICIT}"
        ) from error
    except RuntimeError as error:  # JaxRuntimeError: no answer in time
        raise NotMet(f"--coordinator={coordinator}: the processes did not meet: {error}") from error


def _check_explicit(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator={coordinator} is no HOST:PORT, as in 10.0.0.1:8476")
    if num_processes is None or process_id is None:
        raise ValueError(f"--coordinator={coordinator} alone is half of it; give {EXPLICIT}")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} of --num_processes={num_processes}: the numbers are 0 to "
            "N-1, each on one process"
        )


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone, or never came: try again.

    A collective or a barrier that fails is an error of JAX's runtime, whatever it was wrapped in.
    One of this process's own, that a restart would only meet again, differs by its status code.
    """
    own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
    while error is not None:
        if isinstance(error, NotMet):
            return True
        if jax.process_count() > 1 and any(name in str(error) for name in COLLECTIVES):
            return True
        if isinstance(error, jax.errors.JaxRuntimeError):
            return jax.process_count() > 1 and not str(error).startswith(own)
        error = error.__cause__ or error.__context__
    return False
