"""The layouts of published data sets on disk: AudioSet, Speech Commands, IEMOCAP.

Each is known by a file or folder that only it has. What its lists name and the disk does not hold,
and labels that are not the set's, are counted in a listing's `notes`, a line each: a part of a data
set is as good a source as the whole. Where a published protocol leaves a choice, it is said.
"""

import csv
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from beats_jax.labels import audioset

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .m4a .mp4 .aac .wma .webm .aif .aiff .au .caf .w64".split()
)
SPLITS = ("training", "validation", "testing")


@dataclasses.dataclass(frozen=True)
class Listing:
    """Audio files to prepare: ids [n], their paths [n] and their metadata, one value a file.

    Attributes:
        kind: the layout, e.g. "folder" or "audioset".
        ids, paths, columns: the files.
        spans: id -> (start, end) in seconds, of the clips that are only a part of their file.
        notes: what is not as the set's own lists have it, a line each.
        coverage: split -> class -> (clips there, clips listed), where a set has such lists.
    """

    kind: str
    ids: list[str]
    paths: list[Path]
    columns: dict[str, list[str]]
    spans: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    coverage: Mapping[str, Mapping[str, tuple[int, int]]] = dataclasses.field(default_factory=dict)


def published(root: Path) -> Listing | None:
    """The listing of a folder that holds one of these data sets, else None.

    Raises:
        ValueError: it is one, but nothing of it can be used.
    """
    for is_it, lister in KNOWN:
        if is_it(root):
            return lister(root)
    return None


def audio_files(root: Path) -> list[Path]:
    """Every audio file below a folder, sorted by its path from there; hidden ones left out."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in AUDIO_SUFFIXES
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


# --- AudioSet -------------------------------------------------------------------------------------


def list_audioset(root: Path) -> Listing:
    """AudioSet from its segment lists, `*_segments.csv`, and a folder of clips: all there are.

    A clip holds its segment alone, as the usual downloads do, and its name begins with the video's
    11-character id, alone or after a "Y", in any folder below. Columns: `split` (the list's name:
    balanced_train, unbalanced_train, eval), `labels` (MIDs, with ";" in between), `start`, `end`.

    Raises:
        ValueError: a list cannot be read, or none of its segments has a clip.
    """
    files = _by_video(audio_files(root))
    ids, paths, rows, notes = [], [], [], []
    coverage: dict[str, dict[str, tuple[int, int]]] = {}
    listed_in_all = 0
    for path in sorted(root.glob("*_segments.csv")):
        split = path.name.removesuffix("_segments.csv")
        listed: Counter[str] = Counter()
        there: Counter[str] = Counter()
        strange: Counter[str] = Counter()
        segments = clips = 0
        for video, start, end, mids in _segments(path):
            segments += 1
            strange.update(mid for mid in mids if mid not in audioset())
            known = [mid for mid in mids if mid in audioset()]
            listed.update(known)
            if known and (file := files.get(video)):
                clips += 1
                there.update(known)
                ids.append(file.relative_to(root).as_posix())
                paths.append(file)
                rows.append({"split": split, "labels": ";".join(known), "start": start, "end": end})
        coverage[split] = {mid: (there[mid], listed[mid]) for mid in audioset() if listed[mid]}
        listed_in_all += segments
        notes.append(
            f"{path.name}: {clips} of {segments} segments have a clip, and "
            f"{len(there)} of {len(listed)} classes"
        )
        if strange:
            some = ", ".join(sorted(strange)[:3])
            notes.append(
                f"{path.name}: {strange.total()} labels are not AudioSet's and left out ({some})"
            )
    if not ids:
        raise ValueError(
            f"{root}: none of the {listed_in_all} segments of its lists has a clip in it; clips "
            "are found by name, such as --PJHxphWEs.wav or Y--PJHxphWEs.wav, in any folder below"
        )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Listing("audioset", ids, paths, columns, notes=tuple(notes), coverage=coverage)


def _by_video(paths: Iterable[Path]) -> dict[str, Path]:
    """Clips by the 11-character id of their video; "Y" is first taken as a letter of the id."""
    paths = list(paths)
    with_letter = {path.stem[1:12]: path for path in paths if path.stem.startswith("Y")}
    return with_letter | {path.stem[:11]: path for path in paths}


def _segments(path: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """(video, start, end, MIDs) of each line of a segment list; "#" begins a comment."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(
            (line for line in file if not line.startswith("#")), skipinitialspace=True
        )
        for row in lines:
            if len(row) != 4:
                raise ValueError(
                    f"{path}: {row} is no segment; wanted YTID, start, end, "
                    '"label,label", as in AudioSet\'s own lists'
                )
            video, start, end, mids = row
            yield video, start, end, [mid.strip() for mid in mids.split(",") if mid.strip()]


# --- Speech Commands ------------------------------------------------------------------------------

COMMANDS = tuple("yes no up down left right on off stop go".split())
ONLY_IN_V2 = ("backward", "follow", "forward", "learn", "visual")
SILENCE = "_background_noise_"


