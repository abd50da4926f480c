"""Images made ready once: `python -m jax_resnet.data.prepare SOURCE DESTINATION --resize=256`.

The destination is a TFDS dataset in ArrayRecord files: `config.data.name=prepared:DESTINATION` trains on it. TFDS's own
writer is one process that starts again from nothing; only its names, encoding and facts are used here. Beside them
`prepare.json` says what was done, and `shards/` what is in each file, so that a run that was killed can go on.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_resnet.command import Parser, run
from jax_resnet.data.images import decode
from jax_resnet.data.source import IMAGE_SUFFIXES
from jax_resnet.data.split import EVAL_SPLITS
from jax_resnet.data.tfds_source import image_and_label, tfds_builder
from jax_resnet.errors import UserError, did_you_mean

BROKEN_SHARE = 0.01  # of all images; more of them are no accident
SHARD_IMAGES, SHARDS = 1024, 512  # at least so many in a file; at most so many files a split, as readers keep all open
SKIP = {"image": tfds.decode.SkipDecoding()}


@dataclass(frozen=True)
class Source:
    """What is to be written. `read(split, entries)` gives the bytes, label and name of each."""

    classes: tuple[str, ...]
    splits: dict[str, Sequence[Any]]  # entries
    read: Callable[[str, Sequence[Any]], Iterator[tuple[bytes, int, str]]]
    left_alone: dict[str, int]  # how many files have a suffix that is not an image's; folders that are no split, as x/


@dataclass(frozen=True, eq=False)
class Shard:
    """One file to write."""

    file: Path
    split: str
    source: Source  # without its splits
    entries: Sequence[Any]
    resize: int | None  # pixels of the short side; None: bytes are copied as they are
    quality: int | None

    @property
    def facts(self) -> Path:
        """The file that says what is in it."""
        return self.file.parent / "shards" / f"{self.file.name}.json"


# ---- what there is ---------------------------------------------------------------------------------------------------


def list_folder(root: Path) -> Source:
    """The images of class folders, or of train/ and evaluation parts with class folders, in an order drawn once.

    Raises UserError where there are none, for a class without images, or one that train/ does not have.
    """
    folders = _subfolders(root)
    parts = {n: folders[n] for n in ("train", *EVAL_SPLITS) if n in folders} if "train" in folders else {"train": root}
    left_alone = Counter(f"{n}/" for n in folders.keys() - parts.keys() if "train" in folders)
    classes = tuple(_subfolders(parts["train"]))
    splits: dict[str, Sequence[Any]] = {}
    for split, part in parts.items():
        entries: list[tuple[str, int, int]] = []  # path below root, label, bytes
        for name, folder in _subfolders(part).items():
            if name not in classes:
                raise UserError(f"{folder}: train/ has no such class; {did_you_mean(name, classes)}")
            files = [Path(at, f) for at, _, names in os.walk(folder) for f in names if not f.startswith(".")]
            images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
            left_alone.update(f.suffix.lower() or "no suffix" for f in files if f.suffix.lower() not in IMAGE_SUFFIXES)
            if not images:
                raise UserError(f"{folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
            entries += [(str(f.relative_to(root)), classes.index(name), f.stat().st_size) for f in images]
        if not entries:
            raise UserError(f"{part}: no class folders in it")
        entries.sort()
        # Not class by class: train[:90%], for one, is then of all classes.
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(entries))
        splits[split] = [entries[i] for i in order]
    return Source(classes, splits, functools.partial(_read_files, root), dict(sorted(left_alone.items())))


def _read_files(root: Path, split: str, entries: Sequence[Any]) -> Iterator[tuple[bytes, int, str]]:
    for path, label, _ in entries:
        yield (root / path).read_bytes(), label, path


def _subfolders(folder: Path) -> dict[str, Path]:
    return {d.name: d for d in sorted(folder.iterdir()) if d.is_dir() and not d.name.startswith(".")}


def extract(archive: Path, folder: Path) -> Path:
    """Unpacks a .tar, compressed or not; gives the one folder that holds everything, as in most, or else `folder`.

    Raises UserError for an archive that cannot be read, or has links, devices or paths that lead out of it.
    """
    folder.mkdir()
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                path = Path(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise UserError(f"{archive}: {member.name!r} is a link or device, or leads out of the archive")
                tar.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise UserError(f"{archive}: cannot be read as a .tar ({e})") from None
    inside = _subfolders(folder)
    return folder if len(inside) != 1 or "train" in inside else next(iter(inside.values()))


def list_tfds(name: str, data_dir: str | None) -> Source:
    """All splits of a TFDS dataset, in its order. Raises UserError as training on it would."""
    builder, _, label = _open_tfds(name, data_dir)
    splits: dict[str, Sequence[Any]] = {s: range(n) for s, i in builder.info.splits.items() if (n := i.num_examples)}
    return Source(tuple(builder.info.features[label].names), splits, functools.partial(_read_tfds, name, data_dir), {})


def _read_tfds(name: str, data_dir: str | None, split: str, entries: range) -> Iterator[tuple[bytes, int, str]]:
    builder, image, label = _open_tfds(name, data_dir)
    records = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
    for i in entries:
        example = records[i]
        yield example[image], int(example[label]), f"{split} record {i}"


@functools.cache
def _open_tfds(name: str, data_dir: str | None) -> tuple[Any, str, str]:
    try:
        builder = tfds_builder(name, data_dir)
        return builder, *image_and_label(builder, name)
    except UserError as e:
        raise UserError(str(e).replace(f"config.data.name={name}:", f"tfds:{name}:")) from None


# ---- one file --------------------------------------------------------------------------------------------------------


def make_shard(shard: Shard) -> None:
    """Writes one file and its facts, if they are not there yet, and checks it: all of it read, two images decoded.

    Raises UserError for what cannot be read or written, or is not as its facts say.
    """
    if not (shard.file.exists() and shard.facts.exists()):
        _write(shard)
    names, classes = shard.source.classes, Counter[str]()
    features = _features(names, None)
    try:
        reader = ArrayRecordReader(str(shard.file))
        count = reader.num_records()
        for i in range(count):
            example = features.deserialize_example_np(reader.read(), decoders=SKIP)
            classes[names[int(example["label"])]] += 1
            if i in (0, count - 1):
                decode(example["image"], 3)
        if classes != _read_json(shard.facts)["classes"]:
            raise ValueError(f"its {count} images are not those that were written")
    except Exception as e:  # array_record and protobuf each raise their own
        raise UserError(f"{shard.file}: damaged ({e}); delete it and run the same command again") from None


def _write(shard: Shard) -> None:
    classes: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    sizes, broken, names = set(), [], shard.source.classes
    features = _features(names, None)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    part = shard.file.with_name(f"{shard.file.name}.{os.getpid()}.part")
    try:
        # One record a group, as TFDS writes: it is read at random. Images are compressed already.
        writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        for data, label, name in shard.source.read(shard.split, shard.entries):
            try:
                image = decode(data, 3)
                if not 0 <= label < len(names):
                    raise ValueError(f"label {label} is out of range, 0 … {len(names) - 1}")
            except ValueError as e:
                broken.append(f"{name}: {e}")
                continue
            data, (height, width) = _shrink(data, image, shard)
            example = serializer.get_tf_example(features.encode_example({"image": io.BytesIO(data), "label": label}))
            writer.write(example.SerializeToString(deterministic=True))
            classes[names[label]] += 1
            sums.update(height=height, width=width, bytes=len(data))
            sizes.add((height, width))
        writer.close()
        _sync(part)
    except (OSError, RuntimeError) as e:  # array_record raises RuntimeError
        raise UserError(f"{shard.file}: {e}; run the same command again to go on") from None
    _write_json(shard.facts, {"classes": classes, "sums": sums, "sizes": sorted(sizes)[:2], "broken": broken})
    part.replace(shard.file)  # last: where it is, so are its facts


def _shrink(data: bytes, image: np.ndarray, shard: Shard) -> tuple[bytes, tuple[int, int]]:
    """What to store of an image: bytes, height and width. What is small enough stays as it is."""
    height, width = image.shape[:2]
    short = min(height, width)
    if shard.resize is None or short <= shard.resize:
        return data, (height, width)
    height, width = round(height * shard.resize / short), round(width * shard.resize / short)
    smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(smaller, shard.quality, colorsubsampling="420"), (height, width)


def _features(classes: tuple[str, ...], size: tuple[int, int] | None) -> Any:
    """What an example holds, in the terms of TFDS; `size` is height and width if all images have one."""
    image = tfds.features.Image(shape=(*(size or (None, None)), 3))
    return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=classes)})


def _sync(file: Path) -> None:
    with open(file, "rb") as f:
        os.fsync(f.fileno())


def _write_json(file: Path, value: Any) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    _sync(part)
    part.replace(file)


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())


# ---- all of them -----------------------------------------------------------------------------------------------------


def prepare(source: Source, destination: Path, plan: dict[str, Any], workers: int, console: Console) -> None:
    """Makes all files, then writes what makes them a dataset.

    Raises UserError if more than 1 % of the images are broken, or a file cannot be written or read again.
    """
    shards = []
    for split, entries in source.splits.items():
        count = -(-len(entries) // max(SHARD_IMAGES, -(-len(entries) // SHARDS)))
        cuts = [len(entries) * i // count for i in range(count + 1)]
        for i in range(count):
            file = destination / f"images-{split}.array_record-{i:05d}-of-{count:05d}"
            part = entries[cuts[i] : cuts[i + 1]]
            shards.append(Shard(file, split, replace(source, splits={}), part, plan["resize"], plan["quality"]))
    facts: dict[Shard, dict[str, Any]] = {}
    broken: list[str] = []

    def done(shard: Shard) -> None:
        facts[shard] = _read_json(shard.facts)
        for line in facts[shard]["broken"]:
            console.print(line, soft_wrap=True)
            broken.append(line)
        if len(broken) > BROKEN_SHARE * plan["images"]:
            raise UserError(
                f"{plan['source']}: {len(broken)} of {plan['images']} images are broken, more than 1 %; "
                f"repair or remove them, delete {destination} and begin again"
            )

    _work(shards, done, workers, console)
    found = {split: [facts[s] for s in shards if s.split == split] for split in source.splits}
    summary = {split: _summary(of, source.classes) for split, of in found.items()}
    if none := [name for name, n in summary.get("train", {"classes": {}})["classes"].items() if not n]:
        raise UserError(f"{plan['source']}: class {none[0]!r} has no image to train on")
    _write_info(source.classes, destination, found)
    more = {"splits": summary, "broken": sorted(broken), "left_alone": source.left_alone}
    _write_json(destination / "prepare.json", plan | more)
    for split, of in summary.items():
        counts = of["classes"].values()
        console.print(
            f"{split}: {of['images']:,} images of {len(counts)} classes, {min(counts):,} to {max(counts):,} of each; "
            f"height × width {of['height']:.0f}×{of['width']:.0f} on average; {of['bytes'] / 1e6:,.1f} MB",
            soft_wrap=True,
        )
    if broken:
        console.print(f"left out: {len(broken)} broken images, named in {destination}/prepare.json", soft_wrap=True)
    if source.left_alone:
        console.print("left alone:", ", ".join(f"{n} {what}" for what, n in source.left_alone.items()), soft_wrap=True)
    parts = " --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'" if len(found) == 1 else ""
    console.print(f"to train on it: --config.data.name=prepared:{destination}{parts}", soft_wrap=True)


def _work(shards: list[Shard], done: Callable[[Shard], None], workers: int, console: Console) -> None:
    """Has processes make each shard; `done` follows here. A bar counts images."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    context = multiprocessing.get_context("spawn")  # a fork could copy a lock that another thread holds
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ProcessPoolExecutor(max(1, min(workers, len(shards))), context, _begin_worker) as pool,
    ):
        bar = progress.add_task("writing", total=sum(len(s.entries) for s in shards))
        try:
            # Workers start here, and inherit what is blocked: Ctrl-C is for this process.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            futures = {pool.submit(make_shard, shard): shard for shard in shards}
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                future.result()
                done(futures[future])
                progress.advance(bar, len(futures[future].entries))
        except BaseException as e:
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(e, BrokenProcessPool):
                again = "run the same command again to go on, with fewer --workers"
                raise UserError(f"a worker was killed, perhaps for want of memory; {again}") from None
            raise


