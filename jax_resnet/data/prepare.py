"""Images made ready once: `jax-resnet prepare SOURCE DESTINATION --resize=256`.

The destination is a TFDS dataset in ArrayRecord files: `config.data.name=prepared:DESTINATION` trains on it. TFDS's own
writer is one process that starts again from nothing; only its names, encoding and facts are used here. `prepare.json`
says what was asked for, what is in each file that is finished, and at the end what is in each split.
"""

import contextlib
import fcntl
import io
import json
import lzma
import os
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from rich.console import Console
from rich.progress import Progress

from jax_resnet.data.dataset import EVAL_SPLITS
from jax_resnet.data.image.images import decode
from jax_resnet.data.sources import class_files
from jax_resnet.data.tfds import image_and_label, tfds_builder
from jax_resnet.errors import UserError, did_you_mean, first_line

BROKEN_SHARE = 0.01  # of all images; more of them are no accident
SHARD_IMAGES, SHARDS = 1024, 512  # at least so many in a file; at most so many files a split, as readers keep all open
UNFINISHED = ".unfinished"  # in the destination: the folder of what is not whole yet

Facts = dict[str, Any]  # of one file: images, bytes, sums of height and width, sizes (at most two), crc32, broken


class Source(NamedTuple):
    """What is to be written."""

    classes: tuple[str, ...]
    splits: dict[str, int]  # how many records
    read: Callable[[str, int], tuple[bytes, int, str]]  # split and index → an image's bytes, its label and its name
    contents: Any  # what tells it from another source


def list_folder(root: Path) -> Source:
    """The images of class folders, or of train/ and evaluation parts with class folders, in an order drawn once.

    Raises UserError where there are none, for a class without images, or one that train/ does not have.
    """
    parts = {split: root / split for split in ("train", *EVAL_SPLITS) if (root / split).is_dir()}
    if "train" not in parts:
        parts = {"train": root}
    found = {split: class_files(part, str(root)) for split, part in parts.items()}
    classes = tuple(found["train"])
    entries = {}
    for split, folders in found.items():
        if strangers := folders.keys() - found["train"].keys():
            name = min(strangers)
            raise UserError(f"{parts[split] / name}: train/ has no such class; {did_you_mean(name, classes)}")
        listed = [(file, label) for label, name in enumerate(classes) for file in folders.get(name, [])]
        # Not class by class: train[:90%], for one, is then of all classes.
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(listed))
        entries[split] = [listed[i] for i in order]

    def read(split: str, index: int) -> tuple[bytes, int, str]:
        file, label = entries[split][index]
        return file.read_bytes(), label, str(file.relative_to(root))

    contents = [(str(f.relative_to(root)), label, f.stat().st_size) for e in entries.values() for f, label in e]
    return Source(classes, {split: len(e) for split, e in entries.items()}, read, contents)


def extract(archive: Path, folder: Path) -> Path:
    """Unpacks a .tar, compressed or not; gives the one folder that holds everything, as in most, or else `folder`.

    Raises UserError for an archive that is damaged or cut short, or has links, devices or paths that lead out of it.
    """
    folder.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _unpack(tar, member, folder)
            # Else what is cut between two members would pass for all of it.
            if tar.fileobj is None or tar.fileobj.tell() - tar.offset != tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise UserError(f"{archive}: cannot be unpacked as a .tar ({first_line(e)})") from None
    inside = [d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")]
    return inside[0] if len(inside) == 1 and inside[0].name != "train" else folder


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Writes one file of an archive below `folder`. The standard library's filters came with Python 3.11.4."""
    path = PurePosixPath(member.name.lstrip("/"))
    if ".." in path.parts or not (member.isfile() or member.isdir()):  # links lead out, too
        raise tarfile.ReadError(f"{member.name!r} leads out of it, or is a link or device")
    (folder / path if member.isdir() else (folder / path).parent).mkdir(parents=True, exist_ok=True)
    if source := tar.extractfile(member):
        with source, open(folder / path, "wb") as file:
            shutil.copyfileobj(source, file)


def list_tfds(name: str, data_dir: str | None) -> Source:
    """The splits of a TFDS dataset that have labels, in its order. Raises UserError as training on it would."""
    try:
        builder = tfds_builder(name, data_dir)
        image, label = image_and_label(builder, name)
    except UserError as e:
        raise UserError(str(e).replace("config.data.name=", "tfds:", 1)) from None
    records = {
        split: builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
        for split, info in builder.info.splits.items()
        if info.num_examples
    }

    def read(split: str, index: int) -> tuple[bytes, int, str]:
        try:
            example = records[split][index]
        except Exception as e:  # array_record and protobuf each raise their own
            raise UserError(f"tfds:{name}: {split} record {index} cannot be read ({first_line(e)})") from None
        return example[image], int(example[label]), f"{split} record {index}"

    for split in [split for split in records if read(split, 0)[1] < 0]:  # as ImageNet's test
        print(f"{split}: left out, it has no labels")
        del records[split]
    splits = {split: len(found) for split, found in records.items()}
    return Source(tuple(builder.info.features[label].names), splits, read, (name, splits))


def write(
    file: Path, split: str, indices: range, source: Source, plan: dict[str, Any], workers: int, tick: Callable[[], Any]
) -> Facts:
    """Writes one file, which has its name when it is whole; gives its facts. Broken images are left out.

    Threads make the images ready, as decoders and encoders let go of Python's lock. Raises OSError for what cannot be
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
            for image in pool.map(make, indices):  # left early, it cancels what is not begun
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
    except RuntimeError as e:  # array_record's
        raise OSError(None, first_line(e).partition(";")[0], str(file)) from None
    part.replace(file)
    return {**sums, "sizes": sorted(sizes)[:2], "crc32": crc, "broken": broken}


def check(file: Path, facts: Facts, classes: tuple[str, ...]) -> Counter[str]:
    """Counts a file's images by class. Raises UserError if they are not as its facts say or not in range."""
    features, found, crc = _features(classes), Counter[str](), 0
    try:
        reader = ArrayRecordReader(str(file))
        for _ in range(reader.num_records()):
            record = reader.read()
            crc = zlib.crc32(record, crc)
            example = features.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})
            found[classes[example["label"]]] += 1
        if (found.total(), crc) != (facts["images"], facts["crc32"]):
            raise ValueError(f"its {found.total()} images are not the {facts['images']} that were written")
    except Exception as e:  # array_record and protobuf each raise their own
        raise UserError(f"{file}: damaged ({first_line(e)}); delete it and run the same command again") from None
    return found


