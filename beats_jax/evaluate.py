"""Fine-tuned models on a labelled data set: scores that are kept, ensembles, and results.

Every model scores every clip once; its scores lie in `OUT/scores` and are used again as long as
model and data are the same. An ensemble is the mean of its members' probabilities. The results say
what they are of: `results.json` for programs, `RESULTS.md` for people, pictures in `OUT/plots`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from beats_jax import labels as label_names
from beats_jax import results as results_module
from beats_jax import score_plots, scores, windows
from beats_jax.data.dataset import open_folders
from beats_jax.data.sources import Clips
from beats_jax.fbank import MIN_SAMPLES, SAMPLE_RATE
from beats_jax.inference import Model, load

SETTINGS = {"window": windows.WINDOW, "hop": windows.HOP}  # of long clips, in columns
HEADLINE = {"multi-label": "mAP", "single-label": "accuracy"}


class Truth(NamedTuple):
    """What is right.

    Attributes:
        labels: bool [N, C] of a multi-label task, int [N] of a single-label one.
        scored: bool [M], which N of all M clips these are.
        counts: int [C], clips of each class.
        notes: what had to be left out, a line each.
    """

    labels: np.ndarray
    scored: np.ndarray
    counts: np.ndarray
    notes: tuple[str, ...]


# --- scores ---------------------------------------------------------------------------------------


def score(model: Model, clips: Clips, batch_size: int = 8) -> np.ndarray:
    """Logits float32 [N, C] of whole clips: the mean over their tokens, of any length.

    Raises:
        ValueError: the model has no class scores.
    """
    logits = np.zeros((len(clips), len(model.labels)), np.float32)
    scorers: dict[int, windows.Scorer] = {}

    def parts() -> Iterator[tuple[int, windows.Window]]:
        for row in np.argsort(clips.num_samples, kind="stable"):  # full batches of one length
            (pcm,) = clips.fetch(np.array([row]))
            pcm = np.pad(pcm, (0, max(0, MIN_SAMPLES - len(pcm))))
            for part in windows.cut([pcm / np.float32(32768)]):
                yield int(row), part

    with tqdm(desc="clips", total=len(clips), unit="", disable=None) as bar:
        for row, part, values in windows.run(model, "logits", parts(), batch_size):
            scorer = scorers.setdefault(row, windows.Scorer(model))
            scorer.add(part.first, values)
            if part.last:
                logits[row] = scorers.pop(row).scores().logits
                bar.update()
    return logits


def kept_scores(
    model: Model, clips: Clips, truth: Sequence[str], folder: Path, batch_size: int, precision: str
) -> np.ndarray:
    """`score`, kept in `folder` as .npz and read back for the same model, data and settings.

    The file holds `ids` [N], `labels` [N] (the cells of the data set), `logits` [N, C], `classes`
    [C] in the order of the logits, and `key`, JSON that says what they depend on.
    """
    key = dict(model=model.source["params_sha256"], data=clips.fingerprint, precision=precision)
    key |= SETTINGS
    path = folder / results_module.scores_file(key["model"], key["data"], precision)
    if path.exists():
        with np.load(path, allow_pickle=False) as saved:
            if json.loads(str(saved["key"])) == key:
                return saved["logits"]
    logits = score(model, clips, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft.npz")
    np.savez(
        draft,
        ids=np.array(clips.ids),
        labels=np.array(truth),
        logits=logits,
        classes=np.array(model.labels),
        key=np.array(json.dumps(key)),
    )
    draft.replace(path)
    return logits


def read_truth(cells: Sequence[str], classes: Sequence[str], task: str) -> Truth:
    """What is right, in the classes of a model; labels that are none of them are counted.

    Args:
        cells: text [M], a clip's class; of a multi-label task several, with `labels.SEPARATORS`.
        classes: of the models; MIDs in the cells are read as their names.
        task: "single-label": a clip of no known class is left out; or "multi-label": it stays, as
            one that belongs to none.

    Raises:
        ValueError: no clip belongs to any class.
    """
    index = {name: i for i, name in enumerate(classes)}
    several = task == "multi-label"
    found = (
        label_names.split_cells(cells, index)
        if several
        else [[c] if c else [] for c in map(str.strip, cells)]
    )
    sets = [label_names.names(row) for row in found]
    hot = np.zeros((len(sets), len(classes)), bool)
    for row, names in zip(hot, sets, strict=True):
        row[[index[name] for name in names if name in index]] = True
    strange = Counter(name for names in sets for name in names if name not in index)
    notes = []
    if strange:
        some = ", ".join(f"{name} ({n})" for name, n in strange.most_common(5))
        notes.append(f"{strange.total()} labels are no class of the models: {some}")
    scored = np.asarray(hot.any(axis=1)) | several
    if left_out := int(len(sets) - scored.sum()):
        notes.append(f"{left_out} of {len(sets)} clips have no class of the models: left out")
    counts = hot.sum(axis=0)
    if missing := int(np.sum(counts == 0)):
        some = ", ".join(classes[int(i)] for i in np.flatnonzero(counts == 0)[:5])
        notes.append(f"{missing} of {len(classes)} classes have no clip here: {some}")
    if not counts.any():
        raise ValueError(
            f"none of {len(sets)} clips has a class of the models (here: "
            f"{', '.join(list(strange)[:3]) or 'empty'}; there: {', '.join(classes[:3])}); "
            "give the column of the class with --label"
        )
    truth = hot if several else np.argmax(hot[scored], axis=1)
    return Truth(truth, scored, counts, tuple(notes))


def align(classes: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Where the first model's classes stand in each model's: `logits[:, align(…)[m]]` agree.

    Raises:
        ValueError: the models do not have the same classes.
    """
    first = classes[0]
    for number, other in enumerate(classes[1:], start=2):
        if sorted(first) != sorted(other):
            differing = sorted(set(first) ^ set(other))[:3]
            raise ValueError(
                f"model 1 has {len(first)} classes and model {number} {len(other)}, which are not "
                f"the same (such as {', '.join(differing)}): evaluate them one by one"
            )
    return [np.array([other.index(name) for name in first]) for other in map(list, classes)]


