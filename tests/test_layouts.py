"""Published data sets, in tiny copies of their real layouts: labels, splits, what is missing."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from beats_jax.data.layouts import COMMANDS
from beats_jax.data.sources import list_source


def write_sound(path: Path, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(int(16000 * seconds)), 16000)


# --- AudioSet -------------------------------------------------------------------------------------

BALANCED = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
--ZhevVpy1s, 50.000, 60.000, "/m/012xff"
--aE2O5G5WE, 0.000, 10.000, "/m/03fwl,/m/04rlf,/m/09x0r"
"""
EVAL = """# YTID, start_seconds, end_seconds, positive_labels
YJHxphWEsAB, 30.000, 40.000, "/m/09x0r,/m/nonsense"
-BfvyPmVMo0, 20.000, 30.000, "/m/nonsense"
"""


@pytest.fixture
def audioset(tmp_path) -> Path:
    (tmp_path / "balanced_train_segments.csv").write_text(BALANCED)
    (tmp_path / "eval_segments.csv").write_text(EVAL)
    for name in ("balanced/Y--PJHxphWEs", "--aE2O5G5WE_0_10000", "eval/YJHxphWEsAB", "-BfvyPmVMo0"):
        write_sound(tmp_path / f"clips/{name}.wav")
    write_sound(tmp_path / "clips/of_no_segment.wav")
    return tmp_path


def test_audioset(audioset):
    listing = list_source(audioset)
    assert listing.kind == "audioset"
    assert listing.ids == [
        "clips/balanced/Y--PJHxphWEs.wav",
        "clips/--aE2O5G5WE_0_10000.wav",
        "clips/eval/YJHxphWEsAB.wav",
    ]
    assert listing.columns == {
        "split": ["balanced_train", "balanced_train", "eval"],
        "labels": ["/m/09x0r;/t/dd00088", "/m/03fwl;/m/04rlf;/m/09x0r", "/m/09x0r"],
        "start": ["30.000", "0.000", "30.000"],
        "end": ["40.000", "10.000", "40.000"],
    }
    assert listing.notes == (
        "balanced_train_segments.csv: 2 of 3 segments have a clip, and 4 of 5 classes",
        "eval_segments.csv: 1 of 2 segments have a clip, and 1 of 1 classes",
        "eval_segments.csv: 2 labels are not AudioSet's and left out (/m/nonsense)",
    )
    balanced = listing.coverage["balanced_train"]
    assert (balanced["/m/09x0r"], balanced["/m/012xff"]) == ((2, 2), (0, 1))
    assert list_source(audioset, "split=eval").ids == ["clips/eval/YJHxphWEsAB.wav"]


def test_audioset_without_clips_or_with_a_broken_list(audioset):
    path = audioset / "eval_segments.csv"
    path.write_text(EVAL + "only, three, fields\n")
    with pytest.raises(ValueError, match=r"eval_segments.csv: \['only'.* wanted YTID, start, end"):
        list_source(audioset)
    path.write_text(EVAL)
    for clip in audioset.rglob("*.wav"):
        clip.unlink()
    with pytest.raises(ValueError, match="none of the 5 segments of its lists has a clip"):
        list_source(audioset)


@pytest.mark.realdata
def test_audiosets_real_lists(tmp_path):
    lists = Path(os.environ["BEATS_JAX_DATA"]) / "audioset_meta"
    for path in lists.glob("*_segments.csv"):
        (tmp_path / path.name).symlink_to(path.resolve())
    write_sound(tmp_path / "--PJHxphWEs.wav")
    listing = list_source(tmp_path)
    assert listing.notes == (
        "balanced_train_segments.csv: 1 of 22160 segments have a clip, and 2 of 527 classes",
        "eval_segments.csv: 0 of 20371 segments have a clip, and 0 of 527 classes",
    )
    assert sum(listed for _, listed in listing.coverage["eval"].values()) == 51804


# --- Speech Commands ------------------------------------------------------------------------------


def speech_commands(root: Path, words: tuple[str, ...]) -> Path:
    for word in words:
        for speaker in ("0a7c2a8d", "1b4c9b89", "9ff2d2f4"):
            write_sound(root / word / f"{speaker}_nohash_0.wav", 0.1)
    write_sound(root / "_background_noise_" / "pink_noise.wav", 20.5)
    (root / "_background_noise_" / "README.md").write_text("noise")
    (root / "validation_list.txt").write_text("yes/1b4c9b89_nohash_0.wav\n")
    names = ["yes/9ff2d2f4_nohash_0.wav", "bed/9ff2d2f4_nohash_0.wav", "bed/gone_nohash_0.wav"]
    (root / "testing_list.txt").write_text("\n".join(names) + "\n")
    return root


