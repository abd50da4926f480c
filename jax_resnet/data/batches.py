"""What a batch holds, on the host: a function of (seed, step), whichever thread, process or machine reads it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_resnet.data.order import Phase, train_indices
from jax_resnet.data.split import Split
from jax_resnet.errors import UserError

Broken = list[tuple[str, str]]  # name and reason of each image that could not be decoded
Batch = dict[str, Any]  # arrays [rows, …], and "broken"
Report = Callable[[str, str], None]  # takes the two
SUBSTITUTES = 100  # tried for one broken image


def train_batch(split: Split, step: int, *, seed: int, phase: Phase, rows: np.ndarray, repeats: int = 1) -> Batch:
    """Rows `rows` of the global batch of `step`, which is in `phase`: image uint8 [rows, H, W, C], label int32 [rows].

    The randomness of host crops is keyed by (seed, epoch, record), so no other rows or threads change it. A record that
    cannot be decoded gives its place, and its randomness, to another, which follows from the same key.
    """
    indices, epochs = train_indices(seed, phase.examples(step), phase.batch_size, len(split), repeats)
    indices, epochs = indices[rows], epochs[rows]
    keys = zip(epochs.tolist(), indices.tolist(), strict=True)
    read = split.read(indices, [generator(seed, *key) for key in keys] if split.random else None, phase.image_size)
    broken = list(read.broken.values())
    for row in read.broken:
        epoch, record = int(epochs[row]), int(indices[row])
        for other in generator(seed, epoch, record | 1 << 62).integers(len(split), size=SUBSTITUTES):
            found = split.read(np.array([other]), [generator(seed, epoch, record)], phase.image_size)
            read.images[row], read.labels[row] = found.images[0], found.labels[0]
            if not found.broken:
                break
            broken += found.broken.values()
        else:
            name, reason = read.broken[row]
            raise UserError(f"{split.name} split: {name}: {reason}; nor can any of {SUBSTITUTES} others be decoded")
    return {"image": read.images, "label": read.labels, "broken": broken}


def generator(seed: int, epoch: int, record: int) -> np.random.Generator:
    """What is random about a record's pixels in an epoch."""
    return np.random.Generator(np.random.Philox(key=np.array([seed << 32 | epoch, record], np.uint64)))


def eval_batch(split: Split, number: int, *, batch_size: int, rows: np.ndarray) -> Batch:
    """Those rows of the batch of that number, in the split's order: image and label as in training, and mask.

    mask, bool [len(rows)], is False where there is no example any more, or one that cannot be decoded; undecodable,
    bool too, tells which.
    """
    position = number * batch_size + rows
    there = position < len(split)
    read = split.read(np.minimum(position, len(split) - 1), None)
    undecodable = there & np.isin(np.arange(len(rows)), list(read.broken))
    return {
        "image": read.images,
        "label": read.labels,
        "mask": there & ~undecodable,
        "undecodable": undecodable,
        "broken": [read.broken[row] for row in np.flatnonzero(undecodable).tolist()],
    }


@dataclass
class Ledger:
    """The images of a split that could not be decoded: each is reported once; too many end the run."""

    split: Split
    share: float  # of the split, or of at least LEAST found among those read
    report: Report
    read: int = 0
    failed: int = 0
    names: dict[str, None] = field(default_factory=dict)

    LEAST = 20

    def add(self, broken: Broken, read: int) -> None:
        """Takes what was broken among `read` more. Raises UserError, with the list, when it is too much."""
        self.read += read + len(broken)  # for each that failed another was tried
        self.failed += len(broken)
        for name, reason in broken:
            if name not in self.names:
                self.names[name] = None
                self.report(name, reason)
        count, seen = len(self.names), min(self.read, len(self.split))
        if count > self.share * len(self.split) or (count >= self.LEAST and self.failed > self.share * self.read):
            raise UserError(
                f"{self.split.name} split: {count} images of {seen:,} read cannot be decoded, "
                f"more than config.data.max_broken={self.share:g} allows; repair or remove: {', '.join(self.names)}"
            )
