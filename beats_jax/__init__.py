"""BEATs: audio pre-training with acoustic tokenizers (arXiv 2212.09058), in JAX."""

from beats_jax.fbank import fbank

__version__ = "0.1.0"

__all__ = ["__version__", "fbank"]