def _begin_worker() -> None:
    """Has a worker end when its parent does, even if that is killed."""
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _summary(found: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """A split's images, of each class too, mean height and width in pixels, and bytes."""
    classes, sums = (sum((Counter(f[key]) for f in found), Counter[str]()) for key in ("classes", "sums"))
    images = classes.total()
    means = {side: round(sums[side] / max(1, images), 1) for side in ("height", "width")}
    return {"images": images, "bytes": sums["bytes"], **means, "classes": {name: classes[name] for name in names}}


def _write_info(classes: tuple[str, ...], destination: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Writes what makes a TFDS dataset of the files, dataset_info.json last."""
    core, splits = tfds.core, []
    for split, of in found.items():
        names = core.ShardedFileTemplate(
            dataset_name="images", data_dir=destination, split=split, filetype_suffix="array_record"
        )
        lengths, size = [sum(f["classes"].values()) for f in of], sum(f["sums"].get("bytes", 0) for f in of)
        splits.append(core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=names))
    sizes = {tuple(size) for of in found.values() for f in of for size in f["sizes"]}
    info = core.DatasetInfo(
        builder=core.dataset_info.DatasetIdentity("images", core.Version("1.0.0"), str(destination), ""),
        description="Written by jax_resnet.data.prepare; prepare.json says from what, and how.",
        features=_features(classes, sizes.pop() if len(sizes) == 1 else None),
        supervised_keys=("image", "label"),
    )
    info.set_file_format("array_record")
    info.set_splits(core.splits.SplitDict(splits))
    with tempfile.TemporaryDirectory(dir=destination, suffix=".part") as part:
        info.write_to_directory(part)
        for file in sorted(Path(part).iterdir(), key=lambda f: f.name == "dataset_info.json"):
            file.replace(destination / file.name)


# ---- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claim(destination: Path) -> Iterator[None]:
    """Holds a folder against other runs, and rids it of what a run left half-written, killed or not.

    Raises UserError for a folder of something else, or one where another run is at work.
    """
    destination.mkdir(parents=True, exist_ok=True)
    folder = os.open(destination, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        others = [f.name for f in destination.iterdir() if not f.name.startswith(("prepare.json", "extracted.part"))]
        if others and not (destination / "prepare.json").exists():
            raise UserError(f"{destination}: has {min(others)} in it, not by this command; give a new folder")
        try:
            _sweep(destination)
            yield
        finally:
            _sweep(destination)
            with contextlib.suppress(OSError):
                destination.rmdir()  # if nothing came of it
    except BlockingIOError:
        raise UserError(f"{destination}: another run is writing to it") from None
    finally:
        os.close(folder)


def _sweep(destination: Path) -> None:
    for part in [*destination.glob("*.part"), *destination.glob("shards/*.part")]:
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def begin(destination: Path, plan: dict[str, Any]) -> None:
    """Writes down in a folder what is done there. Raises UserError, naming the difference, if another was begun."""
    if not (destination / "prepare.json").exists():
        _write_json(destination / "prepare.json", plan)
    (destination / "shards").mkdir(exist_ok=True)
    then = _read_json(destination / "prepare.json")
    for key in ("resize", "quality", "images", "contents"):
        if then[key] != plan[key]:
            was, now = (f"{key}={p[key]} of {p['source']}" for p in (then, plan))
            raise UserError(f"{destination}: begun with {was}, not {now}; give another folder, or delete this one")


def _number(flag: str, text: str, most: int) -> int:
    if not (re.fullmatch(r"[1-9]\d{0,8}", text) and int(text) <= most):
        raise UserError(f"{flag}={text}: must be a whole number, from 1 to {most}")
    return int(text)


def main() -> None:
    """Runs the command."""
    parser = Parser(
        prog="python -m jax_resnet.data.prepare",
        description="Writes images once, to be read fast at random: ArrayRecord files, for config.data.name=prepared:… "
        "If it is killed, the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a folder or .tar of class folders, alone or in train/ and val/; or tfds:NAME")
    parser.add_argument("destination", type=Path, help="a folder")
    parser.add_argument("--resize", metavar="N", help="shrink to N pixels on the short side; default: bytes stay as is")
    parser.add_argument("--quality", metavar="N", help="of the JPEGs that --resize makes, up to 100; default: 95")
    parser.add_argument("--workers", metavar="N", help="processes; default: as many as there are processors")
    parser.add_argument("--data_dir", "--data-dir", metavar="FOLDER", help="with tfds:NAME, where TFDS keeps it")
    args = parser.parse_args()
    kind, _, name = args.source.partition(":")
    if args.data_dir and kind != "tfds":
        raise UserError("--data_dir: only with tfds:NAME")
    if args.quality and not args.resize:
        raise UserError("--quality: only with --resize, without which bytes stay as they are")
    resize = _number("--resize", args.resize, 65535) if args.resize else None
    quality = _number("--quality", args.quality or "95", 100) if resize else None
    workers = _number("--workers", args.workers, 1024) if args.workers else os.cpu_count() or 1
    path, destination = Path(args.source).expanduser(), args.destination.expanduser()
    if kind != "tfds" and not path.exists():
        raise UserError(f"{path}: no such folder or .tar; a TFDS dataset is given as tfds:NAME")
    if path.is_dir() and destination.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{destination}: lies in {path}, from which is read; give a folder elsewhere")
    try:
        with claim(destination):
            if kind == "tfds":
                source = list_tfds(name, args.data_dir)
            else:
                source = list_folder(path if path.is_dir() else extract(path, destination / "extracted.part"))
            contents = repr((source.classes, source.splits, kind == "tfds" and name))
            plan = {
                "command": sys.argv[1:],
                "source": args.source if kind == "tfds" else str(path.resolve()),
                "resize": resize,
                "quality": quality,
                "images": sum(map(len, source.splits.values())),
                "contents": hashlib.sha256(contents.encode()).hexdigest()[:16],  # of names, sizes and labels
            }
            begin(destination, plan)
            prepare(source, destination, plan, workers, Console(highlight=False, markup=False))
    except OSError as e:
        raise UserError(f"{e.filename or destination}: {e.strerror or e}") from None


if __name__ == "__main__":
    run(main)
