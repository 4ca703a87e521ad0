"""Batch numbers in, batches out: one pure function per batch, run by TensorFlow or by threads.

counter -> position -> fetch -> crop or pad -> [augment] -> [log-mel patches] -> batch. A batch is
a function of its number (see `order`), so the two executors below only decide who computes it and
when: their int16 batches are equal bit for bit, from any start, in any number of hosts.
"""

import collections
import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from beats_jax import augment as augmentations
from beats_jax.data import order
from beats_jax.data.sources import Clips
from beats_jax.data.token_store import PADDING
from beats_jax.fbank import MEAN, MIN_SAMPLES, STD

Batch = dict[str, np.ndarray]
DTYPES = {
    "waveform": np.int16,
    "partner": np.int16,  # where log-mels are mixed
    "share": np.float32,
    "num_samples": np.int32,
    "counter": np.uint32,
    "index": np.int32,
    "token_ids": np.int32,  # where the clips have them
    "labels": np.float32,  # where the clips have them
}
WAVEFORMS = ("waveform", "partner", "share")  # what log-mel patches are made of
Batches = Generator[Batch, None, None]
T = TypeVar("T")


class Augment(NamedTuple):
    """What happens to training examples besides the crop; by default nothing.

    Attributes:
        roll: move each crop in time, by any number of samples.
        mixup: probability that an example is a mixture with another clip, labels included.
        mixup_of: what is mixed: "waveform" samples, or "log-mel".
        mixup_alpha: of the Beta distribution that a mixture's weight is drawn from.
        cdf: float64 [n], for class-balanced sampling in the place of permutations.
    """

    roll: bool = False
    mixup: float = 0.0
    mixup_of: str = "waveform"
    mixup_alpha: float = 0.8
    cdf: np.ndarray | None = None


AS_IT_IS = Augment()


def train_batches(
    clips: Clips,
    *,
    seed: int,
    batch_size: int,
    clip_samples: int,
    start: int = 0,
    rows: slice | np.ndarray = slice(None),
    augment: Augment = AS_IT_IS,
    backend: str = "tf",
    frontend: str = "host",
    mean: float = MEAN,
    std: float = STD,
    workers: int = 1,
    prefetch: int = 4,
) -> Batches:
    """Endless batches of random crops, in an order that is a function of the seed alone.

    Args:
        clips: what to read.
        seed: of the order and of the crops.
        batch_size: of the global batch, all hosts together.
        clip_samples: length of the crops; shorter clips are padded with zeros.
        start: number of the first batch. Batch n holds examples n * batch_size + row.
        rows: the rows of the global batch to read here.
        augment: what else is done to the examples.
        backend: "tf" (tf.data) or "numpy" (threads; never imports TensorFlow).
        frontend: "host" makes log-mel patches here, "device" leaves the waveform to the caller.
        mean: of the log-mel, for "host".
        std: of the log-mel, for "host".
        workers: batches made at the same time.
        prefetch: batches ready before they are asked for.

    Returns:
        An iterator of dicts, b = number of rows: `waveform` int16 [b, clip_samples] (device) or
        `patches` float32 [b, L, 256] (host); `num_samples` int32 [b], valid samples of the crop;
        `counter` uint32 [b], the example's number; `index` int32 [b], its position in `clips`;
        `token_ids` int32 [b, L] where `clips` has stored ones, 0 at padding; `labels` float32
        [b, C] where it has labels: 0 or 1, and in a mixture both clips' weights;
        for mixtures of log-mels on the device `partner` (as `waveform`) and `share` float32 [b].
        Closing or dropping it stops its threads. What goes wrong in them is raised here.
    """
    _check(clips, batch_size, clip_samples)
    taken = np.arange(batch_size)[rows]

    def make(number: int) -> Batch:
        counters = number * batch_size + taken
        if augment.cdf is None:
            index = order.dataset_positions(seed, counters, len(clips))
        else:
            index = order.weighted_positions(seed, counters, augment.cdf, "balance")
        starts = order.crop_starts(seed, counters, clips.num_samples[index], clip_samples)
        crops = _crops(clips, index, starts, clip_samples)
        labels = None if clips.labels is None else clips.labels.multi_hot(index)
        if augment.roll:
            shifts = order.roll_shifts(seed, counters, np.array([len(crop) for crop in crops]))
            crops = list(map(augmentations.roll, crops, shifts))
        if not augment.mixup:
            return _batch(clips, crops, labels, index, counters, clip_samples)
        partners, shares, labels = _partners(clips, augment, seed, counters, labels, clip_samples)
        if augment.mixup_of == "waveform":
            crops = list(map(augmentations.mixup, crops, partners, shares))
            return _batch(clips, crops, labels, index, counters, clip_samples)
        # Log-mels are mixed where they are made; the mixture is as long as the longer of the two.
        longest = [max(map(len, pair)) for pair in zip(crops, partners, strict=True)]
        crops = [np.pad(c, (0, n - len(c))) for c, n in zip(crops, longest, strict=True)]
        batch = _batch(clips, crops, labels, index, counters, clip_samples)
        batch["partner"] = _padded(partners, clip_samples)
        return batch | {"share": shares.astype(np.float32)}

    numbers, shapes = range(start, sys.maxsize), _shapes(clips, len(taken), clip_samples)
    if augment.mixup and augment.mixup_of == "log-mel":
        shapes |= {"partner": (len(taken), clip_samples), "share": (len(taken),)}
    return _execute(make, numbers, shapes, backend, frontend, mean, std, workers, prefetch)


