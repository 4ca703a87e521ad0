"""Exported folders, official files written from them, the certificate, and `beats-jax convert`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import official
import pytest
from runs import assert_trees_equal
from safetensors.numpy import load_file, save_file

from beats_jax import cli, exported, parity
from beats_jax.checkpoint import Checkpoints, TrainState, tree_sha256
from beats_jax.convert import left_out, load_official, to_official
from beats_jax.fbank import MEAN, STD
from beats_jax.models.beats import BEATs
from beats_jax.models.tokenizer import Tokenizer
from beats_jax.pretrained import load_model
from beats_jax.stages import Pretrained
from beats_jax.torch_file import read_torch_file, write_torch_file

FILES = ("dev_encoder", "dev_finetuned", "dev_tokenizer", "dev_encoder_legacyformat")
PARTS = {"config.json", "model.safetensors", "README.md"}


def fixture(name: str) -> Path:
    return official.FIXTURES / f"{name}.pt"


def assert_same_file(got: Any, want: Any) -> None:
    """Two checkpoints: keys in their order, types, dtypes, shapes, bytes."""
    assert repr({**got, "model": 0}) == repr({**want, "model": 0})  # cfg, label_dict; 1 is not 1.0
    assert list(got["model"]) == list(want["model"])
    for key, value in want["model"].items():
        assert got["model"][key].dtype == value.dtype, key
        assert got["model"][key].shape == value.shape, key
        assert got["model"][key].tobytes() == value.tobytes(), key


@pytest.fixture(scope="module")
def untrained() -> dict[str, Pretrained]:
    """Models of ours as a stage leaves them: an encoder, a tokenizer, a classifier."""
    net = BEATs(**load_official(fixture("dev_tokenizer")).model)
    patches = jnp.zeros((1, 8, 256))
    made: Any = jax.jit(Tokenizer(net, 16).init)(jax.random.key(0), patches)
    params = jax.tree.map(np.asarray, made["params"])
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((64, 16)).astype(np.float32)
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    training = {"layer_norm": {"scale": np.ones(48, np.float32)}}
    head = {"kernel": rng.standard_normal((48, 3), np.float32), "bias": np.ones(3, np.float32)}
    encoder = {"encoder": params["encoder"]}

    def trained(kind: str, params: Any, codebook: Any = None, **more: Any) -> Pretrained:
        arrays = params if codebook is None else {**params, "codebook": codebook}
        source = dict(path=f"/runs/W/iter2/{kind}", kind=kind, step=400, lineage={"teacher": {}})
        source["params_sha256"] = tree_sha256(arrays)
        return Pretrained(kind, net, params, codebook, MEAN, STD, source, **more)

    names = dict(labels=("dog", "/m/09x0r", "rain"), task="multi-label")
    return {
        "encoder": trained("encoder", {**encoder, "predictor": training}),
        "tokenizer": trained("tokenizer", {**params, "estimator": training}, codebook),
        "finetuned": trained("finetuned", {**encoder, "head": head}, **names),
    }


# --- an official file there and back --------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_an_official_file_survives_to_the_bit(tmp_path, name):
    model = load_model(fixture(name))
    assert exported.save_exported(model, tmp_path / "folder") == []
    again = load_model(tmp_path / "folder")
    assert again.source["params_sha256"] == model.source["params_sha256"]
    assert again[:2] == model[:2] and again[4:6] == model[4:6]
    assert (again.labels, again.task) == (model.labels, model.task)
    assert_trees_equal((again.params, again.codebook), (model.params, model.codebook))
    checkpoint, lines = to_official(again)
    assert lines == []
    write_torch_file(tmp_path / "x.pt", checkpoint)
    assert_same_file(read_torch_file(tmp_path / "x.pt"), read_torch_file(fixture(name)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.float32])
def test_what_is_strange_in_an_official_file_survives(tmp_path, dtype):
    """Other dtypes, another order, new weight-norm names, helpers, -0.0, unknown fields."""
    checkpoint = read_torch_file(fixture("dev_tokenizer"))
    rng = np.random.default_rng(0)
    state = {key: checkpoint["model"][key] for key in reversed(checkpoint["model"])}
    if dtype == np.float64:  # with bits that float32 has not
        noise = {key: 1 + 1e-12 * rng.random(x.shape) for key, x in state.items()}
        state = {k: x if "bias.w" in k or "init" in k else x * noise[k] for k, x in state.items()}
    conv = "encoder.pos_conv.0"
    for i, old in enumerate(("weight_g", "weight_v")):
        state[f"{conv}.parametrizations.weight.original{i}"] = state.pop(f"{conv}.{old}")
    state["patch_embedding_pad.weight"] = np.ones((1, 1, 16, 16))
    tables = [key for key in state if "relative_attention_bias" in key]
    state[tables[0]], state[tables[1]] = state[tables[0]].copy(), state[tables[1]].copy()
    state[tables[0]][0], state[tables[1]][0], state[tables[2]][0] = 0.0, -0.0, 0.0
    state = {key: x.astype(dtype) for key, x in state.items()}
    state["raw2fbank_pad.weight"] = np.ones((1, 1, 400), np.float32)
    cfg = {"name": ("x", None, {1: -0.0, "y": [True, 2**70]}), **checkpoint["cfg"]}
    write_torch_file(tmp_path / "x.pt", {"cfg": cfg, "model": state})
    exported.save_exported(load_model(tmp_path / "x.pt"), tmp_path / "folder")
    write_torch_file(tmp_path / "y.pt", to_official(load_model(tmp_path / "folder"))[0])
    assert_same_file(read_torch_file(tmp_path / "y.pt"), {"cfg": cfg, "model": state})
    model: Any = load_model(tmp_path / "folder")
    assert model.params["encoder"]["encoder"]["pos_conv"]["weight_v"].shape == (128, 3, 48)


def test_gates_without_a_bias_are_kept_and_aliases_stay_one_in_any_dtype(tmp_path):
    rng = np.random.default_rng(0)
    cfg = official.state_dict("dev_encoder")[0]
    state = official.random_state(rng, cfg | {"relative_position_embedding": False})
    plain = {"cfg": cfg | {"relative_position_embedding": False}, "model": state}
    half = {key: x.astype(np.float16) for key, x in official.random_state(rng, cfg).items()}
    for checkpoint in (plain, {"cfg": cfg, "model": half, "optimizer": {"step": 1}}):
        write_torch_file(tmp_path / "x.pt", checkpoint)
        back, lines = to_official(load_model(tmp_path / "x.pt"))
        assert (
            lines == ["optimizer of the official file: no part of a model"][: len(checkpoint) - 2]
        )
        checkpoint.pop("optimizer", None)
        assert_same_file(back, checkpoint)
    tables = [x for key, x in back["model"].items() if "relative_attention_bias" in key]
    assert len(tables) == 3 and all(table is tables[0] for table in tables)


# --- our own models -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder", "tokenizer", "finetuned"])
def test_our_model_in_a_folder(tmp_path, untrained, kind):
    model = untrained[kind]
    lines = exported.save_exported(model, tmp_path / "x", ["its family"])
    labels = {"labels.json"} if kind == "finetuned" else set()
    assert {path.name for path in (tmp_path / "x").iterdir()} == PARTS | labels
    assert {path.name for path in tmp_path.iterdir()} == {"x"}  # nothing unfinished beside it
    again = load_model(tmp_path / "x")
    trained = {"encoder": "predictor", "tokenizer": "estimator"}.get(kind)
    kept = {name: part for name, part in model.params.items() if name != trained}
    assert_trees_equal((again.params, again.codebook), (kept, model.codebook))
    assert (again.kind, again.model, again.official) == (kind, model.model, None)
    assert (again.labels, again.task) == (model.labels, model.task)
    assert again.source["path"] == str(tmp_path / "x") and again.source["step"] == 400
    arrays = kept if model.codebook is None else {**kept, "codebook": model.codebook}
    assert again.source["params_sha256"] == tree_sha256(arrays)
    if trained:  # another hash, and where it comes from
        assert lines == [f"{trained} (48 parameters), of use in training only"]
        assert again.source["lineage"] == {"exported_from": model.source}
    else:
        assert lines == [] and again.source["lineage"] == model.source["lineage"]
        assert again.source["params_sha256"] == model.source["params_sha256"]
    # an export of the export is the same
    exported.save_exported(again, tmp_path / "y")
    files = (tmp_path / name / "model.safetensors" for name in "xy")
    assert len({path.read_bytes() for path in files}) == 1
    assert load_model(tmp_path / "y").source["lineage"] == again.source["lineage"]


def test_labels_and_card(tmp_path, untrained):
    run = tmp_path / "iter3" / "finetune"
    run.mkdir(parents=True)
    log = ({"step": 300, "loss": 2.5, "val_mAP": 0.25}, {"step": 400, "loss": 1.5, "lr": 1.0})
    lines = [*log, {"step": 500, "loss": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = untrained["finetuned"]
    model = model._replace(source={**model.source, "path": str(run)}, mean=11.9, std=10.6)
    exported.save_exported(model, tmp_path / "x", ["of noble birth"])
    assert json.loads((tmp_path / "x" / "labels.json").read_text()) == [
        {"index": 0, "label": "dog", "name": "dog"},
        {"index": 1, "label": "/m/09x0r", "name": "Speech"},
        {"index": 2, "label": "rain", "name": "rain"},
    ]
    card = (tmp_path / "x" / "README.md").read_text()
    for text in ('beats_jax.load("x")', "model.classify(", "of noble birth", "iter3, step 400"):
        assert text in card
    rows = {line for line in card.splitlines() if line.startswith("| ")}
    assert rows == {"| measured in training | |", "| loss | 1.5 |", "| val_mAP | 0.25 |"}
    assert "mean 11.90000, std 10.60000" in card and "Licence\n\nUnknown" in card
    again = load_model(tmp_path / "x")
    assert (again.mean, again.std, again.source["iteration"]) == (11.9, 10.6, "iter3")


@pytest.mark.parametrize("kind", ["encoder", "tokenizer", "finetuned"])
def test_our_model_as_an_official_file(tmp_path, untrained, kind):
    """The keys and shapes of the official code's own state dict, so that it loads strictly."""
    model = untrained[kind]
    checkpoint, lines = to_official(model)
    assert lines == left_out(model.params)
    _, reference = official.state_dict(f"dev_{kind}")
    shapes = {key: value.shape for key, value in reference.items()}
    if kind == "finetuned":
        shapes |= {"predictor.weight": (3, 48), "predictor.bias": (3,)}
    assert {key: value.shape for key, value in checkpoint["model"].items()} == shapes
    assert all(value.dtype == np.float32 for value in checkpoint["model"].values())
    cfg = checkpoint["cfg"]
    known = official.state_dict("dev_encoder")[0]
    assert cfg.pop("iteration") == "iter2"
    beside = {"encoder": {}, "tokenizer": {"quant_n": 64, "quant_dim": 16}}
    beside["finetuned"] = dict(finetuned_model=True, predictor_class=3, predictor_dropout=0.0)
    own = ("dropout_input", "layer_wise_gradient_decay_ratio")  # of the official training
    assert cfg == {key: x for key, x in known.items() if key not in own} | beside[kind]
    assert checkpoint.get("label_dict", {}) == dict(enumerate(model.labels))
    write_torch_file(tmp_path / "x.pt", checkpoint)
    again = load_model(tmp_path / "x.pt")
    assert_trees_equal(again.params, exported.without_training_parts(model).params)
    assert (again.kind, again.model, again.labels) == (kind, model.model, model.labels)
    assert parity.certify(model, again)["max_error"].keys() >= {"fbank", "layer_0", "layer_3"}


