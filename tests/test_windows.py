"""Long audio in windows: cut and merged as defined, equal to one pass where one window suffices."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import official
import pytest
import soundfile

from beats_jax import inference, windows
from beats_jax.checkpoint import tree_sha256
from beats_jax.exported import save_exported
from beats_jax.fbank import MEAN, STD, num_tokens
from beats_jax.inference import Model, samples_of
from beats_jax.models.beats import PRESETS, BEATs
from beats_jax.stages import Pretrained
from beats_jax.windows import Merger, Scores, cut, run

WINDOW, HOP = 8, 3  # columns; recordings here are short
SIZES = [(w, h) for w in (1, 2, 5) for h in range(1, w + 1)]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def encoder() -> Model:
    return inference.load(official.FIXTURES / "dev_encoder.pt")


@pytest.fixture(scope="module")
def finetuned() -> Model:
    return inference.load(official.FIXTURES / "dev_finetuned.pt")


@pytest.fixture(scope="module")
def tokenizer() -> Model:
    return inference.load(official.FIXTURES / "dev_tokenizer.pt")


def noise(columns: int, more: int = 0, seed: int = 0) -> np.ndarray:
    """A recording of so many columns, and some samples that fill no other."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.5, 0.5, samples_of(columns) + more).astype(np.float32)


def blocks(waveform: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(waveform, range(size, len(waveform), size))


def starts(columns: int, window: int, hop: int) -> list[int]:
    """First columns of the windows, by definition: every hop, and one that ends with the audio."""
    last = max(columns - window, 0)
    return [*range(0, last, hop), last]


def joined(pieces) -> tuple[np.ndarray, np.ndarray]:
    values, times = zip(*pieces, strict=True)
    return np.concatenate(values), np.concatenate(times)


# --- cut ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "hop"), SIZES)
def test_windows_are_where_they_belong(window, hop):
    for columns, more in itertools.product(range(1, 14), (0, 1, 2559)):
        waveform = noise(columns, more)
        parts = list(cut([waveform], window, hop))
        size = min(columns, window)
        assert [part.first for part in parts] == starts(columns, window, hop)
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        for part in parts:
            first = part.first * 2560
            assert part.columns == size
            np.testing.assert_array_equal(part.waveform, waveform[first : first + samples_of(size)])


@pytest.mark.parametrize("size", [1, 999, 2560, 10**6])
def test_size_of_the_blocks_does_not_matter(size):
    waveform = noise(9, 100)
    expected, parts = list(cut([waveform], 4, 3)), list(cut(blocks(waveform, size), 4, 3))
    assert [part.first for part in parts] == [part.first for part in expected] == [0, 3, 5]
    for part, other in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part.waveform, other.waveform)


@pytest.mark.parametrize("samples", [0, 1, 2799])
def test_too_short(encoder, samples):
    waveform = np.zeros(samples, np.float32)
    message = f"has {samples} samples at 16 kHz and so no token; give at least 2800"
    with pytest.raises(ValueError, match=f"^a.wav {message}"):
        list(cut([waveform], name="a.wav"))
    with pytest.raises(ValueError, match=f"^the waveform {message}"):
        next(windows.frames(encoder, waveform))


@pytest.mark.parametrize(("window", "hop"), [(4, 0), (4, 5), (0, 0)])
def test_sizes_that_make_no_sense(window, hop):
    with pytest.raises(ValueError, match=f"window is {window} and hop {hop} .*1 <= hop <= window"):
        next(cut([noise(9)], window, hop))


# --- Merger ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pick", [False, True])
@pytest.mark.parametrize(("window", "hop"), [*SIZES, (62, 31)])
def test_merged_by_definition(window, hop, pick):
    rng = np.random.default_rng(0)
    for columns in (*range(1, 14), 100):
        size = min(columns, window)
        shares = np.zeros((len(starts(columns, window, hop)), columns))
        parts = np.zeros((*shares.shape, 8, 2), np.float32)
        merger, pieces = Merger(pick), []
        for row, first in enumerate(starts(columns, window, hop)):
            own = slice(first, first + size)
            parts[row, own] = rng.standard_normal((size, 8, 2))
            # 1 at the edges, one more a column towards the middle
            shares[row, own] = [min(i + 1, size - i) for i in range(size)]
            pieces.append(merger.add(first, parts[row, own]))
            assert sum(map(len, pieces)) == first  # no more and no less is final
        merged = np.concatenate([*pieces, merger.rest()])
        if pick:  # the larger weight; of equal ones the earlier
            expected = parts[shares.argmax(axis=0), np.arange(columns)]
            np.testing.assert_array_equal(merged, expected)
        else:
            expected = np.einsum("wt,wtbd->tbd", shares / shares.sum(axis=0), parts)
            np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)
        assert merged.dtype == np.float32


