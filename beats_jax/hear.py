"""A model through the common API of HEAR 2021 (https://hearbenchmark.com/hear-api.html).

Numpy arrays for numpy and jax arrays, torch tensors for torch tensors: HEAR's own tools insist on
torch. `hear-validator beats_jax.hear -m MODEL` passes.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

from beats_jax import inference, windows
from beats_jax.data.audio import as_waveform
from beats_jax.fbank import MIN_SAMPLES, SAMPLE_RATE


def load_model(model_file_path: str) -> Any:
    """Opens whatever `beats_jax.load` opens.

    Returns:
        An object with `sample_rate`, `scene_embedding_size`, `timestamp_embedding_size`, and the
        model as `beats`; where torch has been imported it is a `torch.nn.Module`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: it is no model.
    """
    beats = inference.load(model_file_path)
    torch = sys.modules.get("torch")
    model = SimpleNamespace() if torch is None else torch.nn.Module()
    model.beats, model.sample_rate = beats, SAMPLE_RATE
    model.scene_embedding_size = model.timestamp_embedding_size = beats.embed_dim
    return model


def get_timestamp_embeddings(audio: Any, model: Any) -> tuple[Any, Any]:
    """One embedding for each 0.16 s: the mean of the last layer's features over the 8 bands.

    The mean and not the 8 of them in a row, because that is what BEATs' own classifier is made of
    (the mean over all tokens), because it leaves D and not 8 D numbers (768, not 6144) to HEAR's
    shallow classifiers, and because it makes a scene embedding the mean of these. Every token has
    seen all the others; what it knows of its own band is in `Model.frames`.

    HEAR suggests a step of 50 ms or less for its transcription tasks. BEATs has none finer than
    this: audio is cut into patches of 0.16 s before the model sees it.

    Args:
        audio: [n_sounds, n_samples] at 16 kHz, of any length: long ones run in windows of 10 s that
            overlap by half; under 2800 samples they are filled up with zeros, as in training.
        model: of `load_model`.

    Returns:
        embeddings float32 [n_sounds, n_timestamps, D]; timestamps float32 [n_sounds, n_timestamps]:
        the middles of what was embedded, in milliseconds.

    Raises:
        ValueError: the audio is not what is described here.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.is_tensor(audio):
        arrays = get_timestamp_embeddings(audio.detach().cpu().numpy(), model)
        embeddings, timestamps = (torch.from_numpy(x).to(audio.device) for x in arrays)
        return embeddings, timestamps
    waveforms = as_waveform(audio)
    if waveforms.ndim != 2:
        raise ValueError(f"audio has shape {waveforms.shape}; give [n_sounds, n_samples]")
    waveforms = np.pad(waveforms, [(0, 0), (0, max(MIN_SAMPLES - waveforms.shape[1], 0))])
    parts = ((row, part) for row, x in enumerate(waveforms) for part in windows.cut([x]))
    mergers = [windows.Merger() for _ in waveforms]
    pieces: list[list[np.ndarray]] = [[] for _ in waveforms]
    for row, part, values in windows.run(model.beats, "features", parts):
        pieces[row].append(mergers[row].add(part.first, values.mean(axis=1)))
        if part.last:
            pieces[row].append(mergers[row].rest())
    embeddings = np.stack([np.concatenate(row) for row in pieces])
    times = (1000 * inference.times(embeddings.shape[1])).astype(np.float32)
    return embeddings, np.tile(times, (len(embeddings), 1))


def get_scene_embeddings(audio: Any, model: Any) -> Any:
    """One embedding of a whole sound: the mean of its timestamp embeddings.

    Returns:
        float32 [n_sounds, D]; else as `get_timestamp_embeddings`.
    """
    return get_timestamp_embeddings(audio, model)[0].mean(1)
