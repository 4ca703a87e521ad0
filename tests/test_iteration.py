"""The iterations: distilled tokenizers, their teachers, stored tokens, lineage, official files."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import FIXTURES, assert_gradients_close, assert_trees_equal, tiny_config
from test_train import build

from beats_jax import cli, pretrained, tokens, train
from beats_jax.checkpoint import load_params
from beats_jax.data.dataset import open_data
from beats_jax.data.sources import windows
from beats_jax.data.synthetic import synthetic_clips
from beats_jax.fbank import fbank, patchify
from beats_jax.stages import pretrain, renormalisation
from beats_jax.stages import tokenizer as distillation
from beats_jax.writers import read_metrics

TEACHER, FINETUNED = FIXTURES / "dev_encoder.pt", FIXTURES / "dev_finetuned.pt"
TOKENIZER = FIXTURES / "dev_tokenizer.pt"
NUMPY = {"input__backend": "numpy"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Both iterations of the tiny model, run once."""
    workdir = tmp_path_factory.mktemp("iterations")
    config = tiny_config(**NUMPY, pretrain__steps=4, tokenizer__steps=4)
    for name in ("iter1/pretrain", "iter2/tokenizer", "iter2/pretrain"):
        train.run_stage(config, name, workdir)
    return workdir


def iteration(name="iter2", **overrides):
    small = dict(iteration=name, pretrain__steps=4, tokenizer__steps=4)
    return tiny_config(**{**NUMPY, **small, **overrides})


# --- distillation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilling():
    """One compiled step, and what makes the state before it: a step uses it up."""
    config = tiny_config(**NUMPY, tokenizer__steps=60, tokenizer__lr=2e-3)
    teacher = pretrained.load_model(TEACHER)
    stage, frozen, data, state, step = build(config, name="tokenizer", given=teacher)
    start = jax.device_get(state), jax.tree.map(lambda x: x.sharding, state)
    return stage, frozen, data, functools.partial(jax.device_put, *start), step


def test_distillation_learns_a_repeated_batch(distilling):
    stage, frozen, data, make_state, step = distilling
    state = make_state()
    assert stage.calibrate is not None
    model_state, report = stage.calibrate(
        state.params, state.model_state, frozen, [next(data.calibration())], jax.random.key(0)
    )
    assert report["kmeans_vectors"] > 100 and report["codes_used"] == 32
    model_state = jax.device_put(model_state, jax.tree.map(lambda x: x.sharding, state.model_state))
    state, batch = state._replace(model_state=model_state), next(data.training(0))
    figures = []
    for _ in range(60):
        state, sums = step(state, frozen, batch)
        figures.append(train.floats(sums))
    assert figures[0]["teacher_cosine"] < 0.3
    left, left_by_one_vector = (
        1 - figures[-1][name] for name in ("teacher_cosine", "constant_cosine")
    )
    assert left < 0.7 * left_by_one_vector
    assert figures[-1]["loss"] < figures[0]["loss"] - 0.3
    norms = jnp.linalg.norm(state.model_state["codebook"], axis=1)
    np.testing.assert_allclose(norms, 1.0, atol=1e-5)
    assert "say nothing of the teacher" in (stage.warn(figures[0]) or "")
    assert "teacher" not in (stage.warn(figures[-1]) or "")


def test_the_target_of_a_supervised_teacher_is_its_logits_patch_by_patch():
    teacher = pretrained.load_model(FINETUNED)
    classes = teacher.params["head"]["kernel"].shape[1]
    stage, frozen = train.STAGES["tokenizer"](tiny_config(), teacher)
    batch = {"waveform": np.zeros((1, 16000), np.int16), "num_samples": np.full(1, 16000)}
    params, _ = stage.init(jax.random.key(0), {**batch, "counter": np.zeros(1, np.uint32)})
    assert params["estimator"]["head"]["kernel"].shape == (64, classes)
    # The loss does not change where the teacher's logits are scaled: cosine.
    loss = [
        jax.jit(stage.eval_fn)(params, stage_state(stage, batch), f, batch)[0]["loss"].total
        for f in (frozen, jax.tree.map(lambda x: x, frozen) | {"teacher": doubled(frozen)})
    ]
    np.testing.assert_allclose(loss[0], loss[1], rtol=1e-5)


