"""The analytic cost of a step, against figures worked out by hand and against XLA's own count."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from beats_jax.flops import encoder_flops, layers_flops, predictor_flops
from beats_jax.models.beats import PRESETS, BEATs, Predictor
from beats_jax.training_workloads import Training
from beats_jax.workloads import Settings, make_mesh


def base():
    encoder = BEATs(**PRESETS["base"])
    settings: dict[str, Any] = encoder.settings() | {"num_layers": 3}
    return encoder, Predictor(**settings)


def test_base_costs_what_method_md_derives():
    """Section 6 there: 124 visible tokens 21 GFLOP in the blocks, the predictor's 3 as much."""
    encoder, predictor = base()
    assert layers_flops(encoder, 124) / 1e9 == pytest.approx(21.6, abs=0.1)
    assert layers_flops(predictor, 496) / 1e9 == pytest.approx(23.3, abs=0.1)
    forward = encoder_flops(encoder, 496, 124) + predictor_flops(predictor, 496, 124)
    assert forward / 1e9 == pytest.approx(46.35, abs=0.05)


def test_count_agrees_with_xla():
    """Lowered, not compiled: the matmuls as written, and what little there is beside them."""
    model = BEATs(num_layers=3, embed_dim=256, ffn_dim=1024, num_heads=4, patch_dim=256)
    patches = jax.ShapeDtypeStruct((8, 496, 256), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), patches)
    # As in training: where no gradient follows a CPU takes attention in parts, a loop counted once.
    apply = jax.jit(lambda params, patches: model.apply(params, patches, deterministic=False))
    cost: Any = apply.lower(params, patches).cost_analysis()
    assert cost["flops"] / 8 == pytest.approx(encoder_flops(model, 496), rel=0.08)


def test_a_steps_count_agrees_with_xla(monkeypatch):
    """Fine-tuning's: forward, gradients and update, unrolled, nothing computed twice."""
    preset = dict(num_layers=2, embed_dim=512, ffn_dim=2048, num_heads=8, patch_dim=512)
    monkeypatch.setitem(PRESETS, "two", preset)
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    settings = Settings("finetune", "two", 8, 10.0, "float32", mesh, backend="numpy")
    training = Training(settings, make_mesh(settings))
    batch = {
        "patches": jax.ShapeDtypeStruct((8, 496, 256), jnp.float32),
        "labels": jax.ShapeDtypeStruct((8, 50), jnp.float32),
        "num_samples": jax.ShapeDtypeStruct((8,), jnp.int32),
        "counter": jax.ShapeDtypeStruct((8,), jnp.uint32),
    }
    cost: Any = training.step.lower(training.like, training.frozen, batch).cost_analysis()
    assert cost["flops"] / 8 == pytest.approx(training.stage.flops_per_clip, rel=0.1)
