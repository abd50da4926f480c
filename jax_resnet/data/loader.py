"""Batches in the order of data/order.py: read on the host by threads, put on the devices ahead of need."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_resnet.data.order import Phase, phase_at, train_indices
from jax_resnet.data.source import Split
from jax_resnet.parallel import global_batch, local_rows

Batch = dict[str, np.ndarray]


def train_batch(
    split: Split, step: int, *, seed: int, phases: Sequence[Phase], rows: Mapping[int, np.ndarray]
) -> Batch:
    """Some rows of the global batch of `step`: image uint8 [rows, H, W, C] and label int32 [rows].

    `rows` says which, for each batch size of `phases`.

    The randomness of host crops is keyed by (seed, epoch, record), so no other rows or threads change it.
    """
    phase = phase_at(phases, step)
    indices, epochs = train_indices(seed, phase.examples(step), phase.batch_size, len(split))
    indices, epochs = indices[rows[phase.batch_size]], epochs[rows[phase.batch_size]]
    rngs = [_rng(seed, *of) for of in zip(epochs, indices, strict=True)] if split.crops_at_random else None
    images, labels = split.read(indices, rngs, phase.image_size)
    return {"image": images, "label": labels}


def _rng(seed: int, epoch: int, record: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed << 32 | int(epoch), record], np.uint64)))


def train_batches(
    split: Split, *, start: int, stop: int, seed: int, phases: Sequence[Phase], sharding: NamedSharding, threads: int
) -> Iterator[dict[str, jax.Array]]:
    """The batches of steps start … stop − 1, on the devices: image [batch, H, W, C] and label [batch]."""
    rows = {phase.batch_size: local_rows(sharding, phase.batch_size) for phase in phases}
    # One Grain element is a whole batch: per-image elements cost 10 to 100 times more on small images.
    steps = grain.MapDataset.range(start, stop).map(
        lambda step: train_batch(split, int(step), seed=seed, phases=phases, rows=rows)
    )
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return _to_devices(iter(steps.to_iter_dataset(reading)), sharding)


def eval_batches(
    split: Split, *, batch_size: int, sharding: NamedSharding, threads: int
) -> Iterator[dict[str, jax.Array]]:
    """The whole split in order; the last batch is filled up to batch_size with examples whose mask is False."""
    rows = local_rows(sharding, batch_size)

    def read(number: int) -> Batch:
        position = number * batch_size + rows
        mask = position < len(split)
        images, labels = split.read(np.minimum(position, len(split) - 1), None)
        return {"image": images, "label": labels, "mask": mask}

    numbers = grain.MapDataset.range(-(-len(split) // batch_size)).map(lambda number: read(int(number)))
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return _to_devices(iter(numbers.to_iter_dataset(reading)), sharding)


def _to_devices(batches: Iterable[Batch], sharding: NamedSharding, ahead: int = 2) -> Iterator[dict[str, jax.Array]]:
    """Puts each batch on the devices while the one `ahead` of it is computed."""
    waiting: deque[dict[str, jax.Array]] = deque()
    for batch in batches:
        waiting.append(global_batch(sharding, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft()
    yield from waiting
