"""Files as people have them: every container, odd rates, damage, hours; and arrays of every kind.

What was written must come back, streamed the same bits as at once; what cannot, in one clear line.
"""

import os
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import librosa
import ml_dtypes
import numpy as np
import pytest
import soundfile

from beats_jax.data.audio import as_waveform, audio_blocks, read_audio
from beats_jax.fbank import fbank

RATES = [8000, 11025, 12345, 16000, 22050, 24000, 32000, 44100, 48000, 96000, 192000]


def sine(rate: int = 16000, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.9, 0.9, shape).astype(np.float32)


def joined(path: Path, seconds: float) -> np.ndarray:
    return np.concatenate(list(audio_blocks(path, seconds)))


# --- streamed and whole ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", RATES)
def test_streamed_is_bit_equal_to_one_shot(tmp_path, rate, channels, monkeypatch):
    path = tmp_path / "a.wav"
    samples = noise(int(0.41 * rate) + 7, channels)
    soundfile.write(path, samples, rate, subtype="FLOAT")
    mono = samples.mean(axis=1)
    expected = librosa.resample(mono, orig_sr=rate, target_sr=16000, res_type="soxr_hq")
    for chunk in (1 << 20, 3001):  # decoded in one piece and in many
        monkeypatch.setattr("beats_jax.data.audio.CHUNK", chunk)
        waveform, sample_rate = read_audio(path)
        assert sample_rate == 16000 and waveform.dtype == np.float32
        np.testing.assert_array_equal(waveform, expected)
        for seconds in (0.0001, 0.03, 0.1, 0.41, 60.0):
            np.testing.assert_array_equal(joined(path, seconds), expected)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("samples", [0, 1, 2, 7, 100])
def test_length_of_the_shortest_files(tmp_path, rate, samples):
    """ceil(n * 16000 / rate) as librosa has it; a header without sound is no error."""
    soundfile.write(tmp_path / "a.wav", noise(samples), rate, subtype="FLOAT")
    waveform, _ = read_audio(tmp_path / "a.wav")
    expected = librosa.resample(noise(samples), orig_sr=rate, target_sr=16000, res_type="soxr_hq")
    np.testing.assert_array_equal(waveform, expected)


