"""The loop: every stage learns, compiles once, adds micro-batches exactly, stops on a bad loss."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT, assert_gradients_close, assert_trees_equal, load_config, tiny_config

from beats_jax import optim, sharding, start, train
from beats_jax.checkpoint import load_params
from beats_jax.data.dataset import Data
from beats_jax.fbank import num_tokens
from beats_jax.models.beats import BEATs
from beats_jax.models.tokenizer import Tokenizer, init_random_projection
from beats_jax.stages import Pretrained, model_arguments
from beats_jax.stages.tokenizer import KMEANS_VECTORS
from beats_jax.writers import read_metrics

CONFIGS = ("smoke", "iter1", "iter2", "iter3", "iter3plus", "local_esc50")
PROJECTION = tuple(f"random_projection__{field}" for field in ("mode", "dim", "pool"))


def build(config, devices=1, name="pretrain", given=None):
    """Everything `run_stage` makes before its loop, on the first `devices` devices."""
    section = config[name]
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:devices])
    stage, frozen = train.STAGES[name](config, given)
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    data = Data.open(config, section.batch_size, mesh, "unused")
    tx, schedule = optim.make_optimizer(section, config.adamw)
    init = start.state_maker(stage, tx, config.seed, data.clip_samples)
    like = start.abstract_state(init, mesh)
    state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, like))()
    step = train.make_train_step(
        stage, tx, schedule, config.seed, section.micro_batches, like, mesh
    )
    return stage, frozen, data, state, step


def config_of(**overrides):
    return tiny_config(
        **{"input__backend": "numpy", "pretrain__steps": 40, "pretrain__lr": 3e-3, **overrides}
    )


@functools.cache
def compiled():
    _, frozen, data, state, step = build(config_of())
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return frozen, data, jax.device_get(state), shardings, step


@pytest.fixture
def built():
    """`build(config_of())[1:]`, compiled once; the state, which a step uses up, is each test's."""
    frozen, data, state, shardings, step = compiled()
    return frozen, data, jax.device_put(state, shardings), step


def test_loss_falls_on_one_repeated_batch(built):
    frozen, data, state, step = built
    batch = next(data.training(0))
    losses = []
    for _ in range(40):
        state, sums = step(state, frozen, batch)
        losses.append(train.floats(sums)["loss"])
    assert losses[0] > 6.5  # ln 1024 = 6.93: it starts by guessing
    assert losses[-1] < losses[0] - 1.5


def test_bfloat16_computes_the_same_step_roughly_and_keeps_float32_parameters(built):
    losses = {}
    both = {"float32": built, "bfloat16": build(config_of(precision="bfloat16"))[1:]}
    for precision, (frozen, data, state, step) in both.items():
        state, sums = step(state, frozen, next(data.training(0)))
        losses[precision] = train.floats(sums)["loss"]
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)
    assert losses["bfloat16"] != losses["float32"]


@pytest.mark.parametrize(
    "option",
    [
        {"pretrain__positions": "compact"},
        {"pretrain__mask_token": "zeros"},
        {"pretrain__label_smoothing": 0.1},
        {"input__frontend": "host"},
        dict(zip(PROJECTION, ("paper", 256, 1), strict=True)),
        dict(zip(PROJECTION, ("espnet", 256, 1), strict=True)),
        {"model__layerdrop": 0.5, "remat": "dots_with_no_batch_dims_saveable"},
    ],
)
def test_every_option_changes_the_loss_and_stays_finite(option):
    losses = [loss_without_options(), first_loss(option)]
    assert np.all(np.isfinite(losses))
    if "input__frontend" in option:
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    else:
        assert losses[0] != losses[1]


def first_loss(option):
    config = tiny_config(input__backend="numpy", **option)
    stage, frozen = train.STAGES["pretrain"](config, None)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    data = Data.open(config, 8, mesh, "unused")
    batch = next(data.training(0))
    params, model_state = jax.jit(stage.init)(jax.random.key(0), batch)
    loss, weight, _ = jax.jit(stage.loss_fn)(params, model_state, frozen, batch, jax.random.key(1))
    return float(loss / weight)


