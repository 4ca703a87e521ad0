"""`beats-jax benchmark --what scaling`: what the pre-training step costs between devices.

The loop's own step is partitioned for devices that are not there (CPU devices, which XLA makes up),
its collectives are read off, and their bytes are set against published rates. Nothing is run: the
figures are computed, not measured.

Read is the module as XLA's SPMD partitioner leaves it, the same for all platforms, and not the
compiled one: a CPU widens bfloat16 in it, and takes long over machine code that nobody runs. What a
TPU's or GPU's compiler does to it next is not seen: it joins small arrays into large collectives,
which saves latency and no bytes; it may add up first what is added after it is reduced (the bytes
here are an upper bound); it makes reduce-scatters, which are counted (`collectives`); and it lets
collectives run beside arithmetic. The two efficiencies are for none and for all of that. Latency,
and whatever else a step waits for, are left out.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from beats_jax import sharding
from beats_jax.collectives import Collective, read
from beats_jax.fbank import PATCH_SIZE, SAMPLE_RATE, num_tokens
from beats_jax.training_workloads import Training
from beats_jax.workloads import Settings, check, make_mesh

SHARE = 0.4  # of the peak rate that the arithmetic reaches, as in `configs/iter1.py`
BATCH = 576  # clips in a step, the paper's beyond 16 devices
# Clips of a data shard in the partitioned step: a prime that divides no size of a model, so that an
# array grows with the batch if and only if its number of elements is a multiple.
ROWS = 7
LAYOUTS: dict[str, Callable[[int], dict[str, int]]] = {  # sizes of the mesh's axes on n devices
    "data": lambda n: {"data": n, "fsdp": 1, "tensor": 1},
    "fsdp": lambda n: {"data": 1, "fsdp": n, "tensor": 1},
    "fsdp, tensor=2": lambda n: {"data": 1, "fsdp": n // 2, "tensor": 2},
}


class Machine(NamedTuple):
    """Published rates of a device.

    Attributes:
        flops: of a bfloat16 matrix product, FLOP/s.
        links: all its links to its neighbours together, one way, bytes/s.
        host: how many devices such links join; 0 = all.
        port: its own way to other hosts, one way, bytes/s.
    """

    flops: float
    links: float
    host: int = 0
    port: float = 0.0


# TPU: cloud.google.com/tpu/docs/v5e and v5p (links of a chip, both ways together: 400 and 1200
# GB/s), and for v4 Jouppi et al. 2023, arXiv:2304.01433 (6 links of 50 GB/s). A torus is assumed,
# all of whose links a collective uses at once. H100 and H200 SXM: NVIDIA's data sheets (989 TFLOP/s
# dense; NVLink 900 GB/s, both ways together), 8 in a host with a 400 Gbit/s InfiniBand port each.
MACHINES = {
    "TPU v4": Machine(275e12, 300e9),
    "TPU v5e": Machine(197e12, 200e9),
    "TPU v5p": Machine(459e12, 600e9),
    "H100": Machine(989e12, 450e9, 8, 50e9),
}


def seconds(collective: Collective, machine: Machine) -> float:
    """Time of a collective at the published rates; latency is not counted.

    Between hosts, as many rings run side by side as a group has devices (and ports) on each.
    """
    rate = machine.links
    if machine.host:
        hosts = max(len(np.unique(group // machine.host)) for group in collective.groups)
        if hosts > 1:
            rate = min(rate, machine.port * (collective.groups.shape[1] // hosts))
    return collective.sent / rate


class Cost(NamedTuple):
    """Seconds of a step on one device.

    Attributes:
        fixed: of collectives, whatever the batch.
        growing: of collectives, for each clip a device.
        arithmetic: for each clip a device, at `SHARE` of the peak.
    """

    fixed: float
    growing: float
    arithmetic: float

    @property
    def hidden_from(self) -> float:
        """Clips a device from which arithmetic takes longer than the collectives; may be inf."""
        spare = self.arithmetic - self.growing
        return self.fixed / spare if spare > 0 else float("inf")

    def efficiency(self, clips: float) -> tuple[float, float]:
        """Share of the time that is arithmetic with so many clips a device.

        Returns:
            If the collectives wait for the arithmetic and it for them, and if they fully overlap.
        """
        sending, computing = self.fixed + clips * self.growing, clips * self.arithmetic
        return computing / (computing + sending), computing / max(computing, sending)


def cost(
    collectives: Sequence[Collective], tensor: int, flops_per_clip: float, machine: Machine
) -> Cost:
    """Cost of the step whose collectives, at `ROWS` clips a data shard, these are."""
    taken = {True: 0.0, False: 0.0}
    for collective in collectives:
        taken[grows(collective)] += seconds(collective, machine)
    # `tensor` devices share a data shard's clips
    return Cost(taken[False], taken[True] * tensor / ROWS, flops_per_clip / machine.flops / SHARE)


def grows(collective: Collective) -> bool:
    """Whether the array is one of activations."""
    return collective.elements > 0 and collective.elements % ROWS == 0


# --- the report -----------------------------------------------------------------------------------


def report(
    sizes: Sequence[str], counts: Sequence[int], seconds: float = 10.0, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Every layout of `LAYOUTS` for these models and numbers of devices.

    Args:
        sizes: of `PRESETS`.
        counts: devices, even numbers.
        seconds: length of a clip.
        dtype: of the computation; "auto" is bfloat16, as on accelerators.

    Returns:
        `settings` and `rows`: size, layout, devices, parameters, bytes_sent (by a device in a step,
        whatever the batch), bytes_sent_per_clip (and for each clip a device), arrays (kind ->
        number and bytes of the whole arrays) and machines (name -> hidden_from, `Cost`, and
        efficiency at `BATCH` clips a step, without and with full overlap): JSON.

    Raises:
        ValueError: settings that make no sense.
        ChildProcessError: a step could not be partitioned.
    """
    if odd := [n for n in counts if n < 2 or n % 2]:
        raise ValueError(f"--devices {odd[0]}: want even numbers, to cut the mesh in two")
    dtype = "bfloat16" if dtype == "auto" else dtype
    settings = Settings("pretrain", seconds=seconds, dtype=dtype, backend="numpy")
    for size in sizes:
        check(settings._replace(size=size))
    cases = [(size, layout, n) for size in sizes for layout in LAYOUTS for n in counts]
    rows = []
    for size, layout, devices in tqdm(cases, unit="step", leave=False, disable=None):
        mesh = LAYOUTS[layout](devices)
        step = partitioned(settings._replace(size=size, mesh=mesh))
        rows.append(
            {"size": size, "layout": layout, "devices": devices, **figures(step, mesh["tensor"])}
        )
    return {
        "settings": {"seconds": seconds, "dtype": dtype, "batch_size": BATCH, "share": SHARE},
        "rows": rows,
    }


