"""Prefetch of batches: threads or worker processes read them, a thread puts them on the devices."""

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

PATIENCE = 10  # seconds, for reads in progress at the end
PREFETCHED_BATCHES = 2  # on the devices
# With about so many threads in a process, the work that holds Python's lock keeps it busy.
MAX_THREADS = 8

Loaded = tuple[dict[str, jax.Array], Broken, int]  # a batch, its broken images, rows read


@dataclass(frozen=True)
class Readers:
    """Threads that read batches: so many in each of `workers` processes, or in this one for 0."""

    threads: int
    workers: int

    @classmethod
    def of(cls, data: ConfigDict, split: Split) -> "Readers":
        """Choose the readers of a split by `data`, which is config.data.

        Where it names no number, take a thread for each core, and more than one process from 16
        cores on. A split in memory is read in this process, so that no worker holds a copy.
        """
        cores = _count_cores()
        workers = data.workers
        if split.in_memory:
            workers = 0
        elif workers is None:
            workers = cores // MAX_THREADS if cores >= 2 * MAX_THREADS else 0
        threads = max(1, cores // max(1, workers))
        return cls(data.threads or min(threads, MAX_THREADS), workers)

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads} in each of {self.workers} processes" if self.workers else threads

    def read(self, numbers: range, batch: Callable[[int], Batch], roll: str) -> grain.IterDataset:
        """Prefetch `batch` of each number, in order.

        Each worker process leaves a file, named by its process id, in the folder `roll`.
        """
        # One Grain element is a batch: small images one by one cost 10 to 100 times more.
        batches = grain.MapDataset.range(numbers.start, numbers.stop).map(batch)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads + 1)
        prefetched = batches.to_iter_dataset(options)
        if not self.workers:
            return prefetched
        # Grain reads absl flags, which nothing has parsed where there is no command line.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Else the first worker starts the tracker, which unblocks the signals that Feed blocks.
        resource_tracker.ensure_running()
        processes = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=1)
        enrol = partial(_enrol, roll)
        return prefetched.mp_prefetch(processes, worker_init_fn=enrol).map(_copy_arrays)


def _count_cores() -> int:
    """Count the cores that this process may use, or all where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _enrol(roll: str, *_: int) -> None:
    """Tell the parent this process's id, and end when the parent ends, even if it is killed."""
    Path(roll, str(os.getpid())).touch()
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _copy_arrays(batch: Batch) -> Batch:
    """Copy a batch out of shared memory, which Grain frees while JAX on the CPU may read it."""
    arrays = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}
    return batch | {name: np.array(array) for name, array in arrays.items()}


class Feed:
    """An iterator over batches on the devices: image [batch, H, W, C], label [batch], …

    `waited` is how many seconds its consumer has spent waiting for the host. Close it, or run it to
    its end.
    """

    def __init__(
        self,
        readers: Readers,
        numbers: range,
        batch: Callable[[int], Batch],
        sharding: NamedSharding,
        ledger: Ledger,
    ):
        roll = ""
        self._roll: tempfile.TemporaryDirectory[str] | None = None
        if readers.workers:
            self._roll = tempfile.TemporaryDirectory(prefix="jax_resnet-readers-")
            roll = self._roll.name
        self._batches = iter(readers.read(numbers, batch, roll))
        self._sharding, self._ledger = sharding, ledger
        # Grain's own prefetching thread asks for states, for which workers are started twice.
        # Workers inherit the signals that this thread blocks: Ctrl-C never reaches them.
        block = (signal.SIG_BLOCK, STOP_SIGNALS)
        self._thread = ThreadPoolExecutor(1, "feed", signal.pthread_sigmask, block)
        self._coming: deque[Future[Loaded | None]] = deque()
        self.waited = 0.0

    def _put(self) -> Loaded | None:
        try:
            batch = next(self._batches, None)
        except RuntimeError as e:
            alive = {process.pid for process in self._started()}
            # A worker that raised an error is still alive, and the error says what is wrong.
            if self._enrolled() <= alive:
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
        """Return the next batch; None after the last, or if `stopped()` while waiting for it."""
        while len(self._coming) <= PREFETCHED_BATCHES:
            self._coming.append(self._thread.submit(self._put))
        began = time.monotonic()
        while not stopped() and wait([self._coming[0]], timeout=0.2).not_done:
            pass
        self.waited += time.monotonic() - began
        if stopped():
            return None
        loaded = self._coming.popleft().result()
        if loaded is None:
            return None
        batch, broken, read = loaded
        self._ledger.add(broken, read)
        return batch

    def _enrolled(self) -> set[int]:
        return {int(name) for name in os.listdir(self._roll.name)} if self._roll else set()

    def _started(self) -> list[multiprocessing.process.BaseProcess]:
        """List the living processes that this feed started, not other children of its program."""
        enrolled = self._enrolled()
        return [process for process in multiprocessing.active_children() if process.pid in enrolled]

    def close(self) -> None:
        """End the threads and processes that read; kill processes that are stuck."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if wait([coming for coming in self._coming if coming.running()], PATIENCE).not_done:
            for process in self._started():
                process.kill()
        self._thread.shutdown()
        self._coming.clear()
        self._batches.close()
        if self._roll:
            self._roll.cleanup()
            # An exception's frames hold the last batches in cycles, which Python reports as a leak.
            gc.collect()
            # One thread of Grain's frees shared memory, in order: wait until it has done so.
            freeing = getattr(SharedMemoryArray, "_del_thread_pool", None)
            if freeing:
                freeing.apply(int)


def train_batches(
    split: Split,
    data: ConfigDict,
    *,
    start: int,
    stop: int,
    seed: int,
    phases: Sequence[Phase],
    sharding: NamedSharding,
    report: Report,
) -> Feed:
    """Feed the batches of steps start … stop − 1, read as `data`, which is config.data, says.

    `report` is called once for each image that cannot be decoded. Taking a batch raises UserError
    when a record cannot be read, or too many cannot be decoded.
    """
    rows = {phase.batch_size: local_rows(sharding, phase.batch_size) for phase in phases}

    def batch(step: int) -> Batch:
        phase = phase_at(phases, step)
        local = rows[phase.batch_size]
        return train_batch(split, step, seed=seed, phase=phase, rows=local, repeats=data.repeats)

    ledger = Ledger(split, report, data.max_broken)
    return Feed(Readers.of(data, split), range(start, stop), batch, sharding, ledger)


def eval_batches(
    split: Split,
    data: ConfigDict,
    *,
    batch_size: int,
    sharding: NamedSharding,
    report: Report,
) -> Feed:
    """Feed all of the split in order, as `train_batches`; mask is False where no example is."""
    rows = local_rows(sharding, batch_size)
    batch = partial(eval_batch, split, batch_size=batch_size, rows=rows)
    numbers = range(-(-len(split) // batch_size))
    return Feed(Readers.of(data, split), numbers, batch, sharding, Ledger(split, report))
