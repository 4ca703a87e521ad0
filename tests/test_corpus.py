"""Commands over many files: what they find, what they write, and that nothing finished is lost."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from runs import FIXTURES

import beats_jax
from beats_jax import cli, corpus, questions, windows

ENCODER, FINETUNED = FIXTURES / "dev_encoder.pt", FIXTURES / "dev_finetuned.pt"
TOKENIZER = FIXTURES / "dev_tokenizer.pt"
SMALL = ("--window", "12", "--hop", "6", "--batch-size", "4")  # one compiled size, and few columns


def write(path: Path, seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    waveform = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, rate, subtype="FLOAT")
    return waveform.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four good files, one of them long; a broken, an empty and a too short one."""
    folder = tmp_path_factory.mktemp("sounds")
    for i, seconds in enumerate((1.9, 1.95, 5.0)):
        write(folder / f"a/{i}.wav", seconds, seed=i)
    write(folder / "b/0.wav", 1.9, rate=22050, seed=3)
    write(folder / "b/short.wav", 0.1)
    (folder / "b/broken.flac").write_bytes(b"no sound")
    (folder / "b/empty.wav").write_bytes(b"")
    return folder


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


# --- which files ----------------------------------------------------------------------------------


def test_find(folder, tmp_path, monkeypatch):
    every = corpus.find([str(folder)])
    assert [os.path.relpath(f, folder) for f in every] == [
        *("a/0.wav", "a/1.wav", "a/2.wav", "b/0.wav", "b/broken.flac", "b/empty.wav"),
        "b/short.wav",
    ]
    assert corpus.find([f"{folder}/**/0.wav"]) == [f"{folder}/a/0.wav", f"{folder}/b/0.wav"]
    monkeypatch.chdir(folder)
    assert corpus.find(["a/0.wav", "a/*.wav", "a"]) == ["a/0.wav", "a/1.wav", "a/2.wav"]
    (tmp_path / "list.csv").write_text(f"filename,fold\n{folder}/b/0.wav,1\n")
    assert corpus.find([str(tmp_path / "list.csv")]) == [f"{folder}/b/0.wav"]
    for nothing in ("nowhere.wav", "nowhere/*.wav"):
        with pytest.raises(FileNotFoundError, match="no such file or folder, and no file matches"):
            corpus.find([nothing])


# --- embed ----------------------------------------------------------------------------------------


def test_embed_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "embeddings.npz"
    assert call("embed", ENCODER, folder, "--out", out, *SMALL) == 3
    said = capsys.readouterr()
    assert "4 of 7 files" in said.out
    for name, why in (("broken.flac", "decode"), ("empty.wav", "empty"), ("short.wav", "2800")):
        assert re.search(rf"skipped: .*{name}.*{why}", said.err), name
    table = np.load(out)
    assert [os.path.relpath(f, folder) for f in table["files"]] == [
        *("a/0.wav", "a/1.wav", "a/2.wav", "b/0.wav")
    ]
    model = beats_jax.load(ENCODER)
    assert table["embeddings"].dtype == np.float32 and table["embeddings"].shape == (4, 48)
    for file, vector in zip(table["files"], table["embeddings"], strict=True):
        waveform, _ = beats_jax.read_audio(file)
        if len(waveform) < 32000:
            alone = model.extract_features(waveform)[0].mean(axis=0)
        else:
            parts = [x for x, _ in windows.frames(model, file, window=12, hop=6)]
            alone = np.concatenate(parts).mean(axis=(0, 1))
        np.testing.assert_allclose(vector, alone, rtol=0, atol=1e-5)


def test_the_same_numbers_in_every_table(folder, tmp_path):
    files = [folder / "a/0.wav", folder / "a/2.wav"]
    for suffix in ("npz", "jsonl", "csv"):
        assert call("embed", ENCODER, *files, "--out", tmp_path / f"x.{suffix}", *SMALL) == 0
    arrays = np.load(tmp_path / "x.npz")["embeddings"]
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [line["file"] for line in lines] == [row["file"] for row in rows] == [*map(str, files)]
    for values, line, row in zip(arrays, lines, rows, strict=True):
        np.testing.assert_array_equal(values, np.float32(line["embedding"]))
        np.testing.assert_array_equal(values, [np.float32(row[f"x{i}"]) for i in range(48)])


