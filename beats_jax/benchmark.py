"""`beats-jax benchmark`: how fast, how near the hardware's ceiling, beside whom.

All rows of a run, the matrix product that is the ceiling and the PyTorch peer are timed in turn:
each round calls every one of them once, so that whatever else the machine does hits all alike. A
call ends when its results are there. Figures are medians, with the smallest and the largest.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from beats_jax import peers, roofline
from beats_jax.fbank import fbank
from beats_jax.stages import compute_dtype
from beats_jax.training_workloads import Training, checkpointing, compilations, masking
from beats_jax.workloads import (
    TRAINING,
    Settings,
    Workload,
    attentions,
    check,
    front_ends,
    inference,
    make_mesh,
    noise,
    pipelines,
    random_model,
)

REPEATS, COMPILE_REPEATS = 10, 3
FED_STEPS = 5
CEILING = "matmul"
# Largest difference to a peer's features, which are of the order of 1, and to its log-mel: torch's
# float32 FFT is itself 1e-2 off beside loud tones.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}
FBANK_TOLERANCE = 3e-2


def run(
    settings: Settings, repeats: int | None = None, against: str = "", profile: str = ""
) -> dict[str, Any]:
    """Measures what the settings ask for.

    Args:
        settings: what, at which sizes.
        repeats: calls of each row; by default 10, for `compile` 3.
        against: a PyTorch peer to run beside it (`peers.load_peer`).
        profile: folder for a trace of one call of each row; view it with TensorBoard or Perfetto.

    Returns:
        `settings`, `machine`, `rows` (see `row`) and, with a peer, `against`: JSON.

    Raises:
        ValueError: settings that make no sense or do not fit the devices; no such peer, or one that
            computes something else.
    """
    check(settings)
    repeats = repeats or (COMPILE_REPEATS if settings.what == "compile" else REPEATS)
    if against and settings.what not in ("encode", "fbank"):
        raise ValueError(f"--against goes with --what encode or fbank, not {settings.what}")
    dtype = compute_dtype(settings.dtype)
    exact = jax.default_matmul_precision("highest" if dtype == jnp.float32 else None)
    with exact:
        # First: loaded after TensorFlow, which the pipeline imports, avex crashes the process.
        peer = _peer(settings, against) if against else None
        workloads = make_workloads(settings)
        agreement = {}
        if peer:
            theirs, agreement = _beside(settings, workloads[0], against, peer)
            workloads.append(theirs)
        ceiling = None
        if any(workload.flops for workload in workloads):
            product, flops = roofline.matmul(dtype)
            ceiling = Workload(CEILING, product, 0, flops)
            workloads.append(ceiling)
        samples = measure(workloads, repeats)
        waits = [w.fed(FED_STEPS) if w.fed else None for w in workloads]
        if profile:
            with jax.profiler.trace(profile):
                for workload in workloads:
                    with jax.profiler.TraceAnnotation(workload.name):
                        jax.block_until_ready(workload.call())
    devices = make_mesh(settings).size
    rate = devices * flops_per_s(ceiling, samples[-1]) if ceiling else None
    rows = [
        row(workload, taken, settings.seconds, rate, wait)
        for workload, taken, wait in zip(workloads, samples, waits, strict=True)
    ]
    report = {
        "settings": {**settings._asdict(), "dtype": jnp.dtype(dtype).name, "repeats": repeats},
        "machine": roofline.machine(),
        "matmul_flop_per_s": rate,
        "host_peak_bytes": max(max(taken["host_bytes"]) for taken in samples),
        "device_peak_bytes": roofline.device_peak(),
        "rows": rows,
    }
    if against:
        ours, theirs = rows[0], rows[-2 if ceiling else -1]
        ratios = {key: theirs[key]["median"] / ours[key]["median"] for key in ("wall_s", "cpu_s")}
        report["against"] = {"name": theirs["name"], **agreement, "ratio": ratios}
    return report


def make_workloads(settings: Settings) -> list[Workload]:
    """The rows of one benchmark, to be measured in turn.

    Raises:
        ValueError: the settings make no sense, or do not fit the devices.
    """
    mesh = make_mesh(settings)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.batch_size % shards:
        nearest = max(shards, settings.batch_size // shards * shards)
        raise ValueError(
            f"--batch-size {settings.batch_size} does not divide over {shards} devices; "
            f"use --batch-size {nearest}"
        )
    if settings.what in TRAINING:
        return [Training(settings, mesh).workload()]
    makers = {
        "fbank": front_ends,
        "encode": lambda settings, mesh: [inference(settings, mesh)],
        "tokenize": lambda settings, mesh: [inference(settings, mesh)],
        "masking": masking,
        "attention": attentions,
        "pipeline": pipelines,
        "compile": compilations,
        "checkpoint": checkpointing,
    }
    return makers[settings.what](settings, mesh)


Samples = dict[str, list[float]]


def measure(workloads: Sequence[Workload], repeats: int) -> list[Samples]:
    """Wall and CPU seconds and the host's peak memory of every call, all workloads in turn."""
    for workload in workloads:
        jax.block_until_ready(workload.call())  # the first call allocates, compiles, reads files
    samples: list[Samples] = [{"wall_s": [], "cpu_s": [], "host_bytes": []} for _ in workloads]
    for _ in tqdm(range(repeats), unit="round", leave=False, disable=None):
        for workload, taken in zip(workloads, samples, strict=True):
            roofline.forget_host_peak()
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(workload.call())
            taken["wall_s"].append(time.perf_counter() - wall)
            taken["cpu_s"].append(time.process_time() - cpu)
            taken["host_bytes"].append(roofline.host_peak())
    return samples


