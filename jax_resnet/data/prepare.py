"""Write a dataset for fast random access: `jax-resnet prepare SOURCE DESTINATION --resize=256`.

The destination is a TFDS dataset in ArrayRecord files: `config.data.name=prepared:DESTINATION`
trains on it. TFDS's own writer is one process that cannot resume; only its names, encoding and
metadata are used here. `prepare.json` holds what was asked for, what is in each finished file, and
at the end what is in each split.
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
SHARD_IMAGES = 1024  # in a file, at least
MAX_SHARDS = 512  # of a split: readers keep all of them open
UNFINISHED = ".unfinished"  # the destination's folder of incomplete files

# What one file holds: images, bytes, sums of height and width, sizes (at most two), crc32, broken.
Facts = dict[str, Any]


def write(
    file: Path,
    split: str,
    indices: range,
    source: Source,
    plan: dict[str, Any],
    workers: int,
    tick: Callable[[], Any],
) -> Facts:
    """Write one file, which gets its name when it is complete, and return its facts.

    Broken images are left out. Threads encode the examples, as codecs release Python's lock.
    Raises OSError for what cannot be read or written.
    """
    features = _features(source.classes)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    sums = Counter(images=0, bytes=0, height=0, width=0)
    sizes: set[tuple[int, int]] = set()
    broken: list[str] = []
    crc = 0

    def encode(index: int) -> tuple[bytes, dict[str, int]] | str:
        data, label, name = source.read(split, index)
        try:
            if not 0 <= label < len(source.classes):
                raise ValueError(f"label {label} is out of range, 0 … {len(source.classes) - 1}")
            data, height, width = _shrink(data, plan["resize"], plan["quality"])
        except ValueError as e:
            return f"{name}: {e}"
        example = features.encode_example({"image": io.BytesIO(data), "label": label})
        record = serializer.get_tf_example(example).SerializeToString(deterministic=True)
        return record, {"images": 1, "bytes": len(data), "height": height, "width": width}

    part = file.parent / UNFINISHED / file.name
    try:
        # Groups of one record, as TFDS writes, for random access; images are compressed already.
        writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        with ThreadPoolExecutor(workers) as pool:
            for image in pool.map(encode, indices):
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
    """Count a file's images by class.

    Raises UserError if they differ from the file's facts or a label is out of range.
    """
    features = _features(classes)
    decoders = {"image": tfds.decode.SkipDecoding()}
    counts = Counter[str]()
    crc = 0
    try:
        reader = ArrayRecordReader(str(file))
        for _ in range(reader.num_records()):
            record = reader.read()
            crc = zlib.crc32(record, crc)
            example = features.deserialize_example_np(record, decoders=decoders)
            counts[classes[example["label"]]] += 1
        if (counts.total(), crc) != (facts["images"], facts["crc32"]):
            written = facts["images"]
            raise ValueError(f"its {counts.total()} images are not the {written} that were written")
    except Exception as e:  # array_record and protobuf share no class
        remedy = "delete it and run the same command again"
        raise UserError(f"{file}: damaged ({first_line(e)}); {remedy}") from None
    return counts


def _shrink(data: bytes, resize: int | None, quality: int) -> tuple[bytes, int, int]:
    """Shrink an encoded image's short side to `resize` pixels, if it is longer.

    Returns the encoded image, its height and its width.
    """
    image = decode(data, 3)
    height, width = image.shape[:2]
    short = min(height, width)
    if resize is None or short <= resize:
        return data, height, width
    height, width = round(height * resize / short), round(width * resize / short)
    smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(smaller, quality, colorsubsampling="420"), height, width


def _features(classes: tuple[str, ...], size: tuple[int | None, int | None] = (None, None)) -> Any:
    """Describe an example for TFDS; `size` is height and width where all images share them."""
    image = tfds.features.Image(shape=(*size, 3))
    return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=classes)})


def prepare(source: Source, plan: dict[str, Any], destination: Path, workers: int, console: Console) -> None:
    """Write the files that are missing, read all files again, then write the dataset's metadata.

    Raises UserError if the folder was begun with another plan, more than 1 % of the images are
    broken, or what is read is not what was written; OSError where a file cannot be read or written.
    """
    journal = destination / "prepare.json"
    state = _resume(plan, journal)
    _save(state, journal)
    files: dict[str, Facts] = state["files"]
    shards = _shards(source, destination)
    infos, sizes = [], set()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        missing = [shard for shard in shards if not (shard[1].name in files and shard[1].exists())]
        bar = progress.add_task("writing", total=sum(len(indices) for *_, indices in missing))
        for split, file, indices in missing:
            facts = write(file, split, indices, source, plan, workers, partial(progress.advance, bar))
            for line in facts["broken"]:
                console.print(line)
            files[file.name] = facts
            _check_broken(files, source, plan, destination)
            _save(state, journal)
        for split in source.splits:
            written = [file for name, file, _ in shards if name == split]
            labels = Counter(dict.fromkeys(source.classes, 0))
            for file in progress.track(written, description=f"checking {split}"):
                labels.update(check(file, files[file.name], source.classes))
            parts = [files[file.name] for file in written]
            facts = state["splits"][split] = _sum_facts(parts) | {"classes": labels}
            console.print(
                f"{split}: {facts['images']:,} images, {facts['mean_height']:.0f}×"
                f"{facts['mean_width']:.0f} px on average, {facts['bytes'] / 1e6:,.1f} MB"
            )
            lengths = [part["images"] for part in parts]
            infos.append(tfds.core.SplitInfo(split, lengths, facts["bytes"]))
            sizes |= {tuple(size) for part in parts for size in part["sizes"]}
    tfds.folder_dataset.write_metadata(
        data_dir=destination,
        features=_features(source.classes, sizes.pop() if len(sizes) == 1 else (None, None)),
        split_infos=infos,
        version="1.0.0",
        check_data=False,  # that takes TensorFlow
        description="Written by jax-resnet prepare; prepare.json says from what, and how.",
        supervised_keys=("image", "label"),
    )
    _save(state, journal)
    if broken := _count_broken(files):
        console.print(f"left out: {broken} broken images, named in {journal}")
    use = f"to train on it: --config.data.name=prepared:{destination}"
    if len(infos) == 1:
        use += " --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'"
    console.print(use)


def _count_broken(files: dict[str, Facts]) -> int:
    return sum(len(facts["broken"]) for facts in files.values())


def _check_broken(files: dict[str, Facts], source: Source, plan: dict[str, Any], to: Path) -> None:
    """Raise UserError if too many of the source's images are broken."""
    images, broken = sum(source.splits.values()), _count_broken(files)
    if broken > BROKEN_SHARE * images:
        raise UserError(
            f"{plan['source']}: {broken} of {images} images are broken, more than 1 %; "
            f"repair or remove them, delete {to} and begin again"
        )


