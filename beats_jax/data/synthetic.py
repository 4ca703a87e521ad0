"""Sounds made on the spot, so that everything runs with nothing downloaded.

Thirteen kinds of events that differ in what a spectrogram shows (lines, slopes, stripes, combs,
bands, clouds), each with random pitch, rate, colour and length; in most clips one kind, repeated,
in the others a mixture of several; always over coloured noise. So a masked patch can be guessed
from the visible ones, but not from its own place alone.
"""

import csv
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from beats_jax.data.sources import Clips
from beats_jax.fbank import SAMPLE_RATE
from beats_jax.labels import audioset

Rng = np.random.Generator


def synthetic_clips(num_clips: int, seconds: float = 5.0, seed: int = 0) -> Clips:
    """Clips in memory; clip i is a function of (seed, i) and `seconds`.

    Columns: `category` (an event's name, or "mixture"), `events` (the names, joined by |) and
    `fold` ("1" to "5", every category in each once there are 70 clips).

    Args:
        num_clips: how many, at least 1; about 100 of 5 s are made a second.
        seconds: length of each.
        seed: of all of them.
    """
    if num_clips < 1 or seconds < 0.1:
        raise ValueError(f"{num_clips} clips of {seconds} s: give at least 1 clip, of 0.1 s")
    made = [_clip(seed, i, round(seconds * SAMPLE_RATE)) for i in range(num_clips)]
    waveforms = [waveform for waveform, _, _ in made]
    return Clips(
        ids=[f"synthetic_{i:06d}" for i in range(num_clips)],
        num_samples=np.array([len(w) for w in waveforms], np.int64),
        columns={
            "category": [category for _, category, _ in made],
            "events": ["|".join(names) for _, _, names in made],
            "fold": [str(1 + i // (len(EVENTS) + 1) % 5) for i in range(num_clips)],
        },
        digests=[hashlib.sha256(w.tobytes()).hexdigest() for w in waveforms],
        read=waveforms.__getitem__,
        records=np.arange(num_clips),
    )


def _clip(seed: int, i: int, num_samples: int) -> tuple[np.ndarray, str, list[str]]:
    """Waveform int16 [num_samples], category and event names of clip i."""
    rng = np.random.default_rng([seed, i])
    kinds = list(EVENTS)
    place = i % (len(kinds) + 1)
    if place < len(kinds):
        category, names = kinds[place], [kinds[place]] * rng.integers(1, 4)
    else:
        category = "mixture"
        names = [str(name) for name in rng.choice(kinds, rng.integers(2, 5), replace=False)]
    # Float64 throughout: sin and FFT differ between machines in the last bits, and must not reach
    # the int16 samples, from which the fingerprint is made.
    waveform = _background(rng, num_samples) * 10 ** rng.uniform(-2.2, -1.0)
    for name in names:
        length = int(num_samples * rng.uniform(0.3, 0.9))
        begin = rng.integers(0, num_samples - length + 1)
        event = EVENTS[name](rng, length)
        event *= rng.uniform(0.4, 1.0) / np.max(np.abs(event))
        fade = np.minimum(1.0, np.arange(length) / (0.01 * SAMPLE_RATE))  # no click at the ends
        waveform[begin : begin + length] += event * fade * fade[::-1]
    waveform *= 10 ** rng.uniform(-1.3, -0.05) / np.max(np.abs(waveform))
    return np.round(waveform * 32767).astype("<i2"), category, sorted(set(names))


# --- building blocks ------------------------------------------------------------------------------


def _sine(frequency: np.ndarray) -> np.ndarray:
    """A sine whose frequency in Hz is given for every sample."""
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE)


def _shaped(x: np.ndarray, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`x` filtered with a gain that is a function of frequency in Hz."""
    size = (
        1 << (len(x) - 1).bit_length()
    )  # an FFT of a random, often prime, length takes 5 x longer
    spectrum = np.fft.rfft(x, size) * gain(np.fft.rfftfreq(size, 1 / SAMPLE_RATE))
    return np.fft.irfft(spectrum, size)[: len(x)]


def _peaks(frequency: np.ndarray, centres: np.ndarray, width: float) -> np.ndarray:
    """Gain with a resonance of `width` Hz at each centre."""
    return 1e-3 + np.sum(1 / (1 + ((frequency - centres[:, None]) / width) ** 2), axis=0)


def _background(rng: Rng, n: int) -> np.ndarray:
    """Noise of unit variance that falls (or not) with frequency: white to brown."""
    slope = rng.uniform(0.0, 1.0)
    noise = _shaped(rng.standard_normal(n), lambda f: np.maximum(f, 30.0) ** -slope)
    return noise / np.std(noise)


def _times(rng: Rng, n: int, gap: float, jitter: float) -> np.ndarray:
    """Samples at which something starts, `gap` seconds apart give or take a share `jitter`."""
    gaps = gap * SAMPLE_RATE * rng.uniform(1 - jitter, 1 + jitter, int(n / SAMPLE_RATE / gap) + 2)
    times = np.cumsum(gaps).astype(int) - int(gaps[0])
    return times[times < n]


def _strikes(n: int, times: np.ndarray, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The sum of short sounds, each made anew, that start at `times`."""
    out = np.zeros(n)
    for time in times:
        sound = make()[: n - time]
        out[time : time + len(sound)] += sound
    return out


# --- events: (rng, number of samples) -> float64 [n] ----------------------------------------------


def _chirp_up(rng: Rng, n: int) -> np.ndarray:
    low, high = rng.uniform(200, 1200), rng.uniform(2500, 7000)
    return _sine(np.geomspace(low, high, n))


def _chirp_down(rng: Rng, n: int) -> np.ndarray:
    return _chirp_up(rng, n)[::-1]


def _am_tone(rng: Rng, n: int) -> np.ndarray:
    tone = _sine(np.full(n, rng.uniform(400, 4000)))
    return tone * (0.5 + 0.5 * _sine(np.full(n, rng.uniform(2, 12)))) ** rng.uniform(1, 4)


def _siren(rng: Rng, n: int) -> np.ndarray:
    swing = _sine(np.full(n, rng.uniform(0.4, 3)))
    pitch = rng.uniform(500, 1400) * 2 ** (rng.uniform(0.3, 0.8) * swing)
    return _sine(pitch) + 0.5 * _sine(2 * pitch) + 0.3 * _sine(3 * pitch)


def _noise_bursts(rng: Rng, n: int) -> np.ndarray:
    period, open_share = rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.6)
    is_open = np.arange(n) / SAMPLE_RATE / period % 1 < open_share
    return rng.standard_normal(n) * is_open


def _clicks(rng: Rng, n: int) -> np.ndarray:
    t = np.arange(240) / SAMPLE_RATE
    click = np.exp(-t * 600) * np.sin(2 * np.pi * rng.uniform(1500, 6000) * t)
    return _strikes(n, _times(rng, n, 1 / rng.uniform(3, 20), 0.1), lambda: click)


def _trill(rng: Rng, n: int) -> np.ndarray:
    note, pitch, bend = rng.uniform(0.05, 0.15), rng.uniform(2200, 5000), rng.uniform(0.15, 0.5)
    place = np.arange(n) / SAMPLE_RATE / note % 1
    return _sine(pitch * (1 + bend * np.sin(2 * np.pi * place))) * np.sin(np.pi * place) ** 2


def _voice(rng: Rng, n: int) -> np.ndarray:
    vibrato = 1 + 0.03 * _sine(np.full(n, rng.uniform(4, 7)))
    glide = np.geomspace(1, rng.uniform(0.7, 1.4), n)
    source = np.cumsum(rng.uniform(90, 280) * glide * vibrato) / SAMPLE_RATE % 1 - 0.5
    syllables = np.array_split(source, rng.integers(2, 7))
    out = []
    for syllable in syllables:
        formants = np.array(
            [rng.uniform(250, 900), rng.uniform(900, 2400), rng.uniform(2500, 3500)]
        )
        vowel = _shaped(syllable, lambda f, formants=formants: _peaks(f, formants, 90.0))
        out.append(vowel * np.sin(np.pi * np.linspace(0, 1, len(syllable))) ** 0.7)
    return np.concatenate(out)


def _bell(rng: Rng, n: int) -> np.ndarray:
    ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.74, 3.76]) * rng.uniform(400, 1300)
    decay = rng.uniform(2, 5)
    t = np.arange(min(n, SAMPLE_RATE)) / SAMPLE_RATE
    order = 1 + np.arange(len(ratios))[:, None]  # higher partials are weaker and die sooner
    partials = np.exp(-t * decay * order) * np.sin(2 * np.pi * ratios[:, None] * t) / order
    strike = np.sum(partials, axis=0)
    return _strikes(n, _times(rng, n, rng.uniform(0.4, 1.5), 0.1), lambda: strike)


