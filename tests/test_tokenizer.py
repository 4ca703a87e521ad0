"""The random-projection tokenizer against numpy, and what it is for: codes that are all in use."""

import csv
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from beats_jax.fbank import MEL_BANKS, STD, fbank, patchify, unpatchify
from beats_jax.models.tokenizer import (
    init_random_projection,
    level_mel_bins,
    random_projection_ids,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")
DIMS = {"bestrq": 16, "paper": 256, "espnet": 256}


def usage(ids) -> tuple[float, float]:
    """Perplexity and the share of the most used code."""
    share = np.bincount(np.asarray(ids).ravel(), minlength=1024) / ids.size
    used = share[share > 0]
    return float(np.exp(-np.sum(used * np.log(used)))), float(share.max())


@pytest.fixture(scope="module")
def patches(waveforms) -> jax.Array:
    """Chirp, speech and noise at several levels: [tokens, 256]."""
    levels = 10.0 ** -np.linspace(0, 3, 8)
    clips = [waveforms[name] * level for name in ("chirp", "speech", "noise") for level in levels]
    return jnp.asarray(patchify(fbank(np.stack(clips).astype(np.float32)))).reshape(-1, 256)


def oracle(params, x, mode, loudness_weight=0.1):
    """Scores of all codes in float64, the larger the better."""
    x = np.asarray(x, np.float64)
    codebook = params["codebook"].astype(np.float64)

    def norm(a):
        return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)

    if mode == "bestrq":
        side = int(len(params["projection"]) ** 0.5)
        box = 16 // side
        x = x.reshape(-1, side, box, side, box).mean((2, 4)).reshape(len(x), -1)
        mean = x.mean(1, keepdims=True)
        y = (x - mean + loudness_weight * mean) @ params["projection"]
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        return y @ (codebook / np.linalg.norm(codebook, axis=1, keepdims=True)).T
    if mode == "espnet":
        x = norm(x @ params["patch_embedding"])
    y = x @ params["projection"]
    y = norm(y) if mode == "espnet" else y
    return -(np.square(y).sum(1, keepdims=True) - 2 * y @ codebook.T + np.square(codebook).sum(1))


@pytest.mark.parametrize("mode, pool", [("bestrq", 1), ("bestrq", 4), ("paper", 1), ("espnet", 1)])
def test_ids_match_numpy(patches, mode, pool):
    params = init_random_projection(3, dim=DIMS[mode], pool=pool, mode=mode)
    ids = np.asarray(random_projection_ids(params, patches, mode=mode))
    assert ids.dtype == np.int32 and ids.shape == patches.shape[:-1]
    scores = oracle(params, patches, mode)
    best = scores.max(1)
    np.testing.assert_allclose(scores[np.arange(len(ids)), ids], best, rtol=1e-4, atol=1e-5)
    clear = best - np.sort(scores, axis=1)[:, -2] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ids[clear], scores.argmax(1)[clear])


def test_loudness_weight(patches):
    params = init_random_projection(0)
    for weight in (0.0, 0.1, 1.0):
        ids = random_projection_ids(params, patches, loudness_weight=weight)
        scores = oracle(params, patches, "bestrq", weight)
        assert np.mean(np.asarray(ids) == scores.argmax(1)) > 0.99
    deaf = random_projection_ids(params, patches, loudness_weight=0.0)
    louder = random_projection_ids(params, patches + 0.5, loudness_weight=0.0)
    assert np.mean(np.asarray(deaf) == np.asarray(louder)) > 0.99  # all but rounding


def test_removing_loudness_is_what_keeps_the_codes_in_use(patches):
    ours, top = usage(random_projection_ids(init_random_projection(0), patches))
    paper = init_random_projection(0, dim=256, mode="paper")
    collapsed, _ = usage(random_projection_ids(paper, patches, mode="paper"))
    assert ours > 4 * collapsed and top < 0.2


