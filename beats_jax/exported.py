"""A trained model as a folder for its users: no pickle, no optimizer, nothing of the training.

`config.json` says what it is, `model.safetensors` holds its arrays by our names, `labels.json` a
fine-tuned model's classes in the order of its logits, `README.md` is its card. Of a model that came
from an official file, `official/leftovers.pt` keeps what else that held, so that it can be written
again to the bit. All that loading reads is checked against hashes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import beats_jax
from beats_jax import labels as audioset
from beats_jax.checkpoint import tree_sha256
from beats_jax.convert import LINEARS, Leftovers, encoder_leaves, iteration, left_out
from beats_jax.models.beats import BEATs
from beats_jax.stages import Pretrained
from beats_jax.torch_file import read_torch_file, write_torch_file

CONFIG, WEIGHTS, LABELS, CARD = "config.json", "model.safetensors", "labels.json", "README.md"
LEFTOVERS = "official/leftovers.pt"
PARITY = ("parity.json", "parity.npz")  # of `parity`, where a conversion was verified
# Fields of BEATs that belong to a machine, not to the model; the others are its arguments.
_MACHINE = {"parent", "name", "dtype", "remat"}
# Figures that say how the training went, not what came of it.
_OF_THE_RUN = {
    *("step", "lr", "grad_norm", "clips_per_s", "audio_hours_per_hour", "input_wait", "mfu")
}
# What a config.json that was cut or edited can end in.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, SafetensorError)
_USE = {
    "encoder": "x, token_mask = model.extract_features(waveform)   # 16 kHz, [B, T]",
    "finetuned": "logits, probs = model.classify(waveform)   # 16 kHz, [B, T]; see model.labels",
    "tokenizer": "ids = model.tokenize(waveform)   # 16 kHz, [B, T]",
}


def save_exported(
    pretrained: Pretrained, folder: str | Path, lineage: Sequence[str] = ()
) -> list[str]:
    """Writes a model's folder; it gets its name when it is complete.

    Args:
        pretrained: any model.
        folder: where to. An exported model that is there is replaced.
        lineage: lines of its family tree (`pretrained.lineage_lines`), for the card.

    Returns:
        A line for each part that was left out, being of use in training only.

    Raises:
        ValueError: there is something else in the folder.
        OSError: it cannot be written.
    """
    folder, lines = Path(folder).resolve(), left_out(pretrained.params)
    figures = _figures(pretrained.source)
    pretrained = without_training_parts(pretrained)
    _check_only_ours(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        files = {}
        if pretrained.labels:
            files[LABELS] = _write_json(temporary / LABELS, _label_rows(pretrained.labels))
        if pretrained.official is not None:
            (temporary / LEFTOVERS).parent.mkdir()
            write_torch_file(temporary / LEFTOVERS, pretrained.official._asdict())
            files[LEFTOVERS] = _sha256(temporary / LEFTOVERS)
        config = _config(pretrained) | {"left_out": lines, "files": files}
        _write_json(temporary / CONFIG, config)
        save_file(_flat(pretrained), temporary / WEIGHTS)
        card = _card(folder.name, pretrained, lines, lineage, figures)
        (temporary / CARD).write_text(card, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return lines


def load_exported(folder: str | Path) -> Pretrained:
    """Reads a folder of `save_exported`.

    Raises:
        ValueError: a file of it is missing or damaged, or its arrays are not those it was written
            with.
    """
    folder = Path(folder)
    try:
        return _load(folder)
    except (*_DAMAGE, FileNotFoundError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder} is damaged: {reason}; export it again") from error


def without_training_parts(pretrained: Pretrained) -> Pretrained:
    """The model alone: no label predictor, no estimator.

    Where there were any, its hash changes; then the lineage names the trained model it is from.
    """
    params = {
        name: part
        for name, part in pretrained.params.items()
        if name == "encoder" or name in LINEARS
    }
    if params.keys() == pretrained.params.keys():
        return pretrained
    pretrained = pretrained._replace(params=params)
    source = {
        **pretrained.source,
        "params_sha256": tree_sha256(_arrays(pretrained)),
        "lineage": {"exported_from": pretrained.source},
    }
    return pretrained._replace(source=source)


def describe(pretrained: Pretrained) -> str:
    """One line: kind, iteration and step where they are known, parameters, hash."""
    parts = [pretrained.kind]
    if name := iteration(pretrained):
        parts.append(name)
    if pretrained.source["step"] is not None:
        parts.append(f"step {pretrained.source['step']}")
    count, sha256 = count_parameters(pretrained), pretrained.source["params_sha256"]
    return ", ".join([*parts, f"{count:,} parameters", f"sha256 {sha256}"])


def count_parameters(pretrained: Pretrained) -> int:
    """Numbers in all its arrays, a tokenizer's codebook included."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(_arrays(pretrained)))