def flops_per_s(workload: Workload, samples: Samples) -> float:
    """Analytic FLOPs over the median time: CPU-seconds on a CPU, else the wall's."""
    clock = "cpu_s" if jax.default_backend() == "cpu" else "wall_s"
    return workload.flops / max(statistics.median(samples[clock]), 1e-9)


def row(
    workload: Workload,
    samples: Samples,
    seconds: float,
    ceiling: float | None,
    input_wait: float | None,
) -> dict[str, Any]:
    """A workload's figures.

    Args:
        workload: what was measured.
        samples: of `measure`.
        seconds: length of a clip.
        ceiling: FLOP/s of the matrix product on all devices.
        input_wait: share of the time that the step waits when the pipeline feeds it.

    Returns:
        name, clips, wall_s and cpu_s (median, min, max), and where they make sense: clips_per_s,
        audio_hours_per_hour, audio_seconds_per_cpu_second, gflop_per_clip, flop_per_s,
        share_of_matmul, input_wait, host_bytes, and the workload's own figures.
    """
    figures: dict[str, Any] = {"name": workload.name, "clips": workload.clips}
    for clock in ("wall_s", "cpu_s"):
        taken = samples[clock]
        figures[clock] = dict(median=statistics.median(taken), min=min(taken), max=max(taken))
    if workload.clips:
        figures["clips_per_s"] = workload.clips / figures["wall_s"]["median"]
        figures["audio_hours_per_hour"] = figures["clips_per_s"] * seconds
        cpu = max(figures["cpu_s"]["median"], 1e-9)
        figures["audio_seconds_per_cpu_second"] = workload.clips * seconds / cpu
    if workload.flops:
        if workload.clips:
            figures["gflop_per_clip"] = workload.flops / workload.clips / 1e9
        figures["flop_per_s"] = flops_per_s(workload, samples)
        if ceiling and workload.name != CEILING:
            figures["share_of_matmul"] = figures["flop_per_s"] / ceiling
    if input_wait is not None:
        figures["input_wait"] = input_wait
    return figures | {"host_bytes": max(samples["host_bytes"])} | workload.figures


def _peer(settings: Settings, name: str) -> peers.Peer:
    dtype = jnp.dtype(compute_dtype(settings.dtype)).name
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return peers.load_peer(name, random_model(settings.size), dtype, device)