def _sum_facts(parts: list[Facts]) -> Facts:
    """Sum the images and bytes of a split's files; heights and widths become means, in pixels."""
    facts: Facts = {key: sum(part[key] for part in parts) for key in ("images", "bytes")}
    for side in ("height", "width"):
        total = sum(part[side] for part in parts)
        facts[f"mean_{side}"] = round(total / max(1, facts["images"]), 1)
    return facts


def _resume(plan: dict[str, Any], journal: Path) -> dict[str, Any]:
    """Read how far the folder is. Raises UserError if it was begun with another plan."""
    if not journal.exists():
        return plan | {"splits": {}, "files": {}}
    state = json.loads(journal.read_text())
    for key in ("resize", "quality", "contents"):
        if state[key] != plan[key]:
            was, now = (f"{key}={p[key]} of {p['source']}" for p in (state, plan))
            raise UserError(f"{journal.parent}: begun with {was}, not {now}; give another folder, or delete this one")
    return state


def _shards(source: Source, destination: Path) -> list[tuple[str, Path, range]]:
    """Divide the records into files: the split, the file and the indices of each."""
    shards = []
    for split, size in source.splits.items():
        count = -(-size // max(SHARD_IMAGES, -(-size // MAX_SHARDS)))
        ends = [size * i // count for i in range(count + 1)]
        for i, (start, end) in enumerate(pairwise(ends)):
            file = destination / f"images-{split}.array_record-{i:05d}-of-{count:05d}"
            shards.append((split, file, range(start, end)))
    return shards


def _save(state: dict[str, Any], journal: Path) -> None:
    with open(journal.parent / UNFINISHED / journal.name, "w") as part:
        json.dump(state, part, indent=1, ensure_ascii=False)
        part.flush()
        os.fsync(part.fileno())
    os.replace(part.name, journal)


@contextlib.contextmanager
def claim(destination: Path) -> Iterator[None]:
    """Lock a folder against other runs; remove incomplete files before, a killed run's, and after.

    Raises UserError if the folder holds something else, or another run writes to it.
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