def test_a_tokenizer_s_counters_say_nothing_was_counted(untrained):
    model, _ = to_official(untrained["tokenizer"])
    name, codebook = "quantize.embedding", untrained["tokenizer"].codebook
    want = {"weight": codebook, "embed_avg": codebook, "initted": [1.0], "cluster_size": [0.0] * 64}
    for key, value in want.items():
        np.testing.assert_array_equal(model["model"][f"{name}.{key}"], value)
    np.testing.assert_array_equal(model["model"]["quantize.cluster_size"], [0.0] * 64)
    assert model["model"][f"{name}.embed_avg"] is not model["model"][f"{name}.weight"]


def test_what_an_official_file_cannot_say(tmp_path, untrained):
    model = untrained["finetuned"]._replace(mean=11.9, std=10.6, task="single-label")
    checkpoint, lines = to_official(model)
    assert "extract_features(…, fbank_mean=11.9, fbank_std=10.6)" in lines[0]
    assert "softmax" in lines[1] and len(lines) == 2
    tokenizer, lines = to_official(untrained["tokenizer"]._replace(mean=11.9))
    assert "extract_labels(…, fbank_mean=11.9" in lines[1]
    for content, want in ((checkpoint, (11.9, 10.6)), (tokenizer, (11.9, STD))):
        write_torch_file(tmp_path / "x.pt", content)
        loaded = load_official(tmp_path / "x.pt")
        assert (loaded.mean, loaded.std) == want