def _engine(rng: Rng, n: int) -> np.ndarray:
    wander = 1 + 0.2 * _sine(np.full(n, rng.uniform(0.1, 0.6)))
    place = np.cumsum(rng.uniform(18, 60) * wander) / SAMPLE_RATE % 1
    pulses = np.exp(-8 * place) * (1 + 0.3 * rng.standard_normal(n))
    return _shaped(pulses - pulses.mean(), lambda f: 1 / (1 + (f / 700) ** 2))


def _rain(rng: Rng, n: int) -> np.ndarray:
    hiss = _shaped(rng.standard_normal(n), lambda f: (f > 1500) * 1.0)
    t = np.arange(160) / SAMPLE_RATE
    return 0.2 * hiss + _strikes(
        n,
        _times(rng, n, 1 / rng.uniform(40, 120), 0.9),
        lambda: np.exp(-t * 800) * np.sin(2 * np.pi * rng.uniform(2000, 7500) * t) * rng.random(),
    )


def _drum(rng: Rng, n: int) -> np.ndarray:
    t = np.arange(SAMPLE_RATE // 4) / SAMPLE_RATE
    skin = np.exp(-t * 14) * _sine(rng.uniform(60, 160) * (1 + 2 * np.exp(-t * 30)))
    snare = rng.uniform(0, 0.6) * np.exp(-t * 35)
    beat = _times(rng, n, rng.uniform(0.15, 0.5), 0.03)
    return _strikes(n, beat, lambda: skin + snare * rng.standard_normal(len(t)))


def _wind(rng: Rng, n: int) -> np.ndarray:
    """A narrow band of noise whose centre wanders."""
    width = rng.uniform(100, 400)
    noise = _shaped(rng.standard_normal(n), lambda f: np.exp(-((f / width) ** 2)))
    swing = np.cumsum(rng.choice([-1.0, 1.0]) * np.full(n, rng.uniform(0.2, 0.8))) / SAMPLE_RATE
    return noise * _sine(rng.uniform(800, 3000) * 2 ** np.sin(2 * np.pi * swing))


EVENTS: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "chirp_up": _chirp_up,
    "chirp_down": _chirp_down,
    "am_tone": _am_tone,
    "siren": _siren,
    "noise_bursts": _noise_bursts,
    "clicks": _clicks,
    "trill": _trill,
    "voice": _voice,
    "bell": _bell,
    "engine": _engine,
    "rain": _rain,
    "drum": _drum,
    "wind": _wind,
}


