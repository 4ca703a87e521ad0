"""Checkpoints with Orbax: written in the background, read back to the bit.

A step's folder holds separate items: `params`, `opt_state`, `model_state` and `meta` (JSON: seed,
examples seen, dataset fingerprint, config), so that inference reads `params` alone. A folder gets
its final name only when everything in it is written: what a killed process leaves behind is never
mistaken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from beats_jax import paths
from beats_jax.damage import damage, set_aside
from beats_jax.hosts import lost_peer

log = logging.getLogger("beats_jax")

ITEMS = ("params", "opt_state", "model_state")


class TrainState(NamedTuple):
    """All that changes in training. No rng: every key is a function of (seed, step, name)."""

    step: jax.Array  # int32 [], updates done
    params: Any
    opt_state: Any
    model_state: Any  # what gradients do not touch: code counts, an EMA codebook


def _filled(state: TrainState) -> list[str]:
    """The items that hold an array: Orbax stores no empty tree (fine-tuning's `model_state`)."""
    return [name for name in ITEMS if jax.tree.leaves(getattr(state, name))]


class Checkpoints:
    """The checkpoints of one stage, `<stage>/checkpoints/<step>/`.

    Args:
      folder: where the steps' folders lie; made if missing.
      keep: how many of the newest to keep.
      keep_best: a held-out figure, such as "val_loss": its best checkpoints are kept too ("" =
        none; the lowest where the name ends in "loss", else the highest).
      num_best: how many of them.
      read_only: somebody else's checkpoints: nothing is made or cleaned up.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: int = 2,
        keep_best: str = "",
        num_best: int = 1,
        read_only: bool = False,
    ):
        self._keep_best = keep_best
        policies: list[managers.PreservationPolicy] = [managers.LatestN(keep)]
        if keep_best:
            sign = -1 if keep_best.endswith("loss") else 1
            best = managers.BestN(
                get_metric_fn=lambda metrics: sign * metrics[keep_best],
                n=num_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=(lambda metrics: metrics[keep_best]) if keep_best else None,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=_barrier),
        )
        self.folder = paths.absolute(folder)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=(*ITEMS, "meta")
        )

    def latest_step(self) -> int | None:
        """The newest finished checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    def newest_intact(self, like: TrainState) -> int | None:
        """The newest step whose files can all be read, None where there is no checkpoint.

        Process 0 reads every array once to know. Newer checkpoints that are damaged (a file cut or
        deleted) are moved beside `checkpoints/`, and a line says so.

        Args:
          like: a state that has the items to be restored.

        Raises:
          ValueError: there are checkpoints and all are damaged: none is moved.
        """
        steps, damaged, intact = sorted(self._manager.all_steps(), reverse=True), {}, -1
        if not steps:
            return None
        if jax.process_index() == 0:
            for step in steps:
                reason = damage(self.folder / str(step), _filled(like))
                if reason is None:
                    intact = step
                    break
                damaged[step] = reason
        # All or none: a process that raised alone would leave the others waiting.
        intact = int(multihost_utils.broadcast_one_to_all(np.int32(intact)))
        if intact < 0:
            raise ValueError(
                f"no checkpoint in {self.folder} can be read ("
                + "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
                + "); mend it, or start anew with another --workdir"
            )
        for step, reason in damaged.items():
            place = set_aside(self.folder / str(step), reason)
            log.warning(
                "checkpoint %s/%d is damaged (%s): put aside as %s, going on from step %d",
                *(self.folder, step, reason, place, intact),
            )
        multihost_utils.sync_global_devices("damaged checkpoints put aside")
        self._manager.reload()
        return intact

    def best(self, step: int, figures: Mapping[str, float], num_best: int = 1) -> list[int]:
        """The best steps by `keep_best`, best first, the newest of equally good ones.

        Among the checkpoints and `step`, which is not saved yet and has `figures`: the one that is
        returned where there is nothing to go by. Waits for the save in flight.
        """
        name = self._keep_best
        if name not in figures:
            return [step]
        self.wait()
        measured = [(self._manager.metrics(saved), saved) for saved in self._manager.all_steps()]
        sign = -1 if name.endswith("loss") else 1
        rated = [(sign * found[name], saved) for found, saved in measured if found]
        rated.append((sign * figures[name], step))
        return [at for _, at in sorted(rated, reverse=True)[:num_best]]

    def save(
        self, state: TrainState, meta: dict[str, Any], figures: Mapping[str, float] | None = None
    ) -> None:
        """Starts writing `state`; returns once its arrays are copied from the devices.

        `figures` are what was measured at this step, for `keep_best`.

        Raises:
          OSError: this or the save before failed (disk full, say); older checkpoints are intact.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in _filled(state)}
        args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
        name = self._keep_best
        value = (figures or {}).get(name, math.nan)
        metrics = {name: float(value)} if math.isfinite(value) else None
        with _explained(self.folder, step):
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved beside the arrays of `step`."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step`, laid out as `like` (ShapeDtypeStructs with shardings) says.

        Raises:
          ValueError: the checkpoint's arrays have other names or shapes than the config's model.
        """
        items = {name: ocp.args.StandardRestore(getattr(like, name)) for name in _filled(like)}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"checkpoint {self.folder}/{step} does not fit this config's model: {error}; "
                f"use the config it was made with, or another --workdir"
            ) from error
        where = like.step.sharding
        step_array = jax.device_put(np.int32(step), where)
        return TrainState(step_array, *(restored.get(name, {}) for name in ITEMS))

    def reached_preemption(self, step: int) -> bool:
        """True on every process at the same step once one of them got SIGTERM."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until the save in flight is on disk.

        Raises:
          OSError: it failed; older checkpoints are intact.
        """
        with _explained(self.folder, None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the save in flight and lets the background threads go."""
        with _explained(self.folder, None):
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, _) -> None:
        # Whatever ended the run, the save in flight is finished; its own failure is told only if
        # there is nothing else to tell. With a process lost no save can be finished.
        if lost_peer(error):
            return
        with contextlib.suppress(*[OSError] if kind else []):
            self.close()


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Where Orbax's background threads wait for the other processes.

    Also with an error of their own on their way out, of a write that failed on this process alone;
    the others would wait at another barrier, for a part that never comes, and all would for ever.
    """
    if error := sys.exception():
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class _explained:
    """Turns whatever Orbax and TensorStore raise on a failed write into one OSError."""

    def __init__(self, folder: epath.Path, step: int | None):
        self._what = f"checkpoint {folder}" + ("" if step is None else f"/{step}")

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, Exception) and not lost_peer(error):
            reason = str(error).strip().splitlines() or [kind.__name__]
            raise OSError(
                f"{self._what} could not be written: {reason[0][:300]}; older checkpoints are "
                f"intact: free space, then run the same command again"
            ) from error


