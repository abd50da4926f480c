"""Datasets by name, as random-access splits that know their facts.

A split answers `read(indices, rngs)` with uint8 images [B, H, W, C] and int32 labels [B]. Images that all have one size
and fit are kept in memory; others are decoded when they are read.
"""

import contextlib
import importlib
import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from jax_resnet.data import images as image_ops
from jax_resnet.errors import UserError, did_you_mean

IN_MEMORY_BYTES = 2 << 30
PREPARE = "pip install tensorflow apache-beam mlcroissant"  # what TFDS's own command line imports; the extra `prepare`
EVAL_SPLITS = ("validation", "val", "valid", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


Records = Callable[[Sequence[int]], list[tuple[bytes, int, str]]]


class Split(Protocol):
    """One part of a dataset."""

    @property
    def name(self) -> str:
        """What the dataset calls it."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        ...

    @property
    def crops_at_random(self) -> bool:
        """Whether `read` uses its generators: they are worth making only then."""
        ...

    def __len__(self) -> int: ...

    def read(
        self, indices: np.ndarray, rngs: Sequence[np.random.Generator] | None, size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of those records; `rngs`, one for each, crop for training, None for evaluation.

        The images get `size` pixels a side; None: as many as `image_shape` says.
        """


@dataclass(frozen=True)
class Dataset:
    """A dataset's two splits and its classes."""

    name: str
    train: Split
    eval: Split
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart."""
        return len(self.class_names)


@dataclass(frozen=True)
class Pixels:
    """What becomes of an image on the host before it joins a batch: the same whether it was decoded or in memory."""

    size: int | None  # pixels a side; None: those the image has
    channels: int
    random_area: tuple[float, float] | None  # shares that random-resized crops cover; None: no such crops
    random_ratio: tuple[float, float]
    eval_crop: float  # share of the short side that evaluation keeps

    @classmethod
    def of(cls, c: ConfigDict, size: int | None) -> "Pixels":
        """As `config.data` says. Only what is trained on random-resized crops is evaluated on a crop."""
        random = c.crop == "random_resized"
        area, ratio = tuple(c.crop_area), tuple(c.crop_ratio)
        return cls(size, c.channels, area if random else None, ratio, c.eval_crop if random else 1.0)

    def at(self, size: int | None) -> "Pixels":
        """The same to `size` pixels a side; None: as it is."""
        return replace(self, size=size) if size else self

    def leaves_alone(self, height: int, width: int) -> bool:
        """Whether images of that size come out as they went in."""
        same = self.size is None or (height, width) == (self.size, self.size)
        return same and self.random_area is None and self.eval_crop == 1

    def crop(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """uint8 [H, W, channels] → [size, size, channels]: at random with `rng`, else the centre."""
        if self.size is None:
            return image
        if rng is not None and self.random_area is not None:
            return image_ops.random_resized_crop(image, self.size, self.random_area, self.random_ratio, rng)
        return image_ops.resize_and_center_crop(image, self.size, self.eval_crop)


@dataclass(frozen=True)
class ArraySplit:
    """Images of one size, in memory."""

    name: str
    images: np.ndarray  # uint8 [N, H, W, 1 or 3]
    labels: np.ndarray  # int32 [N]
    pixels: Pixels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels of what `read` gives."""
        height, width = self.images.shape[1:3]
        return (self.pixels.size or height, self.pixels.size or width, self.pixels.channels)

    @property
    def crops_at_random(self) -> bool:
        """Whether `read` uses its generators."""
        return self.pixels.random_area is not None

    def __len__(self) -> int:
        return len(self.images)

    def read(
        self, indices: np.ndarray, rngs: Sequence[np.random.Generator] | None, size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Split."""
        found = image_ops.with_channels(self.images[indices], self.pixels.channels)
        pixels, shape = self.pixels.at(size), (size, size, self.pixels.channels) if size else self.image_shape
        if pixels.leaves_alone(*found.shape[1:3]):
            return found, self.labels[indices]
        images = np.empty((len(indices), *shape), np.uint8)
        for row, image in enumerate(found):
            images[row] = pixels.crop(image, rngs[row] if rngs else None)
        return images, self.labels[indices]


@dataclass(frozen=True)
class EncodedSplit:
    """Encoded images of any size, decoded when read. `records(indices)` gives bytes, label and a name for each."""

    name: str
    size: int
    records: Records
    num_classes: int
    pixels: Pixels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels of what `read` gives."""
        side = self.pixels.size or 0
        return (side, side, self.pixels.channels)

    @property
    def crops_at_random(self) -> bool:
        """Whether `read` uses its generators."""
        return self.pixels.random_area is not None

    def __len__(self) -> int:
        return self.size

    def read(
        self, indices: np.ndarray, rngs: Sequence[np.random.Generator] | None, size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Split. Raises UserError naming the record that cannot be decoded or has a label out of range."""
        pixels, shape = self.pixels.at(size), (size, size, self.pixels.channels) if size else self.image_shape
        images = np.empty((len(indices), *shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for row, (data, label, name) in enumerate(self.records(indices.tolist())):
            try:
                image = image_ops.decode(data, self.pixels.channels)
            except ValueError as e:
                raise UserError(f"{self.name} split: {name}: {e}; repair or remove it") from None
            if not 0 <= label < self.num_classes:
                raise UserError(
                    f"{self.name} split: {name} has label {label}; labels must lie in 0 … {self.num_classes - 1}"
                )
            images[row], labels[row] = pixels.crop(image, rngs[row] if rngs else None), label
        return images, labels


def open_dataset(c: ConfigDict) -> Dataset:
    """Opens the dataset that `config.data` names.

    Raises UserError, in one line, for a dataset that is unknown, not there, not prepared, empty, unreadable, or whose
    labels are out of range.
    """
    kind, colon, path = c.name.partition(":")
    if c.name in ("", "npz", "folder", "prepared"):
        raise UserError(f"config.data.name={c.name}: give a TFDS name, folder:PATH, npz:PATH, prepared:PATH or digits")
    if c.holdout and not (colon and kind == "folder"):
        raise UserError(f"config.data.holdout={c.holdout}: only a folder is split by it, not {c.name}")
    if (c.train_split or c.eval_split) and colon and kind == "npz":
        raise UserError(f"config.data.train_split and eval_split: {c.name} has train and test, and no others")
    if colon and kind == "npz":
        dataset = _open_npz(path, c)
    elif colon and kind == "folder":
        dataset = _open_folder(path, c)
    else:
        dataset = _open_tfds(c.name, c)
    for split in (dataset.train, dataset.eval):
        if len(split) == 0:
            raise UserError(f"config.data.name={c.name}: the {split.name} split is empty")
    if dataset.train.image_shape != dataset.eval.image_shape:
        raise UserError(
            f"config.data.name={c.name}: {dataset.train.name} images are {dataset.train.image_shape}, "
            f"{dataset.eval.name} images {dataset.eval.image_shape}; set config.data.image_size"
        )
    return dataset


# ---- arrays in one file ----------------------------------------------------------------------------------------------


def _open_npz(path: str, c: ConfigDict) -> Dataset:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            if missing := [n for n in names if n not in getattr(file, "files", ())]:
                raise UserError(f"npz:{path}: no array {missing[0]}; it must hold {', '.join(names)}")
            arrays = {n: file[n] for n in names}
    except FileNotFoundError:
        raise UserError(f"npz:{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as e:
        raise UserError(f"npz:{path}: cannot be read as .npz ({e})") from None
    for n in names:
        kind = "uint8" if n.startswith("x") else "integer"
        if not (arrays[n].dtype == np.uint8 or (kind == "integer" and np.issubdtype(arrays[n].dtype, np.integer))):
            raise UserError(
                f"npz:{path}: {n} is {arrays[n].dtype}; it must be {kind}"
                + (" pixels, 0 … 255" if kind == "uint8" else "")
            )
    train_labels, test_labels = arrays["y_train"].reshape(-1), arrays["y_test"].reshape(-1)
    if not train_labels.size:
        raise UserError(f"npz:{path}: the train split is empty")
    classes = int(train_labels.max()) + 1
    if classes > len(train_labels):
        raise UserError(f"npz:{path}: train label {classes - 1} of {len(train_labels)} examples; count classes from 0")
    return Dataset(
        f"npz:{path}",
        _in_memory("train", arrays["x_train"], train_labels, classes, c, f"npz:{path}"),
        _in_memory("test", arrays["x_test"], test_labels, classes, c, f"npz:{path}"),
        tuple(str(i) for i in range(classes)),
    )


def _in_memory(
    name: str, images: np.ndarray, labels: np.ndarray, num_classes: int, c: ConfigDict, source: str
) -> ArraySplit:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{source}: {name} images have shape {images.shape}; they must be [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
        )
    if len(images) != len(labels):
        raise UserError(f"{source}: {len(images)} {name} images, but {len(labels)} labels")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise UserError(
            f"{source}: {name} label {labels[bad[0]]} of record {bad[0]} is out of range; "
            f"labels must lie in 0 … {num_classes - 1}"
        )
    size = c.image_size
    if size is None and c.crop == "random_resized":
        size = images.shape[1]
        if images.shape[1] != images.shape[2]:
            raise UserError(
                f"{source}: random-resized crops are square, the images {images.shape[1:3]}; set config.data.image_size"
            )
    return ArraySplit(name, images, labels.astype(np.int32), Pixels.of(c, size))


# ---- a folder of class folders ---------------------------------------------------------------------------------------


def _open_folder(path: str, c: ConfigDict) -> Dataset:
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"folder:{path}: no such folder")
    subfolders = {d.name: d for d in sorted(root.iterdir()) if d.is_dir() and not d.name.startswith(".")}
    train_name = c.train_split or "train"
    eval_name = c.eval_split or next((n for n in EVAL_SPLITS if n in subfolders), None)
    if train_name in subfolders and c.holdout:
        raise UserError(f"config.data.holdout={c.holdout}: folder:{path} has splits of its own; leave it out")
    if train_name in subfolders:
        if eval_name not in subfolders:
            raise UserError(f"folder:{path}: {train_name}/ has no {eval_name or ' or '.join(EVAL_SPLITS)}/ beside it")
        train_files = _class_files(subfolders[train_name], path)
        eval_files = _class_files(subfolders[eval_name], path)
        if strangers := eval_files.keys() - train_files.keys():
            name = min(strangers)
            raise UserError(
                f"folder:{path}: class {name!r} is in {eval_name}/ but not in {train_name}/; "
                + did_you_mean(name, train_files)
            )
    elif c.train_split or c.eval_split:
        raise UserError(f"folder:{path}: no subfolder {train_name!r}; {did_you_mean(train_name, subfolders)}")
    elif c.holdout:
        train_name, eval_name = "train", "holdout"
        train_files, eval_files = _hold_out(_class_files(root, path), c.holdout)
    else:
        raise UserError(
            f"folder:{path}: neither train/ and val/ in it nor a stated split; to keep a "
            "fifth of each class for evaluation: --config.data.holdout=0.2"
        )
    classes = tuple(train_files)
    return Dataset(
        f"folder:{path}",
        _files_split(train_name, train_files, classes, c),
        _files_split(eval_name, eval_files, classes, c),
        classes,
    )


def _class_files(root: Path, path: str) -> dict[str, list[Path]]:
    folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = {d.name: sorted(f for f in d.rglob("*") if _is_image(f)) for d in folders}
    if not files:
        raise UserError(f"folder:{path}: {root} has no class folders in it")
    for name, found in files.items():
        if not found:
            raise UserError(f"folder:{path}: {root / name} has no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _hold_out(files: dict[str, list[Path]], share: float) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, held = {}, {}
    for name, found in files.items():
        count = min(len(found) - 1, max(1, round(len(found) * share)))
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(found))
        held[name] = [found[i] for i in sorted(order[:count])]
        train[name] = [found[i] for i in sorted(order[count:])]
    return train, held


def _files_split(name: str, files: dict[str, list[Path]], classes: Sequence[str], c: ConfigDict) -> EncodedSplit:
    listed = [(file, label) for label, cls in enumerate(classes) for file in files.get(cls, [])]

    def records(indices: Sequence[int]) -> list[tuple[bytes, int, str]]:
        try:
            return [(listed[i][0].read_bytes(), listed[i][1], str(listed[i][0])) for i in indices]
        except OSError as e:
            raise UserError(f"{name} split: {e.filename}: {e.strerror}") from None

    return _encoded(name, len(listed), records, len(classes), c)


def _encoded(name: str, size: int, records: Records, num_classes: int, c: ConfigDict) -> EncodedSplit:
    if c.image_size is None:
        raise UserError(
            f"config.data.name={c.name}: its images differ in size; "
            "say which the network gets: --config.data.image_size=224"
        )
    split = EncodedSplit(name, size, records, num_classes, Pixels.of(c, c.image_size))
    if size:
        split.read(np.zeros(1, np.int64), None)  # what is wrong with all of it shows now, not after an epoch
    return split


# ---- TensorFlow Datasets ---------------------------------------------------------------------------------------------


def _open_tfds(name: str, c: ConfigDict) -> Dataset:
    import tensorflow_datasets as tfds

    builder = tfds_builder(name, c.data_dir)
    info = builder.info
    image_key, label_key = image_and_label(builder, name)
    feature, label = info.features[image_key], info.features[label_key]
    train = c.train_split or "train"
    evaluation = c.eval_split or next((s for s in EVAL_SPLITS if s in info.splits), "test")
    splits: list[Split] = []
    for split in (train, evaluation):
        try:
            source = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
        except (ValueError, KeyError, AssertionError) as e:
            raise UserError(
                f"config.data.name={name}: no split {split!r}; "
                f"{did_you_mean(split, info.splits)} ({str(e).splitlines()[0]})"
            ) from None
        except Exception as e:  # array_record's own errors have no common class
            raise UserError(
                f"config.data.name={name}: its files in {builder.data_dir} cannot be read ({e}); "
                "delete that folder and prepare it again"
            ) from None

        def records(indices: Sequence[int], source: Any = source, split: str = split) -> list[tuple[bytes, int, str]]:
            try:
                found = source.__getitems__(list(indices))
            except Exception as e:
                raise UserError(
                    f"{split} split: records of {builder.data_dir} cannot be read ({e}); prepare the dataset again"
                ) from None
            return [(r[image_key], int(r[label_key]), f"record {i}") for i, r in zip(indices, found, strict=True)]

        shape = feature.shape
        fixed = all(shape) and len(source) * int(np.prod(shape[:2])) * c.channels <= IN_MEMORY_BYTES
        if fixed:
            splits.append(_decode_all(split, len(source), records, shape[:2], label.num_classes, c, name))
        else:
            splits.append(_encoded(split, len(source), records, label.num_classes, c))
    return Dataset(name, splits[0], splits[1], tuple(label.names))


def tfds_builder(name: str, data_dir: str | None) -> Any:
    """The TFDS builder, its records at random access, of a dataset by name or of a folder as prepared:PATH."""
    import tensorflow_datasets as tfds

    kind, _, path = name.partition(":")
    if kind == "prepared":
        return _prepared_builder(tfds, path)
    return _digits_builder(data_dir) if name == "digits" else _tfds_builder(tfds, name, data_dir)


def image_and_label(builder: Any, name: str) -> tuple[str, str]:
    """What the dataset calls an example's image and its label. Raises UserError if it has no such pair."""
    import tensorflow_datasets as tfds

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
    images, labels = np.empty((size, *shape, c.channels), np.uint8), np.empty(size, np.int64)

    def fill(start: int) -> None:
        indices = range(start, min(start + 512, size))
        for i, (data, label, record) in zip(indices, records(indices), strict=True):
            try:
                images[i], labels[i] = image_ops.decode(data, c.channels), label
            except ValueError as e:
                raise UserError(f"{source}: {record}: {e}; prepare the dataset again") from None

    with ThreadPoolExecutor(c.threads) as pool:
        list(pool.map(fill, range(0, size, 512)))
    return _in_memory(name, images, labels, num_classes, c, source)


def _digits_builder(data_dir: str | None) -> Any:
    digits = importlib.import_module("jax_resnet.data.digits")  # importing it registers the builder with TFDS
    try:
        builder = digits.Digits(data_dir=data_dir, file_format="array_record")
        if not builder.info.splits:
            _prepare_quietly(builder)
    except (OSError, ValueError) as e:
        raise UserError(
            f"digits: cannot be prepared in {data_dir or 'the default folder of TFDS'} ({e}); "
            "choose another: --config.data.data_dir=FOLDER"
        ) from None
    return builder


def _prepare_quietly(builder: Any) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except Exception:  # another process may have prepared it in the meantime
        if not type(builder)(data_dir=builder._data_dir_root, file_format="array_record").info.splits:
            raise


def _prepared_builder(tfds: Any, path: str) -> Any:
    folder = Path(path).expanduser()
    if not (folder / "dataset_info.json").exists():
        begun = (folder / "prepare.json").exists()
        state = "not finished; run the command that began it again" if begun else "no dataset in it"
        raise UserError(f"config.data.name=prepared:{path}: {state if folder.is_dir() else 'no such folder'}")
    try:
        return tfds.builder_from_directory(folder, file_format="array_record")
    except Exception as e:  # TFDS and protobuf each raise their own
        why = str(e).splitlines()[0]
        raise UserError(f"config.data.name=prepared:{path}: no TFDS dataset in array_record ({why})") from None


def _tfds_builder(tfds: Any, name: str, data_dir: str | None) -> Any:
    at = f" --data_dir={data_dir}" if data_dir else ""
    build = f"{PREPARE} && tfds build {name} --file_format=array_record{at}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = [*tfds.list_builders(with_community_datasets=False), "digits", "folder:PATH", "npz:PATH"]
        raise UserError(f"config.data.name={name}: unknown dataset; {did_you_mean(name, known)}") from None
    except ImportError as e:
        raise UserError(f"config.data.name={name}: preparing it needs more ({e}): {build}") from None
    except (ValueError, OSError, AssertionError) as e:
        raise UserError(f"config.data.name={name}: {str(e).splitlines()[0]}") from None
    if not builder.info.splits:
        raise UserError(f"config.data.name={name}: not prepared in {builder.data_dir}; to prepare it: {build}")
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