def _shrink(data: bytes, resize: int | None, quality: int) -> tuple[bytes, int, int]:
    """What to store of an image: bytes, height, width. What is small enough stays as it is; nothing is enlarged."""
    image = decode(data, 3)
    height, width = image.shape[:2]
    short = min(height, width)
    if resize is None or short <= resize:
        return data, height, width
    height, width = round(height * resize / short), round(width * resize / short)
    smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(smaller, quality, colorsubsampling="420"), height, width


def _features(classes: tuple[str, ...], size: tuple[int | None, int | None] = (None, None)) -> Any:
    """What an example holds, in the terms of TFDS; `size` is height and width if all images have one."""
    image = tfds.features.Image(shape=(*size, 3))
    return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=classes)})


def prepare(source: Source, plan: dict[str, Any], destination: Path, workers: int, console: Console) -> None:
    """Writes the files that are not there yet, reads all of them again, then writes what makes them a dataset.

    Raises UserError if the folder was begun with another plan, more than 1 % of the images are broken, or what is read
    is not what was written; OSError where a file cannot be read or written.
    """
    state, journal = plan | {"splits": {}, "files": {}}, destination / "prepare.json"
    if journal.exists():
        state = json.loads(journal.read_text())
    for key in ("resize", "quality", "contents"):
        if state[key] != plan[key]:
            was, now = (f"{key}={p[key]} of {p['source']}" for p in (state, plan))
            raise UserError(f"{destination}: begun with {was}, not {now}; give another folder, or delete this one")
    _save(state, journal)
    files: dict[str, Facts] = state["files"]
    shards = [
        (split, destination / f"images-{split}.array_record-{i:05d}-of-{count:05d}", range(*cut))
        for split, size in source.splits.items()
        for count in [-(-size // max(SHARD_IMAGES, -(-size // SHARDS)))]
        for i, cut in enumerate(pairwise(size * i // count for i in range(count + 1)))
    ]
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
            mine = [file for of, file, _ in shards if of == split]
            found, labels = [files[file.name] for file in mine], Counter(dict.fromkeys(source.classes, 0))
            for file in progress.track(mine, description=f"checking {split}"):
                labels.update(check(file, files[file.name], source.classes))
            count, size, *sides = (sum(f[key] for f in found) for key in ("images", "bytes", "height", "width"))
            height, width = (round(side / max(1, count), 1) for side in sides)
            console.print(f"{split}: {count:,} images, {height:.0f}×{width:.0f} px on average, {size / 1e6:,.1f} MB")
            facts = {"images": count, "bytes": size, "mean_height": height, "mean_width": width, "classes": labels}
            state["splits"][split] = facts
            infos.append(tfds.core.SplitInfo(split, [f["images"] for f in found], size))
            sizes |= {tuple(pair) for f in found for pair in f["sizes"]}
    tfds.folder_dataset.write_metadata(
        data_dir=destination,
        features=_features(source.classes, *(sizes if len(sizes) == 1 else ())),
        split_infos=infos,
        version="1.0.0",
        check_data=False,  # that takes TensorFlow
        description="Written by jax_resnet.data.prepare; prepare.json says from what, and how.",
        supervised_keys=("image", "label"),
    )
    _save(state, journal)
    if broken := sum(len(facts["broken"]) for facts in files.values()):
        console.print(f"left out: {broken} broken images, named in {journal}")
    cut = " --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'" if len(infos) == 1 else ""
    console.print(f"to train on it: --config.data.name=prepared:{destination}{cut}")


def _save(state: dict[str, Any], journal: Path) -> None:
    with open(journal.parent / UNFINISHED / journal.name, "w") as part:
        json.dump(state, part, indent=1, ensure_ascii=False)
        part.flush()
        os.fsync(part.fileno())
    os.replace(part.name, journal)


@contextlib.contextmanager
def claim(destination: Path) -> Iterator[None]:
    """Holds a folder against other runs, and rids it of what is not whole: this run's, and that of one that was killed.

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
