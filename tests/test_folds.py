"""Cross-validation: every fold is tested once, by a model that never saw it."""

import json
from typing import ClassVar

import numpy as np
import pytest
from runs import tiny_config

from beats_jax import folds, train

FOLDS = {
    "input__backend": "numpy",
    "data__num_clips": 70,
    "data__folds": "fold",
    "data__test_filter": "",
    "data__filter": "fold=1|2|3",
    "init_from": "scratch",
    "finetune__steps": 2,
    "finetune__batch_size": 8,
    "finetune__warmup_steps": 1,
    "finetune__eval_every": 1,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("folds")
    folds.run_folds(tiny_config(**FOLDS), "iter1/finetune", workdir)
    return workdir


def result_of(workdir, fold):
    return json.loads((workdir / "iter1" / f"fold{fold}" / "finetune" / "results.json").read_text())


def test_the_table_is_of_every_folds_results(workdir):
    summary = json.loads((workdir / "iter1" / "folds.json").read_text())
    results = {fold: result_of(workdir, fold) for fold in "123"}
    assert list(summary["folds"]) == list("123") and summary["figure"] == "accuracy"
    for name in ("last", "ema", "best", "best_mean"):
        figures = [results[fold]["weights"][name]["test"]["accuracy"] for fold in "123"]
        assert summary["mean"][name] == pytest.approx(np.mean(figures))
        assert summary["std"][name] == pytest.approx(np.std(figures, ddof=1))
    for fold, result in results.items():
        assert result["test_filter"] == f"fold={fold}"
        chosen = summary["folds"][fold]["test"]["selected"]
        assert chosen == result["weights"][result["selected"]]["test"]["accuracy"]
    assert sum(result["clips"]["test"] for result in results.values()) == 42  # each clip once
    assert {sum(result["clips"].values()) for result in results.values()} == {42}
    lines = (workdir / "iter1" / "folds.md").read_text().splitlines()
    assert len(lines) == 2 + 3 + 1 and lines[-1].startswith("| mean of 3 | | ")
    assert f"{100 * summary['mean']['selected']:.1f} ± " in lines[-1]


def test_finished_folds_are_not_run_again(workdir, monkeypatch):
    first = workdir / "iter1" / "fold1" / "finetune"
    before = (first / "metrics.jsonl").read_bytes()
    table = (workdir / "iter1" / "folds.json").read_text()
    (workdir / "iter1" / "folds.json").unlink()
    monkeypatch.setattr(train, "evaluate", None)  # no step may be run
    folds.run_folds(tiny_config(**FOLDS), "iter1/finetune", workdir)
    assert (first / "metrics.jsonl").read_bytes() == before
    assert (workdir / "iter1" / "folds.json").read_text() == table


def test_which_stages_run_by_folds():
    config = tiny_config(**FOLDS)
    assert folds.wanted(config, "finetune") and folds.wanted(config, "iter1/finetune")
    assert not folds.wanted(config, "iter1/pretrain")
    config.data.test_filter = "fold=1"
    assert not folds.wanted(config, "finetune")
    assert not folds.wanted(tiny_config(), "finetune")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__folds": "part"}, r"no column 'part'; the columns are: category, .*test_filter"),
        ({"data__filter": "fold=2"}, r"column 'fold' has the values \['2'\]; want two or more"),
    ],
)
def test_bad_folds_are_one_clear_line(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        folds.run_folds(tiny_config(**{**FOLDS, **changes}), "iter1/finetune", tmp_path)


def test_folds_are_in_numbers_order(monkeypatch):
    class Ten:
        columns: ClassVar = {"fold": [str(n) for n in range(11, 0, -1)] + [""]}

        def select(self, filter):
            return self

    monkeypatch.setattr(folds, "open_source", lambda data, workdir: Ten())
    assert folds.fold_values(tiny_config(**FOLDS).data, "") == [str(n) for n in range(1, 12)]
    assert folds.fold_name("cv", "a/b") == "cva_b"