# --- results --------------------------------------------------------------------------------------


def evaluate(
    paths: Sequence[str],
    data: str,
    out: str | Path,
    *,
    filter: str = "",
    label: str = "",
    batch_size: int = 8,
    precision: str = "float32",
) -> dict[str, Any]:
    """Scores a data set with fine-tuned models, and writes what came of it into `out`.

    Args:
        paths: models, as for `load`; of several, their ensemble too.
        data: a folder made by `prepare`; or any source of it, which is then prepared into `out`.
        out: the folder for scores, results and pictures.
        filter: clips to take, as "fold=5".
        label: the column of the class; by default `labels` of a multi-label task, else `category`.
        batch_size: windows at a time.
        precision: as for `load`.

    Returns:
        What is in `results.json`.

    Raises:
        FileNotFoundError: a model or the data is not there.
        ValueError: a model has no classes, or others than the first; no column `label`; no clip of
            any class.
    """
    models = [load(path, precision=precision) for path in paths]
    for path, model in zip(paths, models, strict=True):
        if model.kind != "finetuned" or not model.labels:
            raise ValueError(f"{path} is of kind {model.kind}: no class scores to evaluate")
        if model.task != models[0].task:
            raise ValueError(f"{path} is {model.task}, but {paths[0]} is {models[0].task}")
    task, classes = models[0].task, models[0].labels
    order = align([model.labels for model in models])
    out = Path(out)
    clips = open_folders(data, out / "data").select(filter)
    label = label or ("labels" if task == "multi-label" else "category")
    if label not in clips.columns:
        known = ", ".join(clips.columns) or "none"
        raise ValueError(f"{data}: no column {label!r}; the columns are: {known}; give --label")
    cells = clips.columns[label]
    truth = read_truth(cells, classes, task)
    probs = []
    for model, places in zip(models, order, strict=True):
        logits = kept_scores(model, clips, cells, out / "scores", batch_size, precision)
        probs.append(model.probabilities(logits)[truth.scored][:, places])
    settings = dict(filter=filter, label=label, precision=precision, **SETTINGS)
    results = {
        **results_module.provenance(),
        "task": task,
        "settings": settings,
        "data": _describe(clips, data, out, truth, classes),
        **summarise(probs, truth.labels, task),
    }
    for entry, path, model in zip(results["members"], paths, models, strict=True):
        known = {name: model.source[name] for name in ("kind", "step", "params_sha256", "lineage")}
        entry |= {"path": path, **known, "config": _config(path)}
    final = np.mean(probs, axis=0)
    title = f"ensemble of {len(models)}" if len(models) > 1 else Path(paths[0]).name
    results["per_class"] = _per_class(final, truth, task, classes, out / "plots", title)
    results_module.write(results, out)
    return results


