"""Design section 6: what must hold when the same run lies on another mesh or on more processes."""

import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from runs import (
    FIXTURES,
    Forked,
    assert_gradients_close,
    assert_trees_equal,
    free_port,
    run_forked,
    tiny_config,
    tiny_flags,
)
from test_train import build

from beats_jax import sharding, train
from beats_jax.checkpoint import Checkpoints
from beats_jax.pretrained import load_model
from beats_jax.writers import read_metrics

MESHES = [
    (2, dict(data=2, fsdp=1, tensor=1)),
    (4, dict(data=1, fsdp=4, tensor=1)),
    (8, dict(data=8, fsdp=1, tensor=1)),
    (8, dict(data=2, fsdp=2, tensor=2)),
]


def sharded_config(**mesh):
    config = tiny_config(input__backend="numpy", model__dropout=0.1)
    config.mesh.update(mesh)
    return config


def one_step(config, devices, start=None, name="pretrain"):
    """From a common state (a checkpoint is laid out anew in this way): what one step computes."""
    given = load_model(FIXTURES / "dev_encoder.pt") if name == "tokenizer" else None
    stage, frozen, data, state, step = build(config, devices, name, given)
    if name == "tokenizer" and start is None and stage.calibrate:
        batches, rng = [next(data.calibration())], jax.random.key(0)
        calibrated, _ = stage.calibrate(state.params, state.model_state, frozen, batches, rng)
        state = state._replace(model_state=calibrated)
    if start is not None:
        state = jax.device_put(start, jax.tree.map(lambda x: x.sharding, state))
    start = jax.device_get(state)
    batch = next(data.training(0))
    _, outputs = jax.jit(stage.eval_fn)(state.params, state.model_state, frozen, batch)
    outputs, batch = jax.device_get((outputs, dict(batch)))
    feed, losses = data.training(0), []
    for number in range(20):
        state, sums = step(state, frozen, next(feed))
        losses.append(train.floats(sums)["loss"])
        if number == 0:
            # Adam's first moment is a tenth of the gradient, clipped to a norm of 1.
            moments = jax.device_get(state.opt_state[1][0].mu)
            unclipped = 10 * max(1.0, float(sums["grad_norm"]))
            grads = jax.tree.map(functools.partial(np.multiply, unclipped), moments)
            after, counts = jax.device_get((state.model_state, sums["metrics"]["code"].counts))
    return (start, losses[0], grads, (counts, after), outputs, batch), losses


@functools.cache
def reference(name="pretrain"):
    return one_step(sharded_config(), 1, name=name)


@pytest.mark.parametrize(("devices", "mesh"), MESHES)
def test_another_mesh_trains_the_same(devices, mesh):
    (start_1, loss_1, grads_1, stats_1, outputs_1, batch_1), losses_1 = reference()
    (start, loss, grads, stats, outputs, batch), losses = one_step(
        sharded_config(**mesh), devices, start_1
    )
    jax.tree.map(np.testing.assert_array_equal, start, start_1)
    jax.tree.map(np.testing.assert_array_equal, batch, batch_1)  # ids and crops
    np.testing.assert_array_equal(outputs["valid"], outputs_1["valid"])  # masks
    jax.tree.map(np.testing.assert_array_equal, stats, stats_1)
    assert loss == pytest.approx(loss_1, rel=1e-5)  # with dropout: its bits are equal too
    assert_gradients_close(grads, grads_1, 1e-4)
    assert losses[-1] == pytest.approx(losses_1[-1], rel=1e-3)


@pytest.mark.parametrize(("devices", "mesh"), [MESHES[2], MESHES[3]])
def test_another_mesh_distils_the_same_codebook_included(devices, mesh):
    (start_1, loss_1, grads_1, (counts_1, after_1), out_1, batch_1), losses_1 = reference(
        "tokenizer"
    )
    (start, loss, grads, (counts, after), outputs, batch), losses = one_step(
        sharded_config(**mesh), devices, start_1, "tokenizer"
    )
    jax.tree.map(np.testing.assert_array_equal, (start, batch), (start_1, batch_1))
    # This state has no code with a margin so small that the reduction order decides.
    np.testing.assert_array_equal(outputs["token_ids"], out_1["token_ids"])
    np.testing.assert_array_equal(counts, counts_1)
    np.testing.assert_allclose(after["codebook"], after_1["codebook"], rtol=0, atol=1e-5)
    assert np.max(np.abs(after["codebook"] - start.model_state["codebook"])) > 1e-4
    assert loss == pytest.approx(loss_1, rel=1e-5)
    assert_gradients_close(grads, grads_1, 1e-4)
    assert losses[-1] == pytest.approx(losses_1[-1], rel=1e-3)


def test_parameters_lie_as_the_table_says():
    *_, state, _ = build(sharded_config(data=2, fsdp=2, tensor=2), 8)
    layer = state.params["encoder"]["encoder"]["layers_0"]
    assert layer["fc1"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert layer["fc2"]["kernel"].sharding.spec == P("tensor", "fsdp")
    assert layer["final_layer_norm"]["scale"].sharding.spec == P()
    moments = state.opt_state[1][0].mu["encoder"]["encoder"]["layers_0"]
    assert moments["fc1"]["kernel"].sharding.spec == P("fsdp", "tensor")


def test_a_checkpoint_goes_from_mesh_to_mesh_bit_equal(tmp_path):
    """1, 2, 4, 8 devices and back, saved on each and restored onto the next."""
    *_, state, _ = build(sharded_config(), 1)
    wanted = jax.device_get(state)
    for data, fsdp, tensor in ((2, 1, 1), (1, 4, 1), (2, 2, 2), (2, 1, 2), (1, 2, 1), (1, 1, 1)):
        devices = jax.devices()[: data * fsdp * tensor]
        mesh = sharding.make_mesh(data, fsdp, tensor, devices=devices)
        where = sharding.tree_shardings(state, mesh)
        like = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, where
        )
        with Checkpoints(tmp_path / f"{data}{fsdp}{tensor}") as checkpoints:
            checkpoints.save(state, {})
            state = checkpoints.restore(0, like)
        assert_trees_equal(jax.device_get(state), wanted)
        assert jax.tree.map(lambda x: x.sharding, state) == where


def test_wrong_sizes_say_what_to_set():
    with pytest.raises(ValueError, match=r"data=3 .* does not fit 8 devices; set one of --config"):
        sharding.make_mesh(3, 1, 1)
    mesh = sharding.make_mesh()
    with pytest.raises(
        ValueError, match=r"20 does not divide over 8.*--config.pretrain.batch_size=16"
    ):
        sharding.check_batch_size(20, 1, mesh, "pretrain")
    with pytest.raises(ValueError, match=r"× 3 micro-batches; set --config.pretrain.batch_size=24"):
        sharding.check_batch_size(32, 3, mesh, "pretrain")


def test_rows_of_the_global_batch():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert sharding.local_rows(8, mesh) == slice(0, 8)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    array = sharding.global_batch({"x": rows}, 8, mesh)["x"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}


@pytest.mark.timeout(900)  # three runs, two of them at once
def test_two_processes_train_as_one(tmp_path):
    stages = ("iter1/pretrain", "iter2/tokenizer", "iter1/finetune")
    changes: dict = dict(stages=stages, teacher=FIXTURES / "dev_encoder.pt")
    changes |= dict(input__backend="numpy", input__frontend="host")
    changes |= dict(pretrain__steps=4, pretrain__save_every=4)
    changes |= dict(tokenizer__steps=4, tokenizer__save_every=4)
    changes |= dict(finetune__steps=4, finetune__batch_size=8, finetune__log_every=1)
    changes |= dict(finetune__eval_every=2, finetune__warmup_steps=1, finetune__visible=0.5)
    done = run_forked(tiny_flags(tmp_path / "one", **changes), tmp_path, devices=2)
    assert done.returncode == 0, done.stderr
    port = free_port()
    flags = [*tiny_flags(tmp_path / "two", **changes), f"--coordinator=127.0.0.1:{port}"]
    logs = [tmp_path / f"log{i}" for i in range(2)]
    processes = [
        Forked([*flags, "--num_processes=2", f"--process_id={i}"], log, log)
        for i, log in enumerate(logs)
    ]
    codes = [process.wait(600) for process in processes]
    assert codes == [0, 0], [log.read_text() for log in logs]
    for stage in stages:
        one, two = (read_metrics(tmp_path / n / stage) for n in ("one", "two"))
        assert [line["step"] for line in one] == [line["step"] for line in two]
        if stage != "iter1/finetune":
            # The same clips were read.
            assert one[0]["code_perplexity"] == two[0]["code_perplexity"]
            one, two = one[1:], two[1:]
        # Fine-tuning starts from weights that are no longer equal to the bit.
        rel = 1e-3 if stage == "iter1/finetune" else 1e-5
        assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=rel)
        assert one[-1]["loss"] == pytest.approx(two[-1]["loss"], rel=1e-3)
    files = [tmp_path / n / "iter1/finetune/results.json" for n in ("one", "two")]
    results = [json.loads(file.read_text()) for file in files]
    assert results[0]["steps"].keys() == {"last", "ema", "best", "best_mean"}
    for name, sets in results[0]["weights"].items():  # of all processes' clips, on every weight set
        for of in ("val", "test"):
            wanted = results[1]["weights"][name][of]["loss"]
            assert sets[of]["loss"] == pytest.approx(wanted, rel=5e-3), (name, of)
