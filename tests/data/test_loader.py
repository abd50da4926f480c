"""Batches: functions of (seed, step) whatever the threads, the start and the hosts; evaluation of each example once."""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from ml_collections import ConfigDict
from tiny import data_config

from jax_resnet.data import loader
from jax_resnet.data.batches import generator, train_batch
from jax_resnet.data.dataset import Split
from jax_resnet.data.image.pixels import Pixels
from jax_resnet.data.image.split import ArraySplit, EncodedSplit
from jax_resnet.data.loader import eval_batches, train_batches
from jax_resnet.data.sampling import Phase, train_indices
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import TransientError, UserError
from jax_resnet.runtime.mesh import batch_sharding


@pytest.fixture(scope="module")
def sharding() -> NamedSharding:
    """Of batches on one device."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return batch_sharding(mesh)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """12 noisy images of many sizes in files, cropped at random to 8×8 when training reads them."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part in ("train", "val"):
        for cls in "abc":
            (root / part / cls).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (rng.integers(10, 30), rng.integers(10, 30), 3), dtype=np.uint8)
                (root / part / cls / f"{i}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return open_dataset(data_config(name=f"folder:{root}", size=8, crop="random_resized")).train


def numbered(count: int, **image: Any) -> ArraySplit:
    """2×2 images; the pixels of each, and its label, are its number."""
    numbers = np.arange(count)
    images = np.broadcast_to(numbers[:, None, None, None], (count, 2, 2, 1)).astype(np.uint8)
    return ArraySplit(
        "numbered", Pixels.of(reading(channels=1, crop="none", **image).image, None), images, numbers.astype(np.int32)
    )


def reading(**changes: Any) -> ConfigDict:
    """config.data with one reading thread, or as `changes` say."""
    return data_config(**{"threads": 1, "workers": 0} | changes)


def evaluated(split: Split, sharding: NamedSharding, batch_size: int, threads: int = 1) -> list[dict[str, np.ndarray]]:
    c = reading(threads=threads)
    return as_numpy(eval_batches(split, c, batch_size=batch_size, sharding=sharding, report=no_report))


def no_report(split: str, name: str, reason: str) -> None:
    raise AssertionError(f"{name} was reported as broken: {reason}")


def one_phase(batch_size: int, image_size: int | None = None) -> tuple[Phase]:
    """Batches alike to the end."""
    return (Phase(0, 10**9, image_size, batch_size, 0),)


def as_numpy(batches) -> list[dict[str, np.ndarray]]:
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in batches]


def assert_equal_batches(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**32 - 1])
def test_every_record_of_every_epoch_has_its_own_crops(seed):
    streams = {generator(seed, epoch, record).integers(2**63) for epoch in range(20) for record in range(20)}
    assert len(streams) == 400


# ---- one training batch ----------------------------------------------------------------------------------------------


def test_rows_are_the_same_read_together_or_in_parts_and_in_any_order(photos):
    def read(rows):
        return train_batch(photos, 2, seed=5, phase=one_phase(8)[0], rows=np.array(rows))

    whole = read(range(8))
    second, first, backwards = read(range(4, 8)), read(range(4)), read(range(7, -1, -1))
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), whole[name])
        np.testing.assert_array_equal(backwards[name][::-1], whole[name])


def pixels_by_record(split: Split, *, seed: int, batch_size: int, steps: int) -> dict[tuple[int, int], bytes]:
    """(epoch, record) → the pixels that training saw of it."""
    seen = {}
    for step in range(steps):
        records, epochs = train_indices(seed, step * batch_size, batch_size, len(split))
        phase, rows = one_phase(batch_size)[0], np.arange(batch_size)
        images = train_batch(split, step, seed=seed, phase=phase, rows=rows)["image"]
        seen |= {(int(e), int(r)): i.tobytes() for e, r, i in zip(epochs, records, images, strict=True)}
    return seen


def test_the_crop_of_a_record_depends_on_its_epoch_and_not_on_its_place_in_a_batch(photos):
    by_8 = pixels_by_record(photos, seed=0, batch_size=8, steps=3)  # two epochs of 12
    assert len(by_8) == 24
    assert pixels_by_record(photos, seed=0, batch_size=6, steps=4) == by_8
    assert all(by_8[0, record] != by_8[1, record] for record in range(12))


def test_the_crops_depend_on_the_seed(photos):
    one, two = (pixels_by_record(photos, seed=seed, batch_size=12, steps=1) for seed in (1, 2))
    assert one.keys() == two.keys()
    assert all(one[key] != two[key] for key in one)


def test_a_batch_holds_the_records_of_its_step():
    batch = train_batch(numbered(20), 7, seed=1, phase=one_phase(6)[0], rows=np.array([0, 3, 5]))
    expected = train_indices(1, 42, 6, 20)[0][[0, 3, 5]]
    assert batch["label"].tolist() == expected.tolist()
    assert batch["image"].dtype == np.uint8
    assert batch["image"].shape == (3, 2, 2, 1)
    assert batch["image"][:, 0, 0, 0].tolist() == expected.tolist()


