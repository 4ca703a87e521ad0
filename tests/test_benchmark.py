"""`beats-jax benchmark`: every part runs and gives figures that hang together; bad input; peers."""

import json
import statistics
import time
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

from beats_jax import benchmark, cli, workloads
from beats_jax.benchmark import Workload
from beats_jax.training_workloads import Training
from beats_jax.workloads import Settings

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
SMALL = Settings("encode", "tiny", 2, 0.4, mesh=ONE, backend="numpy")
ROWS = {
    "fbank": {"fbank, jax", "fbank, numpy", "matmul"},
    "encode": {"encode tiny, beats_jax", "matmul"},
    "tokenize": {"tokenize tiny, beats_jax", "matmul"},
    "pretrain": {"pretrain tiny, random tokens", "matmul"},
    "distill": {"distill tiny", "matmul"},
    "finetune": {"finetune tiny", "matmul"},
    "masking": {
        *("encoder tiny, 25% of the patches", "encoder tiny, all patches", "matmul"),
        *("step tiny, 25% of the patches", "step tiny, all patches"),
    },
    "attention": {
        *("attention tiny, in one piece", "attention tiny, in one piece, with gradients"),
        *("attention tiny, in parts", "matmul"),
    },
    "compile": {
        *("trace and lower", "trace and compile", "trace and load from the cache"),
        "make the state, compilation included",
    },
    "checkpoint": {
        *("save, until the loop goes on", "save, the rest in the background", "restore"),
    },
}


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    monkeypatch.setattr(benchmark.roofline, "CPU_SIDE", 128)


@pytest.fixture
def cache_settings():
    """`compile` changes where JAX keeps compiled programs."""
    names = ("enable_compilation_cache", "compilation_cache_dir")
    names = [f"jax_{n}" for n in (*names, "persistent_cache_min_compile_time_secs")]
    before = {name: getattr(jax.config, name) for name in names}
    yield before
    after = {name: getattr(jax.config, name) for name in names}
    for name, value in before.items():
        jax.config.update(name, value)
    assert after == before, "the benchmark left them changed"


SLOW = ("distill", "finetune", "masking")  # compiled as `pretrain` is


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=[pytest.mark.slow] if what in SLOW else [])
        for what in ROWS
        if what != "compile"
    ],
)
def test_every_part_gives_figures(what):
    report = benchmark.run(SMALL._replace(what=what), repeats=2)
    assert json.loads(json.dumps(report)) == report
    rows = {row["name"]: row for row in report["rows"]}
    assert rows.keys() == ROWS[what]
    for row in rows.values():
        assert row["wall_s"]["min"] <= row["wall_s"]["median"] <= row["wall_s"]["max"]
        assert row["host_bytes"] > 1e8
        if row["clips"]:
            assert row["clips_per_s"] == pytest.approx(2 / row["wall_s"]["median"])
            assert row["audio_hours_per_hour"] == pytest.approx(0.4 * row["clips_per_s"])
            rate = row["gflop_per_clip"] * 2e9 / row["cpu_s"]["median"]
            assert row["share_of_matmul"] == pytest.approx(rate / report["matmul_flop_per_s"])
    first = report["rows"][0]
    if what in workloads.TRAINING:
        assert 0 <= first["input_wait"] <= 1 and first["compile_s"] > 0
        assert first["device_bytes"] > 4 * 2 * 100_000  # at least Adam's moments
    text = benchmark.table(report)
    assert all(f"| {name} |" in text for name in rows) and "jax " in text


@pytest.mark.slow
def test_starting_is_timed_with_and_without_the_cache(cache_settings):
    report = benchmark.run(SMALL._replace(what="compile"), repeats=1)
    wall = {row["name"]: row["wall_s"]["median"] for row in report["rows"]}
    assert wall.keys() == ROWS["compile"]
    assert min(wall.values()) > 0


def test_pipeline_reads_what_was_prepared():
    report = benchmark.run(SMALL._replace(what="pipeline"), repeats=2)
    names = [row["name"] for row in report["rows"]]
    assert names == ["pipeline numpy, int16", "pipeline numpy, log-mel"]
    assert all(row["clips"] == 8 and row["clips_per_s"] > 0 for row in report["rows"])