def _beside(
    settings: Settings, ours: Workload, name: str, peer: peers.Peer
) -> tuple[Workload, dict[str, Any]]:
    """A peer as a workload, and how far its answer is from ours.

    Raises:
        ValueError: its answer is another.
    """
    dtype = jnp.dtype(compute_dtype(settings.dtype)).name
    function = peer.encode if settings.what == "encode" else peer.fbank
    waveform = noise(settings)
    tensor = peer.tensor(waveform)
    if settings.what == "encode":
        here, limit = np.asarray(ours.call(), np.float32), TOLERANCE[dtype]
    else:
        here, limit = np.asarray(fbank(waveform)), FBANK_TOLERANCE
    there = peer.array(function(tensor))
    if here.shape != there.shape:
        raise ValueError(f"--against {name}: its output is {there.shape}, ours {here.shape}")
    error = float(np.abs(here - there).max())
    if not error <= limit:
        raise ValueError(
            f"--against {name}: outputs differ by {error:.3g}, allowed {limit:g}: not the same "
            "computation, so there is nothing to compare"
        )
    workload = Workload(
        f"{settings.what}, {peer.name}", lambda: function(tensor), ours.clips, ours.flops
    )
    return workload, {"max_error": error, "allowed": limit}


# --- what is printed ------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: the machine, a line a row, and the ratio to the peer."""
    settings, machine = report["settings"], report["machine"]
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("", lambda row: row["name"]),
        ("clips/s", lambda row: f"{row['clips_per_s']:.3g}"),
        ("audio h/h", lambda row: f"{row['audio_hours_per_hour']:.4g}"),
        ("wall s: median (min–max)", lambda row: _spread(row["wall_s"])),
        ("CPU s", lambda row: _spread(row["cpu_s"])),
        ("audio s / CPU s", lambda row: f"{row['audio_seconds_per_cpu_second']:.4g}"),
        ("GFLOP/clip", lambda row: f"{row['gflop_per_clip']:.4g}"),
        ("GFLOP/s", lambda row: f"{row['flop_per_s'] / 1e9:.4g}"),
        ("of matmul", lambda row: f"{row['share_of_matmul']:.2f}"),
        ("waits for data", lambda row: f"{100 * row['input_wait']:.0f} %"),
        ("device GB", lambda row: f"{row['device_bytes'] / 1e9:.2f}"),
        ("host GB", lambda row: f"{row['host_bytes'] / 1e9:.2f}"),
        ("trace s", lambda row: f"{row['trace_s']:.1f}"),
        ("compile s", lambda row: f"{row['compile_s']:.1f}"),
        ("state GB", lambda row: f"{row['gigabytes']:.2f}"),
    ]
    cells = [[_cell(show, row) for _, show in columns] for row in report["rows"]]
    used = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    lines = [
        f"{settings['what']}: {settings['size']}, batch {settings['batch_size']} of "
        f"{settings['seconds']:g} s, {settings['dtype']}, {settings['repeats']} repeats",
        f"{machine['devices']} × {machine['device']}; {machine['cores']} core(s) of "
        f"{machine['cpu']}; "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items()),
        "",
        "| " + " | ".join(columns[i][0] for i in used) + " |",
        "|---" * len(used) + "|",
        *("| " + " | ".join(line[i] for i in used) + " |" for line in cells),
    ]
    if peer := report.get("against"):
        ratio = peer["ratio"]
        lines += [
            "",
            f"{peer['name']} takes {ratio['wall_s']:.2f} × our wall time and "
            f"{ratio['cpu_s']:.2f} × our CPU time; outputs differ by at most "
            f"{peer['max_error']:.1e} (allowed {peer['allowed']:g})",
        ]
    if peak := report["device_peak_bytes"]:
        lines += ["", f"device memory, most in use: {peak / 1e9:.2f} GB"]
    return "\n".join(lines)


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['median']:.3g} ({figure['min']:.3g}–{figure['max']:.3g})"


def _cell(show: Callable[[dict[str, Any]], str], row: dict[str, Any]) -> str:
    with contextlib.suppress(KeyError):
        return show(row)
    return ""


def save(report: dict[str, Any], path: str) -> None:
    """Writes the report as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