def mirrored_by_record(seed: int, batch_size: int, steps: int, count: int, **how: Any) -> dict[int, dict[int, bool]]:
    """Record → epoch → whether it is to be mirrored."""
    seen: dict[int, dict[int, bool]] = {}
    options = {"seed": seed, "phase": one_phase(batch_size)[0], "rows": np.arange(batch_size), **how}
    for step in range(steps):
        records, epochs = train_indices(seed, step * batch_size, batch_size, count, how.get("repeats", 1))
        batch = train_batch(numbered(count, flip_alternate=True), step, **options)
        assert (batch["mirrored"].shape, batch["mirrored"].dtype) == ((batch_size,), bool)
        for epoch, record, mirrored in zip(epochs.tolist(), records.tolist(), batch["mirrored"].tolist(), strict=True):
            seen.setdefault(record, {})[epoch] = mirrored
    return seen


def test_alternating_flip_mirrors_half_of_the_records_first_and_each_in_every_other_epoch():
    seen = mirrored_by_record(0, 50, 20, 250)  # four epochs
    assert len(seen) == 250
    for epochs in seen.values():
        assert [epochs[epoch] for epoch in range(4)] == 2 * [epochs[0], not epochs[0]]
    first = [epochs[0] for epochs in seen.values()]
    assert abs(sum(first) - 125) < 5 * np.sqrt(250 / 4)
    assert mirrored_by_record(0, 40, 25, 250) == seen  # whatever the batch
    other = mirrored_by_record(1, 50, 5, 250)
    differ = sum(other[record][0] != seen[record][0] for record in range(250))
    assert abs(differ - 125) < 5 * np.sqrt(250 / 4)


