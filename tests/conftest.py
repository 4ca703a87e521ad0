"""What every test starts from: 8 CPU devices, one compilation cache, synthesised audio."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# Before anything imports JAX; subprocesses inherit it all.
os.environ["JAX_PLATFORMS"] = os.environ.get("BEATS_JAX_TEST_PLATFORM", "cpu")
DEVICES = "--xla_force_host_platform_device_count=8"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
CACHE = Path(__file__).parents[1] / ".cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")


# Files of minutes go first: the last one to start is what the other processes wait for.
LONG = ("test_resume.py", "test_iteration.py", "test_sharding.py", "test_train.py", "test_main.py")
# Files that compare runs of ours with one another, and compile much that runs for moments only.
COMPILED_IN_HASTE = ("test_sharding.py", "test_fused_attention.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, and says why; puts the long files first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    reasons = {}
    if importlib.util.find_spec("torch") is None:
        reasons["torch"] = "PyTorch is not installed: pip install -e '.[torch]'"
    if not os.environ.get("BEATS_JAX_DATA"):
        reasons["realdata"] = "set BEATS_JAX_DATA to the folder with real audio"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste(request) -> Iterator[None]:
    """Fewer of the compiler's optimizations in some files: two thirds of their CPU time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", request.path.name in COMPILED_IN_HASTE)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """No implicit dtype or rank promotion while the test runs.

    For tests of our own array functions and models; as a global setting it breaks optax.adamw and
    Flax's LayerNorm in bfloat16.
    """
    import jax

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def waveforms() -> dict[str, np.ndarray]:
    """Read-only float32 clips at 16 kHz: 2 s of chirp, speech and noise, 1 s of silence."""
    rng = np.random.default_rng(0)
    time = np.arange(2 * 16000) / 16000.0
    sweep = 0.9 * np.sin(2 * np.pi * (50.0 * time + (7800.0 - 50.0) / 4.0 * time**2))
    # Speech-like: a gliding pitch with harmonics under two formants, syllables and exact pauses.
    pitch = 2 * np.pi * np.cumsum(120.0 + 30.0 * np.sin(2 * np.pi * 0.7 * time)) / 16000.0
    harmonics = np.arange(1, 30)[:, None]
    formants = sum(np.exp(-(((120.0 * harmonics - f) / 300.0) ** 2)) for f in (600.0, 1700.0))
    voiced = np.sum(formants * np.sin(harmonics * pitch), axis=0)
    syllables = np.maximum(0.0, np.sin(2 * np.pi * 2.5 * time))
    breath = rng.standard_normal(time.size)
    clips = {
        "chirp": sweep,
        "speech": syllables * (0.5 * voiced / np.abs(voiced).max() + 1e-3 * breath),
        "noise": np.clip(0.1 * rng.standard_normal(time.size), -1.0, 1.0),
        "silence": np.zeros(16000),
    }
    clips = {name: clip.astype(np.float32) for name, clip in clips.items()}
    for clip in clips.values():
        clip.flags.writeable = False
    return clips
