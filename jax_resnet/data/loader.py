"""Batches read ahead of need by threads or worker processes, and put on the devices before they are asked for."""

import gc
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from jax_resnet.data.batches import Batch, Broken, Ledger, Report, eval_batch, train_batch
from jax_resnet.data.dataset import Split
from jax_resnet.data.sampling import Phase, phase_at
from jax_resnet.errors import TransientError, first_line
from jax_resnet.runtime.host import STOP_SIGNALS
from jax_resnet.runtime.mesh import global_batch, local_rows

PATIENCE = 10  # seconds, with batches that are being read when they are no longer wanted
ON_DEVICE = 2  # batches there ahead of need
THREADS = 8  # of one process at most: about there the share of the work that holds Python's lock fills it


@dataclass(frozen=True)
class Readers:
    """Who reads: `threads` in each of `workers` processes, or, where workers is 0, in this one."""

    threads: int
    workers: int

    @classmethod
    def of(cls, c: ConfigDict, split: Split) -> "Readers":
        """As `config.data` says; where it says nothing, one for each processor, in more than one process from 16 on.

        What is in memory is read in this process: it need not be in each.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = c.workers if c.workers is not None else (cores // THREADS if cores >= 2 * THREADS else 0)
        if split.in_memory:
            workers = 0
        return cls(c.threads or min(max(1, cores // max(1, workers)), THREADS), workers)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return threads + (f" in each of {self.workers} processes" if self.workers else "")

    def read(self, numbers: range, batch: Callable[[int], Batch], roll: str) -> grain.IterDataset:
        """`batch` of each number, in order, ahead of need. Worker processes enter themselves in the folder `roll`."""
        # One Grain element is a whole batch: per-image elements cost 10 to 100 times more on small images.
        batches = grain.MapDataset.range(numbers.start, numbers.stop).map(batch)
        reading = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads + 1)
        ahead = batches.to_iter_dataset(reading)
        if not self.workers:
            return ahead
        if not flags.FLAGS.is_parsed():  # as where no command line is: Grain reads its own
            flags.FLAGS.mark_as_parsed()
        resource_tracker.ensure_running()  # or the first process started brings it, and unblocks what Feed blocks
        options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=1)
        return ahead.mp_prefetch(options, worker_init_fn=partial(_enrol, roll)).map(_unshared)


def _enrol(roll: str, *_: int) -> None:
    """Tell the parent which process this is, and end when the parent does, even if that is killed."""
    Path(roll, str(os.getpid())).touch()
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _unshared(batch: Batch) -> Batch:
    # Shared memory goes when Grain's array does; JAX on the CPU may still be reading from it.
    return {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


class Feed:
    """An iterator over batches on the devices: image [batch, H, W, C], label [batch], …

    `waited` is how many seconds their taker has spent waiting for the host. To be closed, or run to its end.
    """

    def __init__(
        self,
        readers: Readers,
        numbers: range,
        batch: Callable[[int], Batch],
        sharding: NamedSharding,
        ledger: Ledger,
    ):
        self._roll = tempfile.TemporaryDirectory(prefix="jax_resnet-readers-") if readers.workers else None
        self._batches = iter(readers.read(numbers, batch, self._roll.name if self._roll else ""))
        self._sharding, self._ledger = sharding, ledger
        # Not Grain's own prefetching thread: it asks for states, for which readers in processes are begun twice.
        # Processes inherit what is blocked here: Ctrl-C is not for them, not even while they start.
        self._thread = ThreadPoolExecutor(1, "feed", signal.pthread_sigmask, (signal.SIG_BLOCK, STOP_SIGNALS))
        self._coming: deque[Future[tuple[dict[str, jax.Array], Broken, int] | None]] = deque()
        self.waited = 0.0

    def _put(self) -> tuple[dict[str, jax.Array], Broken, int] | None:
        try:
            batch = next(self._batches, None)
        except RuntimeError as e:
            alive = {process.pid for process in self._started()}
            if self._enrolled() <= alive:  # what a reader raised, for which none has ended
                raise
            why = f"{first_line(e)} Out of memory, or of /dev/shm? Give more, or --config.data.workers=0"
            raise TransientError(f"a process that reads images has ended: {why}") from e
        if batch is None:
            return None
        broken = batch.pop("broken")
        return global_batch(self._sharding, batch), broken, len(next(iter(batch.values())))

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if (batch := self.take()) is None:
            raise StopIteration
        return batch

    def take(self, stopped: Callable[[], Any] = lambda: False) -> dict[str, jax.Array] | None:
        """The next batch; None after the last, or if `stopped()` while it is waited for."""
        while len(self._coming) <= ON_DEVICE:
            self._coming.append(self._thread.submit(self._put))
        began = time.monotonic()
        while not stopped() and wait([self._coming[0]], timeout=0.2).not_done:
            pass
        self.waited += time.monotonic() - began
        if stopped() or (found := self._coming.popleft().result()) is None:
            return None
        batch, broken, read = found
        self._ledger.add(broken, read)
        return batch

    def _enrolled(self) -> set[int]:
        return {int(name) for name in os.listdir(self._roll.name)} if self._roll else set()

    def _started(self) -> list[multiprocessing.process.BaseProcess]:
        """The living processes that this feed has started: its program may have children of its own."""
        enrolled = self._enrolled()
        return [process for process in multiprocessing.active_children() if process.pid in enrolled]

    def close(self) -> None:
        """End the threads and processes that read, those that are stuck by force."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if wait([coming for coming in self._coming if coming.running()], PATIENCE).not_done:
            for process in self._started():
                process.kill()
        self._thread.shutdown()
        self._coming.clear()
        self._batches.close()
        if self._roll:
            self._roll.cleanup()
            gc.collect()  # the last batches lie in cycles, of an exception and its frames; Python would say they leaked
            giving_back = getattr(SharedMemoryArray, "_del_thread_pool", None)  # Grain's one thread that does
            if giving_back:
                giving_back.apply(int)  # after all that it has been asked before


def train_batches(
    split: Split,
    c: ConfigDict,
    *,
    start: int,
    stop: int,
    seed: int,
    phases: Sequence[Phase],
    sharding: NamedSharding,
    report: Report,
) -> Feed:
    """The batches of steps start … stop − 1, read as `config.data` says.

    `report` is told of each image that could not be decoded, once. Taking a batch raises UserError when a record cannot
    be read, or too many cannot be decoded.
    """
    rows = {phase.batch_size: local_rows(sharding, phase.batch_size) for phase in phases}

    def batch(step: int) -> Batch:
        phase = phase_at(phases, step)
        return train_batch(split, step, seed=seed, phase=phase, rows=rows[phase.batch_size], repeats=c.repeats)

    return Feed(Readers.of(c, split), range(start, stop), batch, sharding, Ledger(split, report, c.max_broken))


def eval_batches(split: Split, c: ConfigDict, *, batch_size: int, sharding: NamedSharding, report: Report) -> Feed:
    """The whole split in order, mask False where there is nothing to count; else as `train_batches`."""
    rows = local_rows(sharding, batch_size)
    batch = partial(eval_batch, split, batch_size=batch_size, rows=rows)
    numbers = range(-(-len(split) // batch_size))
    return Feed(Readers.of(c, split), numbers, batch, sharding, Ledger(split, report))