def _arrays(pretrained: Pretrained) -> dict[str, Any]:
    """The tree whose hash is the model's (`pretrained.load_model`)."""
    codebook = pretrained.codebook
    return pretrained.params if codebook is None else {**pretrained.params, "codebook": codebook}


def _flat(pretrained: Pretrained) -> dict[str, np.ndarray]:
    """encoder.encoder.layers_0.fc1.kernel, …: contiguous, as safetensors wants them."""
    flat: Any = flax.traverse_util.flatten_dict(_arrays(pretrained), sep=".")
    return {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}


def _config(pretrained: Pretrained) -> dict[str, Any]:
    kind, fields = pretrained.kind, {field.name for field in dataclasses.fields(BEATs)} - _MACHINE
    return {
        "kind": kind,
        "model": {name: getattr(pretrained.model, name) for name in sorted(fields)},
        "mean": float(pretrained.mean),
        "std": float(pretrained.std),
        "task": pretrained.task,
        "num_classes": len(pretrained.params["head"]["bias"]) if kind == "finetuned" else 0,
        "codebook": [] if pretrained.codebook is None else list(pretrained.codebook.shape),
        "source": {**pretrained.source, "iteration": iteration(pretrained)},
        "versions": {
            "beats_jax": beats_jax.__version__,
            **{name: version(name) for name in ("jax", "flax", "numpy", "safetensors")},
            "python": platform.python_version(),
        },
    }


def _figures(source: Mapping[str, Any]) -> dict[str, float]:
    """The newest of every figure in a stage's log, at the model's step."""
    from beats_jax.writers import METRICS_FILE, read_metrics  # tensorboardX takes seconds to import

    found, log = {}, epath.Path(source["path"]) / METRICS_FILE
    for line in read_metrics(log) if log.is_file() else ():
        if line["step"] <= source["step"]:
            found |= {name: x for name, x in line.items() if name not in _OF_THE_RUN}
    return found


def _label_rows(labels: Sequence[str]) -> list[dict[str, Any]]:
    named = zip(labels, audioset.names(labels), strict=True)
    return [{"index": i, "label": label, "name": name} for i, (label, name) in enumerate(named)]


def _load(folder: Path) -> Pretrained:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for name, wanted in config["files"].items():
        if _sha256(folder / name) != wanted:
            raise ValueError(f"{name} is not the file it was written with")
    model = BEATs(**config["model"])
    flat = load_file(folder / WEIGHTS)
    _check_leaves(flat, config, model)
    params: Any = flax.traverse_util.unflatten_dict(flat, sep=".")
    codebook = params.pop("codebook", None)
    labels, official = (), None
    if LABELS in config["files"]:
        rows = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        labels = tuple(row["label"] for row in rows)
    if LEFTOVERS in config["files"]:
        official = Leftovers(**read_torch_file(folder / LEFTOVERS))
    pretrained = Pretrained(
        *(config["kind"], model, params, codebook, config["mean"], config["std"]),
        source={**config["source"], "path": str(folder.absolute())},
        labels=labels,
        task=config["task"],
        official=official,
    )
    if (found := tree_sha256(_arrays(pretrained))) != pretrained.source["params_sha256"]:
        wanted = pretrained.source["params_sha256"]
        raise ValueError(f"{WEIGHTS} has sha256 {found[:12]}…, its config says {wanted[:12]}…")
    return pretrained


