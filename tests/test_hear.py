"""The common API of HEAR 2021: names, shapes, units, and the same numbers as the model gives."""

import jax.numpy as jnp
import numpy as np
import official
import pytest

from beats_jax import hear, inference, windows

PATH = str(official.FIXTURES / "dev_encoder.pt")


@pytest.fixture(scope="module")
def model():
    return hear.load_model(PATH)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def test_attributes(model):
    assert model.sample_rate == 16000
    assert model.scene_embedding_size == model.timestamp_embedding_size == 48
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int


def test_embeddings_are_the_models(model):
    audio = noise(3, 17120)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    x, times = inference.load(PATH).frames(audio)
    assert embeddings.shape == (3, 6, 48) and timestamps.shape == (3, 6)
    assert embeddings.dtype == timestamps.dtype == np.float32
    np.testing.assert_allclose(embeddings, x.mean(axis=2), rtol=0, atol=1e-5)
    np.testing.assert_allclose(timestamps, [1000 * times] * 3, rtol=0, atol=1e-3)
    np.testing.assert_allclose(timestamps[0, :2], [87.5, 247.5])
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (3, 48) and scenes.dtype == np.float32
    np.testing.assert_allclose(scenes, x.mean(axis=(1, 2)), rtol=0, atol=1e-5)


def test_long_sounds_run_in_windows(model):
    audio = noise(2, 16 * 16000)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    for row in range(2):
        x, times = zip(*windows.frames(model.beats, audio[row]), strict=True)
        expected = np.concatenate(x).mean(axis=1)
        np.testing.assert_allclose(embeddings[row], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(timestamps[row], 1000 * np.concatenate(times), rtol=1e-6)


@pytest.mark.parametrize("samples", [1, 2799])
def test_short_sounds_are_filled_up(model, samples):
    audio = noise(2, samples)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    expected, _ = hear.get_timestamp_embeddings(np.pad(audio, [(0, 0), (0, 2800 - samples)]), model)
    np.testing.assert_array_equal(embeddings, expected)
    assert timestamps.tolist() == [[87.5], [87.5]]


def test_arrays_of_other_kinds(model):
    pcm = np.round(noise(2, 2800) * 32767).astype(np.int16)
    expected = hear.get_scene_embeddings(pcm / np.float32(32768), model)
    for audio in (pcm, jnp.asarray(pcm), jnp.asarray(pcm / np.float32(32768))):
        scenes = hear.get_scene_embeddings(audio, model)
        assert isinstance(scenes, np.ndarray)
        np.testing.assert_array_equal(scenes, expected)
    with pytest.raises(ValueError, match=r"shape \(2800,\); give \[n_sounds, n_samples\]"):
        hear.get_scene_embeddings(pcm[0], model)


@pytest.mark.torch
def test_torch_in_torch_out():
    """As HEAR's own tools demand it."""
    import torch

    model, audio = hear.load_model(PATH), noise(2, 17120)
    assert isinstance(model.to("cpu"), torch.nn.Module) and model.sample_rate == 16000
    embeddings, timestamps = hear.get_timestamp_embeddings(torch.from_numpy(audio), model)
    expected, times = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == torch.float32
    np.testing.assert_array_equal(embeddings.detach().cpu().numpy(), expected)
    np.testing.assert_array_equal(timestamps.numpy(), times)
    scenes = hear.get_scene_embeddings(torch.from_numpy(audio), model)
    assert isinstance(scenes, torch.Tensor) and scenes.shape == (2, 48)
