"""The front end: torchaudio's values on every path, bits, precision, shapes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from beats_jax.fbank import MEAN, STD, fbank, num_frames, num_tokens, patchify, unpatchify

pytestmark = pytest.mark.usefixtures("strict_promotion")
FRONT_END: Any = sys.modules["beats_jax.fbank"]  # beats_jax.fbank itself is the function
FIXTURE = np.load(Path(__file__).parent / "fixtures" / "fbank.npz")
LOG_UNITS = 2 * STD  # of one normalised unit


@pytest.fixture
def accelerator_code(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """jax takes the branch that it compiles for TPUs, or for GPUs."""
    branch = {"tpu": "tpu", "cuda": "default"}[request.param]
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, **of: of[branch](x))
    FRONT_END._compiled_jax_log_mel.cache_clear()
    yield
    FRONT_END._compiled_jax_log_mel.cache_clear()


def _jit(waveform: np.ndarray, **kwargs) -> np.ndarray:
    return np.asarray(jax.jit(lambda x: fbank(x, **kwargs))(waveform))


def _eager_jax(waveform: np.ndarray, **kwargs) -> np.ndarray:
    return np.asarray(fbank(jnp.asarray(waveform), **kwargs))


def _tensorflow(waveform: np.ndarray, **kwargs) -> np.ndarray:
    import tensorflow as tf

    return tf.function(fbank)(tf.constant(waveform), **kwargs).numpy()


def _eager_tensorflow(waveform: np.ndarray, **kwargs) -> np.ndarray:
    import tensorflow as tf

    return fbank(tf.constant(waveform), **kwargs).numpy()


PATHS = {
    "numpy": fbank,
    "jit": _jit,
    "jax": _eager_jax,
    "tf.function": _tensorflow,
    "tf": _eager_tensorflow,
}
all_paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def _assert_parity(path: Callable) -> None:
    """The tolerances of the fixtures, in log units."""
    for name in ("chirp_1s", "speech_3p27s", "noise_10s", "silence_0p2s"):
        got, wanted = path(FIXTURE[f"{name}/waveform"]), FIXTURE[f"{name}/fbank"]
        assert got.shape == wanted.shape and got.dtype == np.float32
        error = np.abs(got.astype(np.float64) - wanted) * LOG_UNITS
        if name == "silence_0p2s":
            assert error.max() <= 1e-6
        else:
            assert error.mean() <= 3e-5
            assert np.quantile(error, 0.999) <= 2e-3
            assert error.max() <= 5e-2


@all_paths
def test_parity_with_torchaudio(path):
    _assert_parity(path)


@pytest.mark.usefixtures("accelerator_code")
@pytest.mark.parametrize("accelerator_code", ["cuda", "tpu"], indirect=True)
def test_parity_of_the_accelerators_code():
    _assert_parity(_jit)


@pytest.mark.usefixtures("accelerator_code")
@pytest.mark.parametrize("accelerator_code", ["tpu"], indirect=True)
def test_the_tolerances_see_a_matrix_in_bfloat16(monkeypatch):
    rounded = FRONT_END.DFT_MATRIX.astype(jnp.bfloat16).astype(np.float32)
    monkeypatch.setattr(FRONT_END, "DFT_MATRIX", rounded)
    FRONT_END._compiled_jax_log_mel.cache_clear()
    with pytest.raises(AssertionError):
        _assert_parity(_jit)


def test_constants():
    # torchaudio computes both in float32.
    np.testing.assert_allclose(FRONT_END.MEL_BANKS.T, FIXTURE["mel_banks_128x256"], atol=2e-5)
    np.testing.assert_allclose(FRONT_END.WINDOW, FIXTURE["povey_window_400"], atol=1e-6)
    assert not FRONT_END.MEL_BANKS[:, 3].any()  # the empty filter stays
    assert np.flatnonzero(~FRONT_END.MEL_BANKS.any(axis=0)).tolist() == [3]
    impulse = np.zeros(400)
    impulse[200] = 1.0  # pre-emphasis, window and DFT of a unit impulse, by hand
    emphasised = np.zeros(400)
    emphasised[200:202] = 1.0, -0.97
    wanted = np.fft.rfft(emphasised * np.hanning(400) ** 0.85, 512)[:256]
    got = impulse @ FRONT_END.DFT_MATRIX
    np.testing.assert_allclose(got[:256] + 1j * got[256:], wanted, atol=1e-6)


@all_paths
def test_digital_silence_and_the_empty_filter_read_the_floor(path, waveforms):
    floor = np.float32((np.log(np.finfo(np.float32).eps) - MEAN) / LOG_UNITS)
    assert floor == pytest.approx(-2.3917, abs=1e-4)
    assert (path(waveforms["silence"]) == floor).all()
    noise = path(waveforms["noise"])
    assert (noise[:, 3] == floor).all() and (noise[:, 11:] > floor + 0.1).all()


# Rows in the products: 1 to 178 frames a clip, in and beyond whole blocks of 8.
LENGTHS = (400, 561, 1680, 2800, 7777, 16001, 28800)


@pytest.mark.parametrize("name", ["numpy", "jit", "tf.function"])
def test_a_frame_has_the_same_bits_wherever_it_stands(name, waveforms):
    path = PATHS[name]
    clip = waveforms["speech"] + waveforms["noise"]
    alone = {length: path(clip[:length]) for length in LENGTHS}
    for rows in (1, 2, 7):
        # Row 0 noise, the others clips of all lengths in turn, right-padded with zeros.
        batch = np.zeros((rows + len(LENGTHS), clip.size), np.float32)
        batch[:rows] = waveforms["noise"]
        for row, length in enumerate(LENGTHS, rows):
            batch[row, :length] = clip[:length]
        together = path(batch)
        for row, length in enumerate(LENGTHS, rows):
            frames = num_frames(length)
            assert alone[length].shape == (frames, 128)
            np.testing.assert_array_equal(together[row, :frames], alone[length])
    longest = path(clip)  # the rest of the buffer may hold anything
    for length in LENGTHS:
        np.testing.assert_array_equal(longest[: num_frames(length)], alone[length])


def test_a_sharded_batch_has_the_same_bits(waveforms):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batch = np.stack([np.roll(waveforms["speech"][:8000], 100 * i) for i in range(8)])
    sharded = jax.jit(fbank, in_shardings=sharding, out_shardings=sharding)(batch)
    np.testing.assert_array_equal(np.asarray(sharded), _jit(batch))


@all_paths
def test_int16_is_pcm(path, waveforms):
    pcm = np.round(waveforms["speech"] * 32767).astype(np.int16)
    np.testing.assert_array_equal(path(pcm), path(pcm.astype(np.float32) / 32768))


@all_paths
def test_mean_and_std_by_argument(path, waveforms):
    log_mel = path(waveforms["noise"], mean=0.0, std=0.5)
    assert log_mel.mean() > 10.0
    got = path(waveforms["noise"], mean=11.5, std=10.0)
    np.testing.assert_allclose(got, (log_mel - 11.5) / 20.0, atol=1e-6)


@all_paths
def test_any_leading_axes_and_short_clips(path, waveforms):
    clip = waveforms["chirp"][:2800]
    wanted = path(clip)
    nested = path(np.stack([np.stack([clip] * 3)] * 2))
    assert nested.shape == (2, 3, 16, 128)
    np.testing.assert_array_equal(nested, np.broadcast_to(wanted, nested.shape))
    assert path(np.zeros((2, 399), np.float32)).shape == (2, 0, 128)
    assert path(np.zeros((0, 2800), np.float32)).shape == (0, 16, 128)


def test_float64_is_rounded_once(waveforms):
    clip = waveforms["speech"]
    np.testing.assert_array_equal(fbank(clip.astype(np.float64)), fbank(clip))


def test_nan_in_a_frame_stays_nan_there(waveforms):
    clip = waveforms["noise"].copy()
    clip[5000] = np.nan
    for path in (fbank, _jit):
        bad = np.isnan(path(clip)).all(axis=1)
        assert np.flatnonzero(bad).tolist() == [29, 30, 31]  # the frames that hold sample 5000


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.int32, np.uint8])
def test_other_dtypes_are_refused(dtype):
    import tensorflow as tf

    samples = np.zeros(400, dtype)
    for waveform in (samples, jnp.asarray(samples), tf.constant(samples)):
        with pytest.raises(ValueError, match=rf"{np.dtype(dtype).name}; pass float32 .* int16 PCM"):
            fbank(waveform)


def test_shapes_that_cannot_be_audio_are_refused():
    import tensorflow as tf

    with pytest.raises(ValueError, match=r"shape \(\); pass \[\.\.\., T\]"):
        fbank(np.float32(0.0))
    unknown = tf.function(fbank, input_signature=[tf.TensorSpec([None, None], tf.float32)])
    with pytest.raises(ValueError, match="with a known T"):
        unknown.get_concrete_function()
    known = tf.function(fbank, input_signature=[tf.TensorSpec([None, 2800], tf.float32)])
    assert known.get_concrete_function().output_shapes.as_list() == [None, 16, 128]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.mark.parametrize("precision", ["bfloat16", "tensorfloat32", "float32"])
def test_no_default_precision_reaches_the_products(precision, waveforms):
    batch = np.stack([waveforms["speech"], waveforms["chirp"]])
    wanted = _jit(batch)
    with jax.default_matmul_precision(precision):
        np.testing.assert_array_equal(_jit(batch), wanted)
        equations = list(_equations(jax.make_jaxpr(fbank)(batch)))
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert len(products) == 4  # spectrum by matrix on a TPU; mel banks there, on GPUs, on CPUs
    for equation in products:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
        assert equation.params["preferred_element_type"] == np.float32
    kinds = {v.aval.dtype.name for e in equations for v in (*e.invars, *e.outvars)}
    assert kinds <= {"float32", "complex64", "bool", "int32"}


@pytest.mark.parametrize(("platform", "ffts"), [("cuda", 1), ("tpu", 0)])
def test_accelerators_compute_at_highest_precision(platform, ffts):
    with jax.default_matmul_precision("bfloat16"):
        traced = jax.jit(fbank).trace(jax.ShapeDtypeStruct((2, 16000), np.float32))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 2 - ffts and text.count("stablehlo.fft") == ffts
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert "stablehlo.while" not in text and "bf16" not in text


@pytest.mark.parametrize(
    ("samples", "frames", "tokens"),
    [
        *[(0, 0, 0), (399, 0, 0), (400, 1, 0), (559, 1, 0), (560, 2, 0), (2799, 15, 0)],
        *[(2800, 16, 8), (16000, 98, 48), (32000, 198, 96), (80000, 498, 248)],
        *[(160000, 998, 496), (480000, 2998, 1496)],
    ],
)
def test_counts(samples, frames, tokens):
    assert (num_frames(samples), num_tokens(samples)) == (frames, tokens)
    assert fbank(np.zeros(samples, np.float32)).shape == (frames, 128)


def test_counts_of_arrays():
    import tensorflow as tf

    samples = np.array([0, 399, 400, 2800, 160000], np.int32)
    tokens = [0, 0, 0, 8, 496]
    assert num_tokens(samples).tolist() == tokens
    on_device = jax.jit(num_tokens)(samples)
    assert on_device.tolist() == tokens and on_device.dtype == np.int32
    assert tf.function(num_tokens)(tf.constant(samples)).numpy().tolist() == tokens
    assert num_tokens(samples.astype(np.uint32)).tolist() == tokens


def test_patches_are_time_major():
    import tensorflow as tf

    frames = np.arange(2 * 39 * 128, dtype=np.float32).reshape(2, 39, 128)
    patches = patchify(frames)
    assert patches.shape == (2, 16, 256)
    for column, band, i, j in ((0, 0, 0, 0), (1, 3, 5, 11), (0, 7, 15, 15)):
        pixel = patches[1, column * 8 + band, i * 16 + j]
        assert pixel == frames[1, column * 16 + i, band * 16 + j]
    np.testing.assert_array_equal(unpatchify(patches), frames[:, :32])
    for convert in (jnp.asarray, tf.constant):
        np.testing.assert_array_equal(np.asarray(patchify(convert(frames))), patches)
        np.testing.assert_array_equal(np.asarray(unpatchify(convert(patches))), frames[:, :32])
    assert patchify(frames[0, :15]).shape == (0, 256)