# --- on disk, for whoever reads audio from folders ------------------------------------------------

# What AudioSet calls these events; not all of them are perfectly that.
AUDIOSET_NAMES = {
    "chirp_up": "Chirp tone",
    "chirp_down": "Chirp tone",
    "am_tone": "Sine wave",
    "siren": "Siren",
    "noise_bursts": "White noise",
    "clicks": "Clicking",
    "trill": "Bird vocalization, bird call, bird song",
    "voice": "Speech",
    "bell": "Bell",
    "engine": "Engine",
    "rain": "Rain",
    "drum": "Drum",
    "wind": "Wind",
}


def write_folder(
    folder: str | os.PathLike[str], num_clips: int, seconds: float = 2.0, seed: int = 0
) -> list[Path]:
    """Writes `synthetic_clips` as a person's folder of audio: a sub-folder of .wav for each class.

    `metadata.csv` beside them has the columns of the clips, and `filename`. What is there already
    is written again, the same.

    Returns:
        The files, in the order of the clips.
    """
    clips, folder = synthetic_clips(num_clips, seconds, seed), Path(folder)
    names = [f"{c}/{i}.wav" for c, i in zip(clips.columns["category"], clips.ids, strict=True)]
    _write_wavs(clips, [folder / name for name in names])
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", *clips.columns])
        rows.writerows(zip(names, *clips.columns.values(), strict=True))
    return [folder / name for name in names]


def write_audioset(
    folder: str | os.PathLike[str], num_clips: int = 98, seconds: float = 2.0, seed: int = 0
) -> None:
    """Writes a tiny fake copy of AudioSet: its segment lists, and clips named by their videos.

    Two of three clips are `balanced_train`, the third is `eval`; as in a real copy, some videos
    are gone: every 5th segment has no clip.
    """
    clips, folder = synthetic_clips(num_clips, seconds, seed), Path(folder)
    mids = {name: mid for mid, name in audioset().items()}
    videos = [f"fake_{i:06d}" for i in range(num_clips)]
    lists = {
        "balanced_train": [row for row in range(num_clips) if row % 3],
        "eval": [row for row in range(num_clips) if not row % 3],
    }
    there = np.arange(num_clips) % 5 > 0
    paths = [folder / "audio" / f"Y{videos[row]}.wav" for row in np.flatnonzero(there)]
    _write_wavs(clips.select(keep=there), paths)
    for split, rows in lists.items():
        lines = ["# YTID, start_seconds, end_seconds, positive_labels"]
        for row in rows:
            events = clips.columns["events"][row].split("|")
            labels = ",".join(sorted({mids[AUDIOSET_NAMES[event]] for event in events}))
            lines.append(f'{videos[row]}, 0.000, {seconds:.3f}, "{labels}"')
        (folder / f"{split}_segments.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_wavs(clips: Clips, paths: Sequence[Path]) -> None:
    import soundfile

    for row, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        (waveform,) = clips.fetch(np.array([row]))
        soundfile.write(path, waveform, SAMPLE_RATE)