def test_all_frames_into_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "SPOOL", 1000)  # bytes: a temporary file at once
    out = tmp_path / "frames"
    words = ("embed", ENCODER, folder / "a", "--out", out, "--pool", "none", "--layer", 1, *SMALL)
    assert call(*words) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        *("0.wav.npz", "1.wav.npz", "2.wav.npz", "settings.json")
    ]
    model = beats_jax.load(ENCODER)
    whole = list(windows.frames(model, folder / "a/2.wav", layer=1, window=12, hop=6))
    stored = np.load(out / "2.wav.npz")
    features = np.concatenate([x for x, _ in whole])
    np.testing.assert_allclose(stored["features"], features, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(stored["times"], np.concatenate([t for _, t in whole]))
    one = np.load(out / "0.wav.npz")["features"]
    np.testing.assert_allclose(
        one, model.frames(beats_jax.read_audio(folder / "a/0.wav")[0], layer=1)[0], atol=1e-5
    )


# --- classify and tokenize ------------------------------------------------------------------------


def test_classify_prints_names_with_probabilities(folder, capsys):
    assert call("classify", FINETUNED, folder / "a/0.wav", "--top", 2, *SMALL) == 0
    file, *lines = capsys.readouterr().out.splitlines()
    model = beats_jax.load(FINETUNED)
    probs = model.classify(beats_jax.read_audio(folder / "a/0.wav")[0])[1]
    best = np.argsort(-probs)[:2]
    assert file == str(folder / "a/0.wav")
    assert lines == [f"  {probs[i]:.3f}  {model.labels[i]}" for i in best]


def test_classify_windows_and_tables(folder, tmp_path):
    files = [folder / "a/0.wav", folder / "a/2.wav"]
    for suffix in ("npz", "jsonl", "csv"):
        assert call("classify", FINETUNED, *files, "--out", tmp_path / f"x.{suffix}", *SMALL) == 0
    arrays = np.load(tmp_path / "x.npz")
    scores = windows.classify(beats_jax.load(FINETUNED), files[1], window=12, hop=6)
    np.testing.assert_allclose(arrays["probs"][1], scores.probs, atol=1e-6)
    assert arrays["windows"].tolist() == [1, len(scores.spans)] and len(scores.spans) > 3
    np.testing.assert_allclose(arrays["window_probs"][1:], scores.window_probs, atol=1e-6)
    long = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[1])
    assert long["top"][0]["label"] == arrays["labels"][scores.probs.argmax()]
    assert [w["start"] for w in long["windows"]] == scores.spans[:, 0].round(3).tolist()
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [r["window"] for r in rows[:3]] == ["all", "0", "all"]
    assert float(rows[2][arrays["labels"][0]]) == pytest.approx(scores.probs[0], abs=1e-6)


def test_tokenize_files(folder, tmp_path):
    model = beats_jax.load(TOKENIZER)
    file = folder / "a/0.wav"
    ids = model.tokenize(beats_jax.read_audio(file)[0])
    for suffix in ("npz", "jsonl", "csv"):
        assert call("tokenize", TOKENIZER, file, "--out", tmp_path / f"x.{suffix}", *SMALL) == 0
    stored = np.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(stored["ids"], ids)
    assert stored["columns"].tolist() == [len(ids)]
    assert json.loads((tmp_path / "x.jsonl").read_text())["ids"] == ids.tolist()
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [[int(r[f"band{b}"]) for b in range(8)] for r in rows] == ids.tolist()
    assert [r["time"] for r in rows[:2]] == ["0.0875", "0.2475"]


