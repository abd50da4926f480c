"""Three epochs of a folder are the same pixels in the same order, whoever reads them and however often it is killed."""

import json
import random
import signal
import socket
import sys
from pathlib import Path

import cv2
import numpy as np
import programs
import pytest
from conftest import ROOT, main_env
from stream import BATCH, EPOCHS, SEED

from jax_resnet.data.sampling import train_indices

IMAGES = 30
Stream = list[dict[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 JPEGs of three classes to train on, two of them broken."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(IMAGES + 3):
        file = root / ("train" if i < IMAGES else "val") / f"class{i % 3}" / f"{i:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (rng.integers(3, 6), rng.integers(3, 6), 3), dtype=np.uint8)
        pixels = cv2.resize(pixels, tuple(rng.integers(30, 60, 2).tolist()))
        data = cv2.imencode(".jpg", pixels)[1].tobytes()
        file.write_bytes(data if i not in (7, 20) else data[: len(data) // 2])
    return root


def begin(folder: Path, out: Path, *args: int) -> programs.Program:
    command = [sys.executable, ROOT / "tests" / "stream.py", folder, out, *map(str, args)]
    return programs.start(command, env=main_env())


def lines(out: Path) -> Stream:
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return [{int(row): digest for row, digest in step.items()} for step in rows]


def whole(folder: Path, out: Path, *args: int) -> tuple[Stream, str]:
    process = begin(folder, out, *args)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not errors  # no warning of leaked memory either
    return lines(out), printed


@pytest.fixture(scope="module")
def stream(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """As one thread reads it, uninterrupted."""
    found, printed = whole(folder, tmp_path_factory.mktemp("stream") / "out", 1, 0)
    assert sorted(Path(line.split()[0]).name for line in printed.splitlines()) == ["07.jpg", "20.jpg"]
    assert len(found) == -(-EPOCHS * IMAGES // BATCH)
    assert all(sorted(step) == list(range(BATCH)) for step in found)
    return found


def test_every_record_of_an_epoch_has_pixels_of_its_own_and_others_in_each_epoch(stream: Stream) -> None:
    seen: dict[int, list[str]] = {}
    for step, rows in enumerate(stream):
        records, _ = train_indices(SEED, step * BATCH, BATCH, IMAGES)
        for row, record in enumerate(records.tolist()):
            seen.setdefault(record, []).append(rows[row])
    assert sorted(seen) == list(range(IMAGES))
    assert all(len(digests) in (EPOCHS, EPOCHS + 1) for digests in seen.values())
    # Nor do broken records, whose places others take, show the same pixels as these do in their own.
    assert len({digest for digests in seen.values() for digest in digests}) == BATCH * len(stream)


@pytest.mark.parametrize(("threads", "workers"), [(3, 0), (1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_threads_and_worker_processes(folder: Path, tmp_path: Path, stream: Stream, threads: int, workers: int) -> None:
    assert whole(folder, tmp_path / "out", threads, workers)[0] == stream


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_killed_at_random_and_begun_again(folder: Path, tmp_path: Path, stream: Stream, workers: int) -> None:
    rng = random.Random(workers)
    for step in sorted(rng.sample(range(1, len(stream)), 5)):
        process = begin(folder, tmp_path / "out", 2, workers)
        programs.until(lambda step=step: len(lines(tmp_path / "out")) >= step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert step <= len(lines(tmp_path / "out"))
    assert whole(folder, tmp_path / "out", 2, workers)[0] == stream


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_several_processes_read_a_part_each(folder: Path, tmp_path: Path, stream: Stream, count: int) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [begin(folder, tmp_path / f"out{i}", 2, 0, i, count, port) for i in range(count)]
    for process in processes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    parts = [lines(tmp_path / f"out{i}") for i in range(count)]
    assert all(len(rows) == BATCH // count for part in parts for rows in part)
    assert [{k: v for rows in steps for k, v in rows.items()} for steps in zip(*parts, strict=True)] == stream


MEMORY = """
import re, sys
from pathlib import Path
from jax_resnet.config import default
from jax_resnet.data.loader import train_batches
from jax_resnet.data.sampling import Phase
from jax_resnet.data.sources import open_dataset
from jax_resnet.runtime.mesh import batch_sharding, data_mesh
c = default().data
c.update(name="folder:" + sys.argv[1], threads=2, workers=int(sys.argv[2]), max_broken=0.2)
c.image.update(size=64, crop="random_resized", randaugment=(2, 9))
resident = []
batches = train_batches(open_dataset(c).train, c, start=0, stop=2000, seed=0, phases=(Phase(0, 2000, None, 16, 0),),
                        sharding=batch_sharding(data_mesh()), report=lambda *_: None)
for i, batch in enumerate(batches):
    if i % 250 == 249:
        resident.append(int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
print(resident)
"""


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays_flat_over_2000_batches(folder: Path, workers: int) -> None:
    done = programs.run([sys.executable, "-c", MEMORY, folder, str(workers)], env=main_env())
    assert done.returncode == 0, done.stderr
    resident = json.loads(done.stdout)  # MiB; of a batch 0.19, so 8 is one in thirty-six kept
    assert max(resident[2:]) - resident[1] < 8, resident
