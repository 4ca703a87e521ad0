"""What a step sends on 8 devices, array by array as it has to be; and the table made of it."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from math import ceil, inf, prod

import numpy as np
import pytest

from beats_jax import cli, scaling
from beats_jax.collectives import Collective
from beats_jax.models.beats import PRESETS
from beats_jax.scaling import MACHINES, ROWS, Cost, Machine, Step
from beats_jax.workloads import Settings

# One layer in the encoder and one in the predictor: layers differ in nothing.
SMALL = """
from beats_jax.configs import iter1
from beats_jax.models.beats import PRESETS

whole = iter1.get_config

def get_config():
    config = whole()
    config.pretrain.predictor_layers = 1
    return config

iter1.get_config = get_config
PRESETS["tiny"]["num_layers"] = 1
"""
WIDTH, HEADS = PRESETS["tiny"]["embed_dim"], PRESETS["tiny"]["num_heads"]
TOKENS, VISIBLE, CODES, BANDS = 48, 12, 1024, 8  # of a clip of 1 s
FREQUENCIES, GROUPS, TAPS = ceil((TOKENS + 64) / 2) + 1, 16, 128  # of the positional convolution
WAVES = FREQUENCIES * GROUPS * (2 * WIDTH // GROUPS) ** 2


def small_steps(*layouts: str) -> dict[str, Step]:
    """The step in these layouts on 8 devices, all at once: each has to start JAX."""
    settings = Settings("pretrain", "tiny", 1, 1.0, "float32", backend="numpy")
    cases = [settings._replace(mesh=scaling.LAYOUTS[layout](8)) for layout in layouts]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(scaling, "CHILD", SMALL + scaling.CHILD)
        return dict(zip(layouts, pool.map(scaling.partitioned, cases), strict=True))


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    return small_steps("data", "fsdp, tensor=2")


def wanted(step: Step, fsdp: int, tensor: int) -> Counter:
    """Arrays of more than one number, by kind, group size and elements.

    A gradient is reduced once; a matrix that is cut is gathered twice where a layer is computed
    again for its gradient, else once, and its gradient is scattered. Not as one might think: the
    convolution's kernel is exchanged as waves, several times its size, and a table of relative
    positions as the matrix that every layer adds to its scores.
    """
    shards, cut = (fsdp, True) if fsdp > 1 else (8, False)
    arrays = Counter()
    for name, shape in step.parameters.items():
        size = prod(shape)
        in_layer = re.search(r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)/kernel$", name)
        if in_layer or name.endswith(("connector/kernel", "head/kernel")):
            size //= tensor if in_layer else 1
            arrays["reduce-scatter" if cut else "all-reduce", shards, size] += 1
            arrays["all-gather", shards, size] += cut * (2 if in_layer else 1)
        elif name.endswith("weight_v"):
            arrays["all-reduce", shards, WAVES] += 1
        elif name.endswith("relative_attention_bias/embedding"):
            arrays["all-reduce", shards, HEADS // tensor * TOKENS**2] += 1
        elif not name.endswith("weight_g"):
            by_head = re.search(r"(q_proj|k_proj|v_proj|fc1)/bias$|grep_a$", name)
            arrays["all-reduce", shards, size // (tensor if by_head else 1)] += 1
    # Figures: unigram counts, codes predicted, the spread of features (sum, sum of squares).
    arrays["all-reduce", shards, BANDS * CODES] += 1
    arrays["all-reduce", shards, CODES] += 1
    arrays["all-reduce", shards, WIDTH] += 2
    if tensor > 1:
        for tokens in (VISIBLE, TOKENS):
            # A layer: two results, and the gradients of what goes into fc1, q, k and v.
            arrays["all-reduce", tensor, ROWS * tokens * WIDTH] += 6
            # The gate's small matrix works on every head.
            arrays["all-reduce", tensor, 8 * WIDTH // HEADS] += 1
            arrays["all-reduce", tensor, 8] += 1
            # What is cut only by its use, and Adam's moments of it, is put together again.
            arrays["all-gather", tensor, HEADS] += 3
            arrays["all-gather", tensor, 320 * HEADS] += 3
    return +arrays


def check_arrays(step: Step, layout: str) -> None:
    found, scalars = Counter(), 0
    for collective in step.collectives:
        assert collective.size == 4 * collective.elements, collective
        if collective.elements > 1:
            key = collective.kind, collective.groups.shape[1], collective.elements
            found[key] += collective.count
        scalars += collective.elements == 1
    mesh = scaling.LAYOUTS[layout](8)
    assert found == wanted(step, mesh["fsdp"], mesh["tensor"])
    assert 5 < scalars < 200  # sums of the loss, figures, the gradient's norm


@pytest.mark.timeout(900)  # seconds on an idle machine
@pytest.mark.parametrize("layout", ["data", "fsdp, tensor=2"])
def test_arrays_are_those_that_have_to_be_exchanged(steps, layout):
    check_arrays(steps[layout], layout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_arrays_without_a_tensor_axis():
    check_arrays(small_steps("fsdp")["fsdp"], "fsdp")


def test_a_data_parallel_step_reduces_the_gradients_and_no_more(steps):
    step = steps["data"]
    parameters = sum(prod(shape) for shape in step.parameters.values())
    elsewhere = {"weight_v": TAPS * WIDTH**2 // GROUPS, "weight_g": TAPS, "tables": 2 * 320 * HEADS}
    gradients = parameters - sum(elsewhere.values()) + WAVES + 2 * HEADS * TOKENS**2
    reduced = sum(collective.elements for collective in step.collectives)
    figures = BANDS * CODES + CODES + 2 * WIDTH
    assert gradients + figures < reduced < gradients + figures + 20
    assert {collective.kind for collective in step.collectives} == {"all-reduce"}
    assert not any(map(scaling.grows, step.collectives))


def collective(kind="all-reduce", size=8, groups=((0, 1),), elements=1) -> Collective:
    return Collective(kind, size, elements, np.array(groups))


def test_seconds_on_links_and_between_hosts():
    node = Machine(1e12, links=450.0, host=2, port=50.0)
    assert scaling.seconds(collective(size=450), node) == 1.0  # 2 (n - 1) / n = 1
    assert scaling.seconds(collective(size=50, groups=((0, 2), (1, 3))), node) == 1.0
    # four devices on two hosts: two ports work side by side
    assert scaling.seconds(collective(size=200, groups=((0, 1, 2, 3),)), node) == 3.0
    torus = Machine(1e12, links=450.0)
    assert scaling.seconds(collective(size=450, groups=((0, 2), (1, 3))), torus) == 1.0


def test_batch_that_hides_and_efficiency():
    cost = Cost(fixed=4.0, growing=0.5, arithmetic=1.0)
    assert cost.hidden_from == 8.0
    assert cost.efficiency(8.0) == (0.5, 1.0)
    assert cost.efficiency(4.0) == (4 / 10, 4 / 6)
    assert Cost(4.0, 1.0, 1.0).hidden_from == inf
    machine = Machine(1e12, links=10.0)
    found = [collective(size=40), collective(size=70, elements=3 * ROWS)]
    cost = scaling.cost(found, 2, 2e11, machine)
    assert cost == pytest.approx((4.0, 7.0 * 2 / ROWS, 0.2 / scaling.SHARE))


def test_command_makes_the_table(monkeypatch, tmp_path, capsys):
    asked = []

    def partitioned(settings):
        asked.append((settings.size, settings.dtype, *settings.mesh.values()))
        arrays = [collective(size=10**8), collective("all-gather", 7 * 10**6, elements=ROWS)]
        return Step(prod(settings.mesh.values()), arrays, 1e11, {"kernel": [3, 5]})

    monkeypatch.setattr(scaling, "partitioned", partitioned)
    out = tmp_path / "scaling.json"
    words = "benchmark --what scaling --size tiny,base --devices 8,64 --json"
    assert cli.main([*words.split(), str(out)]) == 0
    assert asked[:5] == [
        ("tiny", "bfloat16", 8, 1, 1),
        ("tiny", "bfloat16", 64, 1, 1),
        ("tiny", "bfloat16", 1, 8, 1),
        ("tiny", "bfloat16", 1, 64, 1),
        ("tiny", "bfloat16", 1, 4, 2),
    ]
    report = json.loads(out.read_text())
    assert scaling.table(report) == capsys.readouterr().out.rstrip("\n")
    assert len(report["rows"]) == 12
    row = report["rows"][0]
    assert row["bytes_sent"] == 1e8 and row["bytes_sent_per_clip"] == 7e6 / 2 / ROWS
    assert row["arrays"]["all-gather"] == {"number": 1, "bytes": 7 * 10**6}
    assert row["parameters"] == 15 and row["machines"].keys() == MACHINES.keys()
    assert "| tiny | data | 100 | 0 | " in scaling.table(report)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--devices eight", "--devices eight: want numbers, as in --devices 8,64"),
        ("--devices 8,3", "--devices 3: want even numbers"),
        ("--size base,huge", 'size "huge" is unknown; use one of tiny'),
    ],
)
def test_bad_input_is_one_line(words, line, capsys):
    assert cli.main(["benchmark", "--what", "scaling", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and line in err


def test_a_step_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(scaling, "CHILD", "raise SystemExit('no such thing')")
    settings = Settings("pretrain", "tiny", mesh={"data": 2, "fsdp": 1, "tensor": 1})
    with pytest.raises(ChildProcessError, match="no such thing"):
        scaling.partitioned(settings)
    with pytest.raises(ValueError, match="want a size for each axis"):
        scaling.partitioned(settings._replace(mesh={"data": -1, "fsdp": 1, "tensor": 1}))