@functools.cache
def loss_without_options():
    return first_loss({})


def test_two_tokenizers_one_compilation(built):
    frozen, data, state, step = built
    other = {"tokenizer": init_random_projection(7, 1024, dim=16, pool=4, mode="bestrq")}
    other = jax.device_put(other, jax.tree.map(lambda x: x.sharding, frozen))
    batches = data.training(0)
    state, first = step(state, frozen, next(batches))
    state, second = step(state, other, next(batches))
    assert step._cache_size() == 1
    codes = [np.asarray(s["metrics"]["code"].counts) for s in (first, second)]
    assert np.any(codes[0] != codes[1])


def test_micro_batches_add_up_to_the_big_batch(built):
    results = []
    small = build(config_of(pretrain__micro_batches=4))[1:]
    for frozen, data, state, step in (built, small):
        state, sums = step(state, frozen, next(data.training(0)))
        results.append((state, train.floats(sums)))
    (big, one), (small, many) = results
    assert one.keys() == many.keys()
    for name in one:
        assert one[name] == pytest.approx(many[name], rel=1e-5), name
    assert_trees_equal(big.model_state, small.model_state)
    # After one step Adam's first moment is a tenth of the (clipped) gradient.
    assert_gradients_close(small.opt_state[1][0].mu, big.opt_state[1][0].mu, 1e-5)


def test_a_bad_clip_stops_the_run_by_name_and_the_state_stays_good(tmp_path):
    config = tiny_config(input__backend="numpy", input__frontend="host")
    stage, frozen, data, state, step = build(config)
    batch = dict(next(data.training(0)))
    patches = np.array(batch["patches"])
    patches[3] = np.nan
    batch["patches"] = jax.device_put(patches, batch["patches"].sharding)
    before = jax.device_get(state)
    after, sums = step(state, frozen, batch)
    assert not sums["finite"]
    assert_trees_equal(before, jax.device_get(after))
    _, outputs = jax.jit(stage.eval_fn)(after.params, after.model_state, frozen, batch)
    bad = train.bad_clips(outputs, batch)
    message = train.blame(1, sums, data.train_clips, bad, tmp_path)
    index = int(batch["index"][3])
    assert f"loss of their own: {data.train_clips.ids[index]};" in message


def test_a_diverging_run_keeps_its_last_good_checkpoint(tmp_path):
    config = tiny_config(
        input__backend="numpy", pretrain__lr=1e30, adamw__clip_norm=0.0, pretrain__save_every=1
    )
    with pytest.raises(FloatingPointError, match=r"loss nan at step \d.*the newest checkpoint is"):
        train.run_stage(config, "pretrain", tmp_path)
    params, _ = load_params(tmp_path / "iter1" / "pretrain")
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 4 steps."""
    workdir = tmp_path_factory.mktemp("trained")
    train.run_stage(tiny_config(input__backend="numpy", pretrain__steps=4), "pretrain", workdir)
    return workdir / "iter1" / "pretrain"


def test_a_run_leaves_its_records(trained):
    folder = trained
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0]["code_perplexity"] > 10  # calibration, before step 1
    wanted = "loss lr grad_norm clips_per_s masked_accuracy unigram_loss unigram_accuracy"
    wanted = {*wanted.split(), "code_perplexity", "feature_std", "predicted_codes_used"}
    assert wanted <= lines[1].keys()
    assert {"val_loss", "val_unigram_loss", "val_masked_accuracy"} <= lines[4].keys()
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["pretrain"]["steps"] == 4
    assert record["dataset_fingerprint"] and record["versions"]["jax"] == jax.__version__
    assert (folder / "plots" / "curves.png").stat().st_size > 10_000
    assert (folder / "plots" / "example_0000004.png").stat().st_size > 10_000
    assert list(folder.glob("events*"))


def test_init_from_takes_the_weights_and_resume_the_whole_state(trained, tmp_path):
    small, source = dict(input__backend="numpy", pretrain__steps=4), str(trained)
    train.run_stage(tiny_config(**small, init_from=source), "pretrain", tmp_path / "b")
    first, _ = load_params(f"{tmp_path}/b/iter1/pretrain@0")
    assert_trees_equal(first, load_params(source)[0])

    more = tiny_config(**{**small, "pretrain__steps": 6}, resume=source)
    train.run_stage(more, "pretrain", tmp_path / "c")
    steps = [line["step"] for line in read_metrics(tmp_path / "c" / "iter1" / "pretrain")]
    assert steps == [5, 6]


def abstract_model(config, kind):
    """A teacher or a tokenizer of the config's own size, without its weights."""
    model = BEATs(**model_arguments(config))
    patches = jax.ShapeDtypeStruct((1, 8, 256), jnp.float32)
    made = model if kind == "encoder" else Tokenizer(model, config.tokenizer.codebook_dim)
    params = jax.eval_shape(made.init, jax.random.key(0), patches)["params"]
    params = {"encoder": params} if kind == "encoder" else params
    codebook = np.zeros((config.tokenizer.codebook_size, config.tokenizer.codebook_dim), np.float32)
    codebook = codebook if kind == "tokenizer" else None
    return Pretrained(kind, model, params, codebook, config.data.mean, config.data.std, {})


