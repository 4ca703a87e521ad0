"""Two processes, four faults: the end is that of the undisturbed run."""

import subprocess
import sys

import pytest
from chaos import chaos, forked
from runs import ROOT


@pytest.mark.timeout(1200)
def test_four_faults_on_two_processes_change_nothing(tmp_path):
    faults, stages = ("kill", "kill in a save", "stop", "damage"), ("iter1/pretrain",)
    done = chaos(
        tmp_path, rounds=4, processes=2, seed=1, faults=faults, stages=stages, steps=10,
        eval_every=10, launch=forked, hang_timeout=100.0,
    )  # fmt: skip
    assert sorted(d["fault"] for d in done) == sorted(faults)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_faults_in_both_stages_of_processes_as_users_start_them(tmp_path):
    faults = ("kill in a save", "hang", "full disk", "damage")
    done = chaos(tmp_path, rounds=4, processes=2, seed=1, faults=faults)
    assert sorted(d["fault"] for d in done) == sorted(faults)
    assert {d["stage"] for d in done} == {"iter1/pretrain", "iter2/tokenizer"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("flags", [(), ("--elastic",)])
def test_a_longer_series_on_four_processes(flags):
    command = [sys.executable, "tests/chaos.py", "--rounds=12", "--processes=4", "--seed=0", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
