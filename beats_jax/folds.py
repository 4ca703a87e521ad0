"""Cross-validation: a classifier for every fold of a data set, and the table of them all.

Each fold is a run of its own, `<workdir>/<iteration>/<column><value>/finetune`, whose clips are
tested by a model that never saw them; the mean over the folds is the data set's figure.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from beats_jax import train
from beats_jax.data.dataset import open_source
from beats_jax.selection import RESULTS

log = logging.getLogger("beats_jax")

SUMMARY, TABLE = "folds.json", "folds.md"


def wanted(config: Any, stage: str) -> bool:
    """True for fine-tuning with `data.folds`, unless `data.test_filter` names one fold to test."""
    if stage.rpartition("/")[2] != "finetune":
        return False
    return bool(config.data.folds and not config.data.test_filter)


def run_folds(config: Any, name: str, workdir: epath.PathLike) -> None:
    """Fine-tunes once for each value of the column `data.folds`, and sums the folds up.

    Interrupted, the same call goes on: finished folds are not run again.

    Args:
      config: of the run.
      name: the stage, "finetune" or "<iteration>/finetune".
      workdir: `<iteration>/folds.json` and `folds.md` are written there.

    Raises:
      ValueError: no such column, fewer than two folds, or what `train.run_stage` raises.
    """
    iteration = name.rpartition("/")[0] or config.iteration
    column, folder = config.data.folds, epath.Path(workdir) / iteration
    values = fold_values(config.data, workdir)
    for value in values:
        fold = config.copy_and_resolve_references()
        fold.data.test_filter = f"{column}={value}"
        train.run_stage(fold, f"{iteration}/{fold_name(column, value)}/finetune", workdir)
    if jax.process_index() == 0:
        files = [folder / fold_name(column, value) / "finetune" / RESULTS for value in values]
        results = {value: json.loads(f.read_text()) for value, f in zip(values, files, strict=True)}
        summary = summarize_folds(results)
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1))
        table = folds_table(summary)
        (folder / TABLE).write_text(table + "\n")
        log.info("%s\n%s", folder / TABLE, table)


def fold_values(data: Any, workdir: epath.PathLike) -> list[str]:
    """The values of the column `data.folds` among the clips, in numbers' order if they are numbers.

    Raises:
      ValueError: no such column; fewer than two values, or one that no filter can name.
    """
    clips = open_source(data, workdir).select(data.filter)
    if data.folds not in clips.columns:
        raise ValueError(
            f"data.folds: no column {data.folds!r}; the columns are: "
            f"{', '.join(clips.columns) or 'none'}; without folds: --config.data.folds=, and "
            "--config.data.test_filter=COLUMN=VALUE if a part is to be tested"
        )
    values = {value for value in clips.columns[data.folds] if value}
    if len(values) < 2 or any(set(value) & set(",|") for value in values):
        raise ValueError(
            f"data.folds: column {data.folds!r} has the values {sorted(values)[:5]}; want two or "
            "more, without commas and | in them"
        )
    return sorted(values, key=lambda v: (int(v) if v.isdigit() else 0, v))


def fold_name(column: str, value: str) -> str:
    """A folder's name: "fold" and "1" give "fold1"."""
    return f"{column}{value}".replace("/", "_")


def summarize_folds(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What came of all folds together.

    Args:
      results: fold -> its `results.json` (`selection.results`).

    Returns:
      `figure`, "accuracy" or "mAP"; `folds`: fold -> `clips`, `steps`, `selected` (which weights
      the held-out clips chose) and `test`: weights -> the figure; `mean` and `std`: weights -> over
      the folds (std with n - 1). The weights are "last", "ema", "best", "best_mean" and "selected".
      Besides, `chosen_by`, `task`, `labels`, `seed`, `dataset_fingerprint`, `git_commit`,
      `versions`, all the same in every fold or else a list.
    """
    first = next(iter(results.values()))
    figure = "mAP" if first["task"] == "multi-label" else "accuracy"
    folds = {}
    for fold, result in results.items():
        test = {name: sets["test"][figure] for name, sets in result["weights"].items()}
        test["selected"] = test[result["selected"]]
        folds[fold] = {name: result[name] for name in ("clips", "steps", "selected")} | {
            "test": test
        }
    names = [n for n in first["weights"] if all(n in f["test"] for f in folds.values())]
    table = {name: [f["test"][name] for f in folds.values()] for name in (*names, "selected")}
    about = ("task", "labels", "seed", "chosen_by", "dataset_fingerprint", "git_commit", "versions")
    return {
        "figure": figure,
        "folds": folds,
        "mean": {name: float(np.mean(values)) for name, values in table.items()},
        "std": {name: float(np.std(values, ddof=1)) for name, values in table.items()},
        **{name: _one([result[name] for result in results.values()]) for name in about},
    }


def folds_table(summary: Mapping[str, Any]) -> str:
    """A Markdown table: a line a fold, the test figure (%) of each set of weights, and the mean."""
    names, folds = list(summary["mean"]), summary["folds"]
    lines = [
        f"| test {summary['figure']} % | clips: train, held out, test | "
        + " | ".join(names)
        + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for fold, result in folds.items():
        clips = ", ".join(str(result["clips"][of]) for of in ("train", "val", "test"))
        cells = [f"{100 * result['test'][name]:.1f}" for name in names]
        cells[-1] += f" ({result['selected']})"
        lines.append(f"| {fold} | {clips} | " + " | ".join(cells) + " |")
    cells = [f"{100 * summary['mean'][n]:.1f} ± {100 * summary['std'][n]:.1f}" for n in names]
    lines.append(f"| mean of {len(folds)} | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _one(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values