def test_speech_commands_1_has_12_classes(tmp_path):
    listing = list_source(speech_commands(tmp_path, (*COMMANDS, "bed", "wow")))
    rows = list(zip(listing.ids, *listing.columns.values(), strict=True))
    assert listing.kind == "speech_commands_v1" and "category" in listing.columns
    by_id = {row[0]: row[1:] for row in rows}
    assert by_id["yes/1b4c9b89_nohash_0.wav"] == ("yes", "yes", "1b4c9b89", "validation")
    assert by_id["bed/9ff2d2f4_nohash_0.wav"] == ("_unknown_", "bed", "9ff2d2f4", "testing")
    assert by_id["wow/1b4c9b89_nohash_0.wav"] == ("_unknown_", "wow", "1b4c9b89", "training")
    counts = Counter(listing.columns["category"])
    assert counts == {**dict.fromkeys(COMMANDS, 3), "_unknown_": 6, "_silence_": 20}
    silence = [row for row in rows if row[1] == "_silence_"]
    assert Counter(row[-1] for row in silence) == {"training": 16, "validation": 2, "testing": 2}
    assert listing.spans[silence[7][0]] == (7.0, 8.0) and len(set(listing.ids)) == len(rows)
    assert listing.notes == (
        "testing_list.txt: 1 of 3 clips are not there (such as bed/gone_nohash_0.wav)",
    )


def test_speech_commands_2_has_its_words(tmp_path):
    listing = list_source(speech_commands(tmp_path, ("yes", "bed", "backward", "visual")))
    assert listing.kind == "speech_commands_v2" and len(listing.ids) == 12
    assert set(listing.columns["category"]) == {"yes", "bed", "backward", "visual"}
    assert not listing.spans


def test_prepared_silences_are_parts_of_their_file(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from beats_jax.data.prepare import prepare
    from beats_jax.data.sources import open_clips

    root = speech_commands(tmp_path / "source", ("yes",))
    noise = np.random.default_rng(0).integers(-9999, 9999, 20 * 16000 + 900).astype(np.int16)
    soundfile.write(root / "_background_noise_/pink_noise.wav", noise, 16000)
    report = prepare(root, tmp_path / "out", jobs=1, filter="category=_silence_,split!=training")
    assert (report.clips, report.source) == (4, "speech_commands_v1")
    assert report.notes[0].startswith("testing_list.txt: 2 of 3 clips are not there")
    clips = open_clips(tmp_path / "out")
    assert clips.ids == [f"_background_noise_/pink_noise.wav@{s}" for s in (16, 17, 18, 19)]
    for second, pcm in zip((16, 17, 18, 19), clips.fetch(np.arange(4)), strict=True):
        np.testing.assert_array_equal(pcm, noise[16000 * second : 16000 * (second + 1)])


# --- IEMOCAP --------------------------------------------------------------------------------------

EVALUATION = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\t{0}_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[10.0100 - 11.3925]\t{0}_M001\texc\t[2.5000, 2.5000, 2.5000]
C-E2:\tExcited;\t()

[14.8872 - 18.0175]\t{0}_FXX0\tfru\t[2.5000, 2.5000, 2.5000]
[19.2900 - 20.7875]\t{0}_M003\tang\t[2.5000, 3.5000, 3.0000]
"""


def test_iemocap(tmp_path):
    for session, dialogue in ((1, "Ses01F_impro01"), (5, "Ses05M_script01_1b")):
        folder = tmp_path / f"Session{session}"
        texts = folder / "dialog/EmoEvaluation"
        (texts / "Categorical").mkdir(parents=True)
        (texts / f"{dialogue}.txt").write_text(EVALUATION.format(dialogue))
        (texts / f"._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07")  # as in the archive
        (texts / "Categorical" / f"{dialogue}_e2_cat.txt").write_text("another annotator's")
        for turn in ("F000", "M001", "FXX0", "M003"):
            write_sound(folder / f"sentences/wav/{dialogue}/{dialogue}_{turn}.wav")
    (tmp_path / "Session5/sentences/wav/Ses05M_script01_1b/Ses05M_script01_1b_M003.wav").unlink()
    listing = list_source(tmp_path)
    assert listing.kind == "iemocap"
    assert listing.ids[0] == "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    assert listing.columns == {
        "category": ["neutral", "happy", "angry", "neutral", "happy"],
        "emotion": ["neu", "exc", "ang", "neu", "exc"],
        "fold": list("11155"),
        "speaker": ["Ses01F", "Ses01M", "Ses01M", "Ses05F", "Ses05M"],
        "group": ["Ses01F_impro01"] * 3 + ["Ses05M_script01_1b"] * 2,
    }
    assert listing.notes == (
        "1 of 6 utterances are not there (such as Ses05M_script01_1b_M003)",
        "2 utterances of other emotions are left out (fru 2)",
    )
    for clip in tmp_path.rglob("*.wav"):
        clip.unlink()
    with pytest.raises(ValueError, match="none of the 6 utterances of its four emotions"):
        list_source(tmp_path)
