"""Open TFDS datasets, read from ArrayRecord at random access, without TensorFlow."""

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
# TFDS's own command line imports these; they are the extra `prepare`.
PREPARE = "pip install tensorflow apache-beam mlcroissant"


def open_tfds(name: str, data: ConfigDict) -> Dataset:
    """Open a TFDS dataset as `data`, which is config.data, says; see sources.open_dataset."""
    builder = tfds_builder(name, data.data_dir)
    info = builder.info
    image_key, label_key = image_and_label(builder, name)
    image_feature, label_feature = info.features[image_key], info.features[label_key]
    classes = label_feature.num_classes
    train = data.train_split or "train"
    evaluation = data.eval_split or next((s for s in EVAL_SPLITS if s in info.splits), "test")
    splits: list[Split] = []
    for split in (train, evaluation):
        try:
            source = ArrayRecordDataSource(info.splits[split].file_instructions)
        except (ValueError, KeyError, AssertionError) as e:
            hint = f"{did_you_mean(split, info.splits)} ({first_line(e)})"
            raise UserError(f"config.data.name={name}: no split {split!r}; {hint}") from None
        except Exception as e:  # array_record's errors share no class
            raise UserError(
                f"config.data.name={name}: its files in {builder.data_dir} cannot be read "
                f"({first_line(e)}); delete that folder and prepare it again"
            ) from None
        files = [str(file) for file in info.splits[split].filepaths]
        records = partial(_records, files, split, source, image_key, label_key)
        shape = image_feature.shape
        image_bytes = int(np.prod(shape[:2])) * data.image.channels if all(shape) else 0
        if image_bytes and len(source) * image_bytes <= IN_MEMORY_BYTES:
            splits.append(_decode_all(split, len(source), records, shape[:2], classes, data, name))
        else:
            splits.append(encoded(split, len(source), records, classes, data))
    return Dataset(name, splits[0], splits[1], tuple(label_feature.names), ImageInputs(data))


def _records(
    files: Sequence[str], split: str, source: Any, image: str, label: str, indices: Sequence[int]
) -> Iterator[tuple[bytes, int, str]]:
    try:
        # One by one: for a list, array_record makes threads that cost more than they bring.
        for i in indices:
            features = tf_example_pb2.Example.FromString(source[i]).features.feature
            yield features[image].bytes_list.value[0], features[label].int64_list.value[0], f"record {i}"
    except Exception as e:  # array_record and protobuf share no class
        where = _find_unreadable(files)
        raise UserError(
            f"{split} split: records of {where} cannot be read ({first_line(e)}); prepare the dataset again"
        ) from None


def _find_unreadable(files: Sequence[str]) -> str:
    """Find the first file that cannot be opened, or else name the folder of all."""
    for file in files:
        try:
            ArrayRecordReader(file).close()
        except Exception:  # array_record's errors share no class
            return file
    return str(Path(files[0]).parent)


def tfds_builder(name: str, data_dir: str | None) -> Any:
    """Return the builder, with random access, of a TFDS dataset or of a folder as prepared:PATH."""
    kind, _, path = name.partition(":")
    if kind == "prepared":
        return _prepared_builder(path)
    return _tfds_builder(name, data_dir)


def image_and_label(builder: Any, name: str) -> tuple[str, str]:
    """Return the keys of an example's image and its label.

    Raises UserError if the dataset has no such pair.
    """
    info = builder.info
    features: dict[str, Any] = {}
    if isinstance(info.features, tfds.features.FeaturesDict):
        features = dict(info.features)
    if info.supervised_keys and len(info.supervised_keys) == 2:
        image, label = info.supervised_keys
        has_image = isinstance(features.get(image), tfds.features.Image)
        if has_image and isinstance(features.get(label), tfds.features.ClassLabel):
            return image, label
    what = f"not an image-classification dataset (its features: {', '.join(features)})"
    raise UserError(f"config.data.name={name}: {what}")


def _decode_all(
    name: str,
    size: int,
    records: Records,
    shape: tuple[int, int],
    num_classes: int,
    data: ConfigDict,
    source: str,
) -> ArraySplit:
    images = np.empty((size, *shape, data.image.channels), np.uint8)
    labels = np.empty(size, np.int64)

    def fill(start: int) -> None:
        indices = range(start, min(start + 512, size))
        for i, (content, label, record) in zip(indices, records(indices), strict=True):
            labels[i] = label
            try:
                images[i] = image_ops.decode(content, data.image.channels)
            except ValueError as e:
                raise UserError(f"{source}: {record}: {e}; prepare the dataset again") from None

    with ThreadPoolExecutor(data.threads) as pool:
        list(pool.map(fill, range(0, size, 512)))
    return in_memory(name, images, labels, num_classes, data.image, source)


def _prepared_builder(path: str) -> Any:
    folder = Path(path).expanduser()
    if not (folder / "dataset_info.json").exists():
        state = "no such folder"
        if (folder / "prepare.json").exists():
            state = "not finished; run the command that began it again"
        elif folder.is_dir():
            state = "no dataset in it"
        raise UserError(f"config.data.name=prepared:{path}: {state}")
    try:
        return tfds.builder_from_directory(folder, file_format="array_record")
    except Exception as e:  # TFDS and protobuf share no class
        raise UserError(
            f"config.data.name=prepared:{path}: no TFDS dataset in array_record ({first_line(e)})"
        ) from None


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    setting = f"config.data.name={name}"
    build = f"{PREPARE} && tfds build {name} --file_format=array_record"
    if data_dir:
        build += f" --data_dir={data_dir}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = [*tfds.list_builders(with_community_datasets=False), "digits", "folder:PATH", "npz:PATH"]
        raise UserError(f"{setting}: unknown dataset; {did_you_mean(name, known)}") from None
    except ImportError as e:
        raise NotPrepared(f"{setting}: preparing it needs more ({e}): {build}") from None
    except (ValueError, OSError, AssertionError) as e:
        raise UserError(f"{setting}: {first_line(e)}") from None
    if not builder.info.splits:
        where = builder.data_dir
        raise NotPrepared(f"{setting}: not prepared in {where}; to prepare it: {build}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        proto = tfds.core.dataset_info.read_proto_from_builder_dir(builder.data_dir)
        if "array_record" not in proto.alternative_file_formats:
            raise UserError(
                f"{setting}: prepared as {builder.info.file_format.value}, which has no random "
                f"access; to convert it in place: {PREPARE} && tfds convert_format "
                f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record"
            )
        builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder
