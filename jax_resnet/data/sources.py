"""Open datasets by name: digits, arrays in one file, class folders, and TFDS (in tfds.py)."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jax_resnet.data import digits
from jax_resnet.data.dataset import EVAL_SPLITS, Dataset
from jax_resnet.data.image.device import ImageInputs
from jax_resnet.data.image.split import EncodedSplit, encoded, in_memory
from jax_resnet.errors import UserError, did_you_mean

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def open_dataset(data: ConfigDict) -> Dataset:
    """Open the dataset that `data`, which is config.data, names.

    Raises UserError, in one line, for a dataset that is unknown, missing, not prepared, empty or
    unreadable, or whose labels are out of range.
    """
    kind, colon, path = data.name.partition(":")
    setting = f"config.data.name={data.name}"
    if data.name in ("", "npz", "folder", "prepared"):
        choices = "a TFDS name, folder:PATH, npz:PATH, prepared:PATH or digits"
        raise UserError(f"{setting}: give {choices}")
    if data.holdout and not (colon and kind == "folder"):
        holdout = f"config.data.holdout={data.holdout}"
        raise UserError(f"{holdout}: only a folder is split by it, not {data.name}")
    has_fixed_splits = data.name == "digits" or (colon and kind == "npz")
    if has_fixed_splits and (data.train_split or data.eval_split):
        splits = "config.data.train_split and eval_split"
        raise UserError(f"{splits}: {data.name} has train and test, and no others")
    if data.name == "digits":
        dataset = _open_digits(data)
    elif colon and kind == "npz":
        dataset = _open_npz(path, data)
    elif colon and kind == "folder":
        dataset = _open_folder(path, data)
    else:
        from jax_resnet.data.tfds import open_tfds  # takes a second to import

        dataset = open_tfds(data.name, data)
    for split in (dataset.train, dataset.eval):
        if len(split) == 0:
            raise UserError(f"{setting}: the {split.name} split is empty")
    kind = dataset.inputs.name
    train, evaluation = (split.element_spec()[kind].shape for split in (dataset.train, dataset.eval))
    if train != evaluation:
        raise UserError(
            f"{setting}: {dataset.train.name} {kind}s are {train}, "
            f"{dataset.eval.name} {kind}s {evaluation}; set config.data.{kind}.size"
        )
    return dataset


def _open_digits(data: ConfigDict) -> Dataset:
    train, test = (
        in_memory(split, images, labels, len(digits.CLASSES), data.image, data.name)
        for split, (images, labels) in digits.load_digits().items()
    )
    return Dataset(data.name, train, test, digits.CLASSES, ImageInputs(data))


# ---- arrays in one file ----------------------------------------------------------------------------------------------


def _open_npz(path: str, data: ConfigDict) -> Dataset:
    name = f"npz:{path}"
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            if missing := [key for key in keys if key not in getattr(file, "files", ())]:
                raise UserError(f"{name}: no array {missing[0]}; it must hold {', '.join(keys)}")
            arrays = {key: file[key] for key in keys}
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as e:
        raise UserError(f"{name}: cannot be read as .npz ({e})") from None
    for key, array in arrays.items():
        if key.startswith("x") and array.dtype != np.uint8:
            raise UserError(f"{name}: {key} is {array.dtype}; it must be uint8 pixels, 0 … 255")
        if not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{name}: {key} is {array.dtype}; it must be integer")
    train_labels, test_labels = arrays["y_train"].reshape(-1), arrays["y_test"].reshape(-1)
    if not train_labels.size:
        raise UserError(f"{name}: the train split is empty")
    classes = int(train_labels.max()) + 1
    if classes > len(train_labels):
        label = f"train label {classes - 1} of {len(train_labels)} examples"
        raise UserError(f"{name}: {label}; count classes from 0")
    return Dataset(
        name,
        in_memory("train", arrays["x_train"], train_labels, classes, data.image, name),
        in_memory("test", arrays["x_test"], test_labels, classes, data.image, name),
        tuple(str(i) for i in range(classes)),
        ImageInputs(data),
    )


# ---- a folder of class folders ---------------------------------------------------------------------------------------


def _open_folder(path: str, data: ConfigDict) -> Dataset:
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"folder:{path}: no such folder")
    subfolders = {d.name: d for d in sorted(root.iterdir()) if d.is_dir() and not d.name.startswith(".")}
    train_name = data.train_split or "train"
    eval_name = data.eval_split or next((n for n in EVAL_SPLITS if n in subfolders), None)
    if train_name in subfolders and data.holdout:
        holdout = f"config.data.holdout={data.holdout}"
        raise UserError(f"{holdout}: folder:{path} has splits of its own; leave it out")
    if train_name in subfolders:
        if eval_name not in subfolders:
            wanted = eval_name or " or ".join(EVAL_SPLITS)
            raise UserError(f"folder:{path}: {train_name}/ has no {wanted}/ beside it")
        train_files = class_files(subfolders[train_name], path)
        eval_files = class_files(subfolders[eval_name], path)
        if unknown := eval_files.keys() - train_files.keys():
            name = min(unknown)
            raise UserError(
                f"folder:{path}: class {name!r} is in {eval_name}/ but not in {train_name}/; "
                + did_you_mean(name, train_files)
            )
    elif data.train_split or data.eval_split:
        hint = did_you_mean(train_name, subfolders)
        raise UserError(f"folder:{path}: no subfolder {train_name!r}; {hint}")
    elif data.holdout:
        train_name, eval_name = "train", "holdout"
        train_files, eval_files = _hold_out(class_files(root, path), data.holdout)
    else:
        raise UserError(
            f"folder:{path}: neither train/ and val/ in it nor a stated split; to keep a "
            "fifth of each class for evaluation: --config.data.holdout=0.2"
        )
    classes = tuple(train_files)
    return Dataset(
        f"folder:{path}",
        _files_split(train_name, train_files, classes, data),
        _files_split(eval_name, eval_files, classes, data),
        classes,
        ImageInputs(data),
    )


def class_files(root: Path, path: str) -> dict[str, list[Path]]:
    """List the images of each class folder of `root`.

    Raises UserError, naming folder:`path`, if a class has none.
    """
    folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = {d.name: sorted(f for f in d.rglob("*") if _is_image(f)) for d in folders}
    if not files:
        raise UserError(f"folder:{path}: {root} has no class folders in it")
    for name, images in files.items():
        if not images:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"folder:{path}: {root / name} has no images in it ({suffixes})")
    return files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _hold_out(files: dict[str, list[Path]], share: float) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, held = {}, {}
    for name, images in files.items():
        count = min(len(images) - 1, max(1, round(len(images) * share)))
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(images))
        held[name] = [images[i] for i in sorted(order[:count])]
        train[name] = [images[i] for i in sorted(order[count:])]
    return train, held


def _files_split(
    name: str,
    files: dict[str, list[Path]],
    classes: Sequence[str],
    data: ConfigDict,
) -> EncodedSplit:
    # Workers are sent the paths of perhaps a million files: as strings, and labels as one array.
    paths = [str(file) for cls in classes for file in files.get(cls, [])]
    labels = np.repeat(np.arange(len(classes)), [len(files.get(cls, [])) for cls in classes])

    def records(indices: Sequence[int]) -> Iterator[tuple[bytes, int, str]]:
        try:
            for i in indices:
                with open(paths[i], "rb", buffering=0) as file:
                    content = file.read()
                yield content, int(labels[i]), paths[i]
        except OSError as e:
            raise UserError(f"{name} split: {e.filename}: {e.strerror}") from None

    return encoded(name, len(paths), records, len(classes), data)