def test_command_writes_json_table_and_trace(tmp_path, capsys):
    words = "--what encode --size tiny --batch-size 4 --seconds 0.4 --mesh data=2 --repeats 2"
    out, trace = tmp_path / "out" / "b.json", tmp_path / "trace"
    words = ["benchmark", *words.split(), "--json", str(out), "--profile", str(trace)]
    assert cli.main(words) == 0
    report = json.loads(out.read_text())
    assert report["settings"]["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert benchmark.table(report) == capsys.readouterr().out.rstrip("\n")
    assert list(trace.rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--what frobnicate", 'what "frobnicate" is unknown; use one of fbank, encode'),
        ("--size huge", 'size "huge" is unknown; use one of tiny, small, base'),
        ("--tokens none", 'tokens "none" is unknown'),
        ("--dtype float16", 'precision "float16" is unknown'),
        ("--batch-size 0", "--batch-size is 0"),
        ("--seconds 0.1", "--seconds is 0.1"),
        ("--repeats 0", "--repeats is 0"),
        ("--mesh rows=2", "--mesh rows=2: want sizes of data, fsdp, tensor"),
        ("--mesh data=3,fsdp=-1", "does not fit 8 devices"),
        ("--mesh data=4 --batch-size 6", "use --batch-size 4"),
        ("--what pretrain --against avex", "--against goes with --what encode or fbank"),
        ("--size tiny --against nobody", "--against nobody: want avex, speechbrain"),
    ],
)
def test_bad_input_is_one_line(words, line, capsys):
    assert cli.main(["benchmark", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and line in err


def test_workloads_are_called_in_turn_and_warmed_up():
    calls = []

    def workload(name: str, seconds: float) -> Workload:
        return Workload(name, lambda: calls.append(name) or time.sleep(seconds), 1)

    samples = benchmark.measure([workload("a", 0.02), workload("b", 0.0)], 3)
    assert calls == ["a", "b"] * 4
    assert [len(taken["wall_s"]) for taken in samples] == [3, 3]
    assert min(samples[0]["wall_s"]) >= 0.02
    assert statistics.median(samples[0]["cpu_s"]) < 0.02  # asleep


@pytest.mark.parametrize("size", ["tiny", pytest.param("base", marks=pytest.mark.slow)])
def test_pretraining_step_exports_for_accelerators(size):
    """On shapes alone: no array of the model's size is made."""
    settings = SMALL._replace(what="pretrain", size=size, seconds=10.0, dtype="bfloat16")
    training = Training(settings, workloads.make_mesh(settings))
    batch = {
        "waveform": jax.ShapeDtypeStruct((2, 160000), np.int16),
        "num_samples": jax.ShapeDtypeStruct((2,), np.int32),
        "counter": jax.ShapeDtypeStruct((2,), np.uint32),
    }
    step: Any = training.step
    export = jax.export.export(step, platforms=("tpu", "cuda"))
    exported = export(training.like, training.frozen, batch)
    assert exported.platforms == ("tpu", "cuda")
    state, _ = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), training.like)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes


# An implementation with the official interface whose log-mel is right and whose features are not.
STUB = """
import torch
from beats_jax.fbank import fbank

class BEATsConfig:
    def __init__(self, cfg):
        self.dim = cfg["encoder_embed_dim"]

class BEATs(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.dim = cfg.dim

    def load_state_dict(self, state, strict):
        return [], [key for key in state if key.startswith(UNKNOWN)]

    def preprocess(self, source):
        return torch.from_numpy(fbank(source.numpy()))

    def extract_features(self, source, padding_mask):
        assert padding_mask.shape == source.shape and not padding_mask.any()
        return torch.zeros(len(source), 16, self.dim), None
"""


@pytest.mark.torch
def test_a_folder_with_the_official_interface(tmp_path, monkeypatch):
    def folder(name: str, unknown: str) -> str:
        (tmp_path / name).mkdir()
        text = f"UNKNOWN = {unknown!r}\n{STUB}"
        (tmp_path / name / "BEATs.py").write_text(text)
        monkeypatch.delitem(benchmark.peers.sys.modules, "BEATs", raising=False)
        return str(tmp_path / name)

    path = folder("good", "?")
    report = benchmark.run(SMALL._replace(what="fbank"), 2, path)
    against = report["against"]
    assert against["name"] == f"fbank, official code in {path}"
    assert against["max_error"] <= 1e-6 and against["ratio"]["cpu_s"] > 0
    assert "× our wall time" in benchmark.table(report)
    with pytest.raises(ValueError, match="outputs differ by"):
        benchmark.run(SMALL, 1, path)
    with pytest.raises(ValueError, match=r"other weights than BEATs has: encoder\."):
        benchmark.run(SMALL, 1, folder("other", "encoder."))
