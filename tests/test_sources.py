"""Clips, row filters, layouts of audio on disk; prepared folders are in test_prepare.py."""

import json

import numpy as np
import pytest

from beats_jax.data.sources import Clips, join, list_source, matches, open_clips
from beats_jax.data.synthetic import synthetic_clips

COLUMNS = {"fold": ["1", "2", "3", "4"], "esc10": ["True", "False", "True", ""]}


@pytest.mark.parametrize(
    ("filter", "rows"),
    [
        ("", [0, 1, 2, 3]),
        ("esc10=True", [0, 2]),
        ("fold=1|4", [0, 3]),
        ("fold!=1|4", [1, 2]),
        (" esc10=True , fold!=1 ", [2]),
        ("esc10=", [3]),
    ],
)
def test_matches(filter, rows):
    assert np.flatnonzero(matches(filter, COLUMNS, 4)).tolist() == rows


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("speaker=x", "no column 'speaker'; the columns are: fold, esc10"),
        ("fold", "no '='"),
        ("fold=9", "leaves no clip; fold has values like"),
        ("esc10=True,fold=2", "leaves no clip"),
    ],
)
def test_matches_refuses(filter, message):
    with pytest.raises(ValueError, match=message):
        matches(filter, COLUMNS, 4)


@pytest.fixture(scope="module")
def clips() -> Clips:
    return synthetic_clips(28, seconds=0.2, seed=0)


def test_select_is_a_view(clips):
    chosen = clips.select("fold=2", keep=np.arange(28) % 2 == 0)
    rows = [i for i in range(28) if clips.columns["fold"][i] == "2" and i % 2 == 0]
    assert chosen.ids == [clips.ids[i] for i in rows] and rows
    assert set(chosen.columns["fold"]) == {"2"}
    again = chosen.select(keep=np.arange(len(rows)) >= 1)  # a view of a view
    assert again.ids == chosen.ids[1:]
    for view, wanted in ((chosen, rows), (again, rows[1:])):
        for got, want in zip(view.fetch(np.arange(len(wanted))), clips.fetch(wanted), strict=True):
            np.testing.assert_array_equal(got, want)


def test_join_reads_each_set_where_it_is(clips):
    first, second = clips.select("fold=1"), clips.select("fold!=1")
    second = Clips(**{**vars(second), "columns": {"speaker": ["anna"] * len(second)}})
    both = join({"a": first, "b": second})
    assert both.ids == [f"a/{i}" for i in first.ids] + [f"b/{i}" for i in second.ids]
    assert both.columns["fold"] == ["1"] * len(first) + [""] * len(second)
    assert both.columns["speaker"] == [""] * len(first) + ["anna"] * len(second)
    last = len(both) - 1
    for got, wanted in zip(
        both.fetch(np.array([last, 0, len(first)])),
        second.fetch(np.array([len(second) - 1])) + first.fetch(np.array([0]))
        + second.fetch(np.array([0])),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(got, wanted)
    assert (
        len({both.fingerprint, first.fingerprint, join({"b": second, "a": first}).fingerprint}) == 3
    )
    some = both.select("speaker=anna")
    np.testing.assert_array_equal(some.fetch(np.array([0]))[0], second.fetch(np.array([0]))[0])


def test_fetch_takes_any_order_and_repeats(clips):
    order = np.array([5, 0, 5, 27])
    for waveform, i in zip(clips.fetch(order), order, strict=True):
        np.testing.assert_array_equal(waveform, clips.fetch(np.array([i]))[0])


def test_fingerprint_follows_content_order_and_selection(clips):
    def reversed_clips():
        columns = {name: values[::-1] for name, values in clips.columns.items()}
        return Clips(
            clips.ids[::-1], clips.num_samples, columns, clips.digests[::-1], clips.read,
            clips.records[::-1],
        )  # fmt: skip

    others = [
        synthetic_clips(28, seconds=0.2, seed=1),
        clips.select("fold!=2"),
        clips.select("fold=2"),
        reversed_clips(),
    ]
    prints = [clips.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(prints)) == len(prints)
    assert clips.fingerprint == synthetic_clips(28, seconds=0.2, seed=0).fingerprint
    assert clips.fingerprint == clips.select().fingerprint


# --- layouts --------------------------------------------------------------------------------------


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"sound")


def test_folder_of_classes(tmp_path):
    touch(tmp_path / "dog/b.wav", tmp_path / "dog/deep/a.FLAC", tmp_path / "cat/c.mp3")
    touch(tmp_path / "notes.txt", tmp_path / ".hidden/d.wav", tmp_path / "cat/.e.wav")
    listing = list_source(tmp_path)
    assert listing.kind == "folder"
    assert listing.ids == ["cat/c.mp3", "dog/b.wav", "dog/deep/a.FLAC"]
    assert listing.columns == {"category": ["cat", "dog", "dog"]}
    assert all(path.exists() for path in listing.paths)


def test_flat_folder_has_no_classes(tmp_path):
    touch(tmp_path / "a.wav")
    assert list_source(tmp_path).columns == {}


@pytest.mark.parametrize(
    ("manifest", "kind", "given"),
    [
        ("metadata.csv", "manifest", "."),
        ("meta/esc50.csv", "esc50", "."),
        ("list.csv", "manifest", "list.csv"),
    ],
)
def test_manifests(tmp_path, manifest, kind, given):
    touch(tmp_path / "audio/a.wav", tmp_path / "audio/b.wav", tmp_path / manifest)
    (tmp_path / manifest).write_text('\ufefffilename,fold,note\nb.wav,2,"x, y"\na.wav,1,\n')
    listing = list_source(tmp_path / given)
    assert (listing.kind, listing.ids) == (kind, ["b.wav", "a.wav"])
    assert listing.columns == {"fold": ["2", "1"], "note": ["x, y", ""]}
    assert [path.resolve() for path in listing.paths] == [
        tmp_path / "audio/b.wav",
        tmp_path / "audio/a.wav",
    ]


def test_jsonl_manifest(tmp_path):
    touch(tmp_path / "a.wav")
    rows = [{"filename": "a.wav", "fold": 3, "clean": True}, {"filename": "gone.wav", "fold": None}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listing = list_source(tmp_path / "list.jsonl")
    assert listing.ids == ["a.wav", "gone.wav"]
    assert listing.columns == {"fold": ["3", ""], "clean": ["true", ""]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "file,fold\na.wav,1\n", "no column 'filename'; the columns are: file, fold"),
        ("x.csv", "filename,fold\n", "no rows"),
        ("x.csv", "filename,fold\na.wav,1,2\n", "line 2 has more fields"),
        ("x.csv", "filename,fold\n,1\n", "row 1 has no filename"),
        ("x.csv", "filename\nb.wav\n", "none of its 1 files is in"),
        ("x.jsonl", "{not json}", "cannot be read as jsonl"),
        ("x.jsonl", "[1]", "cannot be read as jsonl"),
        ("x.txt", "a.wav", "ends in .csv or .jsonl"),
    ],
)
def test_bad_manifests(tmp_path, name, text, message):
    touch(tmp_path / "a.wav")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list_source(tmp_path / name)


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        list_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no audio in it"):
        list_source(tmp_path)


def test_open_clips_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_clips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="beats-jax prepare SOURCE"):
        open_clips(tmp_path)