# --- recordings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "more"), [(1, 0), (5, 0), (7, 2559), (8, 0), (8, 2559)], ids=str
)
def test_one_window_is_one_pass(encoder, columns, more):
    waveform = noise(columns, more)
    x, times = joined(windows.frames(encoder, waveform, window=WINDOW, hop=HOP))
    expected, expected_times = encoder.frames(waveform)
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(times, expected_times)
    assert len(times) == columns


def test_default_window_is_10_s(encoder):
    waveform = noise(62, 2559)
    assert len(waveform) < 11 * 16000
    x, _ = joined(windows.frames(encoder, waveform, layer=1))
    np.testing.assert_array_equal(x, encoder.frames(waveform, layer=1)[0])
    assert [part.first for part in cut([noise(94)])] == [0, 31, 32]


@pytest.mark.parametrize(("columns", "hop"), [(9, HOP), (20, HOP), (24, WINDOW), (21, WINDOW)])
def test_frames_of_a_longer_recording(encoder, columns, hop):
    waveform = noise(columns, 700)
    x, times = joined(windows.frames(encoder, waveform, window=WINDOW, hop=hop, batch_size=2))
    merger, expected = Merger(), []
    for first in starts(columns, WINDOW, hop):
        part = waveform[first * 2560 :][: samples_of(WINDOW)]
        expected.append(merger.add(first, encoder.frames(part)[0]))
    np.testing.assert_allclose(x, np.concatenate([*expected, merger.rest()]), rtol=0, atol=1e-5)
    assert x.shape == (columns, 8, encoder.embed_dim) and x.dtype == np.float32
    np.testing.assert_allclose(times, 0.0875 + 0.16 * np.arange(columns), rtol=0, atol=1e-9)


def test_without_overlap_nothing_is_merged(encoder):
    waveform = noise(16)
    x, _ = joined(windows.frames(encoder, waveform, window=WINDOW, hop=WINDOW))
    for half, part in ((x[:8], waveform[: samples_of(8)]), (x[8:], waveform[8 * 2560 :])):
        np.testing.assert_allclose(half, encoder.frames(part)[0], rtol=0, atol=1e-5)


def test_files_and_arrays_are_the_same(encoder, tmp_path):
    pcm = np.round(noise(90, 700) * 32767).astype(np.int16)  # 14.6 s: two blocks of the file
    soundfile.write(tmp_path / "a.flac", pcm, 16000)
    expected, times = joined(windows.frames(encoder, pcm, window=WINDOW, hop=HOP))
    for audio in (tmp_path / "a.flac", str(tmp_path / "a.flac"), pcm / np.float32(32768)):
        x, file_times = joined(windows.frames(encoder, audio, window=WINDOW, hop=HOP))
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(file_times, times)


def test_tokens(tokenizer):
    short, long = noise(7, 2559), noise(20)
    ids, times = joined(windows.tokens(tokenizer, short, window=WINDOW, hop=HOP))
    np.testing.assert_array_equal(ids, tokenizer.tokenize(short))
    assert ids.dtype == np.int32 and len(times) == 7
    ids, times = joined(windows.tokens(tokenizer, long, window=WINDOW, hop=HOP, batch_size=4))
    merger, expected = Merger(pick=True), []
    for first in starts(20, WINDOW, HOP):
        part = long[first * 2560 :][: samples_of(WINDOW)]
        expected.append(merger.add(first, tokenizer.tokenize(part)))
    np.testing.assert_array_equal(ids, np.concatenate([*expected, merger.rest()]))
    assert ids.dtype == np.int32 and len(times) == 20


