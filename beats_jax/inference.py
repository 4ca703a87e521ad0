"""What users call: `load` a model, then features, frames, class scores or tokens of waveforms.

Lengths are padded up to a few sizes (`bucket`), so that clips of any length run on a handful of
compiled programs; what is padded is masked, and cut off again. Masks are worked out in numpy, from
the caller's own lengths, before anything is padded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from beats_jax import labels as audioset
from beats_jax.data.audio import as_waveform
from beats_jax.fbank import (
    BANDS,
    FRAME_SHIFT,
    MIN_SAMPLES,
    NUM_MELS,
    PATCH_SIZE,
    SAMPLE_RATE,
    fbank,
    num_frames,
    num_tokens,
    patchify,
)
from beats_jax.models.beats import BEATs, official_frame_mask, official_token_mask
from beats_jax.models.quantizer import quantize
from beats_jax.models.tokenizer import Tokenizer
from beats_jax.pretrained import load_model
from beats_jax.stages import Pretrained, compute_dtype

log = logging.getLogger("beats_jax")

MASK_MODES = ("exact", "official")
TOKENS_AT_ONCE = 512
# What an answer needs of a model's arrays, and what a model without it lacks.
PARTS = {
    "features": ("encoder", "features"),
    "logits": ("head", "class scores; load a fine-tuned model"),
    "ids": ("codebook", "acoustic tokens; load a tokenizer"),
}
COLUMN_SECONDS = PATCH_SIZE * FRAME_SHIFT / SAMPLE_RATE  # 0.16
FIRST_CENTRE = MIN_SAMPLES / 2 / SAMPLE_RATE  # 0.0875 s: the middle of the first column's samples


def load(path: str | Path, mask_mode: str = "exact", precision: str = "float32") -> Model:
    """Opens a model: an exported folder, a stage folder (`…@STEP`), or an official `.pt` file.

    Args:
        path: where it lies.
        mask_mode: what `padding_mask` means by default: "exact" or "official" (see `Model`).
        precision: of the computation: "float32", "bfloat16", or "auto" (bfloat16 on accelerators).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: it is no model, is damaged, or would not load completely.
    """
    _check_mask_mode(mask_mode)
    pretrained = load_model(path)
    model = pretrained.model.clone(dtype=compute_dtype(precision), remat="")
    return Model(pretrained._replace(model=model), mask_mode)


class Inputs(NamedTuple):
    """What a compiled program takes, and how to cut its answer to what was asked.

    Attributes:
        audio: [B, N'] waveform or [B, F', 128] fbank, padded to a bucket.
        key_mask: bool [B, L'], True = not to be seen.
        token_mask: bool [B, L], True = padding: the caller's.
        single: the caller gave no batch axis.
        exact: padding is returned as zeros.
    """

    audio: np.ndarray
    key_mask: np.ndarray
    token_mask: np.ndarray
    single: bool
    exact: bool


class Model:
    """A trained model. `waveform` is 16 kHz mono everywhere.

    Float samples lie in [-1, 1]; int16 is read as PCM. Shape [B, N], or [N]: then results have no
    batch axis either. Instead of it `fbank=` may be given: normalised log-mel, float [B, F, 128] or
    [F, 128]. `padding_mask` is bool of the same leading shape, True = padding: one entry a sample,
    or with `fbank` one a frame. L = 8 * T' tokens in time-major order, T' = F // 16 columns. Arrays
    of any library come in, numpy arrays go out: float32, whatever the precision of the computation.

    Two ways to treat padding, `mask_mode`:

    - "exact": it has to lie to the right. A column of tokens counts only if all its frames lie in
      valid samples. What is padding is not seen by anything, and comes back as zeros: a padded
      batch gives what each clip gives alone. A clip under 2800 samples has no token: zeros.
    - "official": token masks by the official code's rule, which takes tokens as linear in time;
      padded rows keep what that code computes there.

    Attributes:
        kind: "encoder", "finetuned" or "tokenizer".
        labels: class names of a fine-tuned model in the order of its logits.
        task: "multi-label" (probabilities by sigmoid), "single-label" (softmax), or "".
        num_layers, embed_dim: of the encoder.
        source: where it comes from: path, kind, step, params_sha256, lineage.
    """

    def __init__(self, pretrained: Pretrained, mask_mode: str = "exact"):
        self._net, self._mask_mode = pretrained.model, mask_mode
        self._mean, self._std = float(pretrained.mean), float(pretrained.std)
        keep = ("encoder", "head", "quantize_layer_0", "quantize_layer_2")
        arrays = {name: pretrained.params[name] for name in keep if name in pretrained.params}
        if pretrained.codebook is not None:
            arrays["codebook"] = pretrained.codebook
        self._arrays = jax.device_put(jax.tree.map(np.asarray, arrays))
        # One copy of the weights: on the device, without what only training uses.
        params = {name: part for name, part in self._arrays.items() if name != "codebook"}
        self.pretrained = pretrained._replace(params=params)
        self.kind, self.task, self.source = pretrained.kind, pretrained.task, pretrained.source
        self.labels = audioset.names(pretrained.labels)
        self.num_layers, self.embed_dim = self._net.num_layers, self._net.embed_dim

    def __repr__(self) -> str:
        return f"<beats_jax model: {self.kind} of {self.num_layers} layers, {self.source['path']}>"

    def extract_features(
        self,
        waveform: Any = None,
        padding_mask: Any = None,
        layer: int | None = None,
        *,
        fbank: Any = None,
        mask_mode: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features of every patch, and which of them are padding.

        The official method of this name returns class probabilities for a fine-tuned model; this
        one returns features of any model, and `classify` the probabilities.

        Args:
            layer: 0 = input of the first block, N = last output; the last by default.

        Returns:
            x [B, L, D], token_mask bool [B, L] (True = padding; always an array).

        Raises:
            ValueError: the layer, the waveform or the mask is not what is described here.
        """
        layer = self.check_layer(layer)
        inputs = self._inputs(waveform, padding_mask, fbank, mask_mode)
        x = self._run("features", inputs, layer)
        return _cut(x, inputs), _cut(inputs.token_mask, inputs)

    def all_layers(
        self,
        waveform: Any = None,
        padding_mask: Any = None,
        *,
        fbank: Any = None,
        mask_mode: str | None = None,
    ) -> np.ndarray:
        """[N + 1, B, L, D]: the input of the first block, then the output of every block."""
        inputs = self._inputs(waveform, padding_mask, fbank, mask_mode)
        x = self._run("features", inputs)
        x = x[:, :, : inputs.token_mask.shape[1]]
        return x[:, 0] if inputs.single else x

    def frames(
        self,
        waveform: Any = None,
        padding_mask: Any = None,
        layer: int | None = None,
        *,
        fbank: Any = None,
        mask_mode: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features in time: x [B, T', 8, D] (bands from low to high), times [T'] in seconds.

        A time is the middle of its column: 0.0875 + 0.16 t.
        """
        x, _ = self.extract_features(
            waveform, padding_mask, layer, fbank=fbank, mask_mode=mask_mode
        )
        x = x.reshape(*x.shape[:-2], -1, BANDS, x.shape[-1])
        return x, times(x.shape[-3])

    def classify(
        self,
        waveform: Any = None,
        padding_mask: Any = None,
        *,
        fbank: Any = None,
        mask_mode: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Class scores of whole clips, from a fine-tuned model.

        Returns:
            logits and probs, float32 [B, C], named by `labels`. The logits are the mean over a
            clip's tokens; a clip without a token has zeros in both.
        """
        inputs = self._inputs(waveform, padding_mask, fbank, mask_mode)
        per_token = self._run("logits", inputs)[:, : inputs.token_mask.shape[1]]
        valid = ~inputs.token_mask[..., None]
        count = valid.sum(axis=1)
        logits = per_token.sum(axis=1, where=valid) / np.maximum(count, 1, dtype=np.float32)
        probs = np.where(count > 0, self.probabilities(logits), np.float32(0))
        return (logits[0], probs[0]) if inputs.single else (logits, probs)

    def tokenize(
        self,
        waveform: Any = None,
        padding_mask: Any = None,
        *,
        fbank: Any = None,
        mask_mode: str | None = None,
    ) -> np.ndarray:
        """Acoustic tokens, from a tokenizer: int32 [B, T', 8], bands from low to high.

        Padding is -1; with mask_mode "official" it keeps the id that the official code gives it.
        """
        inputs = self._inputs(waveform, padding_mask, fbank, mask_mode)
        ids = _cut(self._run("ids", inputs), inputs)
        if inputs.exact:
            ids = np.where(_cut(inputs.token_mask, inputs), np.int32(-1), ids)
        return ids.reshape(*ids.shape[:-1], -1, BANDS)

    def by_column(
        self, what: str, waveforms: np.ndarray, num_samples: np.ndarray, layer: int | None = None
    ) -> np.ndarray:
        """One value a column, for windows of long audio (`windows`); exact mode.

        Args:
            what: "features" [B, T', 8, D], zeros where padding; "logits" [B, T', C], the column's
                mean, or "ids" [B, T', 8], both anything where padding.
            waveforms: float32 [B, N], as long as `bucket` columns are.
            num_samples: int [B], the valid samples of each row.
            layer: of the features.
        """
        length = num_tokens(waveforms.shape[1])
        mask = np.arange(length) >= num_tokens(num_samples)[:, None]
        inputs = Inputs(waveforms, mask, mask, False, True)
        values = self._run(what, inputs, self.check_layer(layer) if what == "features" else None)
        values = values.reshape(len(waveforms), -1, BANDS, *values.shape[2:])
        return values.mean(axis=2) if what == "logits" else values

    def probabilities(self, logits: Any) -> Any:
        """Probabilities of logits [..., C]: sigmoid or softmax, by the model's task."""
        if self.task == "single-label":
            return scipy.special.softmax(logits, axis=-1)
        return scipy.special.expit(logits)

    # --- how it is done ---

    def check_layer(self, layer: int | None) -> int:
        """`layer` as it is, None as the last one; a ValueError where there is no such layer."""
        layer = self.num_layers if layer is None else layer
        if not 0 <= layer <= self.num_layers:
            raise ValueError(
                f"layer {layer} is not one of 0 (input) to {self.num_layers} (last output)"
            )
        return layer

    def _run(self, what: str, inputs: Inputs, layer: int | None = None) -> np.ndarray:
        part, meaning = PARTS[what]
        if part not in self._arrays:
            raise ValueError(f"{self.source['path']} is of kind {self.kind}: it has no {meaning}")
        with exact_products(self._net):
            values = forward(
                *(self._net, self._mean, self._std, self._arrays, inputs.audio, inputs.key_mask),
                what=what,
                layer=layer,
                zero_padding=inputs.exact,
            )
        # Cut in numpy, not in JAX, which would compile a program for every length.
        return np.asarray(values)

    def _inputs(self, waveform: Any, padding_mask: Any, fbank: Any, mode: str | None) -> Inputs:
        mode = _check_mask_mode(self._mask_mode if mode is None else mode)
        if (waveform is None) == (fbank is None):
            raise ValueError("give either waveform or fbank=")
        audio = as_waveform(waveform) if fbank is None else _as_fbank(fbank)
        single = audio.ndim == (1 if fbank is None else 2)
        audio = audio[None] if single else audio
        size = audio.shape[:2]
        if not size[0]:
            raise ValueError(f"the batch is {audio.shape}: no clip in it")
        mask = None if padding_mask is None else _as_mask(padding_mask, size, single)
        frames = num_frames(size[1]) if fbank is None else size[1]
        length = BANDS * (frames // PATCH_SIZE)
        if mask is None:
            token_mask = np.zeros((size[0], length), bool)
        elif mode == "exact":
            valid = _valid_lengths(mask)
            tokens = num_tokens(valid) if fbank is None else BANDS * (valid // PATCH_SIZE)
            token_mask = np.arange(length) >= tokens[:, None]
        else:
            rule = official_token_mask if fbank is None else official_frame_mask
            token_mask = rule(mask, frames)
            if length and token_mask.all(axis=1).any():
                rows = np.flatnonzero(token_mask.all(axis=1)).tolist()
                raise ValueError(f"rows {rows} are padding alone; official mode gives NaN for them")
        if (empty := int(np.sum(token_mask.all(axis=1)))) and mode == "exact":
            log.warning(
                "%d of %d clips have under %d valid samples and so no token: zeros",
                *(empty, size[0], MIN_SAMPLES),
            )
        columns = bucket(length // BANDS)
        audio = _pad(audio, samples_of(columns) if fbank is None else columns * PATCH_SIZE)
        return Inputs(audio, _pad_mask(token_mask, columns), token_mask, single, mode == "exact")


# --- the compiled program -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("net", "mean", "std", "what", "layer", "zero_padding"))
def forward(
    net: BEATs,
    mean: float,
    std: float,
    arrays: Any,
    audio: jax.Array,
    key_mask: jax.Array,
    *,
    what: str,
    layer: int | None = None,
    zero_padding: bool = True,
) -> jax.Array:
    """One pass, front end included; compiled for each architecture, bucket and batch size.

    Args:
        net: the encoder.
        mean, std: the log-mel's normalisation.
        arrays: `encoder`; for logits also `head`, for ids `quantize_layer_0`, `_2` and `codebook`.
        audio: waveform [B, N] or fbank [B, F, 128].
        key_mask: bool [B, L], True = not to be seen.
        what: "features", "logits" or "ids".
        layer: of the features; None = all of them.
        zero_padding: as in `BEATs`.

    Returns:
        features float32 [B, L, D] of the layer, or [N + 1, B, L, D] of all; logits float32
        [B, L, C] of every token; or ids int32 [B, L].
    """
    answer = functools.partial(_forward, net, mean, std, arrays, what, layer, zero_padding)
    size = clips_at_once(audio.shape[0], key_mask.shape[1])
    if size == audio.shape[0]:
        return answer(audio, key_mask)
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (audio, key_mask))
    values = jax.lax.map(lambda part: answer(*part), parts)
    if values.ndim == 5:  # of all layers
        values = jnp.moveaxis(values, 0, 1)
        return values.reshape(values.shape[0], -1, *values.shape[3:])
    return values.reshape(-1, *values.shape[2:])


def clips_at_once(batch: int, length: int) -> int:
    """How many clips of `length` tokens go through the model side by side.

    All of them on an accelerator. On a CPU about 512 tokens: more make no matrix product faster,
    and what lies between two products no longer fits the caches (and takes memory).
    """
    if jax.default_backend() != "cpu" or not isinstance(batch, int):  # any batch size: an export
        return batch
    wanted = TOKENS_AT_ONCE // max(length, 1)
    return next(n for n in range(1, batch + 1) if batch % n == 0 and (n >= wanted or n == batch))


def _forward(
    net: BEATs,
    mean: float,
    std: float,
    arrays: Any,
    what: str,
    layer: int | None,
    zero_padding: bool,
    audio: jax.Array,
    key_mask: jax.Array,
) -> jax.Array:
    patches = patchify(audio if audio.ndim == 3 else fbank(audio, mean=mean, std=std))
    options: dict[str, Any] = dict(zero_padding=zero_padding)
    if what == "ids":
        params = {name: arrays[name] for name in arrays if name != "codebook"}
        tokenizer = Tokenizer(net, arrays["codebook"].shape[1])
        vectors: Any = tokenizer.apply({"params": params}, patches, key_mask, **options)
        return quantize(vectors, arrays["codebook"]).ids
    options["all_layers"] = what == "features" and layer != net.num_layers
    x: Any = net.apply({"params": arrays["encoder"]}, patches, key_mask, **options)
    x = x.astype(jnp.float32)
    if what == "logits":
        return x @ arrays["head"]["kernel"] + arrays["head"]["bias"]
    return x[layer] if options["all_layers"] and layer is not None else x


def exact_products(net: BEATs) -> contextlib.AbstractContextManager[Any]:
    """A context in which a float32 model multiplies in float32: accelerators use TF32 or less."""
    return jax.default_matmul_precision("highest" if net.dtype == jnp.float32 else None)


# --- lengths and masks ----------------------------------------------------------------------------


def bucket(columns: int) -> int:
    """The number of columns a clip is padded to: 1, 2, 3, 4, then four sizes an octave."""
    if columns <= 4:
        return max(columns, 1)
    step = 2 ** ((columns - 1).bit_length() - 3)
    return -(-columns // step) * step


def times(columns: int, first: int = 0) -> np.ndarray:
    """Middle of each column in seconds, float64 [columns]."""
    return FIRST_CENTRE + COLUMN_SECONDS * np.arange(first, first + columns)


def samples_of(columns: int) -> int:
    """Samples that just hold this many columns: 2560 a column, and 240."""
    return MIN_SAMPLES + (columns - 1) * PATCH_SIZE * FRAME_SHIFT


def _cut(x: Any, inputs: Inputs) -> Any:
    """[B, L', …] to the caller's [B, L, …] or [L, …]."""
    x = x[:, : inputs.token_mask.shape[1]]
    return x[0] if inputs.single else x


def _pad(audio: np.ndarray, size: int) -> np.ndarray:
    """[B, n, …] to [B, size, …]: zeros added, or what is beyond the last whole column cut off."""
    audio = audio[:, :size]
    return np.pad(audio, [(0, 0), (0, size - audio.shape[1])] + [(0, 0)] * (audio.ndim - 2))


def _pad_mask(token_mask: np.ndarray, columns: int) -> np.ndarray:
    more = BANDS * columns - token_mask.shape[1]
    return np.pad(token_mask, [(0, 0), (0, more)], constant_values=True)


def _check_mask_mode(mode: str) -> str:
    if mode not in MASK_MODES:
        raise ValueError(f'mask_mode is {mode!r}; want "exact" or "official"')
    return mode


def _as_fbank(x: Any) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim not in (2, 3) or x.shape[-1] != NUM_MELS or x.dtype.kind != "f":
        raise ValueError(
            f"fbank is {x.dtype} {x.shape}; want float [B, F, {NUM_MELS}] or [F, {NUM_MELS}]"
        )
    if not np.isfinite(x).all():
        raise ValueError("fbank has values that are not finite")
    return x.astype(np.float32)


def _as_mask(padding_mask: Any, size: Sequence[int], single: bool) -> np.ndarray:
    mask = np.asarray(padding_mask)
    mask = mask[None] if single and mask.ndim == 1 else mask
    if mask.dtype != np.bool_ or mask.shape != tuple(size):
        raise ValueError(
            f"padding_mask is {mask.dtype} {mask.shape}; want bool {tuple(size)}, True = padding "
            "(one entry a sample of waveform, or a frame of fbank)"
        )
    return mask


def _valid_lengths(mask: np.ndarray) -> np.ndarray:
    """int [B] of a right-padding mask."""
    valid = np.sum(~mask, axis=1)
    if not np.array_equal(mask, np.arange(mask.shape[1]) >= valid[:, None]):
        rows = np.flatnonzero(np.any(mask[:, :-1] & ~mask[:, 1:], axis=1)).tolist()
        raise ValueError(
            f"padding_mask has valid samples after padding in rows {rows}; exact mode takes "
            'padding to the right only (mask_mode="official" takes any mask)'
        )
    return valid