def stage_state(stage, batch):
    return stage.init(jax.random.key(0), {**batch, "counter": np.zeros(1, np.uint32)})[1]


def doubled(frozen):
    head = {name: 2 * x for name, x in frozen["teacher"]["head"].items()}
    return {**frozen["teacher"], "head": head}


def test_two_teachers_one_compilation(distilling):
    _, frozen, data, make_state, step = distilling
    other = jax.tree.map(lambda x: x * 1.01, frozen)
    batches, state = data.training(0), make_state()
    state, first = step(state, frozen, next(batches))
    state, second = step(state, other, next(batches))
    assert step._cache_size() == 1 and first["finite"] and second["finite"]


def test_micro_batches_add_up_codebook_included():
    teacher, results = pretrained.load_model(TEACHER), []
    for n in (1, 4):
        config = tiny_config(**NUMPY, tokenizer__micro_batches=n, tokenizer__revive_below=0.5)
        _, frozen, data, state, step = build(config, name="tokenizer", given=teacher)
        codebook = jax.random.normal(jax.random.key(0), state.model_state["codebook"].shape)
        codebook /= jnp.linalg.norm(codebook, axis=1, keepdims=True)
        usage = jnp.where(jnp.arange(32) < 8, 0.0, 9.0)
        state = state._replace(
            model_state={**state.model_state, "codebook": codebook, "usage": usage}
        )
        before = np.array(codebook)
        state, sums = step(state, frozen, next(data.training(0)))
        results.append((jax.device_get(state), train.floats(sums)))
    (big, one), (small, many) = results
    for name in one:
        assert one[name] == pytest.approx(many[name], rel=1e-5, abs=1e-6), name
    moved = np.abs(big.model_state["codebook"] - before).max(axis=1)
    assert moved[:8].max() > 0.3  # they were dead; a place or two stayed empty
    assert 1e-4 < moved[8:].max() < 0.05
    np.testing.assert_allclose(
        big.model_state["codebook"], small.model_state["codebook"], rtol=0, atol=1e-5
    )
    assert_gradients_close(small.opt_state[1][0].mu, big.opt_state[1][0].mu, 1e-5)


def test_padding_changes_nothing():
    """A clip alone, and padded to twice its length: same loss, same statistics."""
    teacher = pretrained.load_model(TEACHER)
    stage, frozen = train.STAGES["tokenizer"](tiny_config(), teacher)
    clip = synthetic_clips(1, 1.0, seed=3).fetch(np.arange(1))[0][None]
    outcomes = []
    for samples in (16000, 32000):
        waveform = np.zeros((1, samples), np.int16)
        waveform[:, :16000] = clip
        batch = {"waveform": waveform, "num_samples": np.full(1, 16000, np.int32)}
        batch["counter"] = np.zeros(1, np.uint32)
        params, state = jax.jit(stage.init)(jax.random.key(0), batch)
        codebook = jax.random.normal(jax.random.key(1), state["codebook"].shape)
        state["codebook"] = codebook / jnp.linalg.norm(codebook, axis=1, keepdims=True)
        loss, weight, (stats, _) = jax.jit(stage.loss_fn)(
            params, state, frozen, batch, jax.random.key(2)
        )
        assert weight == 48 == stats["counts"].sum()
        outcomes.append((loss, stats))
    np.testing.assert_allclose(outcomes[0][0], outcomes[1][0], rtol=1e-4)
    np.testing.assert_allclose(outcomes[0][1]["sums"], outcomes[1][1]["sums"], atol=1e-3)


def test_a_codebook_that_stays_collapsed_stops_the_run(tmp_path):
    config = tiny_config(
        **NUMPY,
        teacher=str(TEACHER),
        tokenizer__collapse_share=1.1,
        tokenizer__collapse_steps=3,
        tokenizer__save_every=1,
    )
    with pytest.raises(FloatingPointError, match=r"collapsed: fewer than 110.0% .* for 3 steps"):
        train.run_stage(config, "iter2/tokenizer", tmp_path)
    steps = [m["step"] for m in read_metrics(tmp_path / "iter2" / "tokenizer")]
    _, meta = load_params(tmp_path / "iter2" / "tokenizer")
    assert steps[-1] == 4 and meta["step"] == 3


