"""From files to shards and back: exact samples, known order, reports, restarts, refusals."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from beats_jax.data import prepare as prepare_module
from beats_jax.data.audio import read_audio
from beats_jax.data.prepare import dataset_stats, prepare
from beats_jax.data.sources import INDEX, open_clips
from beats_jax.data.synthetic import synthetic_clips
from beats_jax.fbank import MIN_SAMPLES, fbank

pytest.importorskip("tensorflow_datasets")
LENGTHS = {"a": 16000, "b": 9000, "c": 2799, "d": 400, "e": 399, "f": 12345}


def noise(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-20000, 20000, n).astype(np.int16)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Good, short, broken, empty and missing files with metadata, not in alphabetical order."""
    root = tmp_path_factory.mktemp("source")
    (root / "audio").mkdir()
    for seed, (name, length) in enumerate(LENGTHS.items()):
        soundfile.write(root / f"audio/{name}.wav", noise(seed, length), 16000)
    (root / "audio/broken.wav").write_bytes(b"RIFF but no sound in here")
    (root / "audio/empty.wav").write_bytes(b"")
    rows = [f"{name}.wav,{i % 2},{i}" for i, name in enumerate([*"fabced", "broken", "empty"])]
    rows.append("missing.wav,0,9")
    (root / "metadata.csv").write_text("\n".join(["filename,fold,target", *rows]))
    return root


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    return out, prepare(source, out, jobs=1)


def test_samples_and_order_are_exact(prepared):
    clips = open_clips(prepared[0])
    assert clips.ids == ["f.wav", "a.wav", "b.wav", "c.wav", "d.wav"]
    assert clips.columns == {"fold": list("01011"), "target": list("01235")}
    assert clips.num_samples.tolist() == [12345, 16000, 9000, 2800, 2800]
    order = np.array([4, 1, 0, 3, 2])
    for i, waveform in zip(order, clips.fetch(order), strict=True):
        name = clips.ids[i][0]
        expected = noise("abcdef".index(name), LENGTHS[name])
        padded = np.pad(expected, (0, max(0, MIN_SAMPLES - len(expected))))
        np.testing.assert_array_equal(waveform, padded)
        assert waveform.dtype == np.int16 and len(waveform) == clips.num_samples[i]


def test_report(prepared):
    out, report = prepared
    assert (report.listed, report.clips, report.skipped) == (9, 5, 4)
    assert report.padded == ["c.wav", "d.wav"]
    assert report.too_short == ["e.wav"]
    assert list(report.unreadable) == ["broken.wav", "empty.wav", "missing.wav"]
    assert "empty" in report.unreadable["empty.wav"]
    assert "No such file" in report.unreadable["missing.wav"]
    assert json.loads((out / "report.json").read_text()) == report._asdict()


def test_unlabelled_short_clips_stay_as_they_are(source, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in "ad":
        shutil.copy(source / f"audio/{name}.wav", folder)
    report = prepare(folder, tmp_path / "out", jobs=1)
    assert report.padded == []
    assert open_clips(tmp_path / "out").num_samples.tolist() == [16000, 400]


def test_the_same_source_is_reused_wherever_it_lies(prepared, source, tmp_path, monkeypatch):
    out, report = prepared
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    monkeypatch.setattr(prepare_module, "_write", lambda *_: pytest.fail("worked again"))
    assert prepare(source, out) == report
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    assert prepare(tmp_path / "copy", out) == report
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}


def change_sound(root: Path) -> str:
    soundfile.write(root / "audio/a.wav", noise(99, 16000), 16000)  # same name, same size
    return ""


def change_label(root: Path) -> str:
    text = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text(text.replace("a.wav,1,1", "a.wav,1,7"))
    return ""


def add_file(root: Path) -> str:
    with (root / "metadata.csv").open("a") as file:
        file.write("\ng.wav,1,1")
    return ""


@pytest.mark.parametrize("change", [change_sound, change_label, add_file, lambda _: "fold=1"])
def test_another_source_or_filter_is_refused(prepared, source, tmp_path, change):
    root = tmp_path / "source"
    shutil.copytree(source, root)
    filter = change(root)
    with pytest.raises(ValueError, match="other files, other metadata or another filter"):
        prepare(root, prepared[0], filter=filter)


def test_fingerprint_is_of_the_content(prepared, source, tmp_path):
    first = open_clips(prepared[0]).fingerprint
    shutil.copytree(source, tmp_path / "copy")
    prepare(tmp_path / "copy", tmp_path / "again", jobs=1)
    assert open_clips(tmp_path / "again").fingerprint == first
    change_sound(tmp_path / "copy")
    prepare(tmp_path / "copy", tmp_path / "changed", jobs=1)
    changed = open_clips(tmp_path / "changed")
    assert changed.fingerprint != first
    assert changed.ids == open_clips(prepared[0]).ids


