"""Figures of whole sets of clips while a stage trains, and the choice among a classifier's weights.

At the end of fine-tuning four sets of weights are compared: the last, their moving average, the
best by a held-out figure (`keep_best`), and the mean of the few best (`average_best`). What is
*selected* is decided by that held-out figure; the test clips are scored once, for all of them, and
decide nothing (method.md (b) 19).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from beats_jax.checkpoint import Checkpoints, TrainState
from beats_jax.data.dataset import Data
from beats_jax.metrics import mean_average_precision, summarize
from beats_jax.optim import averaged_weights

log = logging.getLogger("beats_jax")

Batches = Iterator[dict[str, jax.Array]]
RESULTS = "results.json"  # of a fine-tuned stage folder


class Scored(NamedTuple):
    """What evaluation found in a set of clips.

    Attributes:
      figures: name -> number; empty where there was no clip.
      sums: the metrics that they were made from.
      first: the stage's outputs for the first clip; on process 0 only.
    """

    figures: dict[str, float]
    sums: dict[str, Any]
    first: dict[str, np.ndarray]


def score(
    eval_step: Callable, params: Any, model_state: Any, frozen: Any, batches: Batches
) -> Scored:
    """Runs a stage's `eval_fn` over a set: sums of its metrics, and mAP where it has many labels.

    Args:
      eval_step: the compiled `eval_fn`.
      params, model_state, frozen: its arguments.
      batches: once through the set.
    """
    total, first, logits, labels = None, {}, [], []
    for batch in batches:
        metrics, outputs = eval_step(params, model_state, frozen, batch)
        metrics = jax.device_get(metrics)
        if total is None and jax.process_index() == 0:
            # Row 0 lies on this process's first device: no computation of one process alone.
            first = {name: np.asarray(x.addressable_data(0))[0] for name, x in outputs.items()}
        total = metrics if total is None else jax.tree.map(np.add, total, metrics)
        if "logits" in outputs and "accuracy" not in metrics:
            rows = {name: outputs[name] for name in ("logits", "labels", "valid")}
            rows = multihost_utils.process_allgather(rows, tiled=True)
            logits.append(rows["logits"][rows["valid"][:, 0]])
            labels.append(rows["labels"][rows["valid"][:, 0]])
    figures = summarize(total or {})
    if logits:
        figures["mAP"] = mean_average_precision(np.concatenate(logits), np.concatenate(labels))
    return Scored(figures, total or {}, first)


def final_weights(
    state: TrainState,
    checkpoints: Checkpoints,
    like: TrainState,
    figures: Mapping[str, float],
    average_best: int = 1,
) -> dict[str, tuple[int | list[int], Any]]:
    """The weights that fine-tuning ends with: name -> (step or steps, params).

    "last", "ema", "best", and where there are several good ones to average "best_mean".

    Args:
      state: of the last step, which is not saved yet; `figures` were measured there.
      checkpoints: the stage's, for the best ones.
      like: what to restore.
      average_best: how many of the best to average.
    """
    step = int(state.step)
    best = checkpoints.best(step, figures, average_best)

    def params_at(at: int) -> Any:
        return state.params if at == step else checkpoints.restore(at, like).params

    first = total = params_at(best[0])
    for at in best[1:]:  # one at a time: many models need not fit into memory
        total = jax.tree.map(jnp.add, total, params_at(at))
    weights: dict[str, tuple[int | list[int], Any]] = {
        "last": (step, state.params),
        "ema": (step, jax.jit(averaged_weights)(state.opt_state)),
        "best": (best[0], first),
    }
    if len(best) > 1:
        weights["best_mean"] = (best, jax.tree.map(lambda x: x / len(best), total))
    return weights


def results(
    weights: Mapping[str, tuple[int | list[int], Any]],
    figures_of: Callable[[Any, Batches], dict[str, float]],
    data: Data,
    keep_best: str,
    meta: Mapping[str, Any],
    folder: epath.Path,
) -> dict[str, float]:
    """Scores the final weights on the held-out and the test clips; writes `results.json`.

    Args:
      weights: see `final_weights`.
      figures_of: (params, batches) -> figures.
      data: the stage's.
      keep_best: the held-out figure to choose by; "" = "val_loss".
      meta: what made the stage folder (`start.describe`).
      folder: the stage's.

    Returns:
      The figures as metrics (`flat_figures`).
    """
    clips = {"train": data.train_clips, "val": data.val_clips, "test": data.test_clips}
    sets = {"val": data.validation, "test": data.testing}
    comparison = compare(
        {name: params for name, (_, params) in weights.items()},
        {name: batches for name, batches in sets.items() if len(clips[name])},
        figures_of,
        keep_best or "val_loss",
    )
    about = ("iteration", "task", "labels", "seed", "dataset_fingerprint", "git_commit", "versions")
    record = {
        **comparison,
        "steps": {name: step for name, (step, _) in weights.items()},
        "clips": {name: len(of) for name, of in clips.items()},
        "test_filter": meta["config"]["data"]["test_filter"],
        **{name: meta[name] for name in about},
    }
    if jax.process_index() == 0:
        (folder / RESULTS).write_text(json.dumps(record, indent=1))
        name = comparison["selected"]
        figure = "mAP" if meta["task"] == "multi-label" else "accuracy"
        for of, figures in comparison["weights"][name].items():
            value = figures.get(figure, math.nan)
            log.info("%s %s %.3f (%d clips, %s weights)", of, figure, value, len(clips[of]), name)
        log.info("more in %s", folder / RESULTS)
    return flat_figures(comparison)


def compare(
    weights: Mapping[str, Any],
    sets: Mapping[str, Callable[[], Batches]],
    figures_of: Callable[[Any, Batches], dict[str, float]],
    chosen_by: str,
) -> dict[str, Any]:
    """Scores several weights on several sets, and selects one of them by a held-out figure.

    Args:
      weights: name -> params; the first is selected where nothing is held out.
      sets: "val" and "test", whichever there are.
      figures_of: (params, batches) -> figures.
      chosen_by: the held-out figure, such as "val_accuracy" (the lowest is best if it ends in
        "loss", else the highest).

    Returns:
      `weights`: name -> set -> figures; `chosen_by`; `selected`, a name.
    """
    scores = {
        name: {of: figures_of(params, batches()) for of, batches in sets.items()}
        for name, params in weights.items()
    }
    figure, sign = chosen_by.removeprefix("val_"), -1 if chosen_by.endswith("loss") else 1

    def rank(name: str) -> float:
        return sign * scores[name].get("val", {}).get(figure, 0.0)

    return {"selected": max(scores, key=rank), "chosen_by": chosen_by, "weights": scores}


def flat_figures(comparison: Mapping[str, Any]) -> dict[str, float]:
    """The comparison as metrics: `test_accuracy` of the last weights, `test_accuracy_ema`, ….

    The held-out figures of the last weights are left out: the loop has measured them.
    """
    return {
        f"{of}_{figure}" + ("" if name == "last" else f"_{name}"): value
        for name, sets in comparison["weights"].items()
        for of, figures in sets.items()
        for figure, value in figures.items()
        if (name, of) != ("last", "val")
    }