def test_alternating_flip_shows_both_sides_of_a_record_repeated_in_a_batch():
    seen = mirrored_by_record(0, 20, 10, 100, repeats=2)
    assert all(epochs[0] != epochs[1] for epochs in seen.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_says_which_images_to_mirror_whoever_reads(photos, sharding, workers):
    c = reading(workers=workers)
    photos = dataclasses.replace(photos, pixels=dataclasses.replace(photos.pixels, flip_alternate=True))
    options = {"seed": 3, "phases": one_phase(5), "report": no_report}
    feed = train_batches(photos, c, start=0, stop=4, sharding=sharding, **options)
    found = as_numpy(feed)
    expected = [train_batch(photos, s, seed=3, phase=one_phase(5)[0], rows=np.arange(5)) for s in range(4)]
    assert [batch.pop("broken") for batch in expected] == 4 * [[]]
    assert_equal_batches(found, expected)
    feed.close()


# ---- the stream of training ------------------------------------------------------------------------------------------


def stream(split: Split, sharding: NamedSharding, start: int, stop: int, threads: int = 2, **changes: Any):
    options = {"seed": 3, "phases": one_phase(5), "report": no_report} | changes
    c = reading(threads=threads)
    return as_numpy(train_batches(split, c, start=start, stop=stop, sharding=sharding, **options))


def test_the_stream_is_the_batches_of_its_steps(photos, sharding):
    expected = [train_batch(photos, s, seed=3, phase=one_phase(5)[0], rows=np.arange(5)) for s in range(6)]
    assert [batch.pop("broken") for batch in expected] == 6 * [[]]
    assert_equal_batches(stream(photos, sharding, 0, 6), expected)


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_stream_begun_later_is_the_tail_of_the_whole(photos, sharding, start):
    assert_equal_batches(stream(photos, sharding, start, 10), stream(photos, sharding, 0, 10)[start:])


@pytest.mark.parametrize("threads", [2, 7])
def test_any_number_of_threads_gives_the_same_batches(photos, sharding, threads):
    assert_equal_batches(stream(photos, sharding, 0, 12, threads), stream(photos, sharding, 0, 12, threads=1))


@pytest.mark.parametrize(("start", "stop"), [(4, 4), (4, 5), (0, 1), (0, 2), (0, 3)])
def test_the_stream_has_a_batch_for_each_step(sharding, start, stop):
    assert len(stream(numbered(20), sharding, start, stop)) == stop - start


def test_batches_are_on_the_devices_as_uint8_pixels_and_int32_labels(sharding):
    split, options = numbered(9), {"seed": 0, "phases": one_phase(4), "report": no_report}
    batch = next(train_batches(split, reading(), start=0, stop=1, sharding=sharding, **options))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((4, 2, 2, 1), "uint8"),
        "label": ((4,), "int32"),
    }
    assert all(value.sharding.is_equivalent_to(sharding, value.ndim) for value in batch.values())


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 9, 10, 11, 64])
def test_evaluation_takes_each_example_once_whatever_the_batch(sharding, batch_size, threads):
    batches = evaluated(numbered(10), sharding, batch_size, threads)
    assert len(batches) == -(-10 // batch_size)
    assert all(value.shape[0] == batch_size for batch in batches for value in batch.values())
    assert all(batch["mask"].dtype == bool for batch in batches)
    labels, masks = (np.concatenate([batch[name] for batch in batches]) for name in ("label", "mask"))
    pixels = np.concatenate([batch["image"][:, 1, 1, 0] for batch in batches])
    assert labels[masks].tolist() == list(range(10))
    assert pixels.tolist() == labels.tolist()
    assert masks.sum() == 10


def test_evaluation_crops_the_centre(photos, sharding):
    found = evaluated(photos, sharding, 5, threads=2)
    expected = photos.read(np.arange(12), None).arrays["image"]
    np.testing.assert_array_equal(np.concatenate([b["image"][b["mask"]] for b in found]), expected)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_evaluate_what_one_host_does(sharding, monkeypatch, hosts):
    alone = evaluated(numbered(10), sharding, 8)
    monkeypatch.setattr(loader, "global_batch", lambda sharding, local: local)
    parts = []
    for host in range(hosts):
        rows = np.arange(8).reshape(hosts, -1)[host]
        monkeypatch.setattr(loader, "local_rows", lambda sharding, batch_size, rows=rows: rows)
        parts.append(evaluated(numbered(10), sharding, 8))
    together = [
        {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert_equal_batches(together, alone)


# ---- faults ----------------------------------------------------------------------------------------------------------


class Faulty(ArraySplit):
    """A split whose record 7 cannot be read."""

    def read(self, indices, rngs, size=None):
        if 7 in indices:
            raise UserError("numbered split: record 7: broken")
        return super().read(indices, rngs, size)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "batches",
    [
        lambda *of, **options: train_batches(*of, start=0, stop=5, seed=0, phases=one_phase(2), **options),
        lambda *of, **options: eval_batches(*of, batch_size=2, **options),
    ],
    ids=["train", "eval"],
)
def test_a_user_error_in_a_reading_thread_arrives_as_it_is(
    sharding: NamedSharding, batches: Callable[..., Any], threads: int
):
    good = numbered(10)
    split = Faulty(good.name, good.pixels, good.images, good.labels)
    with pytest.raises(UserError) as e:
        list(batches(split, reading(threads=threads), sharding=sharding, report=no_report))
    assert str(e.value) == "numbered split: record 7: broken"


class Breaking(ArraySplit):
    """A split in which reading raises an error that is nobody's mistake."""

    def read(self, indices, rngs, size=None):
        raise RuntimeError("a fault of the reader")


def test_an_error_of_a_reading_thread_arrives_with_its_traceback(sharding: NamedSharding):
    good = numbered(10)
    split = Breaking(good.name, good.pixels, good.images, good.labels)
    with pytest.raises(RuntimeError, match=r"^a fault of the reader") as e:
        stream(split, sharding, 0, 3)
    assert any(entry.name == "read" for entry in e.traceback)


class Stuck(EncodedSplit):
    """A split whose records never come."""

    def read(self, indices, rngs, size=None):
        while True:
            time.sleep(1)


@pytest.fixture
def stuck(photos, sharding) -> loader.Feed:
    """A feed whose one worker process is reading for ever."""
    split = Stuck(photos.name, photos.pixels, photos.length, photos.records, photos.num_classes)
    batches = train_batches(
        split, reading(workers=1), start=0, stop=5, seed=0, phases=one_phase(2), sharding=sharding, report=no_report
    )
    batches._coming.append(batches._thread.submit(batches._put))
    while not batches._enrolled():
        time.sleep(0.01)
    return batches


def test_a_killed_reader_may_pass(stuck: loader.Feed):
    (pid,) = stuck._enrolled()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(TransientError, match=r"^a process that reads images has ended: .*exit code -9") as e:
        stuck.take()
    assert isinstance(e.value.__cause__, RuntimeError)
    stuck.close()


def test_closing_kills_the_readers_that_it_started_and_nobody_elses(stuck: loader.Feed, monkeypatch):
    (pid,) = stuck._enrolled()
    monkeypatch.setattr(loader, "PATIENCE", 0.01)
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,), daemon=True)
    child.start()
    try:
        stuck.close()
        assert child.is_alive()
        assert pid not in {process.pid for process in multiprocessing.active_children()}
    finally:
        child.kill()
        child.join()


def test_a_file_that_is_damaged_while_training_is_named(tmp_path: Path, sharding: NamedSharding):
    for part in ("train/a", "val/a"):
        (tmp_path / part).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "1.png"), np.zeros((8, 8, 3), np.uint8))
    split = open_dataset(data_config(name=f"folder:{tmp_path}", size=8)).train
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^train split: .*/train/a/1\.png: not an image"):
        stream(split, sharding, 0, 3)
