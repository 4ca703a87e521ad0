"""Metrics of class scores, by scikit-learn: the figures that papers compare.

`metrics` adds sums on the device while a model trains; these here need all scores of a set at once,
on the host. Scores are anything that ranks (logits or probabilities). A class without a positive
clip has no average precision and one without a negative no AUC: nan for the class, and the means
are over the classes that have one (macro).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def average_precisions(scores: Any, labels: Any) -> np.ndarray:
    """Average precision of every class: the area under its precision-recall steps.

    Args:
        scores: [N, C] finite numbers.
        labels: [N, C] bool, or 0 and 1.

    Returns:
        float64 [C]; nan for a class without a positive.

    Raises:
        ValueError: other shapes or labels, scores that are not finite, or no clip.
    """
    from sklearn.metrics import average_precision_score

    scores, labels = _multi_label(scores, labels)
    return np.array(
        [
            average_precision_score(y, x) if y.any() else np.nan
            for x, y in zip(scores.T, labels.T, strict=True)
        ]
    )


def mean_average_precision(scores: Any, labels: Any) -> float:
    """mAP: the mean of `average_precisions` over the classes that have a positive.

    Args:
        scores: [N, C] finite numbers.
        labels: [N, C] bool, or 0 and 1.

    Raises:
        ValueError: as `average_precisions`; no class has a positive.
    """
    return _mean(
        average_precisions(scores, labels), "no class has a positive clip: there is no mAP"
    )


def roc_aucs(scores: Any, labels: Any) -> np.ndarray:
    """Area under the ROC curve of every class; arguments and errors as `average_precisions`.

    Returns:
        float64 [C]; nan for a class that has no positive or no negative.
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = _multi_label(scores, labels)
    return np.array(
        [
            roc_auc_score(y, x) if y.any() and not y.all() else np.nan
            for x, y in zip(scores.T, labels.T, strict=True)
        ]
    )


def mean_auc(scores: Any, labels: Any) -> float:
    """mAUC: the mean of `roc_aucs` over the classes that have positives and negatives.

    Raises:
        ValueError: as `average_precisions`; no class has both.
    """
    return _mean(roc_aucs(scores, labels), "no class has positives and negatives: there is no AUC")


def d_prime(auc: float) -> float:
    """d': how many standard deviations two Gaussians lie apart whose AUC this is.

    AudioSet's papers take it of the mean AUC, not the mean of the classes' d'. An AUC of 1 gives
    inf.

    Reference:
        Hershey et al., "CNN architectures for large-scale audio classification", ICASSP 2017.
    """
    from scipy.stats import norm

    return float(np.sqrt(2) * norm.ppf(auc))


def accuracy(predicted: Any, labels: Any) -> float:
    """Share of clips whose class, int [N], is the predicted one, int [N].

    Raises:
        ValueError: other shapes or dtypes, or no clip.
    """
    predicted, labels = _single_label(predicted, labels)
    return float(np.mean(predicted == labels))


def balanced_accuracy(predicted: Any, labels: Any) -> float:
    """Mean over the classes in `labels` of the share of their clips that are predicted rightly.

    Also called unweighted average recall. Arguments and errors as `accuracy`.
    """
    predicted, labels = _single_label(predicted, labels)
    return float(np.mean([np.mean(predicted[labels == c] == c) for c in np.unique(labels)]))


def confusion_matrix(predicted: Any, labels: Any, num_classes: int) -> np.ndarray:
    """Counts int64 [C, C]: row = the class of the clip, column = the predicted one.

    Args:
        predicted, labels: int [N], from 0 to num_classes - 1.
        num_classes: C; classes that do not occur have rows of zeros.

    Raises:
        ValueError: as `accuracy`; a class beyond `num_classes`.
    """
    from sklearn.metrics import confusion_matrix

    predicted, labels = _single_label(predicted, labels)
    both = np.concatenate([predicted, labels])
    if both.min() < 0 or both.max() >= num_classes:
        raise ValueError(
            f"got classes {both.min()} to {both.max()}; wanted 0 to {num_classes - 1}: "
            f"num_classes is {num_classes}"
        )
    return np.asarray(confusion_matrix(labels, predicted, labels=np.arange(num_classes)), np.int64)


def multi_label_metrics(scores: Any, labels: Any) -> dict[str, float]:
    """`mAP`, `mAUC` and `d_prime` of scores [N, C] and labels [N, C], as named in `results.json`.

    Raises:
        ValueError: as `mean_average_precision` and `mean_auc`.
    """
    auc = mean_auc(scores, labels)
    return {"mAP": mean_average_precision(scores, labels), "mAUC": auc, "d_prime": d_prime(auc)}


def single_label_metrics(scores: Any, labels: Any) -> dict[str, float]:
    """`accuracy` and `balanced_accuracy` of the class with the largest score.

    Args:
        scores: [N, C] finite numbers; of equal ones the first class is taken.
        labels: int [N].

    Raises:
        ValueError: as `accuracy`; scores that are not finite.
    """
    predicted = np.argmax(_finite(scores), axis=1)
    return {
        "accuracy": accuracy(predicted, labels),
        "balanced_accuracy": balanced_accuracy(predicted, labels),
    }


def _mean(values: np.ndarray, nothing: str) -> float:
    if np.isnan(values).all():
        raise ValueError(nothing)
    return float(np.nanmean(values))


def _finite(scores: Any) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores are {scores.shape}; wanted [N, C], a row a clip")
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        raise ValueError(f"scores of {len(bad)} clips are not finite; the first is row {bad[0]}")
    return scores


def _multi_label(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = _finite(scores), np.asarray(labels)
    if labels.shape != scores.shape:
        raise ValueError(f"got scores {scores.shape}, labels {labels.shape}; wanted [N, C] twice")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels have values other than 0 and 1; wanted a multi-hot [N, C]")
    return scores, labels.astype(bool)


def _single_label(predicted: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    kinds = {predicted.dtype.kind, labels.dtype.kind}
    if predicted.ndim != 1 or predicted.shape != labels.shape or not kinds <= set("iu"):
        raise ValueError(
            f"got predicted {predicted.dtype} {predicted.shape}, labels {labels.dtype} "
            f"{labels.shape}; wanted int [N] twice"
        )
    if not len(labels):
        raise ValueError("there is no clip to score")
    return predicted, labels