# --- a stop in the middle -------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["x.jsonl", "tokens"])
def test_a_stopped_command_goes_on(folder, tmp_path, monkeypatch, out):
    words = ("tokenize", TOKENIZER, folder / "a", "--out", tmp_path / out, *SMALL)
    read, asked = corpus.audio_blocks, []

    def interrupted(file):
        asked.append(os.path.basename(file))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return read(file)

    monkeypatch.setattr(corpus, "audio_blocks", interrupted)
    monkeypatch.setattr(windows, "bucket", lambda n: 12 + n % 2)  # so that single files are done
    assert call(*words[:-1], "1") == 130
    assert not (tmp_path / "x.jsonl").exists()
    if out == "x.jsonl":  # torn in the middle of a line, as kill -9 leaves it
        with (tmp_path / "x.jsonl.partial").open("ab") as journal:
            journal.write(b'["half')
    asked.clear()
    monkeypatch.setattr(corpus, "audio_blocks", lambda file: asked.append(file) or read(file))
    assert call(*words[:-1], "1") == 0
    assert len(asked) < 3  # what was done is not done again
    call("tokenize", TOKENIZER, folder / "a", "--out", tmp_path / "whole" / out, *SMALL[:-1], "1")
    if out == "x.jsonl":
        assert (tmp_path / out).read_bytes() == (tmp_path / "whole" / out).read_bytes()
        assert not (tmp_path / "x.jsonl.partial").exists()
    for path in (tmp_path / "whole" / out).glob("*.npz"):
        assert path.read_bytes() == (tmp_path / out / path.name).read_bytes()


def test_results_of_another_kind_are_not_mixed_in(folder, tmp_path, capsys):
    file, out = folder / "a/0.wav", tmp_path / "out"
    assert call("tokenize", TOKENIZER, file, "--out", out, *SMALL) == 0
    assert call("tokenize", TOKENIZER, file, "--out", out, "--window", "12", "--hop", "7") == 2
    assert "was begun with hop 6, now it is 7" in capsys.readouterr().err
    assert call("embed", ENCODER, file, "--pool", "none", "--out", out, *SMALL) == 2
    assert "was begun with model" in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["embed", ENCODER, "{tmp}/nowhere.wav", "--out", "{tmp}/x.npz"], "nowhere.wav: no such"),
        (["embed", ENCODER, "{good}", "--out", "{tmp}/x.npz", "--layer", "9"], "layer 9 is not"),
        (["embed", ENCODER, "{good}", "--out", "{tmp}/x.txt"], "want a table"),
        (["embed", ENCODER, "{good}", "--out", "{tmp}/x.npz", "--pool", "none"], "is no folder"),
        (["embed", ENCODER, "{good}", "--out", "{tmp}/x.npz", "--hop", "63"], "hop <= window"),
        (["embed", ENCODER, "{good}", "--out", "{tmp}/x.npz", "--batch-size", "0"], "at least 1"),
        (["embed", ENCODER, "{good}", "--out", "{tmp}/x.npz", "--precision", "int4"], "int4"),
        (["embed", ENCODER, "{bad}", "--out", "{tmp}/x.npz"], "none of the 1 files"),
        (["embed", "{good}", "{good}", "--out", "{tmp}/x.npz"], "0.wav"),
        (["embed", "{tmp}/no.pt", "{good}", "--out", "{tmp}/x.npz"], "no.pt is not there"),
        (["classify", ENCODER, "{good}"], "it has no class scores"),
        (["tokenize", ENCODER, "{good}", "--out", "{tmp}/x.npz"], "it has no acoustic tokens"),
        (["tokenize", TOKENIZER, "{good}"], "--out --store --agreement"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder, tmp_path, capsys, words, line):
    places = dict(tmp=tmp_path, good=folder / "a/0.wav", bad=folder / "b/broken.flac")
    try:
        code = call(*(str(word).format(**places) for word in words))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    *skipped, last = err.splitlines()
    assert code == 2 and out == "" and line in last and last.startswith("beats-jax")
    assert all(text.startswith("skipped: ") for text in skipped)
    assert not (tmp_path / "x.npz").exists()


def test_a_finished_table_is_not_written_over(folder, tmp_path, capsys):
    words = ("embed", ENCODER, folder / "a/0.wav", "--out", tmp_path / "x.csv", *SMALL)
    assert call(*words) == 0
    before = (tmp_path / "x.csv").read_bytes()
    assert call(*words) == 2 and "is there already" in capsys.readouterr().err
    assert (tmp_path / "x.csv").read_bytes() == before
