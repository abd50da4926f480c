"""A dataset written once, to be read fast at random: `jax-resnet prepare SOURCE DESTINATION --resize=256`.

The destination is a TFDS dataset in ArrayRecord files: `config.data.name=prepared:DESTINATION` trains on it. TFDS's own
writer is one process that starts again from nothing; only its names, encoding and facts are used here. `prepare.json`
says what was asked for, what is in each file that is finished, and at the end what is in each split.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from rich.console import Console
from rich.progress import Progress

from jax_resnet.data.image.images import decode
from jax_resnet.data.raw import Source
from jax_resnet.errors import UserError, first_line

BROKEN_SHARE = 0.01  # of all images; more of them are no accident
# At least so many images in a file, and at most so many files in a split, as readers keep all of them open.
SHARD_IMAGES, SHARDS = 1024, 512
UNFINISHED = ".unfinished"  # in the destination: the folder of files that are incomplete

Facts = dict[str, Any]  # of one file: images, bytes, sums of height and width, sizes (at most two), crc32, broken


def write(
    file: Path, split: str, indices: range, source: Source, plan: dict[str, Any], workers: int, tick: Callable[[], Any]
) -> Facts:
    """Write one file, which gets its name when it is complete; return its facts. Broken images are left out.

    Threads make the images ready, as decoders and encoders release Python's lock. Raises OSError for what cannot be
    read or written.
    """
    features, sums, sizes, crc = _features(source.classes), Counter(images=0, bytes=0, height=0, width=0), set(), 0
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    broken: list[str] = []

    def make(index: int) -> tuple[bytes, dict[str, int]] | str:
        data, label, name = source.read(split, index)
        try:
            if not 0 <= label < len(source.classes):
                raise ValueError(f"label {label} is out of range, 0 … {len(source.classes) - 1}")
            data, height, width = _shrink(data, plan["resize"], plan["quality"])
        except ValueError as e:
            return f"{name}: {e}"
        example = serializer.get_tf_example(features.encode_example({"image": io.BytesIO(data), "label": label}))
        record = example.SerializeToString(deterministic=True)
        return record, {"images": 1, "bytes": len(data), "height": height, "width": width}

    part = file.parent / UNFINISHED / file.name
    try:
        # One record a group, as TFDS writes: it is read at random. Images are compressed already.
        writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        with ThreadPoolExecutor(workers) as pool:
            for image in pool.map(make, indices):
                tick()
                if isinstance(image, str):
                    broken.append(image)
                    continue
                record, facts = image
                writer.write(record)
                crc = zlib.crc32(record, crc)
                sums.update(facts)
                sizes.add((facts["height"], facts["width"]))
        writer.close()
    except RuntimeError as e:  # of array_record
        raise OSError(None, first_line(e).partition(";")[0], str(file)) from None
    part.replace(file)
    return {**sums, "sizes": sorted(sizes)[:2], "crc32": crc, "broken": broken}


def check(file: Path, facts: Facts, classes: tuple[str, ...]) -> Counter[str]:
    """Count a file's images by class. Raises UserError if they are not as its facts say or not in range."""
    features, counts, crc = _features(classes), Counter[str](), 0
    try:
        reader = ArrayRecordReader(str(file))
        for _ in range(reader.num_records()):
            record = reader.read()
            crc = zlib.crc32(record, crc)
            example = features.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})
            counts[classes[example["label"]]] += 1
        if (counts.total(), crc) != (facts["images"], facts["crc32"]):
            raise ValueError(f"its {counts.total()} images are not the {facts['images']} that were written")
    except Exception as e:  # array_record's and protobuf's own
        raise UserError(f"{file}: damaged ({first_line(e)}); delete it and run the same command again") from None
    return counts


def _shrink(data: bytes, resize: int | None, quality: int) -> tuple[bytes, int, int]:
    """Shrink an encoded image to bytes, height, width. A small enough one stays as it is; none is enlarged."""
    image = decode(data, 3)
    height, width = image.shape[:2]
    short = min(height, width)
    if resize is None or short <= resize:
        return data, height, width
    height, width = round(height * resize / short), round(width * resize / short)
    smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(smaller, quality, colorsubsampling="420"), height, width


def _features(classes: tuple[str, ...], size: tuple[int | None, int | None] = (None, None)) -> Any:
    """Describe an example in the terms of TFDS; `size` is height and width if all images have one."""
    image = tfds.features.Image(shape=(*size, 3))
    return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=classes)})