def test_a_seed_means_the_same_arrays_everywhere():
    params = init_random_projection(45)
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
        "projection": ((256, 16), np.float32),
        "codebook": ((1024, 16), np.float32),
    }
    np.testing.assert_allclose(np.linalg.norm(params["codebook"], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(params["projection"].std(), np.sqrt(2 / 272), rtol=0.03)
    np.testing.assert_array_equal(params["codebook"], init_random_projection(45)["codebook"])
    assert not np.allclose(params["codebook"], init_random_projection(46)["codebook"])
    # stored token ids hang on these numbers
    np.testing.assert_allclose(
        params["projection"][0, :3], [0.00226162, 0.02232240, -0.03388345], rtol=1e-6
    )
    np.testing.assert_allclose(
        params["codebook"][-1, :3], [0.11162288, 0.19765450, 0.39860407], rtol=1e-6
    )


def test_compiled_with_the_arrays_as_arguments(patches):
    traces = []

    @jax.jit
    def label(params, patches):
        traces.append(1)
        return random_projection_ids(params, patches[None])[0]

    first, second = (label(init_random_projection(seed), patches) for seed in (0, 1))
    assert len(traces) == 1 and np.mean(np.asarray(first) == np.asarray(second)) < 0.1


def test_bad_arguments(patches):
    with pytest.raises(ValueError, match="mode is 'vq'"):
        init_random_projection(0, mode="vq")
    with pytest.raises(ValueError, match="mode is 'vq'"):
        random_projection_ids(init_random_projection(0), patches, mode="vq")
    with pytest.raises(ValueError, match="pool is 2"):
        init_random_projection(0, pool=2)
    with pytest.raises(ValueError, match="pool is 4 with mode 'paper'"):
        init_random_projection(0, pool=4, mode="paper")


def test_levelled_bins_of_noise_are_flat():
    noise = np.random.default_rng(0).normal(0, 0.1, (8, 32000)).astype(np.float32)
    patches = jnp.asarray(patchify(fbank(noise)))
    plain, level = (unpatchify(x).mean((0, 1)) for x in (patches, level_mel_bins(patches, STD)))
    # What is left is smooth: pre-emphasis, and that the log of fewer FFT bins' power lies lower.
    steps, left = (np.max(np.abs(np.diff(x))) for x in (plain, level))
    assert steps > 1.5 and left < 0.1  # the empty bin read the floor
    weight = MEL_BANKS.sum(0)
    full = weight > 0
    wanted = plain[full] - np.log(weight[full]) / (2 * STD)
    np.testing.assert_allclose(level[full], wanted, atol=1e-5)


@pytest.mark.realdata
@pytest.mark.parametrize("pool", [1, 4])
def test_levelled_bins_free_the_lowest_band_on_real_audio(pool):
    folder = Path(os.environ["BEATS_JAX_DATA"]) / "esc50" / "audio"
    clips = [soundfile.read(path, dtype="float32")[0] for path in sorted(folder.glob("*"))[::12]]
    patches = jnp.asarray(np.concatenate([patchify(fbank(clip)) for clip in clips]))
    params = init_random_projection(7, pool=pool)
    plain = np.asarray(random_projection_ids(params, patches))
    level = np.asarray(random_projection_ids(params, level_mel_bins(patches, STD)))
    assert usage(level)[0] > 1.1 * usage(plain)[0]
    assert usage(plain[::8])[1] > 0.4 and usage(level[::8])[1] < 0.2  # of the lowest band


@pytest.mark.realdata
@pytest.mark.parametrize("pool, perplexity", [(1, 250), (4, 90)])
def test_acceptance_on_real_audio(pool, perplexity):
    """The thresholds of method.md (b) 6, on a part of its clips: ESC-10, RAVDESS and FSDD."""
    folder = Path(os.environ["BEATS_JAX_DATA"])
    with open(folder / "esc50" / "metadata.csv", newline="") as rows:
        esc10 = [row["filename"] for row in csv.DictReader(rows) if row["esc10"] == "True"]
    paths = [folder / "esc50" / "audio" / name for name in esc10[::4]]
    paths += sorted((folder / "ravdess" / "audio").glob("*.flac"))[::20]
    paths += sorted((folder / "fsdd" / "audio").glob("*.flac"))[::25]
    assert len(paths) > 250
    clips = [soundfile.read(path, dtype="float32")[0] for path in paths]
    patches = jnp.asarray(np.concatenate([patchify(fbank(clip)) for clip in clips]))
    params = init_random_projection(7, pool=pool)
    got, top = usage(random_projection_ids(params, patches))
    assert got >= perplexity and top <= 0.12
