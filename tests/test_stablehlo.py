"""Exported programs: batches of any size, the model's own numbers, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import official
import pytest

from beats_jax import inference, stablehlo
from beats_jax.inference import Model

SECONDS = 0.5  # 8000 samples: 3 columns
OUTPUTS = {"features": "dev_encoder", "logits": "dev_finetuned", "ids": "dev_tokenizer"}
SHAPES = {"features": "float32[b,24,48]", "logits": "float32[b,527]", "ids": "int32[b,3,8]"}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    paths = {what: official.FIXTURES / f"{name}.pt" for what, name in OUTPUTS.items()}
    return {what: inference.load(path) for what, path in paths.items()}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stablehlo")
    for what, model in models.items():
        stablehlo.save(stablehlo.export(model, SECONDS, what), folder / what, model)
    return {what: folder / what for what in models}


@pytest.mark.parametrize("what", OUTPUTS)
def test_the_program_gives_what_the_model_gives(models, saved, what):
    assert stablehlo.check(saved[what], models[what]) <= 1e-5
    exported = jax.export.deserialize(bytearray(saved[what].read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu") and exported.fun_name == what


@pytest.mark.parametrize("what", OUTPUTS)
def test_the_file_beside_it(models, saved, what):
    about = json.loads(Path(f"{saved[what]}.json").read_text())
    assert about["output"] == what and about["sample_rate"] == 16000
    assert about["input_shape"] == "float32[b,8000]" and about["output_shape"] == SHAPES[what]
    assert (about["mean"], about["std"]) == (15.41663, 6.55582)
    assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["jax"] == jax.__version__
    assert about["source"]["params_sha256"] == models[what].source["params_sha256"]
    assert about["labels"] == (list(models[what].labels) if what == "logits" else [])
    assert about["task"] == models[what].task


def test_it_runs_without_the_package(models, saved, tmp_path):
    """In a process that has JAX and cannot import beats_jax."""
    x = np.random.default_rng(9).uniform(-1, 1, (2, 8000)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    code = f"""
import sys
sys.modules["beats_jax"] = sys.modules["flax"] = None
import jax.export, numpy as np
exported = jax.export.deserialize(bytearray(open({str(saved["logits"])!r}, "rb").read()))
np.save("y.npy", exported.call(np.load("x.npy")))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected, _ = models["logits"].classify(x)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=0, atol=1e-5)


def test_another_program_is_found_out(models, saved, tmp_path):
    """One that is wrong by more than rounding: its samples come out at half of their size."""
    model, right = (
        models["features"],
        jax.export.deserialize(bytearray(saved["features"].read_bytes())),
    )

    def features(x):
        return right.call(x * np.float32(0.5))

    wrong = jax.export.export(jax.jit(features))(*right.in_avals)
    stablehlo.save(wrong, tmp_path / "wrong", model)
    with pytest.raises(ValueError, match=r"wrong is \S+ off the model's features; at most 0.0001"):
        stablehlo.check(tmp_path / "wrong", model)


def test_damaged_and_strange_files_are_refused(models, saved, tmp_path):
    with pytest.raises(ValueError, match=r"exported from other weights \(\w{12}\) than .*dev_tok"):
        stablehlo.check(saved["features"], models["ids"])
    program, about = saved["ids"].read_bytes(), Path(f"{saved['ids']}.json").read_text()
    (tmp_path / "ids").write_bytes(program[:-1])
    (tmp_path / "ids.json").write_text(about)
    with pytest.raises(ValueError, match=r"ids is not the file that .*ids\.json is about"):
        stablehlo.check(tmp_path / "ids", models["ids"])
    with pytest.raises(FileNotFoundError):
        stablehlo.check(tmp_path / "none", models["ids"])
    elsewhere = stablehlo.export(models["ids"], SECONDS, "ids", platforms=("tpu",))
    stablehlo.save(elsewhere, tmp_path / "tpu", models["ids"])
    with pytest.raises(ValueError, match=r"tpu is for tpu, and this is cpu"):
        stablehlo.check(tmp_path / "tpu", models["ids"])


def test_what_cannot_be_exported(models):
    encoder = models["features"]
    with pytest.raises(ValueError, match=r"0\.17 s are 2720 samples and so no token; .*0\.175 s"):
        stablehlo.export(encoder, 0.17, "features")
    with pytest.raises(ValueError, match="is of kind encoder: it has no class scores"):
        stablehlo.export(encoder, SECONDS, "logits")
    with pytest.raises(ValueError, match='output "probs" is unknown; give one of features, logits'):
        stablehlo.export(encoder, SECONDS, "probs")
    for platforms in (("gpu",), ()):
        with pytest.raises(ValueError, match=r"platforms are \[.*\]; give some of cpu, cuda, tpu"):
            stablehlo.export(encoder, SECONDS, "features", platforms)
    half = encoder.pretrained._replace(model=encoder.pretrained.model.clone(dtype=jnp.bfloat16))
    with pytest.raises(ValueError, match='bfloat16; load it with precision="float32"'):
        stablehlo.export(Model(half), SECONDS, "features")
