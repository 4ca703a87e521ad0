"""What `beats-jax benchmark` measures: every part of the package as a call that can be repeated.

Weights are random and sounds are noise, so that nothing has to be there; what runs is what trains
and what users call: the stages of the configs, the loop's own compiled step, the compiled program
of `inference`, the pipeline and the checkpoints.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from jax.sharding import Mesh, NamedSharding

from beats_jax import sharding
from beats_jax.data.pipeline import eval_batches
from beats_jax.data.sources import Clips, join, open_clips
from beats_jax.fbank import MEAN, SAMPLE_RATE, STD, fbank, num_tokens
from beats_jax.flops import encoder_flops, fbank_flops, tokenizer_flops
from beats_jax.inference import exact_products, forward
from beats_jax.labels import Labels
from beats_jax.models.beats import PRESETS, BEATs
from beats_jax.models.encoder import attend, attend_in_parts
from beats_jax.models.fused_attention import fused_attend, supported
from beats_jax.models.quantizer import l2_normalise
from beats_jax.models.tokenizer import Tokenizer
from beats_jax.roofline import cores, device_bytes
from beats_jax.stages import Pretrained, compute_dtype

# --what -> the config it comes from, and the stage in it.
TRAINING = {
    "pretrain": ("iter1", "pretrain"),
    "distill": ("iter2", "tokenizer"),
    "finetune": ("finetune_esc50", "finetune"),
}
WHATS = (
    *("fbank", "encode", "tokenize", *TRAINING, "masking", "attention"),
    *("pipeline", "compile", "checkpoint"),
)
TOKENS = ("random", "distilled", "stored")
NUM_CLASSES = 50  # of fine-tuning, as ESC-50
NUM_CODES, CODE_DIM = 1024, 256
EPOCHS = 4  # of the clips that a pipeline reads in a call


class Settings(NamedTuple):
    """What to measure; the fields are the command's flags.

    Attributes:
        what: one of `WHATS`.
        size: one of `PRESETS`.
        batch_size: clips in the global batch.
        seconds: length of a clip.
        dtype: "float32", "bfloat16" or "auto".
        mesh: sizes of the axes `data`, `fsdp` and `tensor`.
        tokens: pre-training's: "random" projection, "distilled" in the step, or "stored".
        backend: of the pipeline, "tf" (log-mel on the host) or "numpy" (in the step).
    """

    what: str
    size: str = "base"
    batch_size: int = 8
    seconds: float = 10.0
    dtype: str = "auto"
    mesh: dict[str, int] = {"data": -1, "fsdp": 1, "tensor": 1}  # noqa: RUF012 - never changed
    tokens: str = "random"
    backend: str = "tf"


class Workload(NamedTuple):
    """A part of the package that can be run again and again.

    Attributes:
        name: of its row.
        call: runs it once and returns what to wait for.
        clips: that one call takes.
        flops: of one call (`flops`); 0 = nothing to speak of, or not counted.
        figures: what was measured in making it: `trace_s`, `compile_s`, `device_bytes`, …
        fed: steps fed by the pipeline: their number -> the share of the time spent waiting.
    """

    name: str
    call: Callable[[], Any]
    clips: int
    flops: float = 0.0
    figures: dict[str, float] = {}  # noqa: RUF012 - never changed
    fed: Callable[[int], float] | None = None


def check(settings: Settings) -> None:
    """Raises ValueError for what cannot be measured, saying what can."""
    for field, known in (("what", WHATS), ("size", PRESETS), ("tokens", TOKENS)):
        if (value := getattr(settings, field)) not in known:
            raise ValueError(f'--{field} "{value}" is unknown; use one of {", ".join(known)}')
    compute_dtype(settings.dtype)
    if settings.batch_size < 1:
        raise ValueError(f"--batch-size is {settings.batch_size}; want at least 1")
    if not 0.175 <= settings.seconds <= 3600:
        raise ValueError(f"--seconds is {settings.seconds}; want 0.175 (one token) to 3600")


def make_mesh(settings: Settings) -> Mesh:
    """The settings' mesh; where no axis takes the rest, over the first devices only.

    Raises:
        ValueError: there are fewer devices.
    """
    sizes = settings.mesh.values()
    wanted, there = math.prod(sizes), jax.devices()
    if min(sizes) > 0 and wanted <= len(there):
        there = there[:wanted]
    try:
        return sharding.make_mesh(**settings.mesh, devices=there)
    except ValueError as error:
        asked = ",".join(f"{axis}={size}" for axis, size in settings.mesh.items())
        raise ValueError(
            f"--mesh {asked} does not fit {len(there)} devices; sizes must multiply to it, or to "
            "fewer; -1 is what is left"
        ) from error


# --- inputs and models ----------------------------------------------------------------------------


def noise(settings: Settings) -> np.ndarray:
    """Waveforms float32 [B, T] in [-1, 1]."""
    shape = (settings.batch_size, round(settings.seconds * SAMPLE_RATE))
    return np.random.default_rng(0).normal(0, 0.1, shape).clip(-1, 1).astype(np.float32)


def noise_clips(settings: Settings) -> Clips:
    """A batch of clips in memory, with labels or stored tokens where the step wants them."""
    pcm = np.round(noise(settings) * 32767).astype(np.int16)
    size, rng = len(pcm), np.random.default_rng(1)
    names = [f"noise_{i}" for i in range(size)]
    labels = token_ids = None
    if settings.what == "finetune":
        ids = rng.integers(0, NUM_CLASSES, (size, 1), np.int16)
        labels = Labels(tuple(f"class_{i}" for i in range(NUM_CLASSES)), ids)
    if settings.what == "pretrain" and settings.tokens == "stored":
        shape = (size, int(num_tokens(pcm.shape[1])))
        token_ids = rng.integers(0, NUM_CODES, shape).astype(np.uint16)
    return Clips(
        ids=names,
        num_samples=np.full(size, pcm.shape[1], np.int64),
        columns={},
        digests=names,
        read=pcm.__getitem__,
        records=np.arange(size),
        token_ids=token_ids,
        labels=labels,
    )


def random_model(size: str, kind: str = "encoder", dtype: Any = jnp.float32) -> Pretrained:
    """An untrained encoder, or a tokenizer with a random codebook; arrays of numpy."""
    encoder = BEATs(**PRESETS[size], dtype=dtype)
    patches, codebook = jnp.zeros((1, 8, 256)), None
    if kind == "tokenizer":
        net: Any = Tokenizer(encoder, CODE_DIM)
        params = jax.jit(net.init)(jax.random.key(0), patches)["params"]
        rows = jax.random.normal(jax.random.key(1), (NUM_CODES, CODE_DIM))
        codebook = np.asarray(l2_normalise(rows))
    else:
        params = {"encoder": jax.jit(encoder.init)(jax.random.key(0), patches)["params"]}
    params = jax.tree.map(np.asarray, params)
    source = {"path": "random weights", "kind": kind, "step": 0, "lineage": {}}
    return Pretrained(kind, encoder, params, codebook, MEAN, STD, source)


# --- compiled programs ----------------------------------------------------------------------------


def compiled(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, float]]:
    """A jitted function, compiled for these arguments, and what that took: s, and bytes."""
    begin = time.perf_counter()
    lowered = function.lower(*args, **kwargs)
    middle = time.perf_counter()
    program = lowered.compile()
    figures = {"trace_s": middle - begin, "compile_s": time.perf_counter() - middle}
    return program, figures | device_bytes(program)


def front_ends(settings: Settings, mesh: Mesh) -> list[Workload]:
    """The log-mel in a compiled program, by numpy, and by TensorFlow as tf.data's workers do it."""
    waveform, clips = noise(settings), settings.batch_size
    on_device = jax.device_put(waveform, NamedSharding(mesh, sharding.BATCH))
    program, figures = compiled(jax.jit(fbank), on_device)
    flops = clips * fbank_flops(waveform.shape[1], jax.default_backend())
    rows = [
        Workload("fbank, jax", lambda: program(on_device), clips, flops, figures),
        Workload("fbank, numpy", lambda: fbank(waveform), clips, flops),
    ]
    if settings.backend == "tf":
        from beats_jax.data.pipeline import import_tensorflow

        tf = import_tensorflow()
        graph = tf.function(lambda x: fbank(x), autograph=False)
        tensor = tf.constant(waveform)
        rows.append(Workload("fbank, tf", lambda: graph(tensor).numpy(), clips, flops))
    return rows


