"""What users call, against the official code's outputs and itself: padding, lengths, kinds."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from runs import FIXTURES

import beats_jax
from beats_jax import inference, labels
from beats_jax.fbank import num_frames, num_tokens, patchify
from beats_jax.inference import Model, bucket, clips_at_once, samples_of

ENCODER, FINETUNED = FIXTURES / "dev_encoder.pt", FIXTURES / "dev_finetuned.pt"
TOKENIZER = FIXTURES / "dev_tokenizer.pt"


@pytest.fixture(scope="module")
def encoder() -> Model:
    return beats_jax.load(ENCODER)


@pytest.fixture(scope="module")
def finetuned() -> Model:
    return beats_jax.load(FINETUNED)


@pytest.fixture(scope="module")
def tokenizer() -> Model:
    return beats_jax.load(TOKENIZER)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)


def padded(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips of these lengths in one batch, with something loud where there is padding."""
    batch = noise(len(lengths), max(lengths))
    return batch, np.arange(max(lengths)) >= np.array(lengths)[:, None]


# --- against the official code --------------------------------------------------------------------


@pytest.mark.parametrize("name", official.CASES)
def test_features_are_the_official_ones(encoder, name):
    case = official.case("dev_encoder", name)
    mask = dict(padding_mask=case.get("fbank_mask"), mask_mode="official")
    layers = encoder.all_layers(fbank=case["fbank"], **mask)
    features, token_mask = encoder.extract_features(fbank=case["fbank"], **mask)
    if "patch_mask" in case:
        np.testing.assert_array_equal(token_mask, case["patch_mask"])
    seen = ~token_mask
    np.testing.assert_allclose(layers[0][seen], case["layer0_in"][seen], rtol=0, atol=3e-5)
    for ours, theirs in zip(layers[1:], case["layers"], strict=True):
        theirs = theirs.swapaxes(0, 1) if theirs.shape[0] != len(seen) else theirs
        np.testing.assert_allclose(ours[seen], theirs[seen], rtol=0, atol=3e-5)
    np.testing.assert_allclose(features[seen], case["features"][seen], rtol=0, atol=3e-5)
    from_waveform, its_mask = encoder.extract_features(
        case["waveform"], case.get("padding_mask"), mask_mode="official"
    )
    np.testing.assert_array_equal(its_mask, token_mask)
    np.testing.assert_allclose(from_waveform[seen], case["features"][seen], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", official.CASES)
def test_probabilities_are_the_official_ones(finetuned, name):
    case, audio = official.case("dev_finetuned", name), official.case("dev_encoder", name)
    mask = dict(padding_mask=audio.get("fbank_mask"), mask_mode="official")
    _, probs = finetuned.classify(fbank=audio["fbank"], **mask)
    np.testing.assert_allclose(probs, case["probs"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", official.CASES)
def test_tokens_are_the_official_ones(tokenizer, name):
    case, audio = official.case("dev_tokenizer", name), official.case("dev_encoder", name)
    mask = dict(padding_mask=audio.get("fbank_mask"), mask_mode="official")
    ids = tokenizer.tokenize(fbank=audio["fbank"], **mask)
    clear = case["dist_margin"] > 1e-3
    if "patch_mask" in audio:
        clear = clear & ~audio["patch_mask"].reshape(clear.shape)
    np.testing.assert_array_equal(ids.reshape(clear.shape)[clear], case["ids"][clear])


def test_the_legacy_file_is_the_same_model(encoder):
    legacy = beats_jax.from_pretrained(FIXTURES / "dev_encoder_legacyformat.pt")
    assert legacy.source["params_sha256"] == encoder.source["params_sha256"]


# --- padding and lengths --------------------------------------------------------------------------

LENGTHS = (16000, 12345, 5360, 2800, 2799, 0)


def test_a_padded_batch_gives_what_each_clip_gives_alone(encoder):
    batch, mask = padded(*LENGTHS)
    features, token_mask = encoder.extract_features(batch, mask)
    layers, (x, times) = encoder.all_layers(batch, mask), encoder.frames(batch, mask)
    np.testing.assert_array_equal(np.sum(~token_mask, axis=1), num_tokens(np.array(LENGTHS)))
    assert not features[token_mask].any() and not layers[:, token_mask].any()
    np.testing.assert_array_equal(x.reshape(features.shape), features)
    np.testing.assert_array_equal(times, 0.0875 + 0.16 * np.arange(6))
    for row, length in enumerate(LENGTHS[:4]):
        alone, none_padded = encoder.extract_features(batch[row, :length])
        assert not none_padded.any() and alone.shape == (num_tokens(length), 48)
        np.testing.assert_allclose(features[row, : len(alone)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_layer_is_that_of_all_layers(encoder, layer):
    layers = encoder.all_layers(noise(2, 16000))
    one, _ = encoder.extract_features(noise(2, 16000), layer=layer)
    assert layers.shape == (4, 2, 48, 48)
    np.testing.assert_allclose(layers[layer], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("batch", "length", "size"), [(8, 496, 1), (6, 200, 2), (7, 200, 7)])
def test_clips_go_through_a_few_at_a_time(batch, length, size):
    assert clips_at_once(batch, length) == size


@pytest.mark.parametrize("layer", [None, 2])
def test_clip_by_clip_is_the_batch(encoder, layer, monkeypatch):
    waveform = np.random.default_rng(5).normal(0, 0.1, (4, 8000)).astype(np.float32)
    waveform = jnp.asarray(waveform)  # else the batch's log-mel, a constant, is NumPy's
    mask = np.arange(24) >= np.array([24, 24, 16, 8])[:, None]
    model: Any = encoder
    arguments = model._net, model._mean, model._std, model._arrays, waveform, mask
    forward: Any = inference.forward
    whole = jax.jit(lambda: forward.__wrapped__(*arguments, what="features", layer=layer))
    together = whole()
    monkeypatch.setattr(inference, "TOKENS_AT_ONCE", 48)
    apart = jax.jit(lambda: forward.__wrapped__(*arguments, what="features", layer=layer))
    assert apart().shape == together.shape
    np.testing.assert_allclose(apart(), together, atol=1e-5)


def test_padding_changes_no_class_score_and_no_token(finetuned, tokenizer):
    batch, mask = padded(*LENGTHS)
    logits, probs = finetuned.classify(batch, mask)
    ids = tokenizer.tokenize(batch, mask)
    assert ids.dtype == np.int32 and ids.shape == (6, 6, 8)
    for row, length in enumerate(LENGTHS[:4]):
        alone, _ = finetuned.classify(batch[row, :length])
        np.testing.assert_allclose(logits[row], alone, rtol=0, atol=1e-5)
        one = tokenizer.tokenize(batch[row, :length])
        np.testing.assert_array_equal(ids[row, : len(one)], one)
        assert np.all(ids[row, len(one) :] == -1)
    assert not logits[4:].any() and not probs[4:].any() and np.all(ids[4:] == -1)


def test_buckets_change_no_result(encoder):
    """Against the network itself, without bucket or mask."""
    network = jax.jit(encoder.pretrained.model.apply)
    for length in (2800, 30000):  # 1 and 11 columns, of which 12 are computed
        waveform = noise(length)
        frames = beats_jax.fbank(waveform)
        columns = num_tokens(length) // 8
        patches = patchify(jnp.asarray(frames[None, : 16 * columns]))
        plain = network({"params": encoder.pretrained.params["encoder"]}, patches)
        features, _ = encoder.extract_features(waveform)
        np.testing.assert_allclose(features, np.asarray(plain)[0], rtol=0, atol=1e-5)


def test_lengths_share_programs(encoder):
    compiled, columns = [], []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    for length in range(samples_of(9), samples_of(24), 1111):
        encoder.extract_features(noise(3, length))  # three: no other test has compiled that
        columns.append(num_tokens(length) // 8)
    sizes = {bucket(n) for n in columns}
    assert len(set(columns)) == 15 and len(sizes) == 6
    assert len(compiled) == len(sizes)  # a program a bucket, and nothing else by the way


def test_buckets_waste_little():
    for columns in range(1, 2000):
        assert columns <= bucket(columns) <= max(columns * 1.25, 1)
        assert num_tokens(samples_of(columns)) == 8 * columns
        assert num_tokens(samples_of(columns) - 1) == 8 * (columns - 1)


def test_a_clip_too_short_for_a_token_is_said(encoder, caplog):
    with caplog.at_level(logging.WARNING, "beats_jax"):
        features, token_mask = encoder.extract_features(noise(2, 2799))
    assert features.shape == (2, 0, 48) and token_mask.shape == (2, 0)
    assert encoder.frames(noise(2799))[0].shape == (0, 8, 48)
    assert "2 of 2 clips have under 2800 valid samples" in caplog.text


# --- ways to say the same -------------------------------------------------------------------------


def test_int16_one_clip_and_fbank_are_the_same_clip(encoder):
    pcm = (noise(16000) * 32768).astype(np.int16)
    features, _ = encoder.extract_features(pcm)
    batch, _ = encoder.extract_features(jnp.asarray(pcm[None] / np.float32(32768)))
    np.testing.assert_array_equal(features, batch[0])
    log_mel = beats_jax.fbank(pcm)
    from_fbank, _ = encoder.extract_features(fbank=log_mel)
    np.testing.assert_allclose(from_fbank, features, rtol=0, atol=1e-5)
    half = np.arange(len(log_mel)) >= num_frames(8000)
    masked, token_mask = encoder.extract_features(fbank=log_mel, padding_mask=half)
    alone, _ = encoder.extract_features(pcm[:8000])
    assert np.sum(~token_mask) == len(alone) and masked.dtype == np.float32
    np.testing.assert_allclose(masked[: len(alone)], alone, rtol=0, atol=1e-5)


def test_bfloat16_is_near_and_comes_as_float32(encoder):
    rough = beats_jax.load(ENCODER, precision="bfloat16")
    one, _ = encoder.extract_features(noise(16000))
    two, _ = rough.extract_features(noise(16000))
    assert two.dtype == np.float32 and 1e-6 < np.abs(one - two).max() < 0.2


def test_official_mode_keeps_the_values_of_padding(encoder):
    batch, mask = padded(16000, 8000)
    official_mode = beats_jax.load(ENCODER, mask_mode="official")
    features, token_mask = official_mode.extract_features(batch, mask)
    assert features[token_mask].any()
    exact, _ = official_mode.extract_features(batch, mask, mask_mode="exact")
    np.testing.assert_array_equal(exact, encoder.extract_features(batch, mask)[0])


# --- names ----------------------------------------------------------------------------------------


def test_official_labels_become_names(finetuned):
    mids = finetuned.pretrained.labels
    known = labels.audioset()
    assert len(finetuned.labels) == len(mids) == finetuned.classify(noise(16000))[0].shape[-1]
    assert finetuned.labels == tuple(known.get(mid, mid) for mid in mids)
    assert finetuned.task == "multi-label"


def test_the_order_of_audioset():
    known = list(labels.audioset())
    assert (
        len(known) == 527 and labels.audioset()["/m/09x0r"] == "Speech" and known[0] == "/m/09x0r"
    )
    shuffled = np.random.default_rng(0).permutation(527)
    order = labels.audioset_order([known[i] for i in shuffled])
    np.testing.assert_array_equal(shuffled[order], np.arange(527))
    by_name = labels.audioset_order(labels.names([known[i] for i in shuffled]))
    np.testing.assert_array_equal(by_name, order)
    with pytest.raises(ValueError, match="not AudioSet's 527"):
        labels.audioset_order(["dog", *known[1:]])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.classify(noise(16000)), "kind encoder: it has no class scores"),
        (lambda m: m.tokenize(noise(16000)), "kind encoder: it has no acoustic tokens"),
        (lambda m: m.extract_features(), "either waveform or fbank="),
        (lambda m: m.extract_features(noise(16000), layer=4), "layer 4 is not one of 0"),
        (lambda m: m.extract_features(noise(16000), layer=-1), "layer -1"),
        (lambda m: m.extract_features("a.wav"), "is the path a.wav"),
        (lambda m: m.extract_features(noise(2, 3, 4)), "has shape"),
        (lambda m: m.extract_features(noise(0, 16000)), "no clip in it"),
        (lambda m: m.extract_features(noise(9), mask_mode="loose"), "mask_mode is 'loose'"),
        (lambda m: m.extract_features(fbank=noise(98, 64)), "want float .*128"),
        (lambda m: m.extract_features(fbank=np.full((98, 128), np.nan, np.float32)), "not finite"),
        (lambda m: m.extract_features(noise(16000), np.zeros(98, bool)), "padding_mask is bool"),
        (lambda m: m.extract_features(noise(9), np.zeros(9)), "padding_mask is float64"),
        (
            lambda m: m.extract_features(noise(2, 4), np.array([4 * [False], [1, 0, 0, 1]], bool)),
            r"after padding in rows \[1\].*mask_mode=\"official\"",
        ),
        (
            lambda m: m.extract_features(*padded(16000, 0), mask_mode="official"),
            r"rows \[1\] are padding alone",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(encoder, call, message):
    with pytest.raises(ValueError, match=message):
        call(encoder)


def test_what_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        beats_jax.load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        beats_jax.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not there"):
        beats_jax.load(tmp_path / "nowhere")