def test_settings_without_a_counterpart(untrained):
    def cfg_of(**changes):
        model = untrained["encoder"]
        return to_official(model._replace(model=model.model.clone(**changes)))[0]["cfg"]

    assert cfg_of(layer_norm_first=True)["deep_norm"] is False  # the official code asserts this
    assert cfg_of(relative_position=False)["gru_rel_pos"] is False
    with pytest.raises(ValueError, match="conv_pos is 0"):
        cfg_of(conv_pos=0)


# --- damage ---------------------------------------------------------------------------------------


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def edit_weights(change):
    def edit(folder):
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


def shorten(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


BIAS = "encoder.encoder.layers_1.fc1.bias"


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove("config.json"), "config.json"),
        (remove("labels.json"), "labels.json"),
        (remove("official/leftovers.pt"), "leftovers.pt"),
        (shorten("config.json"), "damaged"),
        (shorten("labels.json"), "labels.json is not the file it was written with"),
        (shorten("official/leftovers.pt"), "leftovers.pt is not the file"),
        (shorten("model.safetensors"), "damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "damaged"),
        (lambda folder: (folder / "config.json").write_text("{}"), "lacks 'files'"),
        (edit_config(model={"depth": 3}), "depth"),
        (edit_config(kind="encoder"), r"has \['head.bias', 'head.kernel'\] besides"),
        (edit_config(num_classes=9), r"head.kernel .* \(48, 527\); want float32 \(48, 9\)"),
        (edit_weights(lambda x: x.pop(BIAS)), rf"lacks \['{BIAS}'\] and has \[\]"),
        (edit_weights(lambda x: x.update(more=x[BIAS])), r"has \['more'\] besides"),
        (edit_weights(lambda x: x.update({BIAS: x[BIAS][1:]})), r"fc1.bias .* is float32 \(95,\)"),
        (edit_weights(lambda x: x.update({BIAS: x[BIAS] * np.float64(1)})), "is float64"),
        (edit_weights(lambda x: x[BIAS].__setitem__(0, 1)), "has sha256 .*its config says"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(exported_once, tmp_path, damage, message):
    folder = tmp_path / "x"
    shutil.copytree(exported_once, folder)
    load_model(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        exported.load_exported(folder)
    assert str(error.value).startswith(f"{folder} is damaged: ")


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "finetuned"
    exported.save_exported(load_model(fixture("dev_finetuned")), folder)
    return folder


def test_only_an_export_is_overwritten(tmp_path, untrained):
    model = untrained["encoder"]
    folder = tmp_path / "x"
    exported.save_exported(model, folder)
    parity.write_certificate({}, folder)
    exported.save_exported(untrained["finetuned"], folder)
    assert load_model(folder).kind == "finetuned"
    assert not (folder / "parity.json").exists()  # of the model that was there
    before = (folder / "config.json").read_bytes()
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds \['thesis.tex'\]"):
        exported.save_exported(model, folder)
    assert (folder / "config.json").read_bytes() == before
    other = tmp_path / "code"
    other.mkdir()
    exported.save_exported(model, other)  # an empty one is taken
    shutil.rmtree(other)
    other.mkdir()
    (other / "README.md").touch()  # a name of ours, but no export
    with pytest.raises(ValueError, match="no exported model"):
        exported.save_exported(model, other)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        exported.save_exported(model, folder / "thesis.tex")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, untrained, monkeypatch):
    exported.save_exported(untrained["encoder"], tmp_path / "x")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(exported, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        exported.save_exported(untrained["finetuned"], tmp_path / "x")
    assert load_model(tmp_path / "x").kind == "encoder"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# --- the certificate ------------------------------------------------------------------------------


LAYERS = "encoder/encoder/layers"


def changed(model: Pretrained, path: str, change: Any) -> Pretrained:
    """`model` with one array replaced, and its hash with it."""
    arrays = model.params if model.codebook is None else model.params | {"codebook": model.codebook}
    flat: Any = flax.traverse_util.flatten_dict(arrays, sep="/")
    tree: Any = flax.traverse_util.unflatten_dict(flat | {path: change(flat[path])}, sep="/")
    source = model.source | {"params_sha256": tree_sha256(tree)}
    codebook = tree.pop("codebook", None)
    return model._replace(params=tree, codebook=codebook, source=source)


@pytest.mark.parametrize(
    "name, path, change, worst",
    [
        ("dev_encoder", "encoder/post_extract_proj/bias", lambda x: x + 1, "layer_0 is off by"),
        ("dev_encoder", f"{LAYERS}_2/fc1/kernel", lambda x: x * 1.01, "layer_3 is off by 0.0"),
        ("dev_encoder", f"{LAYERS}_1/fc2/bias", lambda x: x * np.nan, "layer_2 is off by nan"),
        ("dev_finetuned", "head/bias", lambda x: x + 1e-3, "logits is off by 0.001"),
        ("dev_tokenizer", "codebook", lambda x: np.roll(x, 1, axis=0), "ids is off by"),
        ("dev_tokenizer", "quantize_layer_0/kernel", lambda x: -x, "codes is off by 0."),
    ],
)
def test_a_changed_weight_is_found_where_it_is(name, path, change, worst):
    model = load_model(fixture(name))
    with pytest.raises(ValueError, match=f"is not the model of .*: {worst}"):
        parity.certify(model, changed(model, path, change))


def test_the_last_bit_of_a_weight_and_other_statistics_are_found():
    model = load_model(fixture("dev_encoder"))
    path = f"{LAYERS}_1/fc1/bias"
    with pytest.raises(ValueError, match="outputs agree within 3e-05, but not every weight does"):
        parity.certify(model, changed(model, path, lambda x: np.nextafter(x, np.float32(9))))
    with pytest.raises(ValueError, match="fbank is off by"):
        parity.certify(model, model._replace(mean=15.4))
    with pytest.raises(ValueError, match=r"its outputs are .*layer_3.*; want"):
        parity.certify(model, load_model(fixture("dev_tokenizer")))


def test_the_outputs_that_are_compared_are_the_model_s(untrained):
    """They are those of the fixture's case, so a certificate of 0 is about the real thing."""
    case = official.case("dev_tokenizer", "one_1s")
    waveform = official.case("dev_encoder", "one_1s")["waveform"]
    found = parity.outputs(load_model(fixture("dev_tokenizer")), waveform)
    np.testing.assert_allclose(found["layer_3"], case["features"], rtol=0, atol=1e-3)
    codebook: Any = load_official(fixture("dev_tokenizer")).codebook
    sure = case["dist_margin"].reshape(-1) > 1e-3
    np.testing.assert_allclose(
        found["codes"].reshape(-1, 16)[sure],
        codebook[case["ids"].reshape(-1)][sure],
        rtol=0, atol=1e-6,
    )  # fmt: skip


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_folder(tmp_path_factory, untrained) -> Path:
    """A pre-training stage's folder as training leaves it."""
    folder = tmp_path_factory.mktemp("W") / "iter1" / "pretrain"
    model = untrained["encoder"]
    fields = {name: getattr(model.model, name) for name in exported_fields(model.model)}
    config = {
        "model": {"preset": "tiny", **fields},
        "precision": "float32",
        "remat": "",
        "data": {"mean": MEAN, "std": STD},
    }
    meta = {"stage": "pretrain", "iteration": "iter1", "lineage": {}, "config": config}
    state = TrainState(jnp.int32(7), model.params, {"count": np.zeros(())}, {"n": np.zeros(())})
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state, meta)
    (folder / "metrics.jsonl").write_text('{"step": 7, "val_loss": 3.25}\n')
    return folder


def exported_fields(model: BEATs) -> set[str]:
    return set(model.settings()) - {"dtype", "remat"} | {"patch_dim", "conv_bias"}


def test_convert_there_and_back(tmp_path, stage_folder, capsys):
    folder, file = tmp_path / "folder", tmp_path / "out.pt"
    assert cli.main(["convert", str(stage_folder), str(folder), "--verify"]) == 0
    said = capsys.readouterr().out
    trained = load_model(stage_folder).source["params_sha256"]
    assert f"encoder, iter1, step 7, 87,076 parameters, sha256 {trained}\n" in said
    assert "left out: predictor (48 parameters)" in said
    assert f"{folder}: encoder, iter1, step 7, 87,028 parameters" in said
    assert f"{folder}/parity.json: largest error 0, allowed 3e-05" in said
    assert "val_loss | 3.25" in (folder / "README.md").read_text()
    assert f"sha256 {trained[:12]}" in (folder / "README.md").read_text()
    assert load_model(folder).source["lineage"]["exported_from"]["params_sha256"] == trained
    certificate = json.loads((folder / "parity.json").read_text())
    assert certificate["max_error"] == dict.fromkeys(
        ("fbank", "layer_0", "layer_1", "layer_2", "layer_3"), 0.0
    )
    with np.load(folder / "parity.npz") as arrays:
        np.testing.assert_array_equal(arrays["waveform"], parity.parity_input())
    assert cli.main(["convert", str(folder), str(file), "--verify"]) == 0
    said = capsys.readouterr().out
    assert (
        f"{file}: encoder, iter1, 87,028 parameters" in said and "out.parity.json: largest" in said
    )
    assert (tmp_path / "out.parity.npz").exists()
    # what is there is checked, and not written again
    before = file.stat().st_mtime_ns
    assert cli.main(["convert", str(stage_folder), str(file), "--verify"]) == 0
    assert file.stat().st_mtime_ns == before


def test_verify_finds_a_tampered_file(tmp_path, capsys):
    file, source = tmp_path / "x.pt", fixture("dev_encoder")
    checkpoint = read_torch_file(source)
    checkpoint["model"]["encoder.layers.0.fc1.bias"][3] += 0.1
    write_torch_file(file, checkpoint)
    assert cli.main(["convert", str(source), str(file), "--verify"]) == 2
    err = capsys.readouterr().err
    assert f"{file} is not the model of {source}: layer_" in err and err.count("\n") == 1
    assert not (tmp_path / "x.parity.json").exists()


@pytest.mark.parametrize(
    "src, dst, line",
    [
        ("{tmp}/nowhere", "{tmp}/x", "nowhere is not there"),
        ("{tmp}/text.pt", "{tmp}/x", "text.pt cannot be read"),
        ("{fixture}", "{tmp}", "and is no exported model"),
        ("{fixture}", "{tmp}/text.pt", "text.pt is there already"),
        ("{fixture}", "{tmp}/none/x.pt", "No such file or directory"),
        ("{fixture}", "/proc/nowhere/x", "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, src, dst, line):
    (tmp_path / "text.pt").write_text("no model")
    names = dict(tmp=tmp_path, fixture=fixture("dev_encoder"))
    assert cli.main(["convert", src.format(**names), dst.format(**names)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("beats-jax convert: ") and line in err
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "--help"])
    assert stop.value.code == 0
    assert "example:\n  beats-jax convert W/iter2/pretrain" in capsys.readouterr().out
