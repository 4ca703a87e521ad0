"""A model as one StableHLO program, to run where none of this package is installed.

The program takes waveforms of one length, in batches of any size: log-mel front end, network and
weights are inside. It is what `jax.export` serialises; `jax.export.deserialize` brings it back
(https://docs.jax.dev/en/latest/export/export.html). A JSON file beside it says what it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from beats_jax.fbank import BANDS, MIN_SAMPLES, SAMPLE_RATE, num_tokens
from beats_jax.inference import PARTS, Model, exact_products, forward

PLATFORMS = ("cpu", "cuda", "tpu")
ALL_PLATFORMS = (*PLATFORMS, "rocm")  # jax.export's own names; it checks none of them
# The largest error that `check` lets pass: of features and logits the absolute one; of ids, where a
# vector half-way between two codes may fall to either side, the share that differs.
MAX_ERROR = {"features": 1e-4, "logits": 1e-4, "ids": 1e-2}


def export(
    model: Model, seconds: float, what: str, platforms: Sequence[str] = PLATFORMS
) -> jax.export.Exported:
    """Lowers a model to StableHLO; needs none of the devices it is for.

    Args:
        model: loaded with precision "float32".
        seconds: length of the clips.
        what: "features" (float32 [b, L, D], of the last layer), "logits" (float32 [b, C], of a
            fine-tuned model) or "ids" (int32 [b, T', 8], of a tokenizer).
        platforms: some of `ALL_PLATFORMS`.

    Returns:
        What takes waveforms float32 [b, round(seconds * 16000)] in [-1, 1], all of it valid: 16 kHz
        mono. Its name, `fun_name`, is `what`.

    Raises:
        ValueError: the model has no such output or another precision, the clip has no token, or
            there is no such platform.
    """
    pretrained, samples = model.pretrained, round(seconds * SAMPLE_RATE)
    arrays = dict(pretrained.params)
    if pretrained.codebook is not None:
        arrays["codebook"] = pretrained.codebook
    if what not in PARTS:
        raise ValueError(f'output "{what}" is unknown; give one of {", ".join(PARTS)}')
    part, meaning = PARTS[what]
    if part not in arrays:
        raise ValueError(f"{model.source['path']} is of kind {model.kind}: it has no {meaning}")
    if samples < MIN_SAMPLES:
        raise ValueError(
            f"{seconds} s are {samples} samples and so no token; give at least"
            f" {MIN_SAMPLES / SAMPLE_RATE} s"
        )
    if not platforms or not set(platforms) <= set(ALL_PLATFORMS):
        raise ValueError(
            f"platforms are {list(platforms)}; give some of {', '.join(ALL_PLATFORMS)}"
        )
    if pretrained.model.dtype != jnp.float32:
        raise ValueError('the model computes in bfloat16; load it with precision="float32"')

    def program(waveforms: jax.Array) -> jax.Array:
        batch = waveforms.shape[0]
        with exact_products(pretrained.model):
            values = forward(
                *(pretrained.model, pretrained.mean, pretrained.std, arrays, waveforms),
                jnp.zeros((batch, num_tokens(samples)), bool),
                what=what,
                layer=model.num_layers,
            )
        if what == "logits":
            return jnp.mean(values, axis=1)
        return values.reshape(batch, -1, BANDS) if what == "ids" else values

    program.__name__ = what
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, samples), jnp.float32)
    return jax.export.export(jax.jit(program), platforms=platforms)(shape)


def save(exported: jax.export.Exported, path: str | Path, model: Model) -> None:
    """Writes the program to `path` and what it is to `path`.json.

    Args:
        exported: of `export`.
        path: of the new file.
        model: what was exported.
    """
    program = bytes(exported.serialize())
    about = {
        "output": exported.fun_name,
        "input_shape": str(exported.in_avals[0]),
        "output_shape": str(exported.out_avals[0]),
        "sample_rate": SAMPLE_RATE,
        "mean": float(model.pretrained.mean),
        "std": float(model.pretrained.std),
        "labels": list(model.labels) if exported.fun_name == "logits" else [],
        "task": model.task,
        "source": {name: model.source.get(name) for name in ("kind", "step", "params_sha256")},
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "sha256": hashlib.sha256(program).hexdigest(),
    }
    Path(path).write_bytes(program)
    Path(f"{path}.json").write_text(json.dumps(about, indent=1))


def check(path: str | Path, model: Model) -> float:
    """Runs a saved program on noise, in two batch sizes, and holds it against the model.

    Returns:
        The largest error; of ids the share that differs.

    Raises:
        OSError: a file is missing.
        ValueError: the file is damaged, of another model or not for this device, or the error is
            above `MAX_ERROR`.
    """
    program, about = Path(path).read_bytes(), json.loads(Path(f"{path}.json").read_text())
    if hashlib.sha256(program).hexdigest() != about["sha256"]:
        raise ValueError(f"{path} is not the file that {path}.json is about; export it again")
    if about["source"]["params_sha256"] != model.source["params_sha256"]:
        raise ValueError(
            f"{path} was exported from other weights ({about['source']['params_sha256'][:12]}) than"
            f" {model.source['path']} has ({model.source['params_sha256'][:12]})"
        )
    exported = jax.export.deserialize(bytearray(program))
    if (here := jax.export.default_export_platform()) not in exported.platforms:
        raise ValueError(
            f"{path} is for {', '.join(exported.platforms)}, and this is {here}: check it there, or"
            f" export it for {here} too"
        )
    what, samples, error = exported.fun_name, exported.in_avals[0].shape[1], 0.0
    for batch in (1, 3):
        noise = np.random.default_rng(batch).uniform(-0.5, 0.5, (batch, samples))
        waveforms = noise.astype(np.float32)
        got, wanted = np.asarray(exported.call(waveforms)), _reference(model, waveforms, what)
        wrong = np.mean(got != wanted) if what == "ids" else np.max(np.abs(got - wanted))
        error = max(error, float(wrong))
    if not error <= MAX_ERROR[what]:
        raise ValueError(
            f"{path} is {error:.2g} off the model's {what}; at most {MAX_ERROR[what]} was expected"
        )
    return error


def _reference(model: Model, waveforms: np.ndarray, what: str) -> np.ndarray:
    """What the model gives in place of the program."""
    if what == "features":
        return model.extract_features(waveforms)[0]
    if what == "logits":
        return model.classify(waveforms)[0]
    return model.tokenize(waveforms)