def figures(step: Step, tensor: int) -> dict[str, Any]:
    """A row of `report`, without what it is of."""
    sent = {True: 0.0, False: 0.0}
    arrays: dict[str, dict[str, int]] = {}
    for collective in step.collectives:
        sent[grows(collective)] += collective.sent
        of_kind = arrays.setdefault(collective.kind, {"number": 0, "bytes": 0})
        of_kind["number"] += collective.count
        of_kind["bytes"] += collective.count * collective.size
    machines = {}
    for name, machine in MACHINES.items():
        found = cost(step.collectives, tensor, step.flops_per_clip, machine)
        machines[name] = {
            "hidden_from": found.hidden_from if np.isfinite(found.hidden_from) else None,
            "efficiency": list(found.efficiency(BATCH / step.devices)),
        }
    return {
        "parameters": sum(int(np.prod(shape)) for shape in step.parameters.values()),
        "bytes_sent": sent[False],
        "bytes_sent_per_clip": sent[True] * tensor / ROWS,
        "arrays": arrays,
        "machines": machines,
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: one row a layout, its cells for each number of devices."""
    settings = report["settings"]
    counts = list(dict.fromkeys(row["devices"] for row in report["rows"]))
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        cases.setdefault((row["size"], row["layout"]), []).append(row)
    columns: list[Callable[[dict[str, Any]], str]] = [
        lambda row: f"{row['bytes_sent'] / 1e6:.0f}",
        lambda row: f"{row['bytes_sent_per_clip'] / 1e6:.0f}",
        *(functools.partial(_machine, name) for name in MACHINES),
    ]
    lines = [
        f"pretrain, clips of {settings['seconds']:g} s, {settings['dtype']}; cells: on "
        + " / ".join(map(str, counts))
        + f" devices; arithmetic at {settings['share']:.0%} of the peak. Under a machine: clips a "
        "device from which the collectives can hide behind it, and in brackets its share of a step "
        f"of {settings['batch_size']} clips, %, without and with full overlap.",
        "",
        "| model | mesh | MB a device sends | and a clip | " + " | ".join(MACHINES) + " |",
        "|---" * (4 + len(MACHINES)) + "|",
    ]
    for (size, layout), rows in cases.items():
        shown = [[show(row) for row in rows] for show in columns]
        cells = [" / ".join(dict.fromkeys(cell) if len({*cell}) == 1 else cell) for cell in shown]
        lines.append(f"| {size} | {layout} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine(name: str, row: dict[str, Any]) -> str:
    found = row["machines"][name]
    least, most = (f"{100 * share:.0f}" for share in found["efficiency"])
    clips = "never" if found["hidden_from"] is None else f"{found['hidden_from']:.1f}"
    return f"{clips} ({least}–{most})"


# --- the step, partitioned ------------------------------------------------------------------------

CHILD = "import sys; from beats_jax import scaling; scaling.partition(sys.argv[1])"


class Step(NamedTuple):
    """A partitioned step.

    Attributes:
        devices: of the mesh.
        collectives: of one step, at `ROWS` clips a data shard.
        flops_per_clip: analytic.
        parameters: their shapes, by path.
    """

    devices: int
    collectives: list[Collective]
    flops_per_clip: float
    parameters: dict[str, list[int]]


def partitioned(settings: Settings) -> Step:
    """The pre-training step on a mesh of any size, in `settings.mesh`.

    Raises:
        ValueError: settings that make no sense, or a mesh with an axis of -1.
        ChildProcessError: the step or XLA failed; with the last lines they wrote.
    """
    check(settings)
    devices = int(np.prod(list(settings.mesh.values())))
    if devices < 1:
        raise ValueError(f"the mesh is {settings.mesh}; want a size for each axis")
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps(settings._asdict()))
        # The number of devices is fixed when JAX starts: a process of its own. Its end also ends
        # the compilation, of which the larger part would follow.
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        command = [sys.executable, "-c", CHILD, str(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ChildProcessError(
                f"partitioning for {settings.mesh} failed: {done.stderr[-2000:]}"
            )
        text, facts = task.with_suffix(".hlo").read_text(), json.loads(task.read_text())
    return Step(devices, read(text), **facts)


def partition(task: str) -> None:
    """The child's side of `partitioned`: leaves HLO and facts, and ends the process."""
    path = Path(task)
    lowered, facts = lower(Settings(**json.loads(path.read_text())))
    path.with_suffix(".hlo").write_text(after_partitioning(lowered, path.with_suffix("")))
    path.write_text(json.dumps(facts))
    os._exit(0)  # whatever XLA's threads are doing


def lower(settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The training step traced for `ROWS` clips a data shard, on shapes alone, and facts of it."""
    mesh = make_mesh(settings)
    training = Training(settings, mesh)
    clips = ROWS * mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = int(num_tokens(round(settings.seconds * SAMPLE_RATE)))
    rows = NamedSharding(mesh, sharding.BATCH)
    shapes = {
        "patches": ((clips, tokens, PATCH_SIZE**2), np.float32),
        "num_samples": ((clips,), np.int32),
        "counter": ((clips,), np.uint32),
    }
    batch = {name: jax.ShapeDtypeStruct(*x, sharding=rows) for name, x in shapes.items()}
    where = sharding.tree_shardings(training.frozen, mesh)
    frozen = jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=to),
        training.frozen,
        where,
    )
    parameters = {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(training.like.params)
    }
    facts = {"flops_per_clip": training.stage.flops_per_clip, "parameters": parameters}
    step: Any = training.step
    return step.lower(training.like, frozen, batch), facts


def after_partitioning(lowered: Any, folder: Path) -> str:
    """Text of the module as the partitioner leaves it; compiling goes on in a thread until the end.

    Raises:
        RuntimeError: compiling failed before.
    """
    options = {
        "xla_dump_to": str(folder),
        "xla_dump_hlo_as_text": True,
        "xla_dump_hlo_pass_re": "spmd-partitioning",
    }
    failed: list[Exception] = []

    def compiling() -> None:
        try:
            lowered.compile(compiler_options=options)
        except Exception as error:
            failed.append(error)

    threading.Thread(target=compiling, daemon=True).start()
    while not failed:
        time.sleep(0.2)
        for path in folder.glob("*after_spmd-partitioning*.txt"):
            text = path.read_text()
            if "\nENTRY " in text and text.rstrip().endswith("\n}"):  # its last computation, whole
                return text
    raise RuntimeError("XLA did not get as far as partitioning") from failed[0]