# --- tokens as targets ----------------------------------------------------------------------------


def test_two_distilled_tokenizers_one_compilation():
    tokenizer = pretrained.load_model(TOKENIZER)
    config = tiny_config(**NUMPY)
    _, frozen, data, state, step = build(config, given=tokenizer)
    other = {**frozen["tokenizer"], "codebook": jnp.roll(frozen["tokenizer"]["codebook"], 1, 0)}
    other["codebook"] = jax.device_put(other["codebook"], frozen["tokenizer"]["codebook"].sharding)
    batch = next(data.training(0))
    state, first = step(state, frozen, batch)
    _, second = step(state, {"tokenizer": other}, batch)
    assert step._cache_size() == 1
    codes = [np.asarray(s["metrics"]["code"].counts) for s in (first, second)]
    assert len(codes[0]) == 64
    np.testing.assert_array_equal(np.roll(codes[0], 1), codes[1])


def test_ids_in_the_step_are_those_of_the_official_code():
    """Through the whole way of the step: its own log-mel, renormalised for the tokenizer."""
    stored = np.load(FIXTURES / "dev_tokenizer.npz")
    tokenizer = pretrained.load_model(TOKENIZER)
    config = tiny_config(data__mean=11.0, data__std=9.0)
    assert not np.allclose(renormalisation(tokenizer, config), [1, 0])
    tokenize, arrays, _ = pretrain.distilled(config, tokenizer)
    for case in ("one_1s", "batch_1s_nomask"):
        patches = patchify(fbank(stored[f"{case}/waveform"], mean=11.0, std=9.0))
        ids = tokenize(arrays, patches, jnp.zeros(patches.shape[:2], bool))
        clear = stored[f"{case}/dist_margin"] > 1e-3
        np.testing.assert_array_equal(np.asarray(ids)[clear], stored[f"{case}/ids"][clear])


def test_stored_tokens_train_as_computed_ones(workdir, tmp_path):
    """Resumed half-way, refused where anything of their key differs."""
    config = iteration(data__crop="grid", data__num_clips=12)
    clips = synthetic_clips(12, 1.0, seed=0)
    tokenizer = tokens.load_tokenizer(workdir / "iter2" / "tokenizer")
    store = tmp_path / "store"
    options: dict[str, Any] = dict(
        clip_seconds=1.0, mean=config.data.mean, std=config.data.std, batch_size=8
    )
    assert tokens.store_tokens(tokenizer, clips, store, **options) == 1.0
    whole = np.load(store / "ids.npy").copy()
    record = json.loads((store / "store.json").read_text())
    assert record["done"] == record["rows"] == len(windows(clips, 16000)) == 12
    ids = np.load(store / "ids.npy", mmap_mode="r+")
    ids[8:] = 0
    ids.flush()
    (store / "store.json").write_text(json.dumps({**record, "done": 9}))
    config.data.token_ids = str(store)
    with pytest.raises(ValueError, match="holds 9 of 12 windows"):
        train.run_stage(config, "pretrain", workdir)
    tokens.store_tokens(tokenizer, clips, store, **options)
    np.testing.assert_array_equal(np.load(store / "ids.npy"), whole)

    given = pretrained.load_model(workdir / "iter2" / "tokenizer")
    results = []
    for changes, model in (({"data__token_ids": ""}, given), ({}, 32)):
        changed = iteration(
            **{
                "data__crop": "grid",
                "data__num_clips": 12,
                "data__token_ids": str(store),
                **changes,
            }
        )
        _, frozen, data, state, step = build(changed, given=model)
        batch = next(data.training(0))
        assert ("token_ids" in batch) == (model == 32)
        _, sums = step(state, frozen, batch)
        results.append(train.floats(sums))
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-5), name
    tf = iteration(
        data__crop="grid", data__num_clips=12, data__token_ids=str(store), input__backend="tf"
    )
    *_, data, _, _ = build(tf, given=32)
    np.testing.assert_array_equal(next(data.training(0))["token_ids"], batch["token_ids"])

    wrong = [
        ({"data__crop": "random"}, 'data.crop is "random"'),
        ({"data__num_clips": 13}, "were made with dataset"),
        ({"data__mean": 1.0}, "were made with mean"),
        ({"data__clip_seconds": 0.5}, "were made with clip_samples 16000"),
        ({"precision": "bfloat16"}, "were made with dtype float32, this run has bfloat16"),
        ({"tokenizer__path": str(TOKENIZER)}, "were made with tokenizer"),
    ]
    for change, message in wrong:
        fields = {"data__crop": "grid", "data__num_clips": 12, "data__token_ids": str(store)}
        with pytest.raises(ValueError, match=message):
            train.run_stage(iteration(**{**fields, **change}), "pretrain", workdir)
    with pytest.raises(ValueError, match="holds ids made with clip_samples"):
        tokens.store_tokens(tokenizer, clips, store, **{**options, "clip_seconds": 0.5})


