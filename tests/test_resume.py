"""Resume is exact: a run stopped at any moment ends with the bits of one that was not."""

import signal
from typing import Any

import pytest
from runs import (
    TINY_ITER2,
    assert_trees_equal,
    final_state,
    run,
    run_forked,
    stop_after,
    tiny_config,
    tiny_flags,
    without_timing,
)

from beats_jax import train


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One run of 8 steps from the default (tf) input, never stopped."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = run_forked(tiny_flags(workdir), workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_kill_9_then_the_same_command_ends_bit_equal(undisturbed, tmp_path):
    """Three times: what each start takes up, and leaves to the next, shows in the last bits."""
    log = tmp_path / "iter1" / "pretrain" / "metrics.jsonl"
    for moment in (1, 3, 6):
        code = stop_after(tiny_flags(tmp_path), log, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL
    done = run_forked(tiny_flags(tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    assert_trees_equal(final_state(undisturbed), final_state(tmp_path))
    assert without_timing(log.parent) == without_timing(undisturbed / "iter1" / "pretrain")


@pytest.fixture(scope="module")
def without_tensorflow(tmp_path_factory):
    """The same run from the numpy input, where TensorFlow cannot be imported."""
    workdir = tmp_path_factory.mktemp("numpy")
    python, _, module, *flags = tiny_flags(workdir, input__backend="numpy")
    blocked = "import sys; sys.modules.update(tensorflow=None, tensorflow_datasets=None);"
    start = f"{blocked} sys.argv[0] = {module!r}; from beats_jax.main import run; run()"
    done = run([python, "-c", start, *flags])
    assert done.returncode == 0, done.stderr
    return workdir


def test_the_numpy_input_trains_to_the_same_state(undisturbed, without_tensorflow):
    """int16 batches are bit-equal; log-mel on the host in TF or NumPy differs in rounding only."""
    ours = without_timing(without_tensorflow / "iter1" / "pretrain")
    theirs = without_timing(undisturbed / "iter1" / "pretrain")
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        if a["step"]:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_sigterm_saves_the_step_it_stopped_at(without_tensorflow, tmp_path):
    stage = tmp_path / "iter1" / "pretrain"
    # save_every beyond the end: only the signal can have made a checkpoint.
    flags = tiny_flags(tmp_path, input__backend="numpy", pretrain__save_every=100)
    code = stop_after(flags, stage / "metrics.jsonl", 3, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    saved = sorted(int(p.name) for p in (stage / "checkpoints").iterdir() if p.name.isdigit())
    assert saved[0] == 0 and len(saved) == 2 and 3 <= saved[1] < 8
    done = run_forked(flags, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_trees_equal(final_state(without_tensorflow), final_state(tmp_path))
    assert without_timing(stage) == without_timing(without_tensorflow / "iter1" / "pretrain")


@pytest.fixture(scope="module")
def undisturbed_iteration(tmp_path_factory):
    """Both halves of iteration 2 in one command, never stopped."""
    workdir = tmp_path_factory.mktemp("undisturbed2")
    done = run_forked(tiny_flags(workdir, **TINY_ITER2), workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_kill_9_in_each_half_of_an_iteration(undisturbed_iteration, tmp_path):
    flags = tiny_flags(tmp_path, **TINY_ITER2)
    for half in ("tokenizer", "pretrain"):
        log = tmp_path / "iter2" / half / "metrics.jsonl"
        assert stop_after(flags, log, 3, signal.SIGKILL) == -signal.SIGKILL
        assert (tmp_path / "iter2" / "pretrain").exists() == (half == "pretrain")
    done = run_forked(flags, tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in ("iter2/tokenizer", "iter2/pretrain"):
        mine, theirs = (final_state(w, stage) for w in (tmp_path, undisturbed_iteration))
        assert_trees_equal(mine, theirs)
        mine, theirs = (without_timing(w / stage) for w in (tmp_path, undisturbed_iteration))
        assert mine == theirs


def test_another_seed_or_dataset_is_refused(undisturbed):
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"data__num_clips": 41},
        {"pretrain__batch_size": 16},
        {"random_projection__seed": 9},
        {"data__mean": 1.0},
    ]
    record = undisturbed / "iter1" / "pretrain" / "config.json"
    written = record.read_bytes()
    for change in changes:
        config = tiny_config(input__backend="numpy", **change)
        with pytest.raises(ValueError, match=r"was trained with .* this run has"):
            train.run_stage(config, "pretrain", undisturbed)
    assert record.read_bytes() == written
