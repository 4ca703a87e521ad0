"""Shards made one by one hold what `prepare` writes, and those that are finished stay."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from beats_jax.data import beam, shards
from beats_jax.data.prepare import prepare
from beats_jax.data.sources import INDEX, open_clips

tfds = pytest.importorskip("tensorflow_datasets")
LENGTHS = {"a": 16000, "b": 9000, "c": 2799, "d": 400, "e": 399, "f": 12345}
FINISHED = "shards/clips/1.0.0/*.array_record*"


def noise(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-20000, 20000, n).astype(np.int16)


@pytest.fixture
def source(tmp_path) -> Path:
    """Three shards of four: good and padded; good, short and broken; not one that can be read."""
    root = tmp_path / "source"
    (root / "audio").mkdir(parents=True)
    for seed, (name, length) in enumerate(LENGTHS.items()):
        soundfile.write(root / f"audio/{name}.wav", noise(seed, length), 16000)
    (root / "audio/broken.wav").write_bytes(b"RIFF but no sound in here")
    (root / "audio/empty.wav").write_bytes(b"")
    names = [*"fabcdea", "broken", "empty", "missing"]
    rows = [f"{name}.wav,{i % 2},{i}" for i, name in enumerate(names)]
    (root / "metadata.csv").write_text("\n".join(["filename,fold,target", *rows]))
    return root


class Run:
    """In the place of Beam: the last shard first, each by a copy of the function; `dies` after."""

    def __init__(self, monkeypatch):
        self.made, self.dies = [], 100
        monkeypatch.setattr(beam, "runner", lambda options, jobs: self)
        monkeypatch.setattr(shards, "MIN_ROWS", 4)

    def __call__(self, function, n):
        for shard in reversed(range(n)):
            if len(self.made) == self.dies:
                raise OSError("all machines are gone")
            pickle.loads(pickle.dumps(function))(shard)
            self.made.append(shard)


@pytest.fixture
def run(monkeypatch) -> Run:
    return Run(monkeypatch)


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(out.glob(FINISHED))}


def assert_equal(one: Path, other: Path) -> None:
    """Everything but the cut into shards: reports, sources, index, records as TFDS reads them."""
    for name in ("report.json", "source.json"):
        assert (one / name).read_text() == (other / name).read_text()
    first, second = (json.loads((path / INDEX).read_text()) for path in (one, other))
    assert {**first, "shards": 0} == {**second, "shards": 0}
    every = np.arange(len(first["id"]))
    clips = [open_clips(path).fetch(every) for path in (one, other)]
    for a, b in zip(*clips, strict=True):
        np.testing.assert_array_equal(a, b)
    folders = [tfds.builder_from_directory(path / "shards/clips/1.0.0") for path in (one, other)]
    read = [list(folder.as_data_source(split="train")) for folder in folders]
    assert len(read[0]) == len(every) and read[0] == read[1]
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())


def test_same_folder_as_without_beam(source, tmp_path, run):
    plain = prepare(source, tmp_path / "plain", jobs=1)
    out = tmp_path / "out"
    assert prepare(source, out, beam=()) == plain
    assert plain.padded == ["c.wav", "d.wav"] and plain.too_short == ["e.wav"]
    assert len(plain.unreadable) == 3 and run.made == [2, 1, 0]
    assert [n for _, n in json.loads((out / INDEX).read_text())["shards"]] == [4, 2, 0]
    assert_equal(tmp_path / "plain", out)
    assert prepare(source, out, beam=()) == prepare(source, out) == plain and len(run.made) == 3


def test_killed_it_goes_on(source, tmp_path, run):
    out = tmp_path / "out"
    run.dies = 2
    with pytest.raises(OSError, match="all machines are gone"):
        prepare(source, out, beam=())
    with pytest.raises(ValueError, match="not a prepared data set"):
        open_clips(out)
    before = stamps(out)
    assert len(before) == 2
    left = out / shards.FOLDER / "clips-train.array_record-00000-of-00003.0.tmp"
    left.write_bytes(b"half a shard")
    run.dies = 100
    prepare(source, out, beam=())
    prepare(source, tmp_path / "plain", jobs=1)
    assert_equal(tmp_path / "plain", out)
    after = stamps(out)
    assert len(after) == 3 and before.items() < after.items()


def test_what_changed_is_made_again(source, tmp_path, run):
    """A shard that was cut, one whose file has another sound of the same size; not the third."""
    out = tmp_path / "out"
    prepare(source, out, beam=())
    before = stamps(out)
    (out / INDEX).unlink()
    assert prepare(source, out, beam=()).clips == 6  # the plan is gone: all anew
    assert not before.items() & stamps(out).items()

    run.made, run.dies = [], 3
    shutil.rmtree(out)
    finish, shards._describe = shards._describe, lambda *_: pytest.fail("unfinished")
    try:
        with pytest.raises(pytest.fail.Exception, match="unfinished"):
            prepare(source, out, beam=())
    finally:
        shards._describe = finish
    first, second, third = sorted(out.glob(FINISHED))
    first.write_bytes(first.read_bytes()[:100])
    soundfile.write(source / "audio/d.wav", noise(99, 400), 16000)
    before, run.dies = stamps(out), 100
    prepare(source, out, beam=())
    prepare(source, tmp_path / "plain", jobs=1)
    assert_equal(tmp_path / "plain", out)
    kept = {name for name, stamp in stamps(out).items() if before[name] == stamp}
    assert kept == {third.name} and second.name not in kept


def test_another_source_begins_anew(source, tmp_path, run):
    out = tmp_path / "out"
    run.dies = 2
    with pytest.raises(OSError):
        prepare(source, out, beam=())
    run.dies = 100
    assert prepare(source, out, beam=(), filter="target=0|1").clips == 2
    assert [len(stamps(out)), len(open_clips(out))] == [1, 2]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not empty \(thesis\.tex"):
        prepare(source, tmp_path / "thesis", beam=())


def test_nothing_usable(source, tmp_path, run):
    with pytest.raises(ValueError, match=r"none of the 1 files can be used; broken\.wav"):
        prepare(source, tmp_path / "out", beam=(), filter="target=7")
    with pytest.raises(ValueError, match="prepare them without Beam"):
        prepare("synthetic", tmp_path / "out", beam=())


def test_as_many_shards_as_tfds_makes_of_audioset(source, tmp_path, run, monkeypatch):
    monkeypatch.setattr(shards, "MIN_ROWS", 1)
    monkeypatch.setattr(shards, "MAX_SHARDS", 2)
    prepare(source, tmp_path / "out", beam=())
    assert len(stamps(tmp_path / "out")) == 2


def test_more_shards_than_open_files(source, tmp_path, run, monkeypatch):
    """300 where 256 files may be open; AudioSet is 1024, and so is the usual limit."""
    monkeypatch.setattr(shards, "MIN_ROWS", 1)
    run.dies = 1000
    (source / "metadata.csv").write_text("\n".join(["filename", *["d.wav"] * 300]))
    prepare(source, tmp_path / "out", beam=())
    script = (
        "import resource as r, sys, numpy as np; from beats_jax.data.sources import open_clips\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (256, r.getrlimit(r.RLIMIT_NOFILE)[1]))\n"
        "assert len(open_clips(sys.argv[1]).fetch(np.arange(300))) == 300"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