def inference(settings: Settings, mesh: Mesh) -> Workload:
    """Waveforms in, features or tokens out: the program behind `load(…)` and the commands.

    Clips of the exact length, without the padding up to a size that is compiled already.
    """
    kind = "tokenizer" if settings.what == "tokenize" else "encoder"
    model = random_model(settings.size, kind, compute_dtype(settings.dtype))
    arrays: Any = dict(model.params)
    if model.codebook is not None:
        arrays["codebook"] = model.codebook
    arrays = jax.device_put(arrays, sharding.tree_shardings(arrays, mesh))
    waveform = noise(settings)
    tokens = int(num_tokens(waveform.shape[1]))
    inputs = jax.device_put(
        (waveform, np.zeros((settings.batch_size, tokens), bool)),
        NamedSharding(mesh, sharding.BATCH),
    )
    what = dict(what="ids") if kind == "tokenizer" else dict(what="features")
    layer = {} if kind == "tokenizer" else dict(layer=model.model.num_layers)
    with exact_products(model.model):
        program, figures = compiled(
            forward, model.model, MEAN, STD, arrays, *inputs, **what, **layer
        )
    flops = encoder_flops(model.model, tokens)
    if kind == "tokenizer":
        flops = tokenizer_flops(Tokenizer(model.model, CODE_DIM), tokens, NUM_CODES)
    clips = settings.batch_size
    name = f"{settings.what} {settings.size}, beats_jax"
    return Workload(name, lambda: program(arrays, *inputs), clips, clips * flops, figures)


