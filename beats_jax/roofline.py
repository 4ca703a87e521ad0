"""What the hardware gives: a matmul's rate as the ceiling, and the memory that programs take.

The roof-line of a row is `flops / time` over the rate of large square matrix products of the same
dtype, timed in turn with it, on all devices of the mesh. `flops` is analytic (`flops.py`): the
matrix products as executed, which `tests/test_flops.py` holds against XLA's own count of the
unrolled model. Arithmetic of one 10 s clip at base size (L = 496 tokens, D = 768, F = 3072, 12
layers), in GFLOP:

    a layer     projections 8 L D² = 2.34, scores and values 4 L² D = 0.76,
                feed-forward 4 L D F = 4.68, gates 16 L D = 0.01; together 7.78
    encoder     12 layers 93.40, embedding 2 L 512 (256 + D) = 0.52, positional convolution as the
                matrix products it is done with 0.94; together 94.86. Done directly it would take
                2 L 128 D² / 16 = 4.68: 98.6, the figure others quote.
    a step      forward, and twice that for the gradients of inputs and weights; what is frozen
                counts once, what is computed again to save memory (remat) not at all

On a CPU the time is that of the process's threads together (CPU-seconds), which other processes do
not stretch; on an accelerator it is the wall's.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

CPU_SIDE, SIDE = 2048, 8192  # of the square matrices
PRODUCTS = 16  # in a call on an accelerator: one alone takes as long as starting it


def matmul(dtype: Any, side: int = 0) -> tuple[Callable[[], Any], float]:
    """Matrix products on one device, one after another, and their FLOPs."""
    on_cpu = jax.default_backend() == "cpu"
    side, products = side or (CPU_SIDE if on_cpu else SIDE), 1 if on_cpu else PRODUCTS
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    b = b * side**-0.5  # so that no product grows
    precision = "highest" if dtype == jnp.float32 else None

    @jax.jit
    def multiply(a, b):
        for _ in range(products):
            a = jnp.matmul(a, b, precision=precision)
        return a

    return lambda: multiply(a, b), 2.0 * products * side**3


def device_bytes(program: Any) -> dict[str, float]:
    """`device_bytes` of a compiled program by XLA's own plan: arguments, results, temporaries."""
    plan = program.memory_analysis()
    if plan is None:
        return {}
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return {"device_bytes": float(total - plan.alias_size_in_bytes)}


def device_peak() -> float | None:
    """Most bytes in use on the first device since the process began; None where nobody counts."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def host_peak() -> float:
    """Most bytes of memory that the process has had, since `forget_host_peak` where that works."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def forget_host_peak() -> None:
    """Starts `host_peak` anew (Linux; elsewhere it stays the peak of the whole process)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def cores() -> int:
    """CPU cores that this process may use: `taskset` and containers count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What a figure is worth nothing without: devices, cores, versions."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    packages = ("beats_jax", "jax", "jaxlib", "flax", "numpy")
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu": name,
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