def load_params(stage_folder: epath.PathLike, item: str = "params") -> tuple[Any, dict[str, Any]]:
    """Reads only the parameters (or one other item) of a stage's checkpoint, as numpy arrays.

    Args:
      stage_folder: `W/<iteration>/<stage>`, its newest checkpoint, or `W/…/<stage>@STEP`.
      item: one of `ITEMS`.

    Returns:
      The item's tree and the checkpoint's meta, with `step` added.

    Raises:
      FileNotFoundError: no finished checkpoint there, or not the one asked for.
    """
    path, _, wanted = str(stage_folder).partition("@")
    folder = paths.absolute(path) / "checkpoints"
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps or (wanted and wanted not in map(str, steps)):
        raise FileNotFoundError(
            f"no checkpoint {wanted} in {folder} (found: {steps}); give a stage folder such as "
            f"W/iter1/pretrain, or an official .pt file"
        )
    step = int(wanted) if wanted else steps[-1]
    with _without_warnings(), ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder / str(step) / item).item_metadata
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree.tree)
        arrays = reader.restore(folder / str(step) / item, restore_args=as_numpy)
    meta = json.loads((folder / str(step) / "meta" / "metadata").read_text())
    return arrays, {**meta, "step": step}


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax looks for a file of its manager's inside an item, and warns that it is not there."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)


def tree_sha256(tree: Any) -> str:
    """Hash of a tree of arrays: over its leaves' sorted names, dtypes, shapes and bytes."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    digest = hashlib.sha256()
    for name in sorted(leaves):
        leaf = np.ascontiguousarray(leaves[name])
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(leaf.data)
    return digest.hexdigest()
