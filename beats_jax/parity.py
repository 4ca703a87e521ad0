"""The proof that a conversion changed nothing: both models' outputs on one input, compared.

The input is made from a frozen random stream and stored beside the certificate, for whoever wants
to repeat it with other code. It is 3.3 s long, so that distances between tokens reach the
logarithmic buckets of the relative position bias, which one second does not.
"""

from __future__ import annotations

import functools
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import beats_jax
from beats_jax.convert import LINEARS
from beats_jax.exported import PARITY, without_training_parts
from beats_jax.fbank import SAMPLE_RATE, fbank, patchify
from beats_jax.models.beats import BEATs
from beats_jax.models.quantizer import quantize
from beats_jax.models.tokenizer import Tokenizer
from beats_jax.stages import Pretrained

# Largest error of any output (fixtures/README.md); arrays that are equal give 0 on one machine.
TOLERANCE, TOLERANCE_BASE = 3e-5, 1e-4
_USED = ("encoder", *LINEARS)


def parity_input() -> np.ndarray:
    """[1, 52800] float32: a rising tone in noise, the same on every machine."""
    time = np.arange(round(3.3 * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.RandomState(0).standard_normal(time.size)
    tone = np.sin(2 * np.pi * (100 * time + 600 * time**2))
    return (0.3 * tone + 0.1 * np.clip(noise, -3, 3)).astype(np.float32)[None]


def outputs(pretrained: Pretrained, waveform: np.ndarray) -> dict[str, np.ndarray]:
    """What a model makes of a waveform [B, T], layer by layer, in float32.

    Returns:
        "fbank" [B, F, 128], "layer_0" (input of the first block) to "layer_N" [B, L, D], "logits"
        [B, L, C] of a fine-tuned model, "codes" [B, L, Dq] and "ids" [B, L] of a tokenizer.
    """
    mel = fbank(waveform, mean=pretrained.mean, std=pretrained.std)
    arrays = {name: part for name, part in pretrained.params.items() if name in _USED}
    if pretrained.codebook is not None:
        arrays["codebook"] = pretrained.codebook
    with jax.default_matmul_precision("highest"):
        net = pretrained.model.clone(dtype=jnp.float32, remat="")
        layers, others = _forward(net, arrays, patchify(mel))
    found = {"fbank": mel, **{f"layer_{i}": layer for i, layer in enumerate(layers)}, **others}
    return {name: np.asarray(value) for name, value in found.items()}


@functools.partial(jax.jit, static_argnames="net")
def _forward(net: BEATs, arrays: Any, patches: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    """All layers, and the other outputs: one program for both models of a comparison."""
    layers: Any = net.apply({"params": arrays["encoder"]}, patches, all_layers=True)
    others = {}
    if "head" in arrays:
        others["logits"] = layers[-1] @ arrays["head"]["kernel"] + arrays["head"]["bias"]
    if "codebook" in arrays:
        tokenizer = Tokenizer(net, arrays["codebook"].shape[1])
        params = {name: part for name, part in arrays.items() if name != "codebook"}
        vectors: Any = tokenizer.apply({"params": params}, patches)
        quantized = quantize(vectors, arrays["codebook"])
        others |= {"codes": quantized.codes, "ids": quantized.ids}
    return layers, others


def certify(source: Pretrained, destination: Pretrained) -> dict[str, Any]:
    """Runs both models on `parity_input`.

    Args:
        source: what was converted.
        destination: the result, as read back from its file.

    Returns:
        The certificate: what was compared, the largest error of each output, the tolerance.

    Raises:
        ValueError: the two are not the same model: an output or the arrays differ.
    """
    waveform = parity_input()
    want, got = outputs(source, waveform), outputs(destination, waveform)
    what = f"{destination.source['path']} is not the model of {source.source['path']}"
    shapes, others = ({k: v.shape for k, v in found.items()} for found in (want, got))
    if shapes != others:
        raise ValueError(f"{what}: its outputs are {others}; want {shapes}")
    errors = {name: float(np.max(np.abs(want[name] - got[name]))) for name in want}
    tolerance = TOLERANCE if source.model.num_layers < 12 else TOLERANCE_BASE
    for name, error in errors.items():  # the first to differ is nearest to the cause
        if not error <= tolerance:  # NaN too
            raise ValueError(f"{what}: {name} is off by {error:.3g}; allowed: {tolerance:g}")
    names = ("path", "kind", "step", "params_sha256")
    model = without_training_parts(source)
    if model.source["params_sha256"] != destination.source["params_sha256"]:
        raise ValueError(
            f"{what}: the outputs agree within {tolerance:g}, but not every weight does"
        )
    return {
        "source": {name: source.source[name] for name in names},
        "destination": {name: destination.source[name] for name in names},
        "input": f"{waveform.shape[1] / SAMPLE_RATE:g} s at {SAMPLE_RATE} Hz, in {PARITY[1]}",
        "max_error": errors,
        "tolerance": tolerance,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy")}
        | {"beats_jax": beats_jax.__version__},
        "platform": f"{jax.default_backend()}, {platform.machine()}",
    }


def write_certificate(certificate: dict[str, Any], destination: str | Path) -> Path:
    """Stores it with its input: in an exported folder, or beside a .pt file; returns where."""
    path = Path(destination)
    where, arrays = (
        path / name if path.is_dir() else path.with_suffix(f".{name}") for name in PARITY
    )
    np.savez(arrays, waveform=parity_input())
    where.write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
    return where
