"""What `evaluate` found, for programs and for people: written, read, compared.

A figure is worth what is known of it: results say when, by which code, from which weights and over
exactly which clips.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.special

import beats_jax

RESULTS, REPORT = "results.json", "RESULTS.md"


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes `results.json` and `RESULTS.md`; each gets its name when it is complete."""
    texts = {RESULTS: json.dumps(_without_nan(results), indent=1), REPORT: report(results)}
    for name, text in texts.items():
        draft = folder / f".{name}.draft"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / name)


def provenance() -> dict[str, Any]:
    """When, by which code and with which versions: `date`, `versions`, `git_commit`."""
    packages = ("jax", "flax", "numpy", "scikit-learn", "scipy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "beats_jax": beats_jax.__version__,
            **{name: version(name) for name in packages},
            "python": platform.python_version(),
        },
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the clone that this package runs from, "+" where files differ; else None."""
    root = Path(beats_jax.__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside somebody else's repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def report(results: Mapping[str, Any]) -> str:
    """The results as a block of Markdown, with all that is needed to know what they are of."""
    data, settings, versions = results["data"], results["settings"], results["versions"]
    counts = [n for n in data["coverage"].values() if n]
    lines = [
        "## RESULTS",
        "",
        results_table(results),
        "",
        f"- date: {results['date']}; git commit: {results['git_commit'] or 'not a clone'}",
        "- versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"- data: `{data['path']}`, {data['clips']} clips, {data['hours']:.2f} h, "
        f"{len(counts)} of {data['classes']} classes with {min(counts)} to {max(counts)} clips",
        f"- data's sha256 (sounds, names, metadata): {data['fingerprint']}",
        "- settings: " + ", ".join(f"{name} {value!r}" for name, value in settings.items()),
    ]
    lines += [
        f"- model {number}: `{entry['path']}`"
        + ("" if entry["step"] is None else f", step {entry['step']}")
        + f", sha256 {entry['params_sha256']}"
        for number, entry in enumerate(results["members"], start=1)
    ]
    lines += [f"- {note}" for note in data["notes"]]
    lines += [
        "",
        "Each class's clips and figures, and the models' configs, are in results.json.",
        "",
    ]
    return "\n".join(lines)


def results_table(results: Mapping[str, Any]) -> str:
    """A Markdown table: a line for each member, their mean, the best one and the ensemble."""
    members, names = results["members"], list(results["mean"])
    rows = [(f"model {i}", entry["metrics"]) for i, entry in enumerate(members, start=1)]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    if len(members) > 1:
        best = results["best"]
        rows += [
            (f"mean of {len(members)}", results["mean"]),
            (f"best (model {best + 1}, chosen by this set)", members[best]["metrics"]),
            (f"ensemble of {len(members)}", results["ensemble"]),
        ]
    for title, metrics in rows:
        std = results["std"] if title.startswith("mean of") else {}
        cells = [f"{metrics[n]:.4f}" + (f" ± {std[n]:.4f}" if n in std else "") for n in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(a: str, b: str) -> str:
    """A Markdown table of two results: of their ensembles, or of single models.

    Args:
        a, b: folders that `evaluate` wrote, or their `results.json`.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are over unlike sets, classes or columns, or are no results.
    """
    first, second = (read(path) for path in (a, b))
    same: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "task": lambda r: r["task"],
        "data": lambda r: f"{r['data']['fingerprint'][:12]} ({r['data']['clips']} clips)",
        "column of the class": lambda r: r["settings"]["label"],
        "classes": lambda r: sorted(r["data"]["coverage"]),
    }
    for what, of in same.items():
        if of(first) != of(second):
            got = [str(of(r))[:60] for r in (first, second)]
            raise ValueError(
                f"{a} and {b} are results over unlike sets: {what} {got[0]} and {got[1]}; evaluate "
                "both with the same DATA, --filter and --label"
            )
    lines = [f"| | {a} | {b} | difference |", "|---|---|---|---|"]
    left, right = (r["ensemble"] or r["members"][0]["metrics"] for r in (first, second))
    for name in left:
        if None in (left[name], right[name]):  # d' of a perfect AUC
            continue
        difference = right[name] - left[name]
        lines.append(f"| {name} | {left[name]:.4f} | {right[name]:.4f} | {difference:+.4f} |")
    return "\n".join(lines)


def read(path: str) -> dict[str, Any]:
    """The results in a folder of `write`, or in such a file.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is something else.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no results there; beats-jax evaluate … --out {path}")
    try:
        results = json.loads(file.read_text())
        _ = results["data"]["fingerprint"], results["members"][0]["metrics"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the {RESULTS} of `beats-jax evaluate`") from error
    return results


class Mistake(NamedTuple):
    """A clip that was taken for something else.

    Attributes:
        id: the clip's, its file's name below the data's folder.
        truth, predicted: classes.
        prob: float in 0..1, what the predicted class was given.
    """

    id: str
    truth: str
    predicted: str
    prob: float


def mistakes(folder: str | Path) -> list[Mistake]:
    """What the models of an evaluation, together, got wrong: what they were surest of first.

    Args:
        folder: that `evaluate` wrote, of a single-label task.

    Raises:
        FileNotFoundError: there are no results, or their scores are gone.
        ValueError: a multi-label task, where a clip is not right or wrong as a whole.
    """
    results = read(str(folder))
    if results["task"] != "single-label":
        raise ValueError(f"{folder} is of a {results['task']} task: its clips have no one class")
    data, precision = results["data"]["fingerprint"], results["settings"]["precision"]
    total: Any = 0
    for member in results["members"]:
        name = scores_file(member["params_sha256"], data, precision)
        with np.load(Path(folder) / "scores" / name) as saved:
            order = np.argsort(saved["classes"])  # models may differ in it
            probs = scipy.special.softmax(saved["logits"], axis=-1)[:, order]
            ids, truth, classes = saved["ids"], saved["labels"], saved["classes"][order]
        total = total + probs / len(results["members"])
    best, prob = classes[total.argmax(axis=1)], total.max(axis=1)
    rows = [row for row in np.argsort(-prob) if truth[row] in classes and truth[row] != best[row]]
    return [Mistake(str(ids[i]), str(truth[i]), str(best[i]), float(prob[i])) for i in rows]


def scores_file(params_sha256: str, fingerprint: str, precision: str) -> str:
    """The name under which `evaluate` keeps a model's scores of a data set."""
    return f"{params_sha256[:16]}_{fingerprint[:16]}_{precision}.npz"


def _without_nan(value: Any) -> Any:
    """JSON knows neither nan nor inf: null."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