def _check_leaves(flat: Mapping[str, np.ndarray], config: Mapping[str, Any], model: BEATs) -> None:
    """Every leaf there, none unknown, each float32 of the shape that the config gives it."""
    wanted = {
        ".".join(("encoder", *path)): leaf.shape for path, leaf in encoder_leaves(model).items()
    }
    dim, linears = model.embed_dim, {}
    if config["kind"] == "finetuned":
        linears["head"] = config["num_classes"]
    if config["kind"] == "tokenizer":
        _, code_dim = wanted["codebook"] = tuple(config["codebook"])
        linears |= {"quantize_layer_0": dim, "quantize_layer_2": code_dim}
    for name, out in linears.items():
        wanted |= {f"{name}.kernel": (dim, out), f"{name}.bias": (out,)}
    missing, unknown = sorted(wanted.keys() - flat.keys()), sorted(flat.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(f"{WEIGHTS} lacks {missing[:5]} and has {unknown[:5]} besides")
    for name, shape in wanted.items():
        if flat[name].shape != shape or flat[name].dtype != np.float32:
            got = f"{flat[name].dtype} {flat[name].shape}"
            raise ValueError(f"{name} in {WEIGHTS} is {got}; want float32 {shape}")


def _check_only_ours(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder, or a name that ends in .pt")
    ours = {CONFIG, WEIGHTS, LABELS, CARD, LEFTOVERS, str(Path(LEFTOVERS).parent), *PARITY}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    strange = sorted(there - ours)
    if strange or (there and CONFIG not in there):
        raise ValueError(
            f"{folder} holds {strange[:3] or sorted(there)[:3]}, and is no exported model alone; "
            "give a new folder"
        )


def _write_json(path: Path, content: Any) -> str:
    """Writes, and returns the file's hash."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return _sha256(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _card(
    name: str,
    pretrained: Pretrained,
    lines: Sequence[str],
    lineage: Sequence[str],
    figures: Mapping[str, float],
) -> str:
    """The folder's README: what it is, how to use it, where it comes from, what was measured."""
    model = pretrained.model
    blocks = [
        "---\nlibrary_name: beats_jax\nlicense: unknown\ntags: [audio, beats]\n---",
        f"# {name}",
        f"A BEATs model (arXiv 2212.09058): {describe(pretrained)}.",
        f"{model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads; log-mel "
        f"mean {pretrained.mean:.5f}, std {pretrained.std:.5f}."
        + (f" {len(pretrained.labels)} classes, in `{LABELS}`." if pretrained.labels else "")
        + (f" {pretrained.num_codes} acoustic tokens." if pretrained.num_codes else ""),
        "## Use",
        f'```python\nimport beats_jax\nmodel = beats_jax.load("{name}")\n'
        f"{_USE[pretrained.kind]}\n```",
        f"`beats-jax convert {name} OUT.pt` writes it for the official PyTorch code.",
        "## Lineage",
        "```\n" + "\n".join(lineage or [f"from {pretrained.source['path']}"]) + "\n```",
    ]
    if lines:
        blocks.append("Left out: " + "; ".join(lines) + ".")
    if figures:
        rows = "\n".join(f"| {key} | {value:.5g} |" for key, value in figures.items())
        blocks += ["## Numbers", f"| measured in training | |\n|---|---|\n{rows}"]
    blocks += [
        "## Licence",
        "Unknown: this export does not know under which terms these weights may be used. Ask "
        "whoever trained them, and mind the licence of the data they were trained on.",
    ]
    return "\n\n".join(blocks) + "\n"