def test_bfloat16_ids_are_mostly_the_same(workdir, tmp_path):
    tokenizer = tokens.load_tokenizer(workdir / "iter2" / "tokenizer")
    clips = synthetic_clips(8, 1.0, seed=0)
    share = tokens.store_tokens(
        tokenizer, clips, tmp_path / "store", clip_seconds=1.0, precision="bfloat16"
    )
    assert 0.5 < share <= 1.0


def test_windows_of_the_grid():
    clips = synthetic_clips(3, 2.5, seed=0)
    grid = windows(clips, 16000)
    assert len(grid) == 9 and grid.num_samples.tolist() == 3 * [16000, 16000, 8000]
    whole, parts = clips.fetch(np.arange(3)), grid.fetch(np.arange(9))
    np.testing.assert_array_equal(np.concatenate(parts[3:6]), whole[1])
    assert grid.fingerprint != clips.fingerprint
    # A rest without a token is left out, a short clip is not.
    assert len(windows(clips, 19000)) == 6 and len(windows(clips, 100_000)) == 3
    config = tiny_config(data__crop="grid", data__clip_seconds=1.0, data__num_clips=30)
    training, held_out = open_data(config.data, "unused")
    assert len(training) + len(held_out) == 30
    assert not set(training.ids) & set(held_out.ids)


# --- lineage --------------------------------------------------------------------------------------


