"""BEATs: audio pre-training with acoustic tokenizers (arXiv 2212.09058), in JAX."""

from typing import TYPE_CHECKING, Any

from beats_jax.fbank import fbank

if TYPE_CHECKING:
    from beats_jax.data.audio import read_audio
    from beats_jax.inference import load
    from beats_jax.inference import load as from_pretrained

__version__ = "0.1.0"

__all__ = ["__version__", "fbank", "from_pretrained", "load", "read_audio"]

# Found at their first use: `import beats_jax` and `beats-jax --help` do not wait for JAX.
_LAZY = {
    "load": ("beats_jax.inference", "load"),
    "from_pretrained": ("beats_jax.inference", "load"),
    "read_audio": ("beats_jax.data.audio", "read_audio"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