def test_scores(finetuned):
    short, long = noise(7, 2559), noise(20)
    scores = windows.classify(finetuned, short, window=WINDOW, hop=HOP)
    logits, probs = finetuned.classify(short)
    np.testing.assert_allclose(scores.logits, logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores.probs, probs, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(scores.window_probs[0], scores.probs)
    np.testing.assert_allclose(scores.spans, [[0.0, samples_of(7) / 16000]])

    scores = windows.classify(finetuned, long, window=WINDOW, hop=HOP, batch_size=4)
    merger, expected = Merger(), []
    for row, first in enumerate(starts(20, WINDOW, HOP)):
        part = long[first * 2560 :][: samples_of(WINDOW)]
        expected.append(
            merger.add(first, finetuned.by_column("logits", part[None], [len(part)])[0])
        )
        probs = finetuned.classify(part)[1]
        np.testing.assert_allclose(scores.window_probs[row], probs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(scores.spans[row], [first * 0.16, first * 0.16 + 1.295])
    logits = np.concatenate([*expected, merger.rest()]).mean(axis=0)
    np.testing.assert_allclose(scores.logits, logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores.probs, finetuned.probabilities(logits), rtol=0, atol=1e-5)
    assert [array.dtype for array in scores] == [np.float32, np.float32, np.float64, np.float32]
    assert isinstance(scores, Scores)


def test_recordings_of_many_lengths_run_together(encoder):
    """Their windows come mixed, and go through the model in one another's batches."""
    window, hop = 10, 4  # 9 and 10 columns run in the same batches
    recordings = {c: noise(c, more=9 * c, seed=c) for c in (23, 10, 34, 9, 11, 3)}
    rounds = itertools.zip_longest(*(cut([x], window, hop) for x in recordings.values()))
    parts = [item for row in rounds for item in zip(recordings, row, strict=True) if item[1]]
    mergers = {whose: Merger() for whose in recordings}
    merged = {whose: [] for whose in recordings}
    order = {whose: [] for whose in recordings}
    for whose, part, values in run(encoder, "features", parts, batch_size=4):
        order[whose].append(part.first)
        merged[whose].append(mergers[whose].add(part.first, values))
        if part.last:
            merged[whose].append(mergers[whose].rest())
    for whose, waveform in recordings.items():
        assert order[whose] == starts(whose, window, hop)
        alone = windows.frames(encoder, waveform, window=window, hop=hop, batch_size=4)
        expected, _ = joined(alone)
        np.testing.assert_allclose(np.concatenate(merged[whose]), expected, rtol=0, atol=1e-5)


def test_results_do_not_wait_for_the_end(encoder):
    """Of an endless recording: a batch is run as soon as it is full, and given at once."""
    endless = cut(itertools.repeat(noise(4)), WINDOW, HOP)
    results = run(encoder, "features", ((None, part) for part in endless), batch_size=2)
    assert [part.first for _, part, _ in itertools.islice(results, 4)] == [0, 3, 6, 9]


def test_clear_ends(encoder, tmp_path):
    with pytest.raises(ValueError, match="is of kind encoder: it has no"):
        next(windows.tokens(encoder, noise(3)))
    with pytest.raises(ValueError, match="is of kind encoder: it has no"):
        windows.classify(encoder, noise(3))
    with pytest.raises(ValueError, match="layer 9 is not one of 0"):
        next(windows.frames(encoder, noise(3), layer=9))
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        next(windows.frames(encoder, noise(3), batch_size=0))
    with pytest.raises(ValueError, match=r"shape \(2, 9999\); give one recording"):
        next(windows.frames(encoder, np.zeros((2, 9999), np.float32)))
    with pytest.raises(FileNotFoundError, match=r"none\.wav: No such file"):
        next(windows.frames(encoder, tmp_path / "none.wav"))


# --- memory ---------------------------------------------------------------------------------------

CHILD = """
import sys
from beats_jax import inference, windows
from beats_jax.roofline import host_peak  # getrusage counts the memory of who started it as well

model, audio = sys.argv[1:]
columns = sum(len(times) for _, times in windows.frames(inference.load(model), audio))
print(columns, host_peak() / 1e9)
"""


def base_model(folder: Path) -> Path:
    """Random weights of the released models' size."""
    net = BEATs(**PRESETS["base"])
    params = jax.jit(net.init)(jax.random.key(0), np.zeros((1, 8, 256), np.float32))["params"]
    arrays = {"encoder": jax.tree.map(np.asarray, params)}
    source = dict(path="", kind="encoder", step=None, lineage={}, params_sha256=tree_sha256(arrays))
    save_exported(Pretrained("encoder", net, arrays, None, MEAN, STD, source), folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("size", "minutes"), [("dev", 60), ("base", 5)])
def test_peak_memory(tmp_path, size, minutes):
    """An hour; and at base size as much as fills batch after batch: in less than 1.5 GB."""
    model = (
        base_model(tmp_path / "base") if size == "base" else official.FIXTURES / "dev_encoder.pt"
    )
    second = np.round(noise(35, 44100)[: 2 * 44100] * 32767).astype(np.int16).reshape(44100, 2)
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 44100, 2) as file:
        for _ in range(60 * minutes):
            file.write(second)
    command = [sys.executable, "-c", CHILD, str(model), str(tmp_path / "a.flac")]
    one_device = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=one_device)
    shutil.rmtree(tmp_path)  # pytest keeps the folders of three runs
    assert done.returncode == 0, done.stderr
    columns, gigabytes = done.stdout.split()
    assert int(columns) == num_tokens(60 * minutes * 16000) // 8
    assert float(gigabytes) < 1.5
