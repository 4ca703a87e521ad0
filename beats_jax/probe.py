"""Probes of frozen features, and the log-mel baseline that these must beat.

How good are features? Fit something simple to them on all folds but one and score it on that one,
for every fold: logistic regression, nearest neighbours, nearest class mean, or a learned query
(`attention_probe`). What is to be chosen decides much for wide features and few clips (the
regularisation, the number of neighbours): it is chosen anew for every test fold, by
cross-validation among the training folds, which keeps folds whole (clips of one recording or
speaker share a fold): the final score alone sees the test fold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from beats_jax.features import logmel_baseline_features, mean_features, token_features

if TYPE_CHECKING:  # scores of arrays need no JAX
    from beats_jax.data.sources import Clips
    from beats_jax.inference import Model

# Inverse regularisation strengths to choose from; on a tie the strongest regularisation wins.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
NEIGHBOURS = (1, 3, 5, 10, 20, 50)  # on a tie the fewest win
MAX_ITERATIONS = 5000  # standardised features take some hundred; nearly separable ones more
ATTENTION = "attention"  # needs tokens, the others one vector a clip


class Kind(NamedTuple):
    """A probe of one vector a clip, on features standardised by the training clips.

    Attributes:
        make: a new classifier of scikit-learn.
        parameter: of the classifier, to be chosen; "" = none.
        symbol: what the table calls it.
        values: to choose from, the one that wins a tie first.
    """

    make: Callable[[], Any]
    parameter: str = ""
    symbol: str = ""
    values: tuple[float, ...] = ()


def _logistic_regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=MAX_ITERATIONS)


def _nearest_neighbours() -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(metric="cosine")


def _nearest_mean() -> Any:
    from sklearn.neighbors import NearestCentroid

    return NearestCentroid()


KINDS = {
    "linear": Kind(_logistic_regression, "C", "C", STRENGTHS),
    "knn": Kind(_nearest_neighbours, "n_neighbors", "k", NEIGHBOURS),
    "mean": Kind(_nearest_mean),
}


class Row(NamedTuple):
    """One line of the table: what was probed and how well it did.

    Attributes:
        name: e.g. "trained", "untrained", "log-mel".
        accuracies: [n_folds] float64 in 0..1, in the order of the sorted folds.
        strengths: the C (or k) chosen for each fold; empty where there is none to choose.
    """

    name: str
    accuracies: np.ndarray
    strengths: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """The sample standard deviation over folds: how they differ, not an error of the mean."""
        return float(self.accuracies.std(ddof=1))


def probe_stage(
    stage_folder: str,
    data: str,
    *,
    kinds: Sequence[str] = ("linear",),
    filter: str = "",
    label: str = "category",
    fold: str = "fold",
    layer: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
) -> dict[str, list[Row]]:
    """A stage's encoder, the same encoder untrained, and the log-mel baseline, on one data set.

    Args:
        stage_folder: `W/<iteration>/<stage>`, `…@STEP`, an exported folder or an official `.pt`;
            only a stage that is no fine-tuning says how it started, and so has an "untrained" row.
        data: a folder made by `prepare`, with columns for the label and the fold.
        kinds: of `KINDS`, and "attention", which has no log-mel baseline.
        filter: its rows to take, as "esc10=True".
        label, fold: the columns' names.
        layer: whose features are averaged over the clip; the last by default.
        seed: of the inner split, where there are only two folds, and of the attention probe.
        cache: a folder that keeps every layer's mean features for the next call.

    Returns:
        kind -> its rows; the audio is read once for all.

    Raises:
        FileNotFoundError: no checkpoint or no data there.
        ValueError: a column is missing, a kind is unknown, or the folds cannot be used.
    """
    _check_kinds(kinds, (*KINDS, ATTENTION))
    clips, labels, folds = _open(data, filter, label, fold)
    rows: dict[str, list[Row]] = {kind: [] for kind in kinds}
    vectors = [kind for kind in kinds if kind != ATTENTION]
    for name, model in _models(stage_folder):
        if vectors:
            x = mean_features(model, clips, model.check_layer(layer), cache, name)
            for kind in vectors:
                rows[kind].append(cross_validate(kind, x, labels, folds, seed, name=name))
        if ATTENTION in kinds:
            tokens = token_features(model, clips, layer)
            rows[ATTENTION].append(attention_probe(*tokens, labels, folds, seed, name=name))
    if vectors:
        baseline = logmel_baseline_features(clips.fetch(np.arange(len(clips))))
    for kind in vectors:
        rows[kind].append(_baseline(kind, baseline, labels, folds, seed))
    return rows


def sweep_layers(
    stage_folder: str,
    data: str,
    *,
    kinds: Sequence[str] = ("linear",),
    filter: str = "",
    label: str = "category",
    fold: str = "fold",
    seed: int = 0,
    cache: str | Path | None = None,
) -> tuple[dict[str, list[Row]], dict[str, Row]]:
    """Every layer of one encoder, in one pass over the audio; arguments as of `probe_stage`.

    Returns:
        kind -> the rows of layer 0 (input of the first block) to N (last output), and
        kind -> the log-mel baseline.

    Raises:
        FileNotFoundError, ValueError: as `probe_stage`; "attention", which needs a layer's tokens.
    """
    _check_kinds(kinds, tuple(KINDS))
    clips, labels, folds = _open(data, filter, label, fold)
    _, model = next(_models(stage_folder))
    layers = mean_features(model, clips, slice(None), cache, "trained")
    rows = {
        kind: [
            cross_validate(kind, x, labels, folds, seed, name=f"layer {i}")
            for i, x in enumerate(layers)
        ]
        for kind in kinds
    }
    baseline = logmel_baseline_features(clips.fetch(np.arange(len(clips))))
    return rows, {kind: _baseline(kind, baseline, labels, folds, seed) for kind in kinds}


def _check_kinds(kinds: Sequence[str], known: Sequence[str]) -> None:
    if strange := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"no probe {strange[0]!r} here; the probes are: {', '.join(known)}")


def _open(data: str, filter: str, label: str, fold: str) -> tuple[Clips, list[str], list[str]]:
    """The clips, and the class and the fold of each."""
    from beats_jax.data.sources import open_clips

    clips = open_clips(data).select(filter)
    for column in (label, fold):
        if column not in clips.columns:
            known = ", ".join(clips.columns) or "none"
            raise ValueError(f"{data}: no column {column!r}; the columns are: {known}")
    return clips, clips.columns[label], clips.columns[fold]


def _models(path: str) -> Iterator[tuple[str, Model]]:
    """The trained model and, where it is known how that began, the same untrained."""
    from beats_jax.exported import WEIGHTS
    from beats_jax.inference import Model, load
    from beats_jax.pretrained import untrained

    model = load(path)
    yield "trained", model
    is_stage = not Path(path).is_file() and not (Path(path) / WEIGHTS).is_file()
    if is_stage and model.kind != "finetuned":
        yield "untrained", Model(untrained(path))


def _baseline(kind: str, features: Any, labels: Any, folds: Any, seed: int) -> Row:
    """Of log-mel statistics; for the linear probe with the strength of the published figures."""
    values = (0.1,) if kind == "linear" else None
    return cross_validate(kind, features, labels, folds, seed, name="log-mel", values=values)


# --- probes ---------------------------------------------------------------------------------------


def linear_probe(
    features: Any,
    labels: Any,
    folds: Any,
    seed: int = 0,
    *,
    name: str = "features",
    strengths: Sequence[float] = STRENGTHS,
) -> Row:
    """Cross-validated accuracy of StandardScaler + LogisticRegression, one figure a fold.

    Args:
        features: [N, D] numbers, one row a clip.
        labels: [N] classes (int or text).
        folds: [N] fold of each clip (int or text), at least 2 different.
        seed: for the inner split of a single training fold (only with 2 folds, e.g. train / test);
            everything else is deterministic.
        name: goes into the row.
        strengths: the values of C to choose from; with one there is no choice.

    Raises:
        ValueError: shapes do not match, features are not finite, there are fewer than 2 folds, or
            only one class is left to train on.

    Warns:
        RuntimeWarning: the final fit of a fold did not converge.
    """
    return cross_validate("linear", features, labels, folds, seed, name=name, values=strengths)


def cross_validate(
    kind: str,
    features: Any,
    labels: Any,
    folds: Any,
    seed: int = 0,
    *,
    name: str = "features",
    values: Sequence[float] | None = None,
) -> Row:
    """Cross-validated accuracy of a probe of one vector a clip, one figure a fold.

    Args:
        kind: of `KINDS`: "linear", "knn" (cosine) or "mean" (nearest class mean).
        values: of its parameter, to choose from; its own by default.
        features, labels, folds, seed, name: as of `linear_probe`, as are the errors.
    """
    from threadpoolctl import threadpool_limits

    x, y, groups = _checked(features, labels, folds)
    candidates = sorted(KINDS[kind].values if values is None else values)
    accuracies, chosen = [], []
    for fold in np.unique(groups):
        train, test = groups != fold, groups == fold
        with threadpool_limits(1):  # matrices this small are slower with BLAS threads
            model, value = _fit(KINDS[kind], x[train], y[train], groups[train], seed, candidates)
            accuracies.append(model.score(x[test], y[test]))
        chosen += value
    return Row(name, np.asarray(accuracies), tuple(chosen))


def attention_probe(
    tokens: np.ndarray,
    padding: np.ndarray,
    labels: Any,
    folds: Any,
    seed: int = 0,
    *,
    name: str = "features",
) -> Row:
    """Cross-validated accuracy of `attention_probe.fit_attention`, one figure a fold.

    Args:
        tokens, padding: of `token_features`.
        labels, folds, name: as of `linear_probe`, as are the errors.
        seed: of the order of the training's batches.
    """
    from beats_jax.attention_probe import fit_attention

    means = tokens.sum(axis=1, dtype=np.float32)  # to be checked; nothing is fitted to them
    _, y, groups = _checked(means, labels, folds)
    classes, ids = np.unique(y, return_inverse=True)
    accuracies = []
    for fold in np.unique(groups):
        train, test = np.flatnonzero(groups != fold), groups == fold
        logits = fit_attention(tokens, padding, ids, train, seed, num_classes=len(classes))
        accuracies.append(np.mean(logits[test].argmax(axis=1) == ids[test]))
    return Row(name, np.asarray(accuracies), ())


def evaluate_features(
    named_features: Mapping[str, Any], labels: Any, folds: Any, seed: int = 0
) -> list[Row]:
    """`linear_probe` of several kinds of features [N, D] of the same clips, one row each."""
    return [
        linear_probe(features, labels, folds, seed, name=name)
        for name, features in named_features.items()
    ]


def probe_table(rows: Iterable[Row], kind: str = "linear") -> str:
    """A Markdown table: accuracy in percent (mean ± std over folds), then every fold."""
    rows = list(rows)
    folds = range(1, len(rows[0].accuracies) + 1)
    symbol = KINDS[kind].symbol if kind in KINDS else ""
    lines = [
        "| features | accuracy (%) | "
        + " | ".join(f"fold {k}" for k in folds)
        + (f" | {symbol} |" if symbol else " |"),
        "|---|---|" + "---|" * (len(folds) + bool(symbol)),
    ]
    for row in rows:
        each = " | ".join(f"{100 * accuracy:.1f}" for accuracy in row.accuracies)
        chosen = ", ".join(f"{strength:g}" for strength in sorted(set(row.strengths)))
        line = f"| {row.name} | {100 * row.mean:.1f} ± {100 * row.std:.1f} | {each} |"
        lines.append(line + (f" {chosen} |" if symbol else ""))
    return "\n".join(lines)


def sweep_table(rows: Mapping[str, Sequence[Row]], baseline: Mapping[str, Row]) -> str:
    """A Markdown table of `sweep_layers`: a line a layer, a column a probe, the best in bold."""
    best = {kind: max(row.mean for row in layers) for kind, layers in rows.items()}

    def cell(kind: str, row: Row) -> str:
        text = f"{100 * row.mean:.1f} ± {100 * row.std:.1f}"
        return f"**{text}**" if row.mean == best[kind] and row.name != "log-mel" else text

    lines = ["| features | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
    for each in (*zip(*rows.values(), strict=True), tuple(baseline.values())):
        cells = " | ".join(cell(kind, row) for kind, row in zip(rows, each, strict=True))
        lines.append(f"| {each[0].name} | {cells} |")
    return "\n".join(lines)


def _fit(
    kind: Kind, x: np.ndarray, y: np.ndarray, groups: np.ndarray, seed: int, values: Sequence[float]
) -> tuple[Any, list[float]]:
    """Chooses a value by cross-validation inside (x, y, groups), fits to all; (model, [value])."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    # The scaler is part of the model: it too is fitted on training clips only, inner ones included.
    model = Pipeline([("scaler", StandardScaler()), ("probe", kind.make())])
    if not kind.parameter:
        return model.fit(x, y), []
    splits, name = _inner_splits(x, y, groups, seed), f"probe__{kind.parameter}"
    if kind.parameter == "n_neighbors":  # there have to be so many
        values = [k for k in values if k <= min(len(train) for train, _ in splits)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # judged below, once, on the final fit
        if len(values) == 1:
            value = values[0]
        else:
            search = GridSearchCV(model, {name: list(values)}, cv=splits, refit=False).fit(x, y)
            value = search.best_params_[name]
        model.set_params(**{name: value}).fit(x, y)
    classifier: Any = model["probe"]
    if np.max(getattr(classifier, "n_iter_", 0)) >= MAX_ITERATIONS:
        warnings.warn(
            f"the logistic regression with C={value:g} did not converge in {MAX_ITERATIONS} "
            "iterations; its accuracy is a lower bound: leave large values out of `strengths`",
            RuntimeWarning,
            stacklevel=4,
        )
    return model, [float(value)]


def _inner_splits(x: np.ndarray, y: np.ndarray, groups: np.ndarray, seed: int) -> list[Any]:
    """Splits of the training clips, to fit and to choose by: by whole folds, if there are two."""
    from sklearn.model_selection import GroupKFold, StratifiedKFold

    num_groups = len(np.unique(groups))
    if num_groups > 1:
        splitter = GroupKFold(min(5, num_groups))  # up to 5 folds: each is left out once
        return list(splitter.split(x, y, groups))
    rarest = np.unique(y, return_counts=True)[1].min()
    splitter = StratifiedKFold(max(2, min(5, rarest)), shuffle=True, random_state=seed)
    return list(splitter.split(x, y))


def _checked(features: Any, labels: Any, folds: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, groups = np.asarray(features, np.float64), np.asarray(labels), np.asarray(folds)
    if x.ndim != 2 or y.shape != (len(x),) or groups.shape != (len(x),):
        raise ValueError(
            f"got features {x.shape}, labels {y.shape}, folds {groups.shape}; "
            "wanted [N, D], [N], [N]: one row a clip"
        )
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(1))
        raise ValueError(f"features of {len(bad)} clips are not finite; the first is row {bad[0]}")
    if len(np.unique(groups)) < 2:
        raise ValueError(
            "all clips are in one fold; give at least two, one to train on, one to test"
        )
    for fold in np.unique(groups):
        rest = np.unique(y[groups != fold])
        if len(rest) < 2:
            raise ValueError(f"without fold {fold} all clips are of class {rest[0]}: no probe")
    return x, y, groups
