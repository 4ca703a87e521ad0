"""The command line of training: what a user gets wrong ends in one clear line and exit code 2."""

import os
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, environment, run, run_forked, tiny_flags


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"data__source": "folder"}, "no audio named; set --config.data.dir=FOLDER"),
        ({"data__source": "folder", "data__dir": "/nowhere"}, "/nowhere"),
        ({"data__source": "folder", "data__dir": "EMPTY"}, "no audio in it"),
        ({"data__source": "folder", "data__dir": "BROKEN"}, "none of the 1 files can be used"),
        ({"data__source": "wav"}, 'data.source "wav" is unknown'),
        ({"data__filter": "colour=red"}, "no column 'colour'; the columns are: "),
        ({"pretrain__stepz": 3}, "stepz"),
        ({"pretrain__steps": "many"}, "steps"),
        ({"model__preset": "huge"}, 'model.preset "huge" is unknown; use one of tiny'),
        ({"pretrain__batch_size": 9, "mesh__data": 1, "mesh__fsdp": 2}, "batch_size=8"),
        ({"mesh__tensor": 5}, "does not fit 2 devices"),
        ({"pretrain__positions": "here"}, 'positions "here" is unknown'),
        ({"random_projection__mode": "magic"}, "magic"),
        ({"init_from": "/nowhere"}, "config.init_from: /nowhere is not there"),
        ({"init_from": "/nowhere.pt"}, "/nowhere.pt"),
        ({"stages": "('iter2/tokenizer',)"}, "iter1/pretrain is not there; give"),
        ({"stages": "('iter2/pretrain',)"}, "iter2/tokenizer is not there; give"),
        ({"stages": "('mine/tokenizer',)"}, "mine has no teacher of its own; give one"),
        ({"data__crop": "best"}, 'data.crop "best" is unknown'),
        ({"data__token_ids": "/nowhere"}, "data.token_ids: no store.json in /nowhere"),
        ({"resume": "/nowhere"}, "is none of this config's stages"),
        ({"stages": "('polish',)"}, "this config can run: tokenizer, pretrain, finetune"),
        ({"stages": "('iter2/finetune',)"}, "the encoder to fine-tune (--config.init_from=PATH"),
        ({"pretrain__log_every": 0}, "pretrain.log_every is 0"),
        ({"input__backend": "torch"}, "use 'tf' or 'numpy'"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, changes, wanted):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "noise.wav").write_bytes(b"this is no sound")
    places = {"EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    flags = tiny_flags(tmp_path / "run", **{"input__backend": "numpy", **changes})
    done = run_forked(flags, tmp_path, devices=2)
    assert wanted in last_line(done)


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(tiny_flags(tmp_path / "file" / "run", input__backend="numpy"))
    assert str(tmp_path / "file") in last_line(done)


def test_no_config_and_an_unknown_one(tmp_path):
    main = (sys.executable, "-m", "beats_jax.main")
    assert "--config=configs/smoke.py --workdir=/tmp/smoke" in last_line(run([*main]))
    done = run([*main, "--config=configs/iter9.py", f"--workdir={tmp_path}"])
    assert "no config configs/iter9.py; packaged ones: " in last_line(done)
    done = run([*main, "--config=configs/smoke.py", f"--workdir={tmp_path}", "--num_processes=2"])
    assert "--num_processes without --coordinator; give" in last_line(done)
    done = run([*main, "--config=configs/smoke.py", "--workdir=s3://bucket/W"])
    assert "--workdir=s3://bucket/W: want a folder, or gs://BUCKET/FOLDER" in last_line(done)
    done = run([*main, "--config=my/iter1.py", f"--workdir={tmp_path}"])
    assert "no config my/iter1.py; packaged ones: " in last_line(done)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    """RLIMIT_FSIZE stands for the disk: pictures (150 KB) still fit, the parameters do not."""
    flags = tiny_flags(tmp_path, input__backend="numpy", pretrain__steps=4)
    assert run(flags).returncode == 0
    checkpoints = tmp_path / "iter1" / "pretrain" / "checkpoints"
    shutil.rmtree(checkpoints / "4")  # as if it had been killed after step 3
    kept = sorted(p.name for p in checkpoints.iterdir())
    limited = "import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000,) * 2);"
    done = subprocess.run(
        [sys.executable, "-c", f"{limited} os.execv(sys.executable, sys.argv[1:])", *flags],
        # What the first run compiled is read; nothing half written may get into the shared cache.
        env=environment() | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": str(10**12)},
        cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240,
    )  # fmt: skip
    assert "could not be written" in last_line(done)
    assert set(kept) <= {p.name for p in checkpoints.iterdir()}
    assert run(flags).returncode == 0  # with room again, from the checkpoint that was left


def test_too_little_memory_is_told_in_a_line():
    code = (
        "import beats_jax.main as m\n"
        "def main(_): raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')\n"
        "m.main = main\n"
        "m.run()"
    )
    line = last_line(run([sys.executable, "-c", code]))
    assert "allocating 9 bytes" in line and "--config.STAGE.micro_batches=4" in line


def test_a_packaged_config_is_found_from_any_directory(tmp_path):
    flags = tiny_flags(tmp_path / "run", config="iter1")
    flags = [flag for flag in flags if "num_clips" not in flag]
    done = subprocess.run(
        flags, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert "set --config.data.dir=FOLDER" in last_line(done)
    assert os.listdir(tmp_path) == ["run"]