def attentions(settings: Settings, mesh: Mesh) -> list[Workload]:
    """A layer's attention between its projections, forward and with all gradients.

    In one piece, as XLA compiles it; in a CPU's parts (forward, all that they are used for); by
    GPU kernels, where those run.
    """
    encoder, batch = BEATs(**PRESETS[settings.size]), settings.batch_size
    heads, dim = encoder.num_heads, encoder.embed_dim
    tokens = int(num_tokens(round(settings.seconds * SAMPLE_RATE)))
    dtype = compute_dtype(settings.dtype)
    keys = jax.random.split(jax.random.key(0), 5)
    x = batch, tokens, heads, dim // heads
    q, k, v = (jax.random.normal(key, x).astype(dtype) / 2 for key in keys[:3])
    gate = jax.random.uniform(keys[3], (batch, heads, tokens), maxval=2.0)
    bias = jax.random.normal(keys[4], (1, heads, tokens, tokens))
    rows = jax.device_put((q, k, v, gate), NamedSharding(mesh, sharding.BATCH))
    args = *rows, jax.device_put(bias, sharding.replicated(mesh)), None

    def with_gradients(function):
        def both(*args):
            out, back = jax.vjp(lambda *args: function(*args, None), *args[:-1])
            return out, back(out)

        return both

    ways: dict[str, Any] = {"in one piece": attend}
    if jax.default_backend() == "cpu":
        ways["in parts"] = attend_in_parts
    if supported(q, bias):
        ways["by kernels"] = fused_attend

    def workload(name: str, function: Any, passes: int) -> Workload:
        program, figures = compiled(jax.jit(sharding.on(mesh, function)), *args)
        name, flops = f"attention {settings.size}, {name}", 4 * batch * tokens**2 * dim
        return Workload(name, functools.partial(program, *args), batch, passes * flops, figures)

    workloads = []
    for name, function in ways.items():
        workloads.append(workload(name, function, 1))
        if function is not attend_in_parts:
            workloads.append(workload(f"{name}, with gradients", with_gradients(function), 3))
    return workloads


# --- pipeline -------------------------------------------------------------------------------------


def temporary_folder(owner: Any) -> Path:
    """A folder that goes when `owner` does, or the process."""
    folder = tempfile.mkdtemp(prefix="beats_jax_benchmark_")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def pipelines(settings: Settings, mesh: Mesh) -> list[Workload]:
    """Batches from shards that `prepare` has just written: int16 alone, and with log-mel patches.

    A call reads a whole small set, from its start to its last batch: nothing is made ahead of it.
    """
    del mesh
    from beats_jax.data.prepare import prepare

    def batches(backend: str, frontend: str) -> list[Any]:
        return list(
            eval_batches(
                clips,
                backend=backend,
                frontend=frontend,
                batch_size=settings.batch_size,
                clip_samples=round(settings.seconds * SAMPLE_RATE),
                workers=cores(),
            )
        )

    folder = temporary_folder(batches)
    (folder / "sounds").mkdir()
    for i, waveform in enumerate(noise(settings)):
        soundfile.write(folder / "sounds" / f"{i}.wav", waveform, SAMPLE_RATE)
    prepare(folder / "sounds", folder / "prepared", jobs=1)
    clips = join({str(i): open_clips(folder / "prepared") for i in range(EPOCHS)})
    rows = {"numpy, int16": ("numpy", "device"), "numpy, log-mel": ("numpy", "host")}
    if settings.backend == "tf":
        rows["tf, log-mel"] = ("tf", "host")
    return [
        Workload(f"pipeline {name}", functools.partial(batches, *how), len(clips))
        for name, how in rows.items()
    ]
