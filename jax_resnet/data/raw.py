"""Raw images: class folders, a .tar of them or a TFDS dataset, from which `data/prepare.py` writes a dataset."""

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
    """Describes images that are to be prepared, and reads them."""

    classes: tuple[str, ...]
    splits: dict[str, int]  # how many records
    read: Callable[[str, int], tuple[bytes, int, str]]  # split and index → an image's bytes, its label and its name
    contents: Any  # what tells it from another source


def list_folder(root: Path) -> Source:
    """List the images of class folders, or of train/ and evaluation parts with class folders, in an order drawn once.

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
        # Class by class, train[:90%] would lack the last classes.
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(listed))
        entries[split] = [listed[i] for i in order]

    def read(split: str, index: int) -> tuple[bytes, int, str]:
        file, label = entries[split][index]
        return file.read_bytes(), label, str(file.relative_to(root))

    contents = [(str(f.relative_to(root)), label, f.stat().st_size) for e in entries.values() for f, label in e]
    return Source(classes, {split: len(e) for split, e in entries.items()}, read, contents)


def extract(archive: Path, folder: Path) -> Path:
    """Unpack a .tar, compressed or not; return the one folder that holds everything, as in most, or else `folder`.

    Raises UserError for an archive that is damaged or cut short, or has links, devices or paths that lead out of it.
    """
    folder.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _unpack(tar, member, folder)
            # An archive that is cut between two members would otherwise pass for all of it.
            if tar.fileobj is None or tar.fileobj.tell() - tar.offset != tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise UserError(f"{archive}: cannot be unpacked as a .tar ({first_line(e)})") from None
    inside = [d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")]
    return inside[0] if len(inside) == 1 and inside[0].name != "train" else folder


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one file of an archive below `folder`. The standard library's filters came with Python 3.11.4."""
    path = PurePosixPath(member.name.lstrip("/"))
    if ".." in path.parts or not (member.isfile() or member.isdir()):  # links lead out, too
        raise tarfile.ReadError(f"{member.name!r} leads out of it, or is a link or device")
    (folder / path if member.isdir() else (folder / path).parent).mkdir(parents=True, exist_ok=True)
    if source := tar.extractfile(member):
        with source, open(folder / path, "wb") as file:
            shutil.copyfileobj(source, file)


def list_tfds(name: str, data_dir: str | None) -> Source:
    """List the splits of a TFDS dataset that have labels, in its order. Raises UserError as training on it would."""
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
        except Exception as e:  # array_record and protobuf each raise their own
            raise UserError(f"tfds:{name}: {split} record {index} cannot be read ({first_line(e)})") from None
        return example[image], int(example[label]), f"{split} record {index}"

    for split in [split for split in records if read(split, 0)[1] < 0]:  # as ImageNet's test
        print(f"{split}: left out, it has no labels")
        del records[split]
    splits = {split: len(found) for split, found in records.items()}
    return Source(tuple(builder.info.features[label].names), splits, read, (name, splits))