@pytest.mark.parametrize(
    ("name", "stage_name"),
    [
        (c, s)
        for c in CONFIGS
        for s in ("tokenizer", "pretrain")
        if (c, s) != ("iter1", "tokenizer")
    ],
)
def test_every_config_builds_and_traces_a_step(name, stage_name):
    config = load_config(name)
    section = config[stage_name]
    given = "encoder" if stage_name == "tokenizer" else None if name == "iter1" else "tokenizer"
    given = given and abstract_model(config, given)
    stage, frozen = train.STAGES[stage_name](config, given)
    tx, _ = optim.make_optimizer(section, config.adamw)
    length = int(config.data.clip_seconds * 16000)
    batch = {
        "waveform": jax.ShapeDtypeStruct((4, length), jnp.int16),
        **{k: jax.ShapeDtypeStruct((4,), jnp.int32) for k in ("num_samples", "index")},
        "counter": jax.ShapeDtypeStruct((4,), jnp.uint32),
    }

    def one_step(frozen, batch):
        params, model_state = stage.init(jax.random.key(0), batch)
        loss, *_ = stage.loss_fn(params, model_state, frozen, batch, jax.random.key(1))
        return loss, tx.init(params), stage.eval_fn(params, model_state, frozen, batch)

    loss, opt_state, _ = jax.eval_shape(one_step, frozen, batch)
    assert loss.shape == ()
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(opt_state[1][0].mu["encoder"]))
    wanted = {"base": 90_311_792}.get(config.model.preset)
    assert count == wanted if wanted else count > 0
    assert stage.flops_per_clip > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_short_and_kmeans_sees_enough(name):
    assert len((ROOT / "configs" / f"{name}.py").read_text().splitlines()) <= 80
    config = load_config(name)
    batches = config.tokenizer.calibration_batches * config.tokenizer.batch_size
    if name != "smoke":
        assert batches * num_tokens(int(config.data.clip_seconds * 16000)) >= KMEANS_VECTORS


def test_learning_rate_warms_up_and_ends_at_zero():
    schedule = optim.learning_rate(load_config("iter1").pretrain)
    rates = np.asarray([schedule(step) for step in (0, 31_999, 32_000, 216_000)])
    np.testing.assert_allclose(rates, [5e-4 / 32_000, 5e-4, 5e-4, 2.5e-4], rtol=1e-5)
    assert 0 < np.asarray(schedule(399_999)) < 2e-9


def test_weight_decay_spares_what_is_no_matrix(built):
    _, _, state, _ = built
    flags = jax.tree_util.tree_leaves_with_path(optim.decays(state.params))
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, on in flags if on}
    assert "encoder/encoder/layers_0/fc1/kernel" in decayed
    spared = ("bias", "scale", "embedding", "grep_a", "weight_g", "mask_token")
    assert not [name for name in decayed if name.rsplit("/")[-1] in spared]
