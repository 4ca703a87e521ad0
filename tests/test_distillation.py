"""The distillation stage in numbers: its target by the official outputs, its loss, its update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import FIXTURES, tiny_config

from beats_jax import start, train
from beats_jax.fbank import MEAN, STD, patchify
from beats_jax.metrics import summarize
from beats_jax.models.quantizer import l2_normalise, move_codes


def make(**overrides):
    """The stage with a teacher from an official file, on a log-mel that is not the teacher's."""
    config = tiny_config(iteration="iter2", data__mean=11.0, data__std=9.0, **overrides)
    return train.STAGES["tokenizer"](config, start.earlier(config, "tokenizer", "").given)


def one_clip():
    with np.load(FIXTURES / "dev_encoder.npz") as stored:
        log_mel = stored["one_1s/fbank"] * 2 * STD + MEAN
    return {
        "patches": jnp.asarray(patchify((log_mel - 11.0) / (2 * 9.0)), jnp.float32),
        "num_samples": np.full(1, 16000, np.int32),
        "counter": np.zeros(1, np.uint32),
    }


@pytest.mark.parametrize(
    ("name", "output"), [("dev_encoder", "features"), ("dev_finetuned", "logits_tok")]
)
def test_the_target_is_the_teachers_last_output(name, output):
    stage, frozen = make(teacher=str(FIXTURES / f"{name}.pt"), tokenizer__commitment=0.5)
    batch = one_clip()
    params, state = jax.jit(stage.init)(jax.random.key(0), batch)
    state["codebook"] = l2_normalise(jax.random.normal(jax.random.key(1), (32, 32)))
    metrics, outputs = jax.jit(stage.eval_fn)(params, state, frozen, batch)
    with np.load(FIXTURES / f"{name}.npz") as stored:
        official = stored[f"one_1s/{output}"][0]
    unit = official / np.linalg.norm(official, axis=-1, keepdims=True)
    target = metrics["constant_cosine"]  # the sum of the targets' directions
    np.testing.assert_allclose(target.total / 48, unit.mean(axis=0), rtol=0, atol=3e-5)
    figures = summarize(metrics)
    parts = 1 - figures["teacher_cosine"] + 0.5 * figures["commitment"]
    assert figures["commitment"] > 0.1 and figures["loss"] == pytest.approx(parts, rel=1e-5)
    assert jnp.sum(outputs["nll"]) / 48 == pytest.approx(figures["loss"], rel=1e-5)


def test_the_update_moves_the_codebook_that_was_looked_up_in():
    stage, _ = make(teacher=str(FIXTURES / "dev_encoder.pt"), tokenizer__ema_decay=0.9)
    state = {
        "codebook": l2_normalise(jax.random.normal(jax.random.key(0), (32, 32))),
        "usage": jnp.arange(32.0),
        "steps_collapsed": jnp.int32(7),
    }
    stats = {
        "counts": jnp.arange(32.0) % 5,
        "sums": jax.random.normal(jax.random.key(1), (32, 32)),
    }
    after = stage.update_fn(state, stats)
    want = move_codes(state["codebook"], **stats, decay=0.9)
    np.testing.assert_array_equal(after["codebook"], want)
    kept = after["codebook"][::5] - state["codebook"][::5]  # no vector took these
    np.testing.assert_allclose(kept, 0, atol=1e-6)
    usage = 0.9 * np.arange(32) + 0.1 * (np.arange(32) % 5)
    np.testing.assert_allclose(after["usage"], usage, rtol=1e-6)
    assert after["steps_collapsed"] == 0
    idle = stage.update_fn(state, jax.tree.map(jnp.zeros_like, stats))
    assert idle["steps_collapsed"] == 8