def summarise(probs: Sequence[np.ndarray], labels: np.ndarray, task: str) -> dict[str, Any]:
    """Metrics of every member, their mean, the best and the ensemble.

    Args:
        probs: of every member, [N, C] with one order of classes.
        labels: of `Truth`.
        task: "multi-label" or "single-label".

    Returns:
        `members`: a dict each, with `metrics`; `mean` and `std` (of the sample; empty for one) of
        each metric; `best`: index of the member with the highest mAP or accuracy, which is chosen
        by this very set and so flatters; `ensemble`: metrics of the mean of the probabilities, or
        None for one member.
    """
    metrics = scores.multi_label_metrics if task == "multi-label" else scores.single_label_metrics
    members = [metrics(each, labels) for each in probs]
    table = {name: np.array([member[name] for member in members]) for name in members[0]}
    several = len(members) > 1
    with np.errstate(invalid="ignore"):  # of infinities: d' of a perfect AUC
        std = {name: float(np.std(values, ddof=1)) for name, values in table.items() if several}
    return {
        "members": [{"metrics": member} for member in members],
        "mean": {name: float(values.mean()) for name, values in table.items()},
        "std": std,
        "best": int(np.argmax(table[HEADLINE[task]])),
        "ensemble": metrics(np.mean(probs, axis=0), labels) if several else None,
    }


def _describe(
    clips: Clips, data: str, out: Path, truth: Truth, classes: Sequence[str]
) -> dict[str, Any]:
    """The data set as far as results depend on it."""
    prepared = [Path(data), out / "data" / Path(data).resolve().name]
    reports = [path / "report.json" for path in prepared if (path / "report.json").is_file()]
    prepared_as = json.loads(reports[0].read_text()) if reports else {}
    split = set(clips.columns.get("split", ()))
    listed = {s: c for s, c in prepared_as.get("coverage", {}).items() if s in split}
    return {
        "path": data,
        "fingerprint": clips.fingerprint,
        "clips": int(truth.scored.sum()),
        "left_out": int(np.sum(~truth.scored)),
        "hours": round(float(clips.num_samples[truth.scored].sum()) / SAMPLE_RATE / 3600, 4),
        "classes": len(classes),
        "coverage": dict(zip(classes, map(int, truth.counts), strict=True)),
        "listed": listed,
        "notes": [*prepared_as.get("notes", []), *truth.notes],
    }


def _config(path: str) -> Any:
    """The config of the run that made a model, where it is known."""
    file = Path(path.partition("@")[0]) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _per_class(
    probs: np.ndarray, truth: Truth, task: str, classes: Sequence[str], folder: Path, title: str
) -> dict[str, dict[str, Any]]:
    """Each class's clips and its average precision or recall; and their picture."""
    if task == "multi-label":
        name, values = "average_precision", scores.average_precisions(probs, truth.labels)
        score_plots.plot_class_ap(
            values, truth.counts, classes, folder / "average_precision.png", title
        )
    else:
        matrix = scores.confusion_matrix(probs.argmax(axis=1), truth.labels, len(classes))
        score_plots.plot_confusion(matrix, classes, folder / "confusion.png", title)
        totals = matrix.sum(axis=1)
        name, values = "recall", np.where(totals, np.diag(matrix) / np.maximum(totals, 1), np.nan)
    rows = zip(classes, truth.counts, values, strict=True)
    return {label: {"clips": int(count), name: float(value)} for label, count, value in rows}
