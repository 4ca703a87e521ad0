"""The log-mel front end: Kaldi's 128-bin filter bank, batched, for numpy, jax and TensorFlow.

One definition of the constants (float64 numpy) and one body, `_log_mel`, which takes the array
module as an argument. It reproduces `torchaudio.compliance.kaldi.fbank` with the settings of the
official BEATs code (`method.md` section 2): 25 ms povey window, 10 ms shift, no dither,
pre-emphasis 0.97 after the frame's mean is removed, power spectrum, 20-8000 Hz, log with a
float32-eps floor.

Once the mean is out, all up to the spectrum is linear: ONE matrix [400, 2*256]. TPUs use it; CPUs
and GPUs use an FFT in its place, about 1.5 times as fast on a CPU, 2.2 times on an H200.

A frame never depends on what surrounds it: a clip alone, in a batch or in a longer buffer gives
the same bits. A matrix product of BLAS, Eigen or XLA:CPU does not promise that, for the order of
its sums depends on the number of rows; CPUs therefore multiply fixed blocks of `BLOCK` frames.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

SAMPLE_RATE = 16000  # Hz
FRAME_LENGTH = 400  # samples, 25 ms
FRAME_SHIFT = 160  # samples, 10 ms
NUM_MELS = 128
PATCH_SIZE = 16  # frames and mel bins
BANDS = NUM_MELS // PATCH_SIZE  # patches in one time column
MIN_SAMPLES = FRAME_LENGTH + (PATCH_SIZE - 1) * FRAME_SHIFT  # 2800: one time column
MEAN, STD = 15.41663, 6.55582  # of AudioSet's log-mel values, from the official code

FFT_LENGTH = 512
NUM_BINS = FFT_LENGTH // 2  # Kaldi's mel banks leave the Nyquist bin out
PREEMPHASIS = 0.97
PCM_SCALE = 32768.0  # the official code scales float audio to the int16 range
EPSILON = np.finfo(np.float32).eps
# Frames in one matrix product on a CPU. 8 * 256 * 128 multiplications is as much as OpenBLAS does
# without waking its threads, which fight with the threads around us and cost more than they bring.
BLOCK = 8


def _povey_window() -> np.ndarray:
    """[400] float64: a symmetric Hann window to the power 0.85."""
    return np.hanning(FRAME_LENGTH) ** 0.85


def _mel_banks() -> np.ndarray:
    """[256, 128] float64: triangles in the mel domain, 20-8000 Hz.

    The bins are 31.25 Hz apart, so filter 3 falls between two of them and is all zero: it always
    reads log(EPSILON), in torchaudio and in the official models too.
    """

    def mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(20.0), mel(SAMPLE_RATE / 2), NUM_MELS + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.arange(NUM_BINS) * SAMPLE_RATE / FFT_LENGTH)[:, None]
    return np.maximum(
        0.0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    )


def _dft_matrix() -> np.ndarray:
    """[400, 512] float64: pre-emphasis, window, DFT; real parts of bins 0-255, then imaginary."""
    preemphasis = np.eye(FRAME_LENGTH) - PREEMPHASIS * np.eye(FRAME_LENGTH, k=-1)
    preemphasis[0, 0] = 1.0 - PREEMPHASIS  # Kaldi repeats the first sample to the left
    cycles = np.outer(np.arange(FRAME_LENGTH), np.arange(NUM_BINS)) % FFT_LENGTH
    angle = 2.0 * np.pi / FFT_LENGTH * cycles
    dft = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    return (_povey_window()[:, None] * preemphasis).T @ dft


WINDOW = _povey_window().astype(np.float32)  # [400]
MEL_BANKS = _mel_banks().astype(np.float32)  # [256, 128]
DFT_MATRIX = _dft_matrix().astype(np.float32)  # [400, 512]


def num_frames(num_samples: Any) -> Any:
    """Frames of 400 samples, 160 apart, that lie wholly in the clip (0 below 400 samples).

    Args:
        num_samples: an int, or an integer array of numpy, jax or TensorFlow.
    """
    at_least = max if isinstance(num_samples, int) else _array_module(num_samples).maximum
    overlap = FRAME_LENGTH - FRAME_SHIFT
    return (at_least(num_samples, overlap) - overlap) // FRAME_SHIFT


def num_tokens(num_samples: Any) -> Any:
    """Tokens of a clip: 8 for each time column of 16 whole frames. Argument as `num_frames`."""
    return num_frames(num_samples) // PATCH_SIZE * BANDS


def fbank(waveform: Any, mean: float = MEAN, std: float = STD) -> Any:
    """Normalised Kaldi log-mel filter bank.

    Args:
        waveform: [..., T], 16 kHz mono: float32 or float64 in [-1, 1], or int16 PCM (32768 = 1.0).
            An array of numpy, jax (also while tracing) or TensorFlow; T must be static.
        mean, std: of the corpus's un-normalised log-mel values (`beats-jax stats` measures them).

    Returns:
        [..., F, 128] float32, F = num_frames(T): (log-mel - mean) / (2 * std), in the same library.
        On a CPU the bits of a frame depend on its own 400 samples only (accelerators may choose
        another kernel for another shape).

    Raises:
        ValueError: no sample axis, or another dtype: half precision has too few bits for audio.
    """
    xp = _array_module(waveform)
    waveform = xp.asarray(waveform)
    dtype = waveform.dtype.name
    if dtype not in ("float32", "float64", "int16"):
        raise ValueError(f"waveform is {dtype}; pass float32 or float64 in [-1, 1], or int16 PCM")
    if len(waveform.shape) == 0 or waveform.shape[-1] is None:
        raise ValueError(f"waveform has shape {waveform.shape}; pass [..., T] with a known T")
    *lead, num_samples = _sizes(waveform)
    scale = np.float32(1.0 if dtype == "int16" else PCM_SCALE)
    waveform = xp.reshape(waveform, (-1 if -1 in lead else math.prod(lead), num_samples))
    log_mel = _PATHS[_library(waveform)](xp.asarray(waveform, dtype=np.float32) * scale)
    log_mel = xp.reshape(log_mel, (*lead, _num_blocks(num_samples) * BLOCK, NUM_MELS))
    log_mel = log_mel[..., : num_frames(num_samples), :]
    # A divisor no compiler can see through: XLA and TensorFlow would multiply by the reciprocal of
    # a constant, and its last bit is not torch's quotient (silence would be 3e-6 off in log units).
    divisor = xp.where(xp.isnan(log_mel), np.float32(np.nan), np.float32(2.0 * std))
    return (log_mel - np.float32(mean)) / divisor


def patchify(fbank: Any) -> Any:
    """Cuts [..., F, 128] into patches [..., 8 * (F // 16), 256], without the last F % 16 frames.

    Token t * 8 + f is time column t, band f (0 = lowest); its pixels are time-major (16 x 16).
    """
    xp = _array_module(fbank)
    *lead, frames, _ = _sizes(fbank)
    columns = frames // PATCH_SIZE
    pixels = fbank[..., : columns * PATCH_SIZE, :]
    pixels = xp.reshape(pixels, (*lead, columns, PATCH_SIZE, BANDS, PATCH_SIZE))
    pixels = xp.swapaxes(pixels, -3, -2)  # [..., columns, 8 bands, 16 frames, 16 mels]
    return xp.reshape(pixels, (*lead, columns * BANDS, PATCH_SIZE * PATCH_SIZE))


def unpatchify(patches: Any) -> Any:
    """The inverse of `patchify`: [..., L, 256] to [..., 2 * L, 128]; L is a multiple of 8."""
    xp = _array_module(patches)
    *lead, length, _ = _sizes(patches)
    columns = length // BANDS
    pixels = xp.reshape(patches, (*lead, columns, BANDS, PATCH_SIZE, PATCH_SIZE))
    pixels = xp.swapaxes(pixels, -3, -2)  # [..., columns, 16 frames, 8 bands, 16 mels]
    return xp.reshape(pixels, (*lead, columns * PATCH_SIZE, NUM_MELS))


def _num_blocks(num_samples: int) -> int:
    return -(-num_frames(num_samples) // BLOCK)


def _frame(xp: Any, waveform: Any) -> Any:
    """Overlapping frames of [N, T] in whole blocks, [N * blocks, BLOCK, 400]; zeros fill the last.

    Slices in place of a gather: a frame is two rows of 160 samples and half the third, the next
    starts one row on.
    """
    size, num_samples = waveform.shape
    frames = _num_blocks(num_samples) * BLOCK
    rows = frames + 2
    missing = max(rows * FRAME_SHIFT - num_samples, 0)
    waveform = xp.pad(waveform[:, : rows * FRAME_SHIFT], ((0, 0), (0, missing)), "constant")
    rows = xp.reshape(waveform, (size, rows, FRAME_SHIFT))
    half = FRAME_LENGTH - 2 * FRAME_SHIFT
    parts = [rows[:, :-2], rows[:, 1:-1], rows[:, 2:, :half]]
    frame_shape = (size * frames // BLOCK, BLOCK, FRAME_LENGTH)
    return xp.reshape(xp.concatenate(parts, axis=-1), frame_shape)


def _log_mel(xp: Any, frames: Any, power: Callable, matmul: Callable) -> Any:
    """The whole front end once the frames are cut: [..., 400] of PCM size to [..., 128]."""
    frames = frames - xp.mean(frames, axis=-1, keepdims=True)
    return xp.log(xp.maximum(matmul(power(frames), MEL_BANKS), EPSILON))


def _power_by_matrix(frames: Any, matmul: Callable) -> Any:
    """Power spectrum [..., 256] of centred frames [..., 400], as one matrix product."""
    spectrum = matmul(frames, DFT_MATRIX)
    return spectrum[..., :NUM_BINS] ** 2 + spectrum[..., NUM_BINS:] ** 2


def _power_by_fft(xp: Any, frames: Any, rfft: Callable) -> Any:
    """The same by FFT; `rfft(x, 512)` pads with zeros."""
    previous = xp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    frames = frames - np.float32(PREEMPHASIS) * previous
    frames = frames * xp.broadcast_to(WINDOW, frames.shape)
    spectrum = rfft(frames, FFT_LENGTH)[..., :NUM_BINS]
    return xp.square(xp.real(spectrum)) + xp.square(xp.imag(spectrum))


def _numpy_log_mel(waveform: np.ndarray) -> np.ndarray:
    """[N, T] to [N, blocks * BLOCK, 128], clip by clip: a clip's temporaries fit the cache."""
    # Of float32 several times as fast as numpy's; here, for it takes as long to import as numpy.
    import scipy.fft

    power = functools.partial(_power_by_fft, np, rfft=scipy.fft.rfft)
    clips = [_log_mel(np, _frame(np, clip[None]), power, np.matmul) for clip in waveform]
    return np.stack(clips) if clips else np.empty((0, NUM_MELS), np.float32)


def _jax_log_mel(waveform: Any) -> Any:
    """[N, T] to [N * blocks, BLOCK, 128], in float32 whatever the default matmul precision is."""
    return _compiled_jax_log_mel()(waveform)


@functools.cache
def _compiled_jax_log_mel() -> Callable:
    import jax
    import jax.numpy as jnp

    matmul = functools.partial(
        jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    by_fft = functools.partial(_power_by_fft, jnp, rfft=jnp.fft.rfft)
    by_matrix = functools.partial(_power_by_matrix, matmul=matmul)

    def on_cpu(frames):  # a scan: the compiler merges the products of an unrolled or batched one
        return jax.lax.map(lambda block: _log_mel(jnp, block, by_fft, matmul), frames)

    def on_tpu(frames):
        return _log_mel(jnp, frames, by_matrix, matmul)

    def on_gpu(frames):
        return _log_mel(jnp, frames, by_fft, matmul)

    @jax.jit
    def log_mel(waveform):
        frames = _frame(jnp, waveform)
        return jax.lax.platform_dependent(frames, cpu=on_cpu, tpu=on_tpu, default=on_gpu)

    return log_mel


def _tensorflow_log_mel(waveform: Any) -> Any:
    """[N, T] to [N, blocks, BLOCK, 128], clip by clip as for numpy."""
    import tensorflow as tf

    tnp = tf.experimental.numpy

    def rfft(frames, length):
        # tf.signal.rfft pads by itself, but not an empty batch.
        padding = [[0, 0], [0, 0], [0, length - frames.shape[-1]]]
        return tf.signal.rfft(tf.pad(frames, padding), [length])

    power = functools.partial(_power_by_fft, tnp, rfft=rfft)
    return tf.map_fn(
        lambda clip: _log_mel(tnp, _frame(tnp, clip[None]), power, tf.matmul), waveform
    )


def _library(x: Any) -> str:
    """The library an array belongs to. One that is not imported yet cannot have made it."""
    jax, tensorflow = sys.modules.get("jax"), sys.modules.get("tensorflow")
    if jax is not None and isinstance(x, jax.Array):
        return "jax"
    if tensorflow is not None and tensorflow.is_tensor(x):
        return "tensorflow"
    return "numpy"


_PATHS = {"numpy": _numpy_log_mel, "jax": _jax_log_mel, "tensorflow": _tensorflow_log_mel}


def _array_module(x: Any) -> Any:
    library = _library(x)
    if library == "jax":
        import jax.numpy

        return jax.numpy
    if library == "tensorflow":
        import tensorflow

        return tensorflow.experimental.numpy
    return np


def _sizes(x: Any) -> list[int]:
    """The shape of an array, -1 for a size that TensorFlow does not know yet."""
    return [-1 if size is None else size for size in x.shape]
