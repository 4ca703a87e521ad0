"""From a config to batches on the mesh: clips prepared once, split by a hash of their group.

Fine-tuning sees labelled clips, and three sets of them: a test set by `data.test_filter`, which
nothing is chosen by, and what is left of the data split into a training and a held-out set.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from beats_jax import paths, sharding
from beats_jax.data.order import held_out
from beats_jax.data.pipeline import Augment, eval_batches, train_batches
from beats_jax.data.sources import INDEX, Clips, join, matches, open_clips, windows
from beats_jax.data.synthetic import synthetic_clips
from beats_jax.data.token_store import open_store
from beats_jax.fbank import MIN_SAMPLES, SAMPLE_RATE
from beats_jax.labels import read_labels

log = logging.getLogger("beats_jax")

CALIBRATION = 1_000_003  # what calibration saw says nothing about the order of training


class Data(NamedTuple):
    """The batches of a stage, already on the mesh; each method starts a new iterator."""

    train_clips: Clips
    val_clips: Clips
    test_clips: Clips  # empty but in fine-tuning
    clip_samples: int
    training: Callable[[int], Iterator[dict[str, jax.Array]]]  # from a step on, endless
    calibration: Callable[[], Iterator[dict[str, jax.Array]]]  # a counter stream of its own
    validation: Callable[[], Iterator[dict[str, jax.Array]]]  # once through the held-out clips
    testing: Callable[[], Iterator[dict[str, jax.Array]]]  # once through the test clips
    unaugmented: Callable[[], Iterator[dict[str, jax.Array]]]  # `training` before augmentation

    @classmethod
    def open(
        cls, config: Any, batch_size: int, mesh: Mesh, workdir: epath.PathLike, finetune: Any = None
    ) -> Data:
        """Opens (and, the first time, prepares) the config's data.

        `finetune` is the section of the fine-tuning stage, whose clips are labelled and augmented.
        """
        augment = Augment()
        if finetune is None:
            train_clips, val_clips = open_data(config.data, workdir)
            test_clips = train_clips.select(keep=np.zeros(len(train_clips), bool))
        else:
            train_clips, val_clips, test_clips = open_labelled(config.data, finetune.task, workdir)
            assert train_clips.labels is not None
            augment = Augment(
                finetune.roll,
                finetune.mixup,
                finetune.mixup_of,
                finetune.mixup_alpha,
                train_clips.labels.balanced_cdf() if finetune.balanced_sampling else None,
            )
        clip_samples = round(config.data.clip_seconds * SAMPLE_RATE)
        options = dict(config.input)
        if options["frontend"] == "auto":  # TensorFlow on the host, or JAX where the model runs
            options["frontend"] = "host" if options["backend"] == "tf" else "device"
        common: dict[str, Any] = dict(
            batch_size=batch_size,
            clip_samples=clip_samples,
            rows=sharding.local_rows(batch_size, mesh),
            mean=config.data.mean,
            std=config.data.std,
            **options,
        )

        def on_mesh(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, jax.Array]]:
            return (sharding.global_batch(batch, batch_size, mesh) for batch in batches)

        def stream(seed: int, start: int = 0, augment: Augment = augment):
            return on_mesh(
                train_batches(train_clips, seed=seed, start=start, augment=augment, **common)
            )

        return cls(
            train_clips,
            val_clips,
            test_clips,
            clip_samples,
            training=lambda start: stream(config.seed, start),
            calibration=lambda: stream(config.seed + CALIBRATION),
            validation=lambda: on_mesh(eval_batches(val_clips, **common)),
            testing=lambda: on_mesh(eval_batches(test_clips, **common)),
            unaugmented=lambda: stream(config.seed, augment=Augment(cdf=augment.cdf)),
        )


def open_data(data: Any, workdir: epath.PathLike) -> tuple[Clips, Clips]:
    """Training and held-out clips.

    A folder of audio is prepared into `<workdir>/data/` by process 0, a prepared one is read where
    it is; several, with commas between them, are one set. Clips of one `group` (a metadata column,
    such as the source recording) are held out together; without it each file is its own group.

    Args:
      data: `source` ("folder", "synthetic"), `dir`, `filter`, `group`, `val_fraction`,
        `clip_seconds`; `crop`: "random", or "grid" for windows that lie side by side; `token_ids`,
        a folder of stored tokens, which belong to the grid; for synthetic sounds `num_clips`.
      workdir: the run's.

    Raises:
      ValueError: no such source, no `dir`, no audio, a filter that leaves nothing; stored tokens
        with random crops, or of other windows than these.
      FileNotFoundError: `dir` is not there.
    """
    if data.crop not in ("random", "grid"):
        raise ValueError(f'data.crop "{data.crop}" is unknown; use "random" or "grid"')
    if data.token_ids and data.crop != "grid":
        raise ValueError(
            f'data.token_ids holds ids of fixed windows, but data.crop is "{data.crop}": set '
            "--config.data.crop=grid, or leave --config.data.token_ids empty"
        )
    clips = open_source(data, workdir)
    clips = _grid(clips, data) if data.crop == "grid" else clips
    return _split(clips.select(data.filter), data)


def open_labelled(data: Any, task: str, workdir: epath.PathLike) -> tuple[Clips, Clips, Clips]:
    """Training, held-out and test clips, with their labels.

    The classes are those of all three together, so that every fold has the same. Says how many
    clips there are, which classes have none to train on, and how many clips are padded.

    Args:
      data: as for `open_data`, and `label`, a metadata column; `classes`, "" for those that occur
        (see `labels.read_labels`); `test_filter`, rows that are only ever tested ("" = none);
        `val_filter`, those to hold out, where the data set says so ("" = `val_fraction`).
      task: "single-label" or "multi-label".
      workdir: the run's.

    Raises:
      ValueError: as `open_data`; no such column; a clip without a label, or with one that is not
        in `classes`; a single class; filters that leave nothing to test, hold out or train on.
      FileNotFoundError: `dir` is not there.
    """
    if data.crop != "random":
        raise ValueError(
            f'fine-tuning classifies whole clips, not windows of a grid: data.crop is "{data.crop}"'
            "; set --config.data.crop=random --config.data.token_ids="
        )
    if round(data.clip_seconds * SAMPLE_RATE) < MIN_SAMPLES:
        raise ValueError(
            f"data.clip_seconds {data.clip_seconds} holds no token; want 0.175 or more"
        )
    clips = open_source(data, workdir).select(data.filter)
    if data.label not in clips.columns:
        raise ValueError(
            f"data.label: no column {data.label!r}; the columns are: "
            f"{', '.join(clips.columns) or 'none'}; set --config.data.label=COLUMN (sub-folders of "
            "a folder of audio are the column 'category')"
        )
    cells = clips.columns[data.label]
    labels = read_labels(cells, clips.ids, task, data.classes, data.label)
    if task == "single-label" and len(labels.names) < 2:
        raise ValueError(
            f"data.label: all {len(clips)} clips are {cells[0]!r}: there is nothing to tell "
            "apart; want two classes or more, each in a sub-folder of its own"
        )
    clips = dataclasses.replace(clips, labels=labels)
    test = np.zeros(len(clips), bool)
    if data.test_filter:
        test = matches(data.test_filter, clips.columns, len(clips))
    if test.all():
        raise ValueError(
            f"all {len(clips)} clips pass data.test_filter {data.test_filter!r}: none is left to "
            "train on; test fewer, as in --config.data.test_filter=fold=5"
        )
    if data.val_filter:
        val_rows = matches(data.val_filter, clips.columns, len(clips)) & ~test
        if not val_rows.any() or (test | val_rows).all():
            raise ValueError(
                f"data.val_filter {data.val_filter!r} holds out {val_rows.sum()} of "
                f"{(~test).sum()} clips that are not tested: want some, and some to train on; set "
                "--config.data.val_filter= to hold out data.val_fraction of them"
            )
        val, train = clips.select(keep=val_rows), clips.select(keep=~(test | val_rows))
    else:
        train, val = _split(clips.select(keep=~test), data)
    assert train.labels is not None
    missing = [labels.names[i] for i in np.flatnonzero(train.labels.counts() == 0)]
    sizes = (len(train), len(val), int(test.sum()), len(labels.names))
    log.info("%d clips to train on, %d held out, %d to test, of %d classes", *sizes)
    if missing:
        some = ", ".join(missing[:8])
        log.warning("%d of %d classes have no clip to train on: %s", len(missing), sizes[-1], some)
    if short := int(np.sum(clips.num_samples < MIN_SAMPLES)):
        log.warning(
            "%d clips are shorter than a token and padded to %d samples", short, MIN_SAMPLES
        )
    return train, val, clips.select(keep=test)


def open_source(data: Any, workdir: epath.PathLike) -> Clips:
    """All clips of a config's `data`, before its `filter`; see `open_data`."""
    if data.source == "synthetic":
        return synthetic_clips(data.num_clips, data.clip_seconds, seed=0)
    if data.source == "folder":
        return open_folders(data.dir, epath.Path(workdir) / "data")
    raise ValueError(f'data.source "{data.source}" is unknown; use "folder" or "synthetic"')


