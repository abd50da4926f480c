"""Datasets of TensorFlow Datasets, read from ArrayRecord at random access, without TensorFlow."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from ml_collections import ConfigDict
from tensorflow_datasets.proto import tf_example_pb2

from jax_resnet.data.dataset import EVAL_SPLITS, Dataset, Split
from jax_resnet.data.image import images as image_ops
from jax_resnet.data.image.device import ImageInputs
from jax_resnet.data.image.split import ArraySplit, Records, encoded, in_memory
from jax_resnet.errors import NotPrepared, UserError, did_you_mean, first_line

IN_MEMORY_BYTES = 2 << 30
PREPARE = "pip install tensorflow apache-beam mlcroissant"  # what TFDS's own command line imports; the extra `prepare`


def open_tfds(name: str, c: ConfigDict) -> Dataset:
    """The dataset of that name, as `config.data` says; see sources.open_dataset."""
    builder = tfds_builder(name, c.data_dir)
    info = builder.info
    image_key, label_key = image_and_label(builder, name)
    feature, label = info.features[image_key], info.features[label_key]
    train = c.train_split or "train"
    evaluation = c.eval_split or next((s for s in EVAL_SPLITS if s in info.splits), "test")
    splits: list[Split] = []
    for split in (train, evaluation):
        try:
            source = ArrayRecordDataSource(builder.info.splits[split].file_instructions)
        except (ValueError, KeyError, AssertionError) as e:
            raise UserError(
                f"config.data.name={name}: no split {split!r}; "
                f"{did_you_mean(split, builder.info.splits)} ({first_line(e)})"
            ) from None
        except Exception as e:  # array_record's own errors have no common class
            raise UserError(
                f"config.data.name={name}: its files in {builder.data_dir} cannot be read ({first_line(e)}); "
                "delete that folder and prepare it again"
            ) from None
        files = [str(file) for file in builder.info.splits[split].filepaths]
        records = partial(_records, files, split, source, image_key, label_key)
        shape = feature.shape
        fixed = all(shape) and len(source) * int(np.prod(shape[:2])) * c.image.channels <= IN_MEMORY_BYTES
        if fixed:
            splits.append(_decode_all(split, len(source), records, shape[:2], label.num_classes, c, name))
        else:
            splits.append(encoded(split, len(source), records, label.num_classes, c))
    return Dataset(name, splits[0], splits[1], tuple(label.names), ImageInputs(c))


def _records(
    files: Sequence[str], split: str, source: Any, image: str, label: str, indices: Sequence[int]
) -> Iterator[tuple[bytes, int, str]]:
    try:
        for i in indices:  # one by one: array_record makes threads for a list, which cost more than they bring
            features = tf_example_pb2.Example.FromString(source[i]).features.feature
            yield features[image].bytes_list.value[0], features[label].int64_list.value[0], f"record {i}"
    except Exception as e:  # array_record's own, and protobuf's
        where = _unreadable(files)
        raise UserError(
            f"{split} split: records of {where} cannot be read ({first_line(e)}); prepare the dataset again"
        ) from None


def _unreadable(files: Sequence[str]) -> str:
    """The first file that cannot be opened, else the folder of all."""
    for file in files:
        try:
            ArrayRecordReader(file).close()
        except Exception:  # array_record's own, of no common class
            return file
    return str(Path(files[0]).parent)


def tfds_builder(name: str, data_dir: str | None) -> Any:
    """Return the TFDS builder, its records at random access, of a dataset by name or of a folder as prepared:PATH."""
    kind, _, path = name.partition(":")
    return _prepared_builder(path) if kind == "prepared" else _tfds_builder(name, data_dir)


def image_and_label(builder: Any, name: str) -> tuple[str, str]:
    """What the dataset calls an example's image and its label. Raises UserError if it has no such pair."""
    info = builder.info
    image, label = info.supervised_keys if info.supervised_keys and len(info.supervised_keys) == 2 else ("", "")
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    kinds = tfds.features.Image, tfds.features.ClassLabel
    if not isinstance(features.get(image), kinds[0]) or not isinstance(features.get(label), kinds[1]):
        raise UserError(
            f"config.data.name={name}: not an image-classification dataset (its features: {', '.join(features)})"
        )
    return image, label


def _decode_all(
    name: str,
    size: int,
    records: Records,
    shape: tuple[int, int],
    num_classes: int,
    c: ConfigDict,
    source: str,
) -> ArraySplit:
    images, labels = np.empty((size, *shape, c.image.channels), np.uint8), np.empty(size, np.int64)

    def fill(start: int) -> None:
        indices = range(start, min(start + 512, size))
        for i, (data, label, record) in zip(indices, records(indices), strict=True):
            try:
                images[i], labels[i] = image_ops.decode(data, c.image.channels), label
            except ValueError as e:
                raise UserError(f"{source}: {record}: {e}; prepare the dataset again") from None

    with ThreadPoolExecutor(c.threads) as pool:
        list(pool.map(fill, range(0, size, 512)))
    return in_memory(name, images, labels, num_classes, c.image, source)


def _prepared_builder(path: str) -> Any:
    folder = Path(path).expanduser()
    if not (folder / "dataset_info.json").exists():
        begun = (folder / "prepare.json").exists()
        state = "not finished; run the command that began it again" if begun else "no dataset in it"
        raise UserError(f"config.data.name=prepared:{path}: {state if folder.is_dir() else 'no such folder'}")
    try:
        return tfds.builder_from_directory(folder, file_format="array_record")
    except Exception as e:  # TFDS and protobuf each raise their own
        why = first_line(e)
        raise UserError(f"config.data.name=prepared:{path}: no TFDS dataset in array_record ({why})") from None


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    at = f" --data_dir={data_dir}" if data_dir else ""
    build = f"{PREPARE} && tfds build {name} --file_format=array_record{at}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = [*tfds.list_builders(with_community_datasets=False), "digits", "folder:PATH", "npz:PATH"]
        raise UserError(f"config.data.name={name}: unknown dataset; {did_you_mean(name, known)}") from None
    except ImportError as e:
        raise NotPrepared(f"config.data.name={name}: preparing it needs more ({e}): {build}") from None
    except (ValueError, OSError, AssertionError) as e:
        raise UserError(f"config.data.name={name}: {first_line(e)}") from None
    if not builder.info.splits:
        raise NotPrepared(f"config.data.name={name}: not prepared in {builder.data_dir}; to prepare it: {build}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = tfds.core.dataset_info.read_proto_from_builder_dir(builder.data_dir)
        if "array_record" not in found.alternative_file_formats:
            raise UserError(
                f"config.data.name={name}: prepared as {builder.info.file_format.value}, which has no random access; "
                f"to convert it in place: {PREPARE} && tfds convert_format --dataset_version_dir={builder.data_dir} "
                "--out_file_format=array_record"
            )
        builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder
