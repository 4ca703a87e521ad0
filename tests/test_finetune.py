"""Fine-tuning: labels, augmentations, layer-wise rates, averages, selection, resumption."""

import functools
import json
import shutil
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from runs import (
    ROOT,
    assert_gradients_close,
    assert_trees_equal,
    load_config,
    tiny_config,
    without_timing,
)

import beats_jax
from beats_jax import augment, cli, losses, optim, pretrained, selection, sharding, start, train
from beats_jax.checkpoint import load_params
from beats_jax.data import order
from beats_jax.data.dataset import Data, open_labelled
from beats_jax.data.pipeline import Augment, eval_batches, train_batches
from beats_jax.data.synthetic import synthetic_clips
from beats_jax.fbank import MEAN, NUM_MELS, STD, fbank, patchify, unpatchify
from beats_jax.labels import Labels, audioset, audioset_order, read_labels
from beats_jax.models.beats import BEATs, depths, token_padding_mask
from beats_jax.scores import average_precisions
from beats_jax.stages import batch_patches, finetune
from beats_jax.stages import tokenizer as distillation

FINETUNE = {
    "input__backend": "numpy",
    "data__num_clips": 84,
    "finetune__steps": 6,
    "finetune__batch_size": 8,
    "finetune__warmup_steps": 2,
    "finetune__save_every": 2,
    "finetune__log_every": 1,
    "finetune__eval_every": 2,
    "finetune__keep": 10,
}


FINETUNING = [f"finetune_{task}" for task in ("as2m", "as20k", "esc50", "ks1", "ks2", "er")]


def config_of(**overrides):
    return tiny_config(**{**FINETUNE, **overrides})


def build(config, devices=1):
    """Everything `run_stage` makes before its loop, on the first `devices` devices."""
    section = config.finetune
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:devices])
    data = Data.open(config, section.batch_size, mesh, "unused", section)
    stage, _ = train.STAGES["finetune"](config, data.train_clips.labels)
    tx, schedule = optim.make_optimizer(section, config.adamw)
    init = start.state_maker(stage, tx, config.seed, data.clip_samples)
    like = start.abstract_state(init, mesh)
    state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, like))()
    step = train.make_train_step(
        stage, tx, schedule, config.seed, section.micro_batches, like, mesh
    )
    return stage, data, state, step


# --- labels ---------------------------------------------------------------------------------------


def test_labels_are_sorted_or_in_audiosets_order():
    ids = ["a", "b", "c"]
    labels = read_labels(["dog", "cat", "dog"], ids, "single-label")
    assert labels.names == ("cat", "dog")
    np.testing.assert_array_equal(labels.multi_hot(np.array([0, 1, -1])), [[0, 1], [1, 0], [0, 0]])
    assert labels.counts().tolist() == [1, 2]
    for separator in ";,|":
        cells = [f"dog{separator} cat", "cat", f"cow{separator}"]
        labels = read_labels(cells, ids, "multi-label")
        assert labels.names == ("cat", "cow", "dog")
        hot = labels.multi_hot(np.arange(3))
        np.testing.assert_array_equal(hot, [[1, 0, 1], [1, 0, 0], [0, 1, 0]])
    # One class with a comma in its name stays one class.
    assert read_labels(["Child speech, kid speaking"], ["a"], "single-label").names == (
        "Child speech, kid speaking",
    )
    mids = list(audioset())
    some = [mids[500], mids[3], mids[40]]
    assert read_labels(some, ids, "single-label").names == (mids[3], mids[40], mids[500])
    names = [audioset()[mid] for mid in some]
    assert read_labels(names, ids, "single-label").names == (names[1], names[2], names[0])
    whole = read_labels([";".join(some[:2]), *some[1:]], ids, "multi-label", "audioset")
    np.testing.assert_array_equal(audioset_order(whole.names), np.arange(527))
    assert whole.counts()[[3, 40, 500]].tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("cells", "task", "classes", "message"),
    [
        (["a", "", " "], "single-label", "", "2 of 3 clips have no label in column 'label' .* y"),
        (["a", ";", "b"], "multi-label", "", r"1 of 3 .*--config.data.filter=label!="),
        (["a", "b", "b"], "single-label", "a, c", r"2 labels .* none of the 2 classes .*: b \(2\)"),
        (
            ["a", "b", "b"],
            "two-label",
            "",
            'finetune.task "two-label" is unknown; use single-label',
        ),
    ],
)
def test_bad_labels_are_one_clear_line(cells, task, classes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_labels(cells, ["x", "y", "z"], task, classes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__label": "colour"}, "no column 'colour'; the columns are: category, events, fold"),
        ({"data__test_filter": "fold=9"}, "leaves no clip; fold has values like"),
        ({"data__test_filter": "fold!=9"}, "all 84 clips pass data.test_filter"),
        ({"data__filter": "category=rain"}, "clips are 'rain': there is nothing to tell apart"),
        ({"data__crop": "grid"}, "whole clips"),
        ({"data__clip_seconds": 0.1}, "holds no token"),
        ({"data__val_filter": "fold=1"}, "holds out 0 of 56 clips that are not tested"),
        ({"data__val_filter": "fold!=1"}, "holds out 56 of 56 clips that are not tested"),
        ({"data__classes": "rain,wind"}, "labels in column 'category' are none of the 2 classes"),
    ],
)
def test_bad_data_is_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message):
        open_labelled(config_of(**changes).data, "single-label", "unused")


def test_test_clips_are_neither_trained_on_nor_held_out(caplog):
    caplog.set_level("INFO", logger="beats_jax")
    data = config_of(data__test_filter="fold=5", data__classes="").data
    train_clips, val, test = open_labelled(data, "single-label", "unused")
    assert set(test.columns["fold"]) == {"5"} and len(test) > 0 and len(val) > 0
    assert "5" not in {*train_clips.columns["fold"], *val.columns["fold"]}
    assert not {*train_clips.ids} & {*val.ids} and len(train_clips) + len(val) + len(test) == 84
    assert train_clips.labels and val.labels and test.labels
    assert train_clips.labels.names == val.labels.names == test.labels.names
    for clips in (train_clips, val, test):
        assert clips.labels
        hot = clips.labels.multi_hot(np.arange(len(clips)))
        found = [clips.labels.names[i] for i in hot.argmax(axis=1)]
        assert found == clips.columns["category"] and np.all(hot.sum(axis=1) == 1)
    data.val_filter = "fold=2"
    train_clips, val, _ = open_labelled(data, "single-label", "unused")
    assert {*val.columns["fold"]} == {"2"} and {*train_clips.columns["fold"]} == {"1", "3", "4"}
    data.val_filter, data.test_filter = "", "category=rain"
    open_labelled(data, "single-label", "unused")
    assert "1 of 14 classes have no clip to train on: rain" in caplog.text


# --- augmentations --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips():
    made = synthetic_clips(30, 1.0, seed=3)
    lengths = [1000, 9000, *made.num_samples[2:]]  # one under a token, one short, the others 1 s
    labels = read_labels(made.columns["events"], made.ids, "multi-label")
    waveforms = [made.read(i)[:n] for i, n in enumerate(lengths)]
    fields = {**vars(made), "num_samples": np.array(lengths), "read": waveforms.__getitem__}
    return type(made)(**{**fields, "labels": labels})


def collect(iterator, number):
    batches = list(islice(iterator, number))
    iterator.close()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def augmented(clips, number, **kwargs):
    cdf = clips.labels and clips.labels.balanced_cdf()
    settings = dict(
        seed=5, batch_size=6, clip_samples=12000, frontend="device", backend="numpy",
        augment=Augment(roll=True, mixup=0.5, mixup_alpha=0.8, cdf=cdf),
    )  # fmt: skip
    return collect(train_batches(clips, **{**settings, **kwargs}), number)


def test_augmented_batches_are_functions_of_their_number(clips):
    whole = augmented(clips, 6)
    for backend in ("tf", "numpy"):  # resumed in the middle, on either executor
        resumed = augmented(clips, 3, start=3, backend=backend)
        assert resumed.keys() == whole.keys() and "labels" in whole
        for name, value in resumed.items():
            np.testing.assert_array_equal(value, whole[name][18:], err_msg=name)
            assert value.dtype == whole[name].dtype
    some = augmented(clips, 6, rows=np.array([1, 4]))  # another host's rows
    for name, value in some.items():
        np.testing.assert_array_equal(value, whole[name].reshape(6, 6, *value.shape[1:])[:, [1, 4]]
                                      .reshape(value.shape))  # fmt: skip
    other = augmented(clips, 6, seed=6)
    assert all(np.any(other[name] != whole[name]) for name in ("waveform", "labels", "index"))


@pytest.mark.parametrize("backend", ["tf", "numpy"])
def test_log_mels_are_mixed_as_waveforms_are(clips, backend):
    of_log_mels = Augment(mixup=0.7, mixup_of="log-mel", mixup_alpha=0.8)
    mixed = augmented(clips, 2, augment=of_log_mels)
    plain = augmented(clips, 2, augment=Augment())
    of_waveforms = augmented(clips, 2, augment=of_log_mels._replace(mixup_of="waveform"))
    for name in ("labels", "num_samples", "index", "counter"):
        np.testing.assert_array_equal(mixed[name], of_waveforms[name])
    share = order.mixup_weights(5, np.arange(12), 0.7, 0.8).astype(np.float32)
    np.testing.assert_array_equal(mixed["share"], share)
    own, other = (
        np.asarray(patchify(fbank(jnp.asarray(of)))) for of in (plain["waveform"], mixed["partner"])
    )
    wanted = share[:, None, None] * own + (1 - share[:, None, None]) * other
    on_device = batch_patches({k: jnp.asarray(v) for k, v in mixed.items()}, MEAN, STD)
    on_host = augmented(clips, 2, augment=of_log_mels, frontend="host", backend=backend)
    assert "partner" not in on_host and 0 < np.sum(share < 1) < 12
    np.testing.assert_allclose(on_device, wanted, atol=1e-5)
    np.testing.assert_allclose(on_host["patches"], wanted, atol=1e-4)


def test_a_mixture_is_what_was_drawn(clips):
    batch = augmented(clips, 20)
    counters = np.arange(120)
    cdf = clips.labels.balanced_cdf()
    weights = order.mixup_weights(5, counters, 0.5, 0.8)
    index = order.weighted_positions(5, counters, cdf, "balance")
    partner = order.weighted_positions(5, counters, cdf, "mixup/partner")
    starts = order.crop_starts(5, counters, clips.num_samples[index], 12000)
    partner_starts = order.crop_starts(5, counters, clips.num_samples[partner], 12000, "mixup/crop")
    assert 40 < np.sum(weights < 1) < 80
    np.testing.assert_array_equal(batch["index"], index)
    for row in range(120):
        crop = clips.read(index[row])[starts[row] :][:12000].astype(np.float64)
        crop = np.roll(crop, order.roll_shifts(5, counters[[row]], np.array([len(crop)]))[0])
        hot = clips.labels.multi_hot(index[[row]])[0]
        other = clips.read(partner[row])[partner_starts[row] :][:12000]
        length = len(crop) if weights[row] == 1 else max(len(crop), len(other))
        wanted = np.zeros(12000)
        wanted[: len(crop)] = weights[row] * crop
        if weights[row] < 1:
            wanted[: len(other)] += (1 - weights[row]) * other
            hot = (
                weights[row] * hot + (1 - weights[row]) * clips.labels.multi_hot(partner[[row]])[0]
            )
        np.testing.assert_allclose(batch["waveform"][row], wanted, atol=0.51)
        np.testing.assert_allclose(batch["labels"][row], hot, atol=1e-6)
        assert batch["num_samples"][row] == max(length, 2800)


def test_without_augmentation_batches_are_what_they_were(clips):
    plain = augmented(clips, 5, augment=Augment())
    index = order.dataset_positions(5, np.arange(30), 30)
    np.testing.assert_array_equal(plain["index"], index)
    np.testing.assert_array_equal(plain["labels"], clips.labels.multi_hot(index))
    unlabelled = type(clips)(**{**vars(clips), "labels": None})
    before = augmented(unlabelled, 5, augment=Augment())
    assert "labels" not in before
    np.testing.assert_array_equal(before["waveform"], plain["waveform"])
    # A labelled clip under one token is padded to one; evaluation fills up with empty rows.
    assert sorted(plain["num_samples"])[0] == 2800 and sorted(before["num_samples"])[0] == 1000
    last = collect(
        eval_batches(clips, batch_size=8, clip_samples=12000, frontend="device", backend="numpy"), 4
    )
    assert last["num_samples"][30:].tolist() == [0, 0] and not last["labels"][30:].any()


def test_weights_and_balance_follow_their_distributions(clips):
    counters = np.arange(40_000)
    weights = order.mixup_weights(0, counters, 1.0, 0.8)
    assert weights.mean() == pytest.approx(0.5, abs=0.01)
    assert weights.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.03)  # of Beta(a, a)
    assert np.all(order.mixup_weights(0, counters[:99], 0.0, 0.8) == 1)
    labels = Labels(("a", "b"), np.array([[0, -1]] * 9 + [[0, 1]], np.int16))
    cdf = labels.balanced_cdf()
    np.testing.assert_allclose(np.diff(cdf, prepend=0), [0.1 / 2] * 9 + [1.1 / 2])
    drawn = np.bincount(order.weighted_positions(0, counters, cdf, "x"), minlength=10) / 40_000
    np.testing.assert_allclose(drawn, np.diff(cdf, prepend=0), atol=0.01)


def test_spec_augment_masks_within_bounds_and_by_counter():
    patches = jnp.ones((64, 6 * 8, 256))
    num_samples = jnp.where(jnp.arange(64) < 32, 15_600, 8_080)  # 96 and 49 frames
    counters = jnp.arange(64, dtype=jnp.uint32)
    masks = finetune.SpecAugment(2, 0.25, 1, 0.5)
    rng = jax.random.key(1)
    seen = np.asarray(unpatchify(finetune.masked(patches, num_samples, counters, rng, masks)))
    rows, columns = np.all(seen == 0, axis=2), np.all(seen == 0, axis=1)
    np.testing.assert_array_equal(seen == 0, rows[:, :, None] | columns[:, None, :])
    assert set(np.unique(seen)) == {0.0, 1.0}
    assert 30 < rows[:32].sum(axis=1).max() <= 2 * 24 and columns.sum(axis=1).max() <= 64
    assert rows[32:].sum(axis=1).max() <= 2 * 12 and not rows[32:, 49:].any()  # valid frames only
    assert columns.sum(axis=1).max() > NUM_MELS // 4
    again = finetune.masked(patches[5:9], num_samples[5:9], counters[5:9], rng, masks)
    np.testing.assert_array_equal(unpatchify(again), seen[5:9])
    other = finetune.masked(patches, num_samples, counters, jax.random.key(2), masks)
    assert np.any(np.asarray(unpatchify(other)) != seen)
    nothing = finetune.masked(patches, num_samples, counters, rng, finetune.NO_MASKS)
    np.testing.assert_array_equal(nothing, patches)


def test_roll_and_mixup_in_numbers():
    a, b = np.array([1, 2, 3, 32767], np.int16), np.array([10, 10], np.int16)
    assert augment.roll(a, 1).tolist() == [32767, 1, 2, 3]
    assert augment.mixup(a, b, 0.25).tolist() == [8, 8, 1, 8192]
    assert augment.mixup(b, a, 1.0).tolist() == [10, 10, 0, 0]


# --- losses, rates, averages ----------------------------------------------------------------------


def test_losses_in_numbers(strict_promotion):
    logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    hard = jnp.array([0, 2])
    one_hot = jax.nn.one_hot(hard, 3)
    for smoothing in (0.0, 0.1):
        np.testing.assert_allclose(
            losses.soft_cross_entropy(logits, one_hot, smoothing),
            losses.cross_entropy(logits, hard, smoothing),
            rtol=1e-6,
        )
    x, targets = np.asarray(logits, np.float64), np.array([[1, 0, 0.3], [1, 1, 0]])
    probs = 1 / (1 + np.exp(-x))
    weights = np.array([1.0, 2.0, 0.5], np.float32)
    for smoothing in (0.0, 0.2):
        t = (1 - smoothing) * targets + smoothing / 2
        terms = -(t * np.log(probs) + (1 - t) * np.log(1 - probs))
        got = losses.binary_cross_entropy(logits, jnp.float32(targets), smoothing)
        np.testing.assert_allclose(got, terms.mean(axis=1), rtol=1e-6)
        got = losses.binary_cross_entropy(logits, jnp.float32(targets), smoothing, weights)
        np.testing.assert_allclose(got, (weights * terms).mean(axis=1), rtol=1e-6)
    assert np.isfinite(
        losses.binary_cross_entropy(jnp.full((1, 1), -200.0), jnp.ones((1, 1)))
    ).all()
    np.testing.assert_allclose(finetune.inverse_frequency(np.array([1, 4, 0])), [1.6, 0.4, 1.0])


@functools.cache
def three_layers():
    model = BEATs(num_layers=3, embed_dim=32, ffn_dim=64, num_heads=2, patch_dim=32)
    patches = jnp.zeros((1, 8, 256))
    params = jax.eval_shape(model.init, jax.random.key(0), patches)["params"]
    return {"encoder": params, "head": {"kernel": jnp.zeros((32, 5)), "bias": jnp.zeros(5)}}


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_layer_wise_rates_in_numbers():
    rates = by_name(optim.layer_rates(three_layers(), 0.5))
    layers = {"layers_0": 0.25, "layers_1": 0.5, "layers_2": 1.0, "head": 1.0}
    for name, rate in rates.items():
        parts = name.split("/")
        assert rate == next((layers[part] for part in parts if part in layers), 0.125), name
    assert rates["encoder/patch_embedding/kernel"] == 0.125
    assert rates["encoder/encoder/relative_attention_bias/embedding"] == 0.125
    assert max(jax.tree.leaves(depths(three_layers()))) == 4
    for trained, moving in ((0, "head/"), (1, "layers_2/"), (2, "layers_1/"), (4, "patch_emb")):
        some = by_name(optim.layer_rates(three_layers(), 0.5, trained))
        assert {x for name, x in some.items() if moving in name} != {0.0}
        assert all(x in (0.0, rates[name]) for name, x in some.items())
        assert (some["encoder/encoder/layers_0/fc1/kernel"] > 0) == (trained > 2)
        assert (some["encoder/layer_norm/scale"] > 0) == (trained > 3)


def test_rates_scale_adams_steps_and_the_average_is_the_formula():
    section = ml_collections.ConfigDict(
        dict(steps=10, lr=0.1, warmup_steps=0, schedule="linear",
             layer_decay=0.5, trained_layers=-1, ema_decay=0.9)
    )  # fmt: skip
    adamw = load_config("smoke").adamw
    params: Any = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), three_layers())
    tx, schedule = optim.make_optimizer(section, adamw)
    opt_state, visited = tx.init(params), [params]
    for _ in range(3):
        grads = jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), params)
        updates, opt_state = tx.update(grads, opt_state, visited[-1])
        visited.append(optax.apply_updates(visited[-1], updates))
    moved = by_name(jax.tree.map(lambda a, b: float(jnp.mean(a - b)), params, visited[1]))
    assert moved["head/bias"] == pytest.approx(0.1, rel=1e-3)  # Adam's first step is the rate
    assert moved["encoder/encoder/layers_0/fc1/bias"] == pytest.approx(0.025, rel=1e-3)
    assert moved["encoder/encoder/pos_conv/bias"] == pytest.approx(0.0125, rel=1e-3)
    wanted = jax.tree.map(lambda a, b, c: (0.81 * a + 0.9 * b + c) / 2.71, *visited[1:])
    for got, value in zip(
        jax.tree.leaves(optim.averaged_weights(opt_state)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(got, value, rtol=1e-6)
    assert np.asarray(schedule(0)) == pytest.approx(0.1)


# --- the stage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built():
    """One compiled step, and what makes the state before it: a step uses it up."""
    config = config_of(finetune__steps=60, finetune__lr=5e-3, finetune__mixup=0.0)
    stage, data, state, step = build(config)
    start = jax.device_get(state), jax.tree.map(lambda x: x.sharding, state)
    return stage, data, functools.partial(jax.device_put, *start), step


def test_loss_falls_on_one_repeated_batch(built):
    _, data, make_state, step = built
    state = make_state()
    batch, figures = next(data.training(0)), []
    for _ in range(60):
        state, sums = step(state, {}, batch)
        figures.append(train.floats(sums))
    assert figures[0]["loss"] == pytest.approx(np.log(14), rel=0.2)  # it starts by guessing
    assert figures[-1]["loss"] < figures[0]["loss"] - 1.0  # label smoothing 0.1 leaves 0.6
    assert figures[-1]["accuracy"] > 0.8


def test_padding_changes_nothing(built):
    stage, _, make_state, _ = built
    state = make_state()
    rng = np.random.default_rng(0)
    lengths = np.array([8000, 2800, 16000, 5000], np.int32)
    waveform = (rng.standard_normal((4, 16000)) * 3000).astype(np.int16)
    batch = {
        "waveform": waveform,  # noise at padding too: it must not be seen
        "num_samples": lengths,
        "labels": np.eye(14, dtype=np.float32)[:4],
        "index": np.arange(4, dtype=np.int32),
    }
    eval_fn = jax.jit(stage.eval_fn)
    metrics, outputs = eval_fn(state.params, {}, {}, batch)
    assert set(outputs) == {"nll", "valid", "logits", "labels", "index"}
    for row in (0, 1, 3):
        alone = {name: x[row : row + 1] for name, x in batch.items()}
        alone["waveform"] = alone["waveform"][:, : lengths[row]]
        logits = eval_fn(state.params, {}, {}, alone)[1]["logits"]
        np.testing.assert_allclose(outputs["logits"][row], logits[0], atol=1e-5)
    empty = {**batch, "num_samples": np.array([8000, 0, 0, 0], np.int32)}
    metrics, outputs = eval_fn(state.params, {}, {}, empty)
    assert float(metrics["loss"].weight) == 1 and outputs["valid"].tolist()[1:] == [[False]] * 3
    assert float(metrics["loss"].total) == pytest.approx(float(outputs["nll"][0, 0]))


def test_patchout_hides_patches_in_training_alone(built):
    stage, data, make_state, _ = built
    state = make_state()
    quarter = build(config_of(finetune__visible=0.25, finetune__head_dropout=0.0))[0]
    batch = next(data.training(0))
    for mine, wanted in zip(
        jax.tree.leaves(quarter.eval_fn(state.params, {}, {}, batch)),
        jax.tree.leaves(stage.eval_fn(state.params, {}, {}, batch)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, wanted)

    def logits_if(patches):
        """The loss sum of a batch with these patches, and its gradient for them."""
        made = {k: v for k, v in batch.items() if k != "waveform"} | {"patches": patches}
        return quarter.loss_fn(state.params, {}, {}, made, jax.random.key(3))[0]

    patches = batch_patches(batch, MEAN, STD)
    reached = np.asarray(jnp.any(jax.grad(logits_if)(patches) != 0, axis=-1))
    tokens = (~np.asarray(token_padding_mask(batch["num_samples"], patches.shape[1]))).sum(axis=1)
    masked_too = reached.sum(axis=1)  # SpecAugment hides some of the visible ones
    assert np.all(masked_too <= np.round(tokens / 4)) and masked_too.mean() > 0.15 * tokens.mean()
    assert len({row.tobytes() for row in reached}) == len(reached)  # drawn for every example


def test_micro_batches_add_up_to_the_big_batch():
    found = []
    for n in (1, 4):
        config = config_of(finetune__micro_batches=n, finetune__head_dropout=0.0)
        _, data, state, step = build(config)
        state, sums = step(state, {}, next(data.training(0)))
        found.append((jax.device_get(state), train.floats(sums)))
    (big, one), (small, many) = found
    for name in one:
        assert one[name] == pytest.approx(many[name], rel=1e-5), name
    # After one step Adam's first moment is a tenth of the (clipped) gradient.
    assert_gradients_close(small.opt_state[1][0].mu, big.opt_state[1][0].mu, 1e-5)


@pytest.mark.parametrize("trained_layers", [0, 1])
def test_frozen_layers_do_not_move(trained_layers):
    _, data, state, step = build(config_of(finetune__trained_layers=trained_layers))
    before = by_name(jax.device_get(state.params))
    batches = data.training(0)
    for _ in range(2):
        state, _ = step(state, {}, next(batches))
    after, depth = by_name(jax.device_get(state.params)), by_name(depths(state.params))
    for name in before:
        still = np.array_equal(before[name], after[name])
        # A key projection's bias has no gradient (runs.assert_gradients_close).
        assert still == (depth[name] > trained_layers) or name.endswith("k_proj/bias"), name
    assert any(
        not np.array_equal(before[n], after[n]) for n in before if depth[n] == trained_layers
    )


def test_another_mesh_trains_the_same():
    found, first = [], None
    for devices, mesh in ((1, {}), (8, dict(data=2, fsdp=2, tensor=2))):
        config = config_of(model__layerdrop=0.2, finetune__mixup=0.8)
        config.mesh.update(mesh)
        _, data, state, step = build(config, devices)
        first = jax.device_get(state) if first is None else first
        state = jax.device_put(first, jax.tree.map(lambda x: x.sharding, state))
        batches, steps = data.training(0), []
        batch = jax.device_get(next(batches))
        state, sums = step(state, {}, next(data.training(0)))
        moments = jax.device_get(state.opt_state[1][0].mu)
        steps.append(train.floats(sums)["loss"])
        for _ in range(19):
            state, sums = step(state, {}, next(batches))
            steps.append(train.floats(sums)["loss"])
        found.append((batch, moments, steps))
    (batch_1, moments_1, losses_1), (batch, moments, losses_8) = found
    assert_trees_equal(batch, batch_1)  # ids, crops, augmentations, labels
    assert losses_8[0] == pytest.approx(losses_1[0], rel=1e-5)  # masks and dropout bits too
    assert_gradients_close(moments, moments_1, 1e-4)
    assert losses_8[-1] == pytest.approx(losses_1[-1], rel=1e-3)


def test_a_trained_head_keeps_its_classes_by_name():
    mids = list(audioset())
    trained = {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.array([7.0, 8.0, 9.0])}
    fresh = {"kernel": np.full((2, 4), -1.0), "bias": np.full(4, -1.0)}
    labels = ("new", audioset()[mids[5]], "dog", "cat")
    head = finetune.extend_head(fresh, trained, labels, ("cat", mids[5], "dog"))
    np.testing.assert_array_equal(head["bias"], [-1, 8, 9, 7])
    np.testing.assert_array_equal(head["kernel"], [[-1, 1, 2, 0], [-1, 4, 5, 3]])
    same = finetune.extend_head(fresh, trained, ("a", "b", "c", "d"), ("x", "y", "z"))
    assert_trees_equal(same, fresh)


# --- scores and selection -------------------------------------------------------------------------


def test_multi_label_scores_become_map_over_valid_clips():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 3)).astype(np.float32)
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
    valid = np.array([[True]] * 5 + [[False]])

    def eval_step(params, model_state, frozen, batch):
        rows = slice(3 * batch, 3 * batch + 3)
        outputs = {"logits": logits[rows], "labels": labels[rows], "valid": valid[rows]}
        return {}, jax.tree.map(jnp.asarray, outputs)

    numbers: Any = iter([0, 1])
    scored = selection.score(eval_step, None, None, None, numbers)
    wanted = np.nanmean(average_precisions(logits[:5], labels[:5]))
    assert scored.figures == {"mAP": pytest.approx(wanted)}
    assert selection.score(eval_step, None, None, None, iter([])).figures == {}


@pytest.mark.parametrize(("figure", "selected"), [("val_accuracy", "ema"), ("val_loss", "best")])
def test_the_test_set_selects_nothing(figure, selected):
    table = {
        ("last", "val"): {"accuracy": 0.5, "loss": 2.0},
        ("last", "test"): {"accuracy": 0.9, "loss": 0.1},
        ("ema", "val"): {"accuracy": 0.7, "loss": 1.5},
        ("ema", "test"): {"accuracy": 0.1, "loss": 3.0},
        ("best", "val"): {"accuracy": 0.6, "loss": 1.0},
        ("best", "test"): {"accuracy": 0.2, "loss": 2.0},
    }
    names = {name: name for name in ("last", "ema", "best")}
    sets: dict[str, Any] = {of: lambda of=of: of for of in ("val", "test")}

    def figures_of(name, of):
        return table[name, of]

    found = selection.compare(names, sets, figures_of, figure)
    assert (found["selected"], found["chosen_by"]) == (selected, figure)
    flat = selection.flat_figures(found)
    assert flat["test_accuracy"] == 0.9 and flat["test_accuracy_ema"] == 0.1
    assert flat["val_loss_best"] == 1.0 and "val_accuracy" not in flat
    only = selection.compare(names, {"test": sets["test"]}, figures_of, figure)
    assert only["selected"] == "last"


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tiny encoder, and a classifier of 14 kinds of sounds from it."""
    workdir = tmp_path_factory.mktemp("finetuned")
    config = config_of(pretrain__steps=2, pretrain__warmup_steps=1)
    for name in ("iter1/pretrain", "iter1/finetune"):
        train.run_stage(config, name, workdir)
    return workdir


def test_a_run_leaves_its_records(workdir):
    folder = workdir / "iter1" / "finetune"
    lines = without_timing(folder)
    assert {"loss", "lr", "grad_norm", "accuracy"} <= lines[0].keys()
    assert {"val_loss", "val_accuracy"} <= lines[1].keys()
    assert not any("test" in name for line in lines[:-1] for name in line)
    wanted = {f"test_accuracy{which}" for which in ("", "_ema", "_best", "_best_mean")}
    assert wanted | {"val_accuracy_ema"} <= lines[-1].keys()
    record = json.loads((folder / "results.json").read_text())
    assert record["weights"]["last"]["test"]["accuracy"] == lines[-1]["test_accuracy"]
    assert record["weights"]["last"]["val"]["accuracy"] == lines[-1]["val_accuracy"]
    best = max(range(len(lines)), key=lambda i: (lines[i].get("val_accuracy", -1), i))
    assert record["steps"]["best"] == lines[best]["step"]
    assert record["weights"]["best"]["val"]["accuracy"] == lines[best]["val_accuracy"]
    measured = sorted(
        [(line["val_accuracy"], line["step"]) for line in lines if "val_accuracy" in line]
    )
    assert record["steps"]["best_mean"] == [step for _, step in measured[::-1][:2]]
    assert sum(record["clips"].values()) == 84 and record["clips"]["test"] > 0
    assert record["test_filter"] == "fold=1" and len(record["labels"]) == 14
    assert (folder / "plots" / "augmentations.png").stat().st_size > 10_000
    assert (folder / "plots" / "curves.png").stat().st_size > 10_000


def test_it_starts_from_its_iterations_encoder(workdir):
    meta = json.loads((workdir / "iter1" / "finetune" / "config.json").read_text())
    encoder = pretrained.load_model(workdir / "iter1" / "pretrain")
    assert meta["lineage"]["init_from"]["params_sha256"] == encoder.source["params_sha256"]
    first = pretrained.load_model(f"{workdir}/iter1/finetune@0")
    assert_trees_equal(first.params["encoder"], encoder.params["encoder"])


def test_a_killed_run_ends_bit_equal(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "w")
    folder = tmp_path / "w" / "iter1" / "finetune"
    for step in (4, 6):  # as if it had been killed after step 3
        shutil.rmtree(folder / "checkpoints" / str(step))
    (folder / "results.json").unlink()
    train.run_stage(config_of(), "iter1/finetune", tmp_path / "w")
    theirs = workdir / "iter1" / "finetune"
    for item in ("params", "opt_state"):  # the average of the weights is in the latter
        mine, wanted = (load_params(f"{where}@6", item)[0] for where in (folder, theirs))
        assert_trees_equal(mine, wanted)
    assert without_timing(folder) == without_timing(theirs)
    mine, wanted = (json.loads((where / "results.json").read_text()) for where in (folder, theirs))
    assert mine | {"git_commit": ""} == wanted | {"git_commit": ""}


def test_many_labels_a_clip_from_training_to_an_exported_model(tmp_path):
    config = config_of(
        finetune__task="multi-label", data__label="events", init_from="scratch",
        finetune__steps=2, finetune__balanced_sampling=True, finetune__class_weights=True,
        finetune__mixup_of="log-mel", finetune__mixup=0.8, finetune__keep_best="val_mAP",
    )  # fmt: skip
    train.run_stage(config, "iter1/finetune", tmp_path)
    folder = tmp_path / "iter1" / "finetune"
    record = json.loads((folder / "results.json").read_text())
    assert record["chosen_by"] == "val_mAP" and record["task"] == "multi-label"
    assert 0 < record["weights"]["last"]["test"]["mAP"] == without_timing(folder)[-1]["test_mAP"]
    assert cli.main(["convert", str(folder), str(tmp_path / "model")]) == 0
    model, exported = beats_jax.load(folder), beats_jax.load(tmp_path / "model")
    assert (exported.task, exported.labels) == (model.task, model.labels)
    waveform = np.sin(np.arange(16000) / 20, dtype=np.float32)
    logits, probs = exported.classify(waveform)
    np.testing.assert_array_equal(logits, model.classify(waveform)[0])
    np.testing.assert_allclose(probs, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-5)


def test_another_test_fold_under_a_run_is_refused(workdir):
    for change in ({"data__test_filter": "fold=4"}, {"finetune__mixup": 0.7}):
        with pytest.raises(ValueError, match=r"was trained with .* this run has"):
            train.run_stage(config_of(**change), "iter1/finetune", workdir)


def test_load_and_classify_give_the_stages_logits(workdir):
    folder = workdir / "iter1" / "finetune"
    model = beats_jax.load(folder)
    assert (model.kind, model.task, len(model.labels)) == ("finetuned", "single-label", 14)
    config = config_of()
    stage, data, *_ = build(config)
    params = jax.tree.map(jnp.asarray, model.pretrained.params)
    batch = next(data.testing())
    outputs = jax.device_get(stage.eval_fn(params, {}, {}, batch)[1])
    rows = outputs["valid"][:, 0]
    logits, probs = model.classify(np.asarray(batch["waveform"])[rows])
    np.testing.assert_allclose(logits, outputs["logits"][rows], atol=1e-4)
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, rtol=1e-5)
    names = [data.test_clips.columns["category"][i] for i in outputs["index"][rows]]
    assert [model.labels[i] for i in outputs["labels"][rows].argmax(axis=1)] == names


def test_it_is_a_teacher_and_a_start_with_more_classes(workdir):
    folder = workdir / "iter1" / "finetune"
    teacher = pretrained.load_model(folder)
    stage, frozen = distillation.from_config(tiny_config(), teacher)
    assert frozen["teacher"]["head"]["kernel"].shape == (64, 14)
    config = config_of(
        init_from=str(folder), data__classes=",".join(["new", *teacher.labels[::-1]])
    )
    stage, data, state, _ = build(config)
    assert data.train_clips.labels
    meta = {"labels": data.train_clips.labels.names}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    tx, _ = optim.make_optimizer(config.finetune, config.adamw)
    init = start.state_maker(stage, tx, config.seed, data.clip_samples)
    like = start.abstract_state(init, mesh)
    none = type("None", (), {"newest_intact": lambda self, like: None})()
    started, restored = start.starting_state(config, init, like, none, meta, teacher)  # pyright: ignore
    assert not restored
    np.testing.assert_array_equal(
        started.params["head"]["bias"][1:], teacher.params["head"]["bias"][::-1]
    )
    assert_trees_equal(started.params["encoder"], teacher.params["encoder"])
    fresh = np.asarray(state.params["head"]["kernel"][:, 0])
    np.testing.assert_array_equal(started.params["head"]["kernel"][:, 0], fresh)


@pytest.mark.parametrize("name", ["smoke", *FINETUNING])
def test_every_config_builds_and_traces_a_step(name):
    config = load_config(name)
    labels = Labels(("a", "b", "c"), np.array([[0], [1], [2]], np.int16))
    stage, _ = train.STAGES["finetune"](config, labels)
    assert train.checked(config, "finetune")[1] == "finetune"
    tx, _ = optim.make_optimizer(config.finetune, config.adamw)
    length = int(config.data.clip_seconds * 16000)
    batch = {
        "waveform": jax.ShapeDtypeStruct((4, length), jnp.int16),
        "labels": jax.ShapeDtypeStruct((4, 3), jnp.float32),
        **{k: jax.ShapeDtypeStruct((4,), jnp.int32) for k in ("num_samples", "index")},
        "counter": jax.ShapeDtypeStruct((4,), jnp.uint32),
    }

    def one_step(batch):
        params, model_state = stage.init(jax.random.key(0), batch)
        loss, *_ = stage.loss_fn(params, model_state, {}, batch, jax.random.key(1))
        return loss, tx.init(params), stage.eval_fn(params, model_state, {}, batch)

    loss, _, (_, outputs) = jax.eval_shape(one_step, batch)
    assert loss.shape == () and outputs["logits"].shape == (4, 3)
    assert stage.flops_per_clip > 0
    assert len((ROOT / "configs" / f"{name}.py").read_text().splitlines()) <= 80