def list_speech_commands(root: Path) -> Listing:
    """Speech Commands: v1 as 12 classes, v2 as its 35 words.

    Columns: `category`, `word`, `speaker`, and `split` by the official lists (training,
    validation, testing). Version 1 has the classes of Warden's recogniser: ten commands,
    `_unknown_` (all its other words, so by far the largest class: train with balanced sampling) and
    `_silence_`, which is made here: `_background_noise_` cut into seconds, of each recording the
    first 80 % for training and 10 % each for validation and testing. The authors' separate test
    archive has clips of its own for both; it is a folder of classes and is read as one.

    Reference:
        Warden, "Speech Commands: A dataset for limited-vocabulary speech recognition", 2018,
        arXiv:1804.03209.

    Raises:
        ValueError: there is no audio in it.
    """
    version_2 = any((root / word).is_dir() for word in ONLY_IN_V2)
    lists = {s: (root / f"{s}_list.txt").read_text("utf-8").split() for s in SPLITS[1:]}
    split_of = {name: split for split, names in lists.items() for name in names}
    found = {path.relative_to(root).as_posix(): path for path in audio_files(root)}
    noises = {i: path for i, path in found.items() if i.startswith(f"{SILENCE}/")}
    ids = [i for i in found if i not in noises and "/" in i]
    columns: dict[str, list[str]] = {"category": [], "word": [], "speaker": [], "split": []}
    for i in ids:
        word, name = i.split("/")[0], i.split("/")[-1]
        known = version_2 or word in COMMANDS
        columns["category"].append(word if known else "_unknown_")
        columns["word"].append(word)
        columns["speaker"].append(name.partition("_nohash_")[0])
        columns["split"].append(split_of.get(i, SPLITS[0]))
    paths, spans = [found[i] for i in ids], {}
    for i, path, split, span in [] if version_2 else _silences(noises):
        ids.append(i)
        paths.append(path)
        spans[i] = span
        for name, value in zip(columns, ("_silence_", "", "", split), strict=True):
            columns[name].append(value)
    if not ids:
        raise ValueError(f"{root}: no audio in the folders of its words")
    notes = tuple(
        f"{split}_list.txt: {missing} of {len(names)} clips are not there (such as {first})"
        for split, names in lists.items()
        if (missing := sum(name not in found for name in names))
        for first in [next(name for name in names if name not in found)]
    )
    if not version_2 and not noises:
        notes += (f"no {SILENCE}: there is no class _silence_",)
    kind = "speech_commands_v2" if version_2 else "speech_commands_v1"
    return Listing(kind, ids, paths, columns, spans, notes)


def _silences(
    noises: Mapping[str, Path],
) -> Iterator[tuple[str, Path, str, tuple[float, float]]]:
    """(id, file, split, span) of every whole second of the background noises."""
    import soundfile

    for i, path in noises.items():
        try:
            seconds = int(soundfile.info(path).duration)
        except soundfile.LibsndfileError:
            seconds = 1  # listed once, so that `prepare` counts it among the unreadable
        for second in range(seconds):
            tenth = 10 * second // seconds
            split = SPLITS[max(0, tenth - 7)]  # tenths 0 to 7, 8, 9
            yield f"{i}@{second}", path, split, (float(second), second + 1.0)


# --- IEMOCAP --------------------------------------------------------------------------------------

EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "sad": "sad", "ang": "angry"}
_UTTERANCE = re.compile(r"^\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t", re.M)


def list_iemocap(root: Path) -> Listing:
    """IEMOCAP: four emotions (excitement counts as happiness), a fold for each of five sessions.

    5531 utterances of the whole set, the usual choice (SUPERB's too). Columns: `category`,
    `emotion` (the annotators' own), `fold` (the session), `speaker` (e.g. Ses01F), `group` (the
    dialogue).

    Reference:
        Busso et al., "IEMOCAP: Interactive emotional dyadic motion capture database", 2008.

    Raises:
        ValueError: there is no utterance of these emotions in it.
    """
    ids, paths, rows = [], [], []
    others: Counter[str] = Counter()
    missing: list[str] = []
    for path in sorted(root.glob("Session*/dialog/EmoEvaluation/[!.]*.txt")):
        session = path.parents[2]
        for name, emotion in _UTTERANCE.findall(path.read_text("utf-8", errors="replace")):
            if emotion not in EMOTIONS:
                others[emotion] += 1
                continue
            dialogue = name.rpartition("_")[0]
            file = session / "sentences" / "wav" / dialogue / f"{name}.wav"
            if not file.is_file():
                missing.append(name)
                continue
            ids.append(file.relative_to(root).as_posix())
            paths.append(file)
            rows.append(
                {
                    "category": EMOTIONS[emotion],
                    "emotion": emotion,
                    "fold": session.name.removeprefix("Session"),
                    "speaker": name[:5] + name.rpartition("_")[2][0],
                    "group": dialogue,
                }
            )
    if not ids:
        raise ValueError(
            f"{root}: none of the {len(missing)} utterances of its four emotions is there; wanted "
            "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav and so on"
        )
    notes = []
    if missing:
        total = len(missing) + len(ids)
        notes.append(f"{len(missing)} of {total} utterances are not there (such as {missing[0]})")
    if others:
        counts = ", ".join(f"{emotion} {n}" for emotion, n in others.most_common())
        notes.append(f"{others.total()} utterances of other emotions are left out ({counts})")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Listing("iemocap", ids, paths, columns, notes=tuple(notes))


KNOWN: tuple[tuple[Callable[[Path], bool], Callable[[Path], Listing]], ...] = (
    (lambda root: any(root.glob("*_segments.csv")), list_audioset),
    (
        lambda root: all((root / f"{split}_list.txt").is_file() for split in SPLITS[1:]),
        list_speech_commands,
    ),
    (lambda root: any(root.glob("Session*/dialog/EmoEvaluation")), list_iemocap),
)