def eval_batches(
    clips: Clips,
    *,
    batch_size: int,
    clip_samples: int,
    start: int = 0,
    rows: slice | np.ndarray = slice(None),
    backend: str = "tf",
    frontend: str = "host",
    mean: float = MEAN,
    std: float = STD,
    workers: int = 1,
    prefetch: int = 4,
) -> Batches:
    """Every clip once, in the data set's order, cropped at its start; otherwise as `train_batches`.

    The last batch is filled up with rows of zeros that have num_samples 0 and index -1.
    """
    _check(clips, batch_size, clip_samples)
    taken = np.arange(batch_size)[rows]

    def make(number: int) -> Batch:
        counters = number * batch_size + taken
        index = np.where(counters < len(clips), counters, -1)
        crops = _crops(clips, index, np.zeros_like(index), clip_samples)
        labels = None if clips.labels is None else clips.labels.multi_hot(index)
        return _batch(clips, crops, labels, index, counters, clip_samples)

    numbers = range(start, -(-len(clips) // batch_size))
    shapes = _shapes(clips, len(taken), clip_samples)
    return _execute(make, numbers, shapes, backend, frontend, mean, std, workers, prefetch)


def _check(clips: Clips, batch_size: int, clip_samples: int) -> None:
    if not len(clips):
        raise ValueError("there are no clips to read; check the filter and the held-out fraction")
    if min(batch_size, clip_samples) < 1:
        raise ValueError(f"batch_size {batch_size}, clip_samples {clip_samples}: must be positive")


def _crops(
    clips: Clips, index: np.ndarray, starts: np.ndarray, clip_samples: int
) -> list[np.ndarray]:
    """The crops of the clips at `index`, each int16 [up to clip_samples]; none at all for -1."""
    crops = [np.zeros(0, np.int16)] * len(index)
    real = np.flatnonzero(index >= 0)
    for row, samples in zip(real, clips.fetch(index[real]), strict=True):
        crops[row] = samples[starts[row] : starts[row] + clip_samples]
    return crops


def _partners(
    clips: Clips,
    augment: Augment,
    seed: int,
    counters: np.ndarray,
    labels: np.ndarray | None,
    clip_samples: int,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """What examples are mixed with: other clips, drawn as if they were examples themselves.

    Returns:
        The partners' crops, empty where nothing is mixed; the examples' own shares, float64 [b];
        the mixtures' labels.
    """
    weights = order.mixup_weights(seed, counters, augment.mixup, augment.mixup_alpha)
    cdf = np.arange(1, len(clips) + 1) / len(clips) if augment.cdf is None else augment.cdf
    index = order.weighted_positions(seed, counters, cdf, "mixup/partner")
    index = np.where(weights < 1, index, -1)
    starts = order.crop_starts(seed, counters, clips.num_samples[index], clip_samples, "mixup/crop")
    partners = _crops(clips, index, starts, clip_samples)
    if clips.labels is not None and labels is not None:
        share = weights.astype(np.float32)[:, None]
        labels = share * labels + (1 - share) * clips.labels.multi_hot(index)
    return partners, weights, labels


def _padded(crops: list[np.ndarray], clip_samples: int) -> np.ndarray:
    """int16 [b, clip_samples]: the crops, followed by zeros."""
    waveform = np.zeros((len(crops), clip_samples), np.int16)
    for row, crop in zip(waveform, crops, strict=True):
        row[: len(crop)] = crop
    return waveform


def _batch(
    clips: Clips,
    crops: list[np.ndarray],
    labels: np.ndarray | None,
    index: np.ndarray,
    counters: np.ndarray,
    clip_samples: int,
) -> Batch:
    """Crops, padded with zeros, and what belongs to them; rows whose index is -1 stay empty."""
    num_samples = np.array([len(crop) for crop in crops], np.int32)
    if labels is not None:  # a labelled clip is never dropped: a short one is padded to one token
        num_samples = np.where(index >= 0, np.maximum(num_samples, MIN_SAMPLES), 0)
    batch = {
        "waveform": _padded(crops, clip_samples),
        "num_samples": num_samples.astype(np.int32),
        "counter": counters.astype(np.uint32),
        "index": index.astype(np.int32),
    }
    if clips.token_ids is not None:
        real = np.flatnonzero(index >= 0)
        token_ids = np.zeros((len(index), clips.token_ids.shape[1]), np.int32)
        token_ids[real] = clips.token_ids[clips.records[index[real]]]
        batch["token_ids"] = np.where(token_ids == PADDING, 0, token_ids)
    if labels is not None:
        batch["labels"] = labels
    return batch


def _shapes(clips: Clips, rows: int, clip_samples: int) -> dict[str, tuple[int, ...]]:
    """Of every array of a batch."""
    shapes = dict.fromkeys(("num_samples", "counter", "index"), (rows,))
    shapes = {"waveform": (rows, clip_samples), **shapes}
    if clips.token_ids is not None:
        shapes["token_ids"] = (rows, clips.token_ids.shape[1])
    if clips.labels is not None:
        shapes["labels"] = (rows, len(clips.labels.names))
    return shapes


def _execute(
    make: Callable[[int], Batch],
    numbers: range,
    shapes: dict[str, tuple[int, ...]],
    backend: str,
    frontend: str,
    mean: float,
    std: float,
    workers: int,
    prefetch: int,
) -> Batches:
    if backend not in ("tf", "numpy"):
        raise ValueError(f"input.backend is {backend!r}; use 'tf' or 'numpy'")
    if frontend not in ("host", "device"):
        raise ValueError(f"input.frontend is {frontend!r}; use 'host' or 'device'")
    if min(workers, prefetch) < 1:
        raise ValueError(f"input.workers {workers}, input.prefetch {prefetch}: must be positive")

    def finish(batch: dict[str, Any]) -> dict[str, Any]:
        if frontend == "host":
            batch["patches"] = augmentations.log_mel_patches(batch, mean, std)
            batch = {name: x for name, x in batch.items() if name not in WAVEFORMS}
        return batch

    if backend == "numpy":
        return _numpy_batches(lambda number: finish(make(number)), numbers, workers, prefetch)
    return _tf_batches(make, finish, numbers, shapes, workers, prefetch)


def _numpy_batches(
    make: Callable[[int], Batch], numbers: range, workers: int, prefetch: int
) -> Batches:
    with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
        yield from ordered(pool, make, numbers, max(prefetch, workers))


def ordered(
    pool: Executor, function: Callable[[Any], T], items: Iterable[Any], ahead: int
) -> Iterator[T]:
    """`pool.map`, but never more than `ahead` calls ahead of the consumer; cancels when closed."""
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for call in waiting:
            call.cancel()


def _tf_batches(
    make: Callable[[int], Batch],
    finish: Callable[[dict[str, Any]], dict[str, Any]],
    numbers: range,
    shapes: dict[str, tuple[int, ...]],
    workers: int,
    prefetch: int,
) -> Batches:
    """tf.data asks for batches by number: one Python call each; the log-mel is TensorFlow's own."""
    tf = import_tensorflow()
    failures: list[BaseException] = []

    def call(number: np.ndarray) -> list[np.ndarray]:
        try:
            batch = make(int(number))
            return [batch[name] for name in shapes]
        except BaseException as failure:
            failures.append(failure)
            raise

    @tf.autograph.experimental.do_not_convert
    def read(number: Any) -> dict[str, Any]:
        dtypes = [DTYPES[name] for name in shapes]
        values = tf.numpy_function(call, [number], dtypes, stateful=False)
        batch = dict(zip(shapes, values, strict=True))
        for name, value in batch.items():
            value.set_shape(shapes[name])
        return finish(batch)

    data = tf.data.Dataset.range(numbers.start, numbers.stop)
    data = data.map(read, num_parallel_calls=workers, deterministic=True).prefetch(prefetch)
    try:
        yield from cast(Iterator[Batch], data.as_numpy_iterator())
    except tf.errors.OpError as error:  # it has the text of a failure in `call`, not the exception
        raise (failures[0] if failures else error) from None


def import_tensorflow() -> Any:
    """TensorFlow without accelerators: they are JAX's, and it would take all of their memory."""
    # It greets with ten lines otherwise; oneDNN's kernels give it nothing here but one more line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError):  # the caller has used them with it already
            tf.config.set_visible_devices([], kind)
    return tf
