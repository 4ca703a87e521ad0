"""Analytic floating-point operations, for MFU and rooflines: a multiply-add counts as two.

Counted: matmuls as executed. Not counted: norms, softmax, GELU and the front end (under 1 %), and
what does not grow with the batch (weight norm and the transform of the positional kernel). The
positional convolution counts as the matrix products that it is done with (`position.py`): 0.9 GFLOP
of a base model's 10 s clip, 0.3 with a quarter visible, where a direct one takes 4.7. Base, 10 s
clip (496 tokens, 124 visible): forward of masked pre-training 46.4 GFLOP, of which the encoder
22.1; a step is three times that (forward, gradients of the inputs, gradients of the weights).
"""

from __future__ import annotations

import math

from beats_jax.fbank import (
    DFT_MATRIX,
    FFT_LENGTH,
    FRAME_LENGTH,
    MEL_BANKS,
    PATCH_SIZE,
    num_frames,
)
from beats_jax.models.beats import BEATs, Predictor
from beats_jax.models.encoder import Transformer
from beats_jax.models.tokenizer import Estimator, Tokenizer


def layers_flops(model: Transformer, tokens: int) -> float:
    """Forward pass of the model's blocks over `tokens` positions of one clip."""
    dim = model.embed_dim
    projections = 8 * tokens * dim**2
    attention = 4 * tokens**2 * dim
    feed_forward = 4 * tokens * dim * model.ffn_dim
    gates = 16 * tokens * dim
    return float(model.num_layers * (projections + attention + feed_forward + gates))


def encoder_flops(model: BEATs, tokens: int, visible: int | None = None) -> float:
    """Forward pass of the encoder on one clip of `tokens` patches, `visible` of which it sees."""
    seen, dim = tokens if visible is None else visible, model.embed_dim
    embedding = 2 * seen * model.patch_dim * (PATCH_SIZE**2 + dim)
    frequencies = math.ceil((tokens + model.conv_pos // 2) / 2) + 1  # as in PositionalConv
    transforms = 2 * (2 * seen * 2 * frequencies * dim)
    products = 8 * frequencies * dim**2 / model.conv_pos_groups
    return embedding + transforms + products + layers_flops(model, seen)


def predictor_flops(model: Predictor, tokens: int, visible: int) -> float:
    """Forward pass of the label predictor: connector, blocks on the full grid, head."""
    connector = 2 * visible * model.embed_dim**2
    head = 2 * tokens * model.embed_dim * model.num_classes
    return connector + head + layers_flops(model, tokens)


def tokenizer_flops(model: Tokenizer, tokens: int, num_codes: int = 1024) -> float:
    """Forward pass of a distilled tokenizer on one clip: encoder, projection, nearest code."""
    dim = model.encoder.embed_dim
    projection = 2 * tokens * dim * (dim + model.codebook_dim)
    return (
        encoder_flops(model.encoder, tokens)
        + projection
        + 2 * tokens * model.codebook_dim * num_codes
    )


def estimator_flops(model: Estimator, codebook_dim: int, tokens: int) -> float:
    """Forward pass of the tokenizer's estimator: connector, blocks, head."""
    ends = 2 * tokens * model.embed_dim * (codebook_dim + (model.target_dim or 0))
    return ends + layers_flops(model, tokens)


def fbank_flops(num_samples: int, backend: str) -> float:
    """The log-mel of one clip, as `fbank` computes it: by a matrix on a TPU, else by an FFT.

    A real FFT of N points counts as 2.5 N log2 N.
    """
    if backend == "tpu":
        spectrum = 2 * DFT_MATRIX.size
    else:
        spectrum = 2 * FRAME_LENGTH + 2.5 * FFT_LENGTH * math.log2(FFT_LENGTH)
    return num_frames(num_samples) * (spectrum + 2 * MEL_BANKS.size)