def _split(clips: Clips, data: Any) -> tuple[Clips, Clips]:
    """Training and held-out clips, groups kept together."""
    groups = clips.columns.get(data.group, clips.ids)
    groups = [group or own for group, own in zip(groups, clips.ids, strict=True)]
    val = held_out(groups, data.val_fraction)
    return clips.select(keep=~val), clips.select(keep=val)


def _grid(clips: Clips, data: Any) -> Clips:
    """The windows of all clips, with their stored tokens if there are any."""
    clip_samples = round(data.clip_seconds * SAMPLE_RATE)
    clips = windows(clips, clip_samples)
    if not data.token_ids:
        return clips
    store = open_store(data.token_ids)
    store.check(clip_samples=clip_samples, mean=data.mean, std=data.std, dataset=clips.fingerprint)
    return dataclasses.replace(clips, token_ids=store.ids)


def open_folders(folders: str, cache: epath.PathLike | None = None) -> Clips:
    """One folder, or several with commas between them as one set.

    Args:
      folders: prepared ones; where `cache` is given also audio, which is prepared into it.

    Raises:
      ValueError: none named, two of one name, or not prepared.
      FileNotFoundError: one is not there.
    """
    sources = [Path(folder.strip()) for folder in folders.split(",") if folder.strip()]
    names = [path.resolve().name for path in sources]
    if not sources:
        raise ValueError("no audio named; set --config.data.dir=FOLDER (or FOLDER,FOLDER)")
    if len(set(names)) < len(names):
        raise ValueError(f"data.dir: folders need different names, got {', '.join(names)}")
    sets = {
        name: open_clips(_prepared(path, epath.Path(cache) / name) if cache else path)
        for name, path in zip(names, sources, strict=True)
    }
    return join(sets) if len(sets) > 1 else sets[names[0]]


def _prepared(folder: Path, cache: epath.Path) -> Path:
    if (folder / INDEX).exists():
        return folder
    if paths.in_store(cache):
        raise ValueError(
            f"data.dir: {folder} is not prepared, and in {cache} it cannot be: beats-jax prepare "
            f"{folder} OUT, then --config.data.dir=OUT"
        )
    out = Path(cache)
    if not folder.exists() and (out / INDEX).exists():
        log.warning("%s is gone; going on with what was prepared from it in %s", folder, out)
        return out
    from beats_jax.data.prepare import prepare

    if jax.process_index() == 0:
        report = prepare(folder, out)
        if report.skipped:
            log.warning(
                "%s: %d of %d files skipped, listed in %s",
                *(folder, report.skipped, report.listed, out / "report.json"),
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data prepared")
    return out