def test_block_lengths(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(16000), 16000)
    assert [len(block) for block in audio_blocks(tmp_path / "a.wav", 0.3)] == [4800] * 3 + [1600]
    assert [len(block) for block in audio_blocks(tmp_path / "a.wav", 0.5)] == [8000, 8000]
    assert [len(block) for block in audio_blocks(tmp_path / "a.wav")] == [16000]
    for seconds in (0, -1, 1e-5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"seconds is .*; give the length of a block"):
            audio_blocks(tmp_path / "a.wav", seconds)


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize(
    ("name", "subtype"), [("a.mp3", None), ("a.ogg", "VORBIS"), ("a.ogg", "OPUS"), ("a.flac", None)]
)
def test_compressed_files_do_not_depend_on_the_chunks(tmp_path, name, subtype, rate, monkeypatch):
    """soundfile seeks after each read, which spoils an MP3 read in pieces: ours must not."""
    rate = 48000 if subtype == "OPUS" else rate
    soundfile.write(tmp_path / name, noise(2 * rate, 2), rate, subtype=subtype)
    whole, _ = read_audio(tmp_path / name)
    monkeypatch.setattr("beats_jax.data.audio.CHUNK", 2500)
    np.testing.assert_array_equal(read_audio(tmp_path / name)[0], whole)
    samples, _ = soundfile.read(tmp_path / name, dtype="float32")
    expected = samples.mean(axis=1)
    expected = librosa.resample(expected, orig_sr=rate, target_sr=16000, res_type="soxr_hq")
    # soundfile.read begins with a seek to 0; after that, libmpg123 rounds a little differently.
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-6 if name == "a.mp3" else 0)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """10 minutes of 44.1 kHz stereo: 106 MB on disk, 212 MB as float32."""
    path = tmp_path / "long.wav"
    second = (noise(44100, 2) * 32767).astype(np.int16)
    with soundfile.SoundFile(path, "w", 44100, 2, "PCM_16") as file:
        for _ in range(600):
            file.write(second)
    tracemalloc.start()
    total = sum(len(block) for block in audio_blocks(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    path.unlink()  # pytest keeps the folders of three runs
    assert total == 600 * 16000
    assert peak < 30e6


# --- containers -----------------------------------------------------------------------------------

EXACT_BITS = {
    **{"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32},
    **{"ALAC_16": 16, "ALAC_20": 20, "ALAC_24": 24, "ALAC_32": 32, "FLOAT": 24, "DOUBLE": 24},
    **{"DWVW_16": 16, "DWVW_24": 24},
}
# Subtypes made for the telephone or for one rate; every other is written at 16 kHz.
OWN_RATE = {"OPUS": 48000, "GSM610": 8000, "G721_32": 8000, "G723_24": 8000, "G723_40": 8000}
OWN_RATE |= {"NMS_ADPCM_16": 8000, "NMS_ADPCM_24": 8000, "NMS_ADPCM_32": 8000}
FORMAT_RATE = {"WVE": 8000, "VOC": 8000, "XI": 44100}
# soundfile reads back something else too: 8 and 24 bit are written wrongly from floats.
WRITTEN_WRONGLY = {("SDS", "PCM_S8"), ("SDS", "PCM_24")}


def written(path: Path, format: str, subtype: str, rate: int) -> bool:
    try:
        soundfile.write(path, sine(rate), rate, subtype=subtype, format=format)
    except soundfile.LibsndfileError:  # e.g. MPEG layer I can only be read
        return False
    return True


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The largest normalised cross-correlation within 30 ms: codecs delay."""
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    middle = b[480 : n - 480] / np.linalg.norm(b[480 : n - 480])
    windows = np.lib.stride_tricks.sliding_window_view(a, len(middle))
    return float((windows @ middle / np.linalg.norm(windows, axis=1)).max())


@pytest.mark.parametrize("format", sorted(set(soundfile.available_formats()) - {"RAW"}))
def test_every_format_gives_what_was_written(tmp_path, format):
    tested = 0
    for subtype in soundfile.available_subtypes(format):
        path = tmp_path / f"{subtype}.{format.lower()}"
        rate = FORMAT_RATE.get(format, OWN_RATE.get(subtype, 16000))
        if (format, subtype) in WRITTEN_WRONGLY or not written(path, format, subtype, rate):
            continue
        waveform, _ = read_audio(path)
        if rate == 16000 and subtype in EXACT_BITS:
            step = max(2.0 / 2 ** EXACT_BITS[subtype], 1e-6)
            np.testing.assert_allclose(waveform, sine(), rtol=0, atol=step, err_msg=subtype)
        else:
            assert correlation(waveform, sine()) > 0.99, subtype
            assert abs(len(waveform) - 8000) < 1000, subtype  # whole packets
        tested += 1
    assert tested


def test_suffix_does_not_matter(tmp_path):
    soundfile.write(tmp_path / "a.flac", sine(), 16000)
    expected, _ = read_audio(tmp_path / "a.flac")
    for name in ("a", "a.wav", "a.mp3", "ä ö.txt", os.fsdecode(b"latin-\xe9.wav")):
        os.replace(tmp_path / "a.flac", tmp_path / name)
        np.testing.assert_array_equal(read_audio(tmp_path / name)[0], expected)
        os.replace(tmp_path / name, tmp_path / "a.flac")


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(8000),
        np.clip(8 * sine(), -1, 1),
        6 * sine(),  # peaks of 3.0
        np.eye(1, 8000)[0],
    ],
    ids=["silence", "clipped", "over full scale", "click"],
)
def test_levels_stay(tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="DOUBLE")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav")[0], samples.astype(np.float32))


# --- what cannot be read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; copy"),
        (b"Dear diary, today I renamed a text file.\n", "soundfile cannot decode it .*install it"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "soundfile cannot decode it"),
        (np.random.default_rng(0).bytes(3000), "soundfile cannot decode it"),
    ],
    ids=["empty", "text", "half a header", "random"],
)
def test_not_audio(tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.wav: {message}") as raised:
        read_audio(tmp_path / "a.wav")
    assert "\n" not in str(raised.value)


def test_paths_that_are_no_file(tmp_path):
    """The path is checked at the call, before the first block is asked for."""
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/none.wav: No such file.*check"):
        audio_blocks(tmp_path / "none.wav")
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path}: is a folder; give"):
        audio_blocks(tmp_path)
    (tmp_path / "a.wav").touch()
    with pytest.raises(NotADirectoryError, match=r"a\.wav/b\.wav: Not a directory"):
        audio_blocks(tmp_path / "a.wav/b.wav")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is a pipe or a device; save"):
        audio_blocks(tmp_path / "pipe")
    (tmp_path / "a.raw").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"a\.raw: .raw is sound without a header"):
        read_audio(tmp_path / "a.raw")
    if os.geteuid():
        (tmp_path / "a.wav").write_bytes(b"secret")
        (tmp_path / "a.wav").chmod(0)
        with pytest.raises(PermissionError, match=r"a\.wav: Permission denied; make"):
            audio_blocks(tmp_path / "a.wav")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_not_finite_says_where(tmp_path, bad):
    samples = sine(44100)
    samples[11025] = bad
    soundfile.write(tmp_path / "a.wav", samples, 44100, subtype="DOUBLE")
    with pytest.raises(ValueError, match=r"a\.wav: has samples .*finite.* first at 0\.250 s"):
        read_audio(tmp_path / "a.wav")


def test_integers_kept_as_floats(tmp_path):
    """As scipy.io.wavfile.write makes them of a float array that was never scaled."""
    soundfile.write(tmp_path / "a.wav", 20000 * sine(), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav: has a peak of 10000, .*divide by 32768"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("part", [0.01, 0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "format", ["WAV", "AIFF", "AU", "CAF", "W64", "RF64", "FLAC", "OGG", "MP3"]
)
def test_cut_off_file_gives_what_soundfile_finds(tmp_path, monkeypatch, format, part):
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg
    path = tmp_path / "a"
    soundfile.write(path, noise(8000), 16000, format=format)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    try:
        expected, _ = soundfile.read(path, dtype="float32")
    except soundfile.LibsndfileError:
        with pytest.raises(ValueError, match=f"^{path}: .*(cannot decode|is damaged)"):
            read_audio(path)
    else:
        np.testing.assert_allclose(read_audio(path)[0], expected, rtol=0, atol=1e-6)


def test_damage_in_the_middle_comes_after_the_blocks_before(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(16000 * 25), 16000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])
    blocks = audio_blocks(path, 10.0)
    assert [len(next(blocks)) for _ in range(2)] == [160000, 160000]
    with pytest.raises(ValueError, match=r"a\.flac: is damaged somewhere after 20\.0 s"):
        next(blocks)


# --- ffmpeg ---------------------------------------------------------------------------------------


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch) -> Path:
    """A stand-in: notes its arguments and gives out answer.au, its length unknown, as a pipe."""
    samples = np.stack([sine(44100), np.zeros(22050)], 1).astype(np.float32)
    answer = tmp_path / "answer.au"
    soundfile.write(answer, samples, 44100, subtype="FLOAT", endian="BIG")
    content = answer.read_bytes()
    answer.write_bytes(content[:8] + b"\xff" * 4 + content[12:])
    program = tmp_path / "bin/ffmpeg"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat {answer}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "clip.m4a").write_bytes(b"something else")
    return program


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_ffmpeg_decodes_what_soundfile_cannot(tmp_path, ffmpeg):
    before = open_files()
    waveform, _ = read_audio(tmp_path / "clip.m4a")
    np.testing.assert_array_equal(waveform, read_audio(tmp_path / "answer.au")[0])
    assert correlation(waveform, sine()) > 0.999 and len(waveform) == 8000
    np.testing.assert_array_equal(joined(tmp_path / "clip.m4a", 0.1), waveform)
    arguments = (tmp_path / "arguments").read_text()
    assert f"-i file:{tmp_path}/clip.m4a -map 0:a:0 -c:a pcm_f32be -f au -" in arguments
    blocks = audio_blocks(tmp_path / "clip.m4a", 0.1)
    next(blocks)
    del blocks  # given up half-way
    assert open_files() == before


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo '[in#0 @ 0x5] no moov atom' >&2; echo Error >&2; exit 1", "ffmpeg: no moov atom;"),
        ("exit 0", "ffmpeg: nothing;"),
        ("echo no sound at all", "what ffmpeg makes of it cannot be read"),
    ],
)
def test_ffmpeg_fails(tmp_path, ffmpeg, script, message):
    before = open_files()
    ffmpeg.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(ValueError, match=rf"clip\.m4a: .*{message}") as raised:
        read_audio(tmp_path / "clip.m4a")
    del raised
    assert open_files() == before


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int8", [-128, 0, 64, 127]),
        ("uint8", [0, 128, 192, 255]),
        ("int16", [-(2**15), 0, 2**14, 2**15 - 1]),
        ("int32", [-(2**31), 0, 2**30, 2**31 - 2**24]),
        (">i2", [-(2**15), 0, 2**14, 2**15 - 1]),
    ],
)
def test_integers_are_pcm(dtype, values):
    waveform = as_waveform(np.array(values, dtype))
    assert waveform.dtype == np.float32 and waveform.dtype.isnative
    assert waveform.tolist()[:3] == [-1.0, 0.0, 0.5] and 0.99 < waveform[3] < 1.0


def test_int16_gives_the_log_mel_that_fbank_gives():
    pcm = (noise(2, 16000) * 32767).astype(np.int16)
    np.testing.assert_array_equal(fbank(as_waveform(pcm)), fbank(pcm))


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64", ">f4"])
def test_floats_are_taken_as_they_are(dtype):
    x = (3 * noise(2, 500)).astype(dtype)
    waveform = as_waveform(x)
    assert waveform.dtype == np.float32 and waveform.dtype.isnative
    np.testing.assert_array_equal(waveform, x.astype(np.float32))


def test_arrays_of_other_kinds():
    x = noise(100)
    assert as_waveform(x) is x
    np.testing.assert_array_equal(as_waveform(jnp.asarray(x)), x)
    np.testing.assert_array_equal(as_waveform(jnp.asarray(x, jnp.bfloat16)), x.astype("bfloat16"))
    np.testing.assert_array_equal(as_waveform(x.tolist()), x)
    np.testing.assert_array_equal(as_waveform(x[::-2]), x[::-2])
    for empty in ([], np.empty((0, 100), np.float32), np.empty((3, 0), np.int16)):
        assert as_waveform(empty).shape == np.shape(empty)


class OnTheGpu:
    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(9, np.int64), "int64; int64 has no full scale: divide by it .* or give int16"),
        ([0, 1, 2], "int64; int64 has no full scale"),
        (np.zeros(9, bool), "bool; true and false"),
        (np.zeros(9, np.uint16), "uint16; pass floats in .*int16, int32, int8 or uint8"),
        (np.zeros(9, np.complex64), "complex64; pass the signal, not its spectrum"),
        (np.array([None]), "object; its rows"),
        ([[0.1, 0.2], [0.3]], "list that numpy cannot take .*; pass a numpy array"),
        (OnTheGpu(), r"OnTheGpu that numpy cannot take \(can't convert.*x\.detach\(\)\.cpu\(\)"),
        ("a.wav", r"the path a\.wav; read it first with read_audio"),
        (Path("a.wav"), r"the path a\.wav; read it"),
        (0.5, r"shape \(\); pass \[T\] or \[B, T\]"),
        (np.zeros((1, 2, 3)), r"shape \(1, 2, 3\); .*waveform\.mean\(axis=\.\.\.\)"),
        (np.zeros((16000, 2)), r"shape \(16000, 2\); .*waveform\.mean\(axis=\.\.\.\)"),
        ([0.0, np.nan], "not finite"),
        (np.array([0, np.inf], np.float16), "not finite"),
        ([0.0, -1e300], "not finite"),
        (
            [0.0, -65.0],
            "float64 with a peak of 65, .*integer PCM stored as floats; divide by 32768",
        ),
        (jnp.asarray([20000.0], jnp.bfloat16), "bfloat16 with a peak of 19968"),
    ],
)
def test_refused_arrays(x, message):
    with pytest.raises(
        ValueError, match=f"^waveform (is|is a|is the|has|has samples that are) {message}"
    ):
        as_waveform(x)


def test_loud_floats_pass():
    assert as_waveform([64.0, -64.0]).tolist() == [64.0, -64.0]