def prepare(source: Source, plan: dict[str, Any], destination: Path, workers: int, console: Console) -> None:
    """Write the files that are missing, read all of them again, then write what makes them a dataset.

    Raises UserError if the folder was begun with another plan, more than 1 % of the images are broken, or what is read
    is not what was written; OSError where a file cannot be read or written.
    """
    journal = destination / "prepare.json"
    state = _begun(plan, journal)
    _save(state, journal)
    files: dict[str, Facts] = state["files"]
    shards = _shards(source, destination)
    images, infos, sizes = sum(source.splits.values()), [], set()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        todo = [shard for shard in shards if not (shard[1].name in files and shard[1].exists())]
        bar = progress.add_task("writing", total=sum(len(indices) for *_, indices in todo))
        for split, file, indices in todo:
            facts = write(file, split, indices, source, plan, workers, partial(progress.advance, bar))
            for line in facts["broken"]:
                console.print(line)
            files[file.name] = facts
            broken = sum(len(facts["broken"]) for facts in files.values())
            if broken > BROKEN_SHARE * images:
                raise UserError(
                    f"{plan['source']}: {broken} of {images} images are broken, more than 1 %; "
                    f"repair or remove them, delete {destination} and begin again"
                )
            _save(state, journal)
        for split in source.splits:
            written = [file for name, file, _ in shards if name == split]
            labels = Counter(dict.fromkeys(source.classes, 0))
            for file in progress.track(written, description=f"checking {split}"):
                labels.update(check(file, files[file.name], source.classes))
            parts = [files[file.name] for file in written]
            count, size, *sides = (sum(f[key] for f in parts) for key in ("images", "bytes", "height", "width"))
            height, width = (round(side / max(1, count), 1) for side in sides)
            console.print(f"{split}: {count:,} images, {height:.0f}×{width:.0f} px on average, {size / 1e6:,.1f} MB")
            facts = {"images": count, "bytes": size, "mean_height": height, "mean_width": width, "classes": labels}
            state["splits"][split] = facts
            infos.append(tfds.core.SplitInfo(split, [f["images"] for f in parts], size))
            sizes |= {tuple(pair) for f in parts for pair in f["sizes"]}
    tfds.folder_dataset.write_metadata(
        data_dir=destination,
        features=_features(source.classes, *(sizes if len(sizes) == 1 else ())),
        split_infos=infos,
        version="1.0.0",
        check_data=False,  # that takes TensorFlow
        description="Written by jax-resnet prepare; prepare.json says from what, and how.",
        supervised_keys=("image", "label"),
    )
    _save(state, journal)
    if broken := sum(len(facts["broken"]) for facts in files.values()):
        console.print(f"left out: {broken} broken images, named in {journal}")
    cut = " --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'" if len(infos) == 1 else ""
    console.print(f"to train on it: --config.data.name=prepared:{destination}{cut}")


def _begun(plan: dict[str, Any], journal: Path) -> dict[str, Any]:
    """Read how far the folder is. Raises UserError if it was begun with another plan."""
    state = json.loads(journal.read_text()) if journal.exists() else plan | {"splits": {}, "files": {}}
    for key in ("resize", "quality", "contents"):
        if state[key] != plan[key]:
            was, now = (f"{key}={p[key]} of {p['source']}" for p in (state, plan))
            raise UserError(f"{journal.parent}: begun with {was}, not {now}; give another folder, or delete this one")
    return state


def _shards(source: Source, destination: Path) -> list[tuple[str, Path, range]]:
    """Divide the records into files: the split, the file and the indices of each."""
    return [
        (split, destination / f"images-{split}.array_record-{i:05d}-of-{count:05d}", range(*cut))
        for split, size in source.splits.items()
        for count in [-(-size // max(SHARD_IMAGES, -(-size // SHARDS)))]
        for i, cut in enumerate(pairwise(size * i // count for i in range(count + 1)))
    ]


def _save(state: dict[str, Any], journal: Path) -> None:
    with open(journal.parent / UNFINISHED / journal.name, "w") as part:
        json.dump(state, part, indent=1, ensure_ascii=False)
        part.flush()
        os.fsync(part.fileno())
    os.replace(part.name, journal)


@contextlib.contextmanager
def claim(destination: Path) -> Iterator[None]:
    """Hold a folder against other runs, and rid it of incomplete files: this run's, and those of one that was killed.

    Raises UserError for a folder of something else, or one where another run is at work.
    """
    destination.mkdir(parents=True, exist_ok=True)
    folder = os.open(destination, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        others = {f.name for f in destination.iterdir()} - {UNFINISHED}
        if others and "prepare.json" not in others:
            raise UserError(f"{destination}: has {min(others)} in it, not by this command; give a new folder")
        shutil.rmtree(destination / UNFINISHED, ignore_errors=True)
        (destination / UNFINISHED).mkdir()
        try:
            yield
        finally:
            shutil.rmtree(destination / UNFINISHED, ignore_errors=True)
    except BlockingIOError:
        raise UserError(f"{destination}: another run is writing to it") from None
    finally:
        os.close(folder)
