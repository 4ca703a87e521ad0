"""The device mesh and one table that says how parameters lie on it.

Axes: `data` (batch), `fsdp` (batch, and parameters cut to save memory), `tensor` (heads and the
feed-forward's hidden units). Everything is `jax.jit` on global arrays with NamedSharding: a mean
over the batch is a mean over the whole batch, on however many devices or hosts it lies.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Last parts of a parameter's path -> how its dimensions lie on the mesh; the first match counts,
# what matches nothing is replicated. Megatron's order: the first matmul of a pair is cut by
# columns, the second by rows, so that one all-reduce a pair is enough. The positional convolution's
# kernel stays whole: cut, its spectrum, nine times its size, would be gathered as well as reduced.
RULES: tuple[tuple[str, P], ...] = (
    (r"(q_proj|k_proj|v_proj|fc1)/kernel$", P("fsdp", "tensor")),
    (r"(out_proj|fc2)/kernel$", P("tensor", "fsdp")),
    (r"(q_proj|k_proj|v_proj|fc1)/bias$", P("tensor")),
    (r"(post_extract_proj|connector|head)/kernel$", P("fsdp", None)),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices (of all processes), or over `devices`; -1 = what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = int(np.prod([s for s in sizes if s > 0]))
    if sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices; "
            f"set one of --config.mesh.data, .fsdp, .tensor to -1 and let the others divide it"
        )
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=devices)


def _path_name(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    return len(spec) <= len(shape) and all(
        axis is None or size % mesh.shape[axis] == 0
        for axis, size in zip(spec, shape, strict=False)
    )


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of arrays or ShapeDtypeStructs, by `RULES`.

    Works on params and on whatever repeats their paths (Adam's moments). A leaf whose size the
    mesh does not divide is replicated: odd sizes cost memory, they do not fail.
    """

    def leaf(path, x):
        name = _path_name(path)
        spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
        return NamedSharding(mesh, spec if _fits(spec, x.shape, mesh) else P())

    return jax.tree_util.tree_map_with_path(leaf, tree)


def on(mesh: Mesh, function: Callable) -> Callable:
    """A function to be compiled, in which kernels are told that arrays lie on the mesh.

    XLA cuts its own operations by itself; a kernel of ours has to be told (`fused_attention.py`).
    """

    @functools.wraps(function)
    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return on_mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def metrics_and_rows(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """For a function of a batch that returns sums, wanted everywhere, and rows, left in place."""
    return replicated(mesh), NamedSharding(mesh, BATCH)


def check_batch_size(batch_size: int, micro_batches: int, mesh: Mesh, stage: str) -> None:
    """Raises ValueError, with the nearest size that works, when a batch cannot be cut evenly."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = shards * micro_batches
    if batch_size % unit:
        nearest = max(unit, batch_size // unit * unit)
        raise ValueError(
            f"{stage}.batch_size {batch_size} does not divide over {shards} devices"
            + (f" × {micro_batches} micro-batches" if micro_batches > 1 else "")
            + f"; set --config.{stage}.batch_size={nearest}"
        )


def local_rows(batch_size: int, mesh: Mesh) -> slice:
    """The rows of the global batch that this process's devices hold: all a host has to read."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    spans = [
        (s[0].start or 0, batch_size if s[0].stop is None else s[0].stop)
        for s in indices.values()
        if s
    ]
    return slice(min(a for a, _ in spans), max(b for _, b in spans))


def global_batch(
    batch: Mapping[str, np.ndarray], batch_size: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """This process's rows (as `local_rows` says) -> arrays of the global batch on the mesh."""
    sharding, first = NamedSharding(mesh, BATCH), local_rows(batch_size, mesh).start

    def put(x: np.ndarray) -> jax.Array:
        def rows(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[start - first : stop - first]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, rows)

    return {name: put(x) for name, x in batch.items()}