def test_lineage_names_everything_down_to_the_random_projection(workdir, capsys):
    record = json.loads((workdir / "iter2" / "pretrain" / "config.json").read_text())
    tokenizer = record["lineage"]["tokenizer"]
    teacher = tokenizer["lineage"]["teacher"]
    assert tokenizer["path"] == str(workdir / "iter2" / "tokenizer")
    assert teacher["path"] == str(workdir / "iter1" / "pretrain") and teacher["step"] == 4
    assert teacher["lineage"]["tokenizer"]["settings"]["mode"] == "bestrq"
    assert cli.main(["info", str(workdir / "iter2" / "tokenizer"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["params_sha256"] == tokenizer["params_sha256"]
    assert {"kind", "parameters", "step", "lineage"} <= info.keys()
    assert cli.main(["info", str(workdir / "iter2" / "pretrain")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("   ") for line in lines[2:]] == [0, 1, 2, 3]
    assert "random projection" in lines[-1] and "seed 0" in lines[-1]
    assert cli.main(["info", str(TOKENIZER)]) == 0
    assert "tokenizer" in capsys.readouterr().out


def test_the_untrained_encoder_is_what_the_run_started_from(workdir):
    for stage in ("iter2/tokenizer", "iter2/pretrain"):
        first, _ = load_params(f"{workdir / stage}@0")
        again = pretrained.untrained(str(workdir / stage)).params["encoder"]
        assert_trees_equal(first["encoder"], jax.device_get(again))


def test_a_teacher_that_changed_under_a_run_is_refused(workdir, tmp_path):
    first, second = str(workdir / "iter1" / "pretrain@2"), str(workdir / "iter1" / "pretrain@4")
    train.run_stage(iteration(teacher=first), "tokenizer", tmp_path)
    with pytest.raises(ValueError, match=r"with the teacher .*pretrain@2 .* changed under the run"):
        train.run_stage(iteration(teacher=second), "tokenizer", tmp_path)
    train.run_stage(iteration(), "pretrain", tmp_path)
    path = str(workdir / "iter2" / "tokenizer")
    with pytest.raises(ValueError, match=r"with the tokenizer .* changed under the run"):
        train.run_stage(iteration(tokenizer__path=path), "pretrain", tmp_path)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("tokenizer", {"teacher": str(TOKENIZER)}, "is a tokenizer; want an encoder"),
        ("pretrain", {"tokenizer__path": str(TEACHER)}, "is no tokenizer: encoder"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused(tmp_path, stage, change, message):
    with pytest.raises(ValueError, match=message):
        train.run_stage(iteration(**change), stage, tmp_path)


# --- from official files --------------------------------------------------------------------------


def test_continued_pretraining_from_official_files(tmp_path):
    """The encoder follows the file's architecture; the tokenizer stage has nothing to do."""
    config = iteration("iter3", init_from=str(TEACHER), tokenizer__path=str(TOKENIZER))
    for name in ("tokenizer", "pretrain"):
        train.run_stage(config, name, tmp_path)
    assert not (tmp_path / "iter3" / "tokenizer").exists()
    stage = tmp_path / "iter3" / "pretrain"
    first, _ = load_params(f"{stage}@0")
    official = pretrained.load_model(TEACHER)
    assert_trees_equal(first["encoder"], official.params["encoder"])
    assert first["predictor"]["head"]["kernel"].shape == (48, 64)
    last = pretrained.load_model(stage)
    assert last.model.embed_dim == 48 and last.source["lineage"].keys() == {
        "init_from",
        "tokenizer",
    }
    assert read_metrics(stage)[-1]["step"] == 4
    assert config.model.preset == "tiny" and "embed_dim" not in config.model  # the caller's own


def test_iter3plus_from_a_fine_tuned_teacher(tmp_path):
    config = iteration("iter3plus", teacher=str(FINETUNED))
    for name in ("tokenizer", "pretrain"):
        train.run_stage(config, name, tmp_path)
    tokenizer = pretrained.load_model(tmp_path / "iter3plus" / "tokenizer")
    assert tokenizer.kind == "tokenizer" and tokenizer.num_codes == 32
    assert tokenizer.source["lineage"]["teacher"]["kind"] == "finetuned"
    lines = read_metrics(tmp_path / "iter3plus" / "tokenizer")
    wanted = {"teacher_cosine", "commitment", "codes_used", "code_perplexity", "dead_codes"}
    assert (
        wanted <= lines[1].keys()
        and {f"val_{n}" for n in wanted - {"dead_codes"}} <= lines[-1].keys()
    )
    plots = {p.name for p in (tmp_path / "iter3plus" / "tokenizer" / "plots").iterdir()}
    assert {"curves.png", "example_0000004.png", "code_usage_0000004.png"} <= plots


# --- robustness -----------------------------------------------------------------------------------


def test_tokens_agree_less_the_louder_the_noise():
    tokenizer = tokens.load_tokenizer(TOKENIZER)
    result = tokens.token_agreement(
        tokenizer, cli.RANDOM_PROJECTION, synthetic_clips(16, 1.0, seed=0), (200, 30, 0), 1.0
    )
    assert result.keys() == {"random projection", "distilled"}
    for row in result.values():
        nearly_none, some, much = row["agreement"]
        assert nearly_none > 0.98 and nearly_none > some > much
        assert 0 < row["chance"] < 1 and row["perplexity"] > 1


def test_dead_codes_count_what_is_not_used():
    teacher = pretrained.load_model(TEACHER)
    stage, _ = train.STAGES["tokenizer"](tiny_config(), teacher)
    state = {"codebook": jnp.eye(32), "usage": jnp.zeros(32), "steps_collapsed": jnp.int32(0)}
    counts = jnp.zeros(32).at[:5].set(8.0)
    stats = {"counts": counts, "sums": jnp.zeros((32, 32)).at[:5, 0].set(8.0)}
    after = stage.update_fn(state, stats)
    assert jnp.sum(after["usage"] < distillation.DEAD) == 27
    np.testing.assert_array_equal(after["codebook"][5:], jnp.eye(32)[5:])
    assert "few codes" in stage.warn({"codes_used": 30.0, "code_perplexity": 2.0})