def test_filter_is_applied_before_decoding(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = prepare(source, "out", filter="fold=1,target!=3", jobs=1)
    assert len(open_clips("out")) == report.clips  # the folder's name may be relative
    assert report.listed == 3 and set(report.unreadable) == {"empty.wav"}
    assert open_clips(tmp_path / "out").ids == ["a.wav", "d.wav"]
    with pytest.raises(ValueError, match="no column 'speaker'"):
        prepare(source, tmp_path / "other", filter="speaker=1")
    assert not (tmp_path / "other").exists()


def test_rates_channels_and_containers(tmp_path):
    """A stereo 44.1 kHz FLAC and an 8 kHz MP3 come out as the 16 kHz mean of their channels."""
    time_ = np.arange(44100) / 44100
    left, right = 0.6 * np.sin(2 * np.pi * 440 * time_), 0.2 * np.sin(2 * np.pi * 1000 * time_)
    soundfile.write(tmp_path / "stereo.flac", np.stack([left, right], 1), 44100)
    soundfile.write(tmp_path / "low.mp3", left[::5][:8000], 8000)
    prepare(tmp_path, tmp_path / "out", jobs=1)
    clips = open_clips(tmp_path / "out")
    assert clips.ids == ["low.mp3", "stereo.flac"]
    low, stereo = clips.fetch(np.arange(2))
    assert len(stereo) == 16000
    at = np.arange(16000) / 16000
    mean = 0.3 * np.sin(2 * np.pi * 440 * at) + 0.1 * np.sin(2 * np.pi * 1000 * at)
    middle = slice(400, -400)
    np.testing.assert_allclose(stereo[middle] / 32768, mean[middle], atol=2e-3)
    peak = np.abs(np.fft.rfft(low[2000:14000].astype(float))).argmax() * 16000 / 12000
    assert abs(peak - 440 * 44100 / 5 / 8000 * 8000 / 8820) < 45


def test_full_scale_does_not_wrap(tmp_path):
    loud = np.array([1.5, 1.0, -1.0, -1.5] * 1000, np.float32)
    soundfile.write(tmp_path / "loud.wav", loud, 16000, subtype="FLOAT")
    prepare(tmp_path, tmp_path / "out", jobs=1)
    (waveform,) = open_clips(tmp_path / "out").fetch(np.array([0]))
    assert waveform[:4].tolist() == [32767, 32767, -32768, -32768]


def test_not_finite_is_unreadable(tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.full(4000, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan\.wav: .*not finite"):
        read_audio(tmp_path / "nan.wav")
    with pytest.raises(ValueError, match=r"none of the 1 files can be used; nan\.wav"):
        prepare(tmp_path, tmp_path / "out", jobs=1)


def test_what_soundfile_cannot_read_goes_through_ffmpeg(tmp_path, monkeypatch):
    """A stand-in for ffmpeg, which may be missing here, that gives a WAV as ffmpeg's pipe does."""
    pcm = noise(0, 8000)
    soundfile.write(tmp_path / "answer.wav", np.stack([pcm, pcm], 1), 16000)
    wav = bytearray((tmp_path / "answer.wav").read_bytes())
    wav[4:8] = wav[40:44] = b"\xff" * 4  # sizes unknown: a pipe cannot be rewound
    (tmp_path / "answer.wav").write_bytes(wav)
    (tmp_path / "clip.m4a").write_bytes(b"something else")
    program = tmp_path / "bin/ffmpeg"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/answer.wav\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    waveform, rate = read_audio(tmp_path / "clip.m4a")
    assert rate == 16000 and waveform.dtype == np.float32
    np.testing.assert_array_equal(waveform * 32768, pcm)
    program.write_text("#!/bin/sh\necho moov atom not found >&2; exit 1\n")
    with pytest.raises(ValueError, match="ffmpeg: moov atom not found"):
        read_audio(tmp_path / "clip.m4a")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"clip\.m4a.*ffmpeg, which might, is not installed"):
        read_audio(tmp_path / "clip.m4a")


def test_synthetic(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SYNTHETIC_CLIPS", 15)
    report = prepare("synthetic", tmp_path / "out", filter="category!=bell")
    made, clips = synthetic_clips(15).select("category!=bell"), open_clips(tmp_path / "out")
    assert report.source == "synthetic" and report.clips == len(made) == 14
    assert clips.fingerprint == made.fingerprint  # sounds, names, columns and order
    assert prepare("synthetic", tmp_path / "out", filter="category!=bell") == report
    with pytest.raises(ValueError, match="another filter"):
        prepare("synthetic", tmp_path / "out")


# --- interruptions and damage ---------------------------------------------------------------------


def test_killed_prepare_is_not_taken_for_finished_and_starts_afresh(tmp_path):
    root, out = tmp_path / "source", tmp_path / "out"
    root.mkdir()
    for i in range(60):
        soundfile.write(root / f"{i:02d}.wav", noise(i, 4000), 16000)
    script = (
        "import sys, time; from beats_jax.data import decode as d, prepare as p\n"
        "decode = d.decode\n"
        "def slow(path):\n"
        "    print(path, file=sys.__stdout__, flush=True); time.sleep(0.05); return decode(path)\n"
        "d.decode = slow; p.prepare(*sys.argv[1:3], jobs=1)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(root), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout
    for _ in range(20):
        assert child.stdout.readline()
    with pytest.raises(BlockingIOError, match="another prepare"):
        prepare(root, out, jobs=1)
    child.kill()
    child.wait()
    assert any(out.iterdir()) and not (out / INDEX).exists()
    with pytest.raises(ValueError, match="not a prepared data set"):
        open_clips(out)
    assert prepare(root, out, jobs=1).clips == 60
    assert len(open_clips(out).fetch(np.arange(60))) == 60
    assert len(list((out / "shards/clips").iterdir())) == 1  # the unfinished folder is gone


def test_foreign_folder_is_left_alone(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not empty \(thesis\.tex"):
        prepare(source, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_full_disk(source, tmp_path):
    """A child whose files may not grow over 64 KiB ends with one line, and finishes nothing."""
    prepare_it = f"{sys.executable} -B -m beats_jax.cli prepare {source} {tmp_path}/out --jobs 1"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 64; exec {prepare_it}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write the shards" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / INDEX).exists()


def test_damage_names_the_shard(prepared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(prepared[0], out)
    (shard,) = out.glob("shards/clips/1.0.0/*.array_record*")
    whole = shard.read_bytes()
    clips = open_clips(out)
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=f"{shard.name}: record 1 cannot be read.*prepare it again"):
        clips.fetch(np.array([1]))
    shard.write_bytes(whole[:20000] + bytes(200) + whole[20200:])
    clips = open_clips(out)
    with pytest.raises(OSError, match=shard.name):
        clips.fetch(np.arange(5))
    clips = open_clips(out)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        clips.fetch(np.array([0]))
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: this shard"):
        open_clips(out)


def test_many_threads_share_a_reader(prepared):
    clips = open_clips(prepared[0])
    barrier = threading.Barrier(8)

    def digests(seed: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(seed).integers(0, len(clips), 200)
        want = clips.num_samples[order]
        return all(len(w) == n for w, n in zip(clips.fetch(order), want, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(digests, range(8)))


def test_several_shards_keep_the_order(tmp_path, monkeypatch):
    from tensorflow_datasets.core import shuffle
    from tensorflow_datasets.core.utils import shard_utils

    monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", 1 << 10)
    monkeypatch.setattr(shard_utils.ShardConfig, "max_shard_size", 1 << 15)
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1 << 16)  # sort in files, not in memory
    root = tmp_path / "source"
    root.mkdir()
    for i in range(30):
        soundfile.write(root / f"{i:02d}.wav", noise(i, 4000 + i), 16000)
    prepare(root, tmp_path / "out", jobs=1)
    clips = open_clips(tmp_path / "out")
    assert len(list(tmp_path.glob("out/shards/clips/1.0.0/*.array_record*"))) > 3
    order = np.random.default_rng(0).permutation(30)
    for i, waveform in zip(order, clips.fetch(order), strict=True):
        np.testing.assert_array_equal(waveform, noise(i, 4000 + i))


def test_stats(prepared):
    clips = open_clips(prepared[0])
    mean, std, frames = dataset_stats(clips)
    logmel = np.concatenate([fbank(w, 0.0, 0.5) for w in clips.fetch(np.arange(len(clips)))])
    assert frames == len(logmel)
    np.testing.assert_allclose([mean, std], [logmel.mean(), logmel.std()], rtol=1e-4)


@pytest.mark.realdata
def test_real_files(tmp_path):
    source = Path(os.environ["BEATS_JAX_DATA"]) / "fsdd"
    report = prepare(source, tmp_path / "out", filter="speaker=george,index=0|1")
    assert report.clips == report.listed == 20
    clips = open_clips(tmp_path / "out")
    for waveform, name in zip(clips.fetch(np.arange(20)), clips.ids, strict=True):
        samples, _ = soundfile.read(source / "audio" / name, dtype="int16")
        np.testing.assert_array_equal(waveform[: len(samples)], samples)
        assert not waveform[len(samples) :].any()
