"""Raw images for data/prepare.py: class folders, a .tar of them or a TFDS dataset."""

import lzma
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from jax_resnet.data.dataset import EVAL_SPLITS
from jax_resnet.data.sources import class_files
from jax_resnet.data.tfds import image_and_label, tfds_builder
from jax_resnet.errors import UserError, did_you_mean, first_line


class Source(NamedTuple):
    """Images to be prepared, and how to read one."""

    classes: tuple[str, ...]
    splits: dict[str, int]  # numbers of records
    # (split, index) → encoded image, label, name.
    read: Callable[[str, int], tuple[bytes, int, str]]
    contents: Any  # differs from any other source's


def list_folder(root: Path) -> Source:
    """List the images of class folders, or of train/ and evaluation parts with class folders.

    Their order is random, and always the same. Raises UserError where there are none, for a class
    without images, or one that train/ does not have.
    """
    parts = {split: root / split for split in ("train", *EVAL_SPLITS) if (root / split).is_dir()}
    if "train" not in parts:
        parts = {"train": root}
    files = {split: class_files(part, str(root)) for split, part in parts.items()}
    classes = tuple(files["train"])
    entries = {}
    for split, folders in files.items():
        if unknown := folders.keys() - files["train"].keys():
            name = min(unknown)
            raise UserError(f"{parts[split] / name}: train/ has no such class; {did_you_mean(name, classes)}")
        labelled = enumerate(classes)
        images = [(file, label) for label, name in labelled for file in folders.get(name, [])]
        # Class by class, train[:90%] would lack the last classes.
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(images))
        entries[split] = [images[i] for i in order]

    def read(split: str, index: int) -> tuple[bytes, int, str]:
        file, label = entries[split][index]
        return file.read_bytes(), label, str(file.relative_to(root))

    contents = []
    for images in entries.values():
        contents += [(str(f.relative_to(root)), label, f.stat().st_size) for f, label in images]
    splits = {split: len(images) for split, images in entries.items()}
    return Source(classes, splits, read, contents)


def extract(archive: Path, folder: Path) -> Path:
    """Unpack a .tar, compressed or not, into `folder`.

    Returns the archive's only folder, unless that is train/, or else `folder`. Raises UserError for
    an archive that is damaged or truncated, or has links, devices or paths that lead out of it.
    """
    folder.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _unpack(tar, member, folder)
            # An archive that was truncated between two members would otherwise pass as complete.
            if tar.fileobj is None or tar.fileobj.tell() - tar.offset != tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise UserError(f"{archive}: cannot be unpacked as a .tar ({first_line(e)})") from None
    folders = [d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")]
    if len(folders) == 1 and folders[0].name != "train":
        return folders[0]
    return folder


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one member of an archive below `folder`: tarfile's filters need Python 3.11.4."""
    relative = PurePosixPath(member.name.lstrip("/"))
    # A link may lead out of the folder too.
    if ".." in relative.parts or not (member.isfile() or member.isdir()):
        raise tarfile.ReadError(f"{member.name!r} leads out of it, or is a link or device")
    path = folder / relative
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if source := tar.extractfile(member):
        with source, open(path, "wb") as file:
            shutil.copyfileobj(source, file)


def list_tfds(name: str, data_dir: str | None) -> Source:
    """List the labelled splits of a TFDS dataset. Raises UserError as training on it would."""
    if name == "digits":
        raise UserError("tfds:digits: no TFDS dataset; nothing need be prepared to train on config.data.name=digits")
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
        except Exception as e:  # array_record and protobuf share no class
            where = f"tfds:{name}: {split} record {index}"
            raise UserError(f"{where} cannot be read ({first_line(e)})") from None
        return example[image], int(example[label]), f"{split} record {index}"

    unlabelled = [split for split in records if read(split, 0)[1] < 0]  # like ImageNet's test
    for split in unlabelled:
        print(f"{split}: left out, it has no labels")
        del records[split]
    splits = {split: len(examples) for split, examples in records.items()}
    return Source(tuple(builder.info.features[label].names), splits, read, (name, splits))
