"""Datasets by name: what is read, and the one line that says what is wrong."""

import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import programs
import pytest
import squares
import tiny
from conftest import ROOT
from ml_collections import ConfigDict

from jax_resnet.data.dataset import Dataset, Rows
from jax_resnet.data.image.pixels import Pixels
from jax_resnet.data.image.split import EncodedSplit
from jax_resnet.data.image.split import ImageSplit as Split
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import UserError


def data_config(name: str, **changes: Any) -> ConfigDict:
    return tiny.data_config(**{"name": name, "crop": "none"} | changes)


def refusal(c: ConfigDict) -> str:
    """The one line with which `open_dataset` refuses `c`."""
    with pytest.raises(UserError) as e:
        open_dataset(c)
    assert "\n" not in str(e.value)
    return str(e.value)


def parts(rows: Rows) -> tuple[np.ndarray, np.ndarray, dict[int, tuple[str, str]]]:
    """Images, labels and what is broken."""
    return rows.arrays["image"], rows.arrays["label"], rows.broken


def read_all(split: Split) -> tuple[np.ndarray, np.ndarray]:
    images, labels, broken = parts(split.read(np.arange(len(split)), None))
    assert not broken
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    assert images.shape == (len(split), *split.shape())
    return images, labels


def values(split: Split) -> list[tuple[int, int]]:
    """The value of each image's pixels and its label."""
    images, labels = read_all(split)
    assert all(len(set(image.ravel())) == 1 for image in images)
    return [(int(image.flat[0]), int(label)) for image, label in zip(images, labels, strict=True)]


# ---- digits ----------------------------------------------------------------------------------------------------------


def sorted_records(images: np.ndarray, labels: np.ndarray) -> list[tuple[int, bytes]]:
    return sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


def test_digits_are_those_of_scikit_learn_split_by_class():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    dataset = open_dataset(data_config("digits", channels=1))
    assert (len(dataset.train), len(dataset.eval), dataset.num_classes) == (1437, 360, 10)
    assert (dataset.train.name, dataset.eval.name) == ("train", "test")
    assert dataset.class_names == tuple("0123456789")
    for split, pixels, labels in ((dataset.train, x_train, y_train), (dataset.eval, x_test, y_test)):
        expected = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
        assert sorted_records(*read_all(split)) == sorted_records(expected, labels)


def test_digits_come_in_the_order_that_tfds_gave_them():
    """Bit for bit: the digests are of the records that were read while a TFDS builder prepared them."""
    dataset = open_dataset(data_config("digits", channels=1))
    digests = [
        hashlib.sha256(array.tobytes()).hexdigest() for array in read_all(dataset.train) + read_all(dataset.eval)
    ]
    assert digests == [
        "e1947ef3351095c681ee1287488fa21cf265092e77dd91ff504bcd9a27beaec3",
        "4eee1d414dba37598106ec3f393325992c48f28c3c855c0b3291ce569486be4a",
        "2a975554829df2b0ec348d8987eaa084ef3087cda66eee0ec8392f4b4189a4b1",
        "9e7b7083b35486ccc9c1827a61fd6fbb2e079bef6b9fee8e622c9dc02c5e5b0d",
    ]


def test_digits_with_three_channels_are_grey():
    grey, _ = read_all(open_dataset(data_config("digits", channels=1)).eval)
    colour, _ = read_all(open_dataset(data_config("digits", channels=3)).eval)
    np.testing.assert_array_equal(colour, grey.repeat(3, axis=-1))


def test_digits_are_resized_to_the_image_size():
    dataset = open_dataset(data_config("digits", channels=1, size=16))
    small, _ = read_all(open_dataset(data_config("digits", channels=1)).eval)
    large, _ = read_all(dataset.eval)
    assert dataset.train.shape() == (16, 16, 1)
    means = large.reshape(360, 8, 2, 8, 2).mean((2, 4))
    assert np.corrcoef(means.ravel(), small.ravel())[0, 1] > 0.95


# ---- TFDS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squares_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the TFDS dataset of tests/squares.py."""
    return squares.prepare(tmp_path_factory.mktemp("tfds"))


def test_dataset_of_images_of_one_size_is_in_memory(squares_dir):
    dataset = open_dataset(data_config(f"prepared:{squares_dir}", channels=1))
    assert dataset.train.source == dataset.eval.source == "memory"
    for split in (dataset.train, dataset.eval):
        assert sorted_records(*read_all(split)) == sorted_records(*squares.arrays(split.name))


@pytest.mark.parametrize("name", ["digits", "prepared"])
def test_opening_a_dataset_imports_neither_tensorflow_nor_torch(squares_dir, tmp_path, name):
    for package in ("tensorflow", "torch"):  # importable, so that an attempt shows even where they are not installed
        (tmp_path / "trap" / package).mkdir(parents=True)
        (tmp_path / "trap" / package / "__init__.py").write_text(f"print('imported', {package!r}); raise ImportError")
    code = (
        "import sys\n"
        "from jax_resnet.config import default\n"
        "from jax_resnet.data.sources import open_dataset\n"
        "c = default().data\n"
        f"c.name, c.image.channels = {name if name == 'digits' else f'prepared:{squares_dir}'!r}, 1\n"
        "dataset = open_dataset(c)\n"
        "print(len(dataset.train), sorted({'tensorflow', 'torch'} & set(sys.modules)))\n"
    )
    (tmp_path / "home").mkdir()
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'trap'}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu",
                        "HOME": str(tmp_path / "home")}  # fmt: skip
    done = programs.run([sys.executable, "-c", code], env=env)
    count = 1437 if name == "digits" else 150
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{count} []"]), done.stderr
    assert not list((tmp_path / "home").glob("tensorflow_datasets"))


def test_unknown_dataset_gets_the_nearest_names():
    assert "did you mean imagenet2012" in refusal(data_config("imagnet2012"))
    assert "did you mean digits" in refusal(data_config("digit"))


def test_unprepared_dataset_gets_the_command_that_prepares_it(tmp_path):
    text = refusal(data_config("cifar10", data_dir=str(tmp_path)))
    assert text.startswith(f"config.data.name=cifar10: not prepared in {tmp_path}")
    assert text.endswith(f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}")


def test_without_data_dir_the_command_names_none(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    text = refusal(data_config("cifar10"))
    assert f"not prepared in {tmp_path}" in text
    assert text.endswith("tfds build cifar10 --file_format=array_record")


def copy_as_tfrecord(squares_dir: Path, to: Path) -> Path:
    """The folder of a copy of the squares whose facts say that its files are TFRecords."""
    version = to / "squares" / "1.0.0"
    version.mkdir(parents=True)
    for file in squares_dir.glob("*.json"):
        (version / file.name).write_text(file.read_text())
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    return version


def test_dataset_without_random_access_gets_the_command_that_converts_it(squares_dir, tmp_path):
    version = copy_as_tfrecord(squares_dir, tmp_path)
    text = refusal(data_config("squares", data_dir=str(tmp_path)))
    assert text.startswith("config.data.name=squares: prepared as tfrecord, which has no random access")
    assert f"tfds convert_format --dataset_version_dir={version}" in text
    assert "--out_file_format=array_record" in text


def test_dataset_converted_in_place_is_read(squares_dir, tmp_path):
    """As `tfds convert_format` leaves it: ArrayRecord files beside the others, named only among the alternatives."""
    version = copy_as_tfrecord(squares_dir, tmp_path)
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"alternativeFileFormats": ["array_record"]}))
    for file in squares_dir.glob("*array_record*"):
        (version / file.name).write_bytes(file.read_bytes())
    dataset = open_dataset(data_config("squares", data_dir=str(tmp_path), channels=1))
    assert sorted_records(*read_all(dataset.train)) == sorted_records(*squares.arrays("train"))


def test_unknown_version_of_a_dataset_is_refused(tmp_path):
    assert "9.9.9" in refusal(data_config("mnist:9.9.9", data_dir=str(tmp_path)))


@pytest.mark.parametrize(("key", "value", "near"), [("train_split", "trian", "train"), ("eval_split", "tset", "test")])
def test_unknown_split_gets_the_nearest_name(squares_dir, key, value, near):
    text = refusal(data_config(f"prepared:{squares_dir}", channels=1, **{key: value}))
    assert f"no split {value!r}; did you mean {near}?" in text


def test_a_part_of_a_split_can_be_named(squares_dir):
    name = f"prepared:{squares_dir}"
    c = data_config(name, channels=1, train_split="train[:100]", eval_split="train[100:]")
    dataset = open_dataset(c)
    assert (len(dataset.train), len(dataset.eval)) == (100, 50)
    whole = open_dataset(data_config(name, channels=1)).train
    both = [np.concatenate(parts) for parts in zip(read_all(dataset.train), read_all(dataset.eval), strict=True)]
    assert sorted_records(*both) == sorted_records(*read_all(whole))


def test_damaged_files_are_named(squares_dir, tmp_path):
    version = tmp_path / "squares" / "1.0.0"
    version.mkdir(parents=True)
    for file in squares_dir.iterdir():
        content = file.read_bytes()
        (version / file.name).write_bytes(content[: len(content) // 2] if "array_record" in file.name else content)
    text = refusal(data_config("squares", data_dir=str(tmp_path), channels=1))
    assert f"{version}/squares-train.array_record-" in text
    assert "prepare" in text


@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two prepared TFDS datasets: `photos`, JPEGs of many sizes, and `unlabelled`, without labels."""
    import tensorflow_datasets as tfds

    class Photos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        labelled = True

        def _info(self):
            features = {"image": tfds.features.Image(shape=(None, None, 3))}
            if self.labelled:
                features["label"] = tfds.features.ClassLabel(names=["cat", "dog"])
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label") if self.labelled else None,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(6)), "validation": self._generate_examples(range(6, 9))}

        def _generate_examples(self, numbers):
            for i in numbers:
                jpeg = cv2.imencode(".jpg", np.full((10 + i, 30 - i, 3), 20 * i, np.uint8))[1].tobytes()
                yield i, {"image": io.BytesIO(jpeg)} | ({"label": i % 2} if self.labelled else {})

    class Unlabelled(Photos):
        labelled = False

    folder = tmp_path_factory.mktemp("photos")
    for builder in (Photos, Unlabelled):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_dataset_of_images_of_many_sizes_is_decoded_when_read(photos_dir):
    dataset = open_dataset(data_config("photos", data_dir=str(photos_dir), size=8))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.eval.name == "validation"
    assert sorted(values(dataset.train)) == [(20 * i, i % 2) for i in range(6)]
    assert sorted(values(dataset.eval)) == [(20 * i, i % 2) for i in range(6, 9)]
    some, _, _ = parts(dataset.train.read(np.array([3, 0]), None))
    np.testing.assert_array_equal(some, read_all(dataset.train)[0][[3, 0]])


def test_dataset_of_images_of_many_sizes_needs_one(photos_dir):
    text = refusal(data_config("photos", data_dir=str(photos_dir)))
    assert text.startswith("config.data.name=photos: its images differ in size")
    assert "--config.data.image.size=" in text


def test_dataset_without_labels_is_refused(photos_dir):
    text = refusal(data_config("unlabelled", data_dir=str(photos_dir), size=8))
    assert text == "config.data.name=unlabelled: not an image-classification dataset (its features: image)"


# ---- arrays in one file ----------------------------------------------------------------------------------------------


def write_npz(folder: Path, **changes: Any) -> str:
    """The name of a good .npz of 6 and 4 images of 5×5, 3 classes, with arrays replaced, or left out for None."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (6, 5, 5), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 2, 1, 0]),
        "x_test": rng.integers(0, 256, (4, 5, 5), dtype=np.uint8),
        "y_test": np.array([2, 0, 1, 1]),
    }
    file = folder / "data.npz"
    np.savez(file, **{name: a for name, a in (arrays | changes).items() if a is not None})
    return f"npz:{file}"


@pytest.mark.parametrize("shape", [(6, 5, 5), (6, 5, 5, 1)])
def test_npz_of_grey_images_is_read_as_it_is(tmp_path, shape):
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    dataset = open_dataset(data_config(write_npz(tmp_path, x_train=pixels), channels=1))
    images, labels = read_all(dataset.train)
    np.testing.assert_array_equal(images, pixels.reshape(6, 5, 5, 1))
    assert labels.tolist() == [0, 1, 2, 2, 1, 0]
    assert (len(dataset.eval), dataset.class_names) == (4, ("0", "1", "2"))


def test_npz_records_come_in_the_order_asked_for(tmp_path):
    split = open_dataset(data_config(write_npz(tmp_path), channels=1)).train
    some, labels, _ = parts(split.read(np.array([4, 0, 4]), None))
    np.testing.assert_array_equal(some, read_all(split)[0][[4, 0, 4]])
    assert labels.tolist() == [1, 0, 1]


def test_reading_with_crops_leaves_the_stored_images_alone(tmp_path):
    split = open_dataset(data_config(write_npz(tmp_path), channels=1, crop="random_resized")).train
    before, _ = read_all(split)
    cropped, _, _ = parts(split.read(np.arange(6), [np.random.default_rng(i) for i in range(6)]))
    assert (cropped != before).any()
    np.testing.assert_array_equal(read_all(split)[0], before)


@pytest.mark.parametrize("labels", [np.array([[0], [1], [2], [2], [1], [0]]), np.array([0, 1, 2, 2, 1, 0], np.uint8)])
def test_npz_labels_may_be_a_column_or_bytes(tmp_path, labels):
    dataset = open_dataset(data_config(write_npz(tmp_path, y_train=labels), channels=1))
    assert read_all(dataset.train)[1].tolist() == [0, 1, 2, 2, 1, 0]


def test_npz_of_grey_images_for_a_colour_network(tmp_path):
    grey = open_dataset(data_config(write_npz(tmp_path), channels=1)).train
    colour = open_dataset(data_config(write_npz(tmp_path), channels=3)).train
    np.testing.assert_array_equal(read_all(colour)[0], read_all(grey)[0].repeat(3, axis=-1))


def test_npz_of_colour_images_for_a_grey_network(tmp_path):
    rng = np.random.default_rng(2)
    x_train, x_test = (rng.integers(0, 256, (n, 5, 5, 3), dtype=np.uint8) for n in (6, 4))
    dataset = open_dataset(data_config(write_npz(tmp_path, x_train=x_train, x_test=x_test), channels=1))
    expected = (x_train @ np.array([0.299, 0.587, 0.114]))[..., None]
    np.testing.assert_allclose(read_all(dataset.train)[0], expected, atol=0.51)


def test_npz_images_are_resized_to_the_image_size(tmp_path):
    x_train = np.repeat(np.repeat(np.arange(6 * 25, dtype=np.uint8).reshape(6, 5, 5), 2, axis=1), 2, axis=2)
    dataset = open_dataset(data_config(write_npz(tmp_path, x_train=x_train), channels=1, size=5))
    np.testing.assert_array_equal(read_all(dataset.train)[0].ravel(), np.arange(6 * 25))
    assert dataset.eval.shape() == (5, 5, 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"y_test": None}, "no array y_test; it must hold x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((6, 5, 5), np.float32)}, "x_train is float32; it must be uint8"),
        ({"y_train": np.zeros(6)}, "y_train is float64; it must be integer"),
        ({"y_train": np.array([*"abcdef"])}, "y_train is <U1; it must be integer"),
        ({"y_train": np.array([0, 1, None], object)}, "cannot be read as .npz"),
        ({"x_train": np.zeros((6, 5, 5, 2), np.uint8)}, "train images have shape (6, 5, 5, 2); they must be [N, H, W]"),
        ({"x_test": np.zeros((4, 25), np.uint8)}, "test images have shape (4, 25); they must be [N, H, W]"),
        ({"y_train": np.array([0, 1, -1, 2, 1, 0])}, "train label -1 of record 2 is out of range"),
        ({"y_test": np.array([0, 1, 2, -3])}, "test label -3 of record 3 is out of range"),
        ({"y_train": np.array([0, 1, 2])}, "6 train images, but 3 labels"),
        ({"y_test": np.eye(4, dtype=int)}, "4 test images, but 16 labels"),
        ({"x_train": np.zeros((0, 5, 5), np.uint8), "y_train": np.zeros(0, int)}, "the train split is empty"),
        ({"x_test": np.zeros((0, 5, 5), np.uint8), "y_test": np.zeros(0, int)}, "the test split is empty"),
        ({"x_test": np.zeros((4, 7, 7), np.uint8)}, "(5, 5, 1), test images (7, 7, 1); set config.data.image.size"),
    ],
)
def test_npz_with_a_fault_is_refused_in_a_line_that_names_it(tmp_path, changes, expected):
    name = write_npz(tmp_path, **changes)
    text = refusal(data_config(name, channels=1))
    assert name in text
    assert expected in text


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda good: b"", id="no byte"),
        pytest.param(lambda good: b"hello", id="text"),
        pytest.param(lambda good: good[: len(good) // 2], id="half"),
        pytest.param(lambda good: good[:300] + b"\xff" * 20 + good[320:], id="changed bytes"),
    ],
)
def test_npz_that_is_none_is_refused(tmp_path, spoil):
    file = Path(write_npz(tmp_path).removeprefix("npz:"))
    file.write_bytes(spoil(file.read_bytes()))
    assert refusal(data_config(f"npz:{file}")).startswith(f"npz:{file}: cannot be read as .npz")


def test_compressed_npz_with_changed_bytes_is_refused(tmp_path):
    file = tmp_path / "data.npz"
    np.savez_compressed(file, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), np.arange(99)))
    good = file.read_bytes()
    file.write_bytes(good[:60] + b"\xff" * 20 + good[80:])
    assert refusal(data_config(f"npz:{file}")).startswith(f"npz:{file}: cannot be read as .npz")


def test_one_array_saved_under_the_name_of_an_npz_is_refused(tmp_path):
    with open(tmp_path / "data.npz", "wb") as file:
        np.save(file, np.zeros(3))
    assert "cannot be read as .npz" in refusal(data_config(f"npz:{tmp_path / 'data.npz'}"))


def test_npz_that_is_not_there_or_a_folder_is_refused(tmp_path):
    assert refusal(data_config(f"npz:{tmp_path / 'none.npz'}")) == f"npz:{tmp_path / 'none.npz'}: no such file"
    assert "cannot be read as .npz" in refusal(data_config(f"npz:{tmp_path}"))


def test_random_crops_of_images_that_are_not_square_need_a_size(tmp_path):
    wide = {"x_train": np.zeros((6, 5, 8), np.uint8), "x_test": np.zeros((4, 5, 8), np.uint8)}
    c = data_config(write_npz(tmp_path, **wide), channels=1, crop="random_resized")
    assert "set config.data.image.size" in refusal(c)
    c.image.size = 4
    assert open_dataset(c).train.shape() == (4, 4, 1)


# ---- a folder of class folders ---------------------------------------------------------------------------------------


def write_images(root: Path, *files: str) -> None:
    """4×4 PNGs; the pixels of each are its place in `files`, from 1. A name that ends in / is an empty folder."""
    for value, name in enumerate(files, start=1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir(exist_ok=True)
        else:
            png = cv2.imencode(".png", np.full((4, 4, 3), value, np.uint8))[1]
            (root / name).write_bytes(png.tobytes())


def folder_config(root: Path, **changes: Any) -> ConfigDict:
    return data_config(f"folder:{root}", **({"size": 4} | changes))


def open_folder(root: Path, *files: str, **changes: Any) -> Dataset:
    write_images(root, *files)
    return open_dataset(folder_config(root, **changes))


@pytest.mark.parametrize("eval_name", ["validation", "val", "valid", "test"])
def test_folder_with_train_and_evaluation_parts(tmp_path, eval_name):
    dataset = open_folder(tmp_path, "train/dog/1.png", "train/cat/1.png", "train/cat/2.png", f"{eval_name}/dog/3.png")
    assert dataset.class_names == ("cat", "dog")
    assert values(dataset.train) == [(2, 0), (3, 0), (1, 1)]
    assert values(dataset.eval) == [(4, 1)]
    assert dataset.eval.name == eval_name


def test_folder_splits_can_be_named(tmp_path):
    files = ("a/x/1.png", "b/x/2.png", "val/x/3.png")
    dataset = open_folder(tmp_path, *files, train_split="a", eval_split="b")
    assert values(dataset.train) == [(1, 0)]
    assert values(dataset.eval) == [(2, 0)]


def test_images_in_nested_folders_and_with_capital_suffixes_are_found(tmp_path):
    dataset = open_folder(tmp_path, "train/a/2020/may/1.png", "train/a/2.PNG", "train/b/3.png", "val/b/deep/4.png")
    assert sorted(values(dataset.train)) == [(1, 0), (2, 0), (3, 1)]
    assert values(dataset.eval) == [(4, 1)]


def test_other_files_and_hidden_folders_are_passed_over(tmp_path):
    write_images(tmp_path, "train/a/1.png", "val/a/2.png", "train/.cache/3.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "list.csv").write_text("a,1")
    dataset = open_dataset(folder_config(tmp_path))
    assert dataset.class_names == ("a",)
    assert values(dataset.train) == [(1, 0)]


HOLDOUT = [f"{name}/{i}.png" for name, count in (("a", 20), ("b", 10), ("c", 2), ("d", 1)) for i in range(count)]


def test_holdout_keeps_its_share_of_each_class_and_something_to_train_on(tmp_path):
    dataset = open_folder(tmp_path, *HOLDOUT, holdout=0.3)
    train, held = values(dataset.train), values(dataset.eval)
    assert np.bincount([label for _, label in held], minlength=4).tolist() == [6, 3, 1, 0]
    assert np.bincount([label for _, label in train], minlength=4).tolist() == [14, 7, 1, 1]
    assert sorted(train + held) == [(i, "abcd".index(name[0])) for i, name in enumerate(HOLDOUT, start=1)]


def test_holdout_is_the_same_every_time(tmp_path):
    first = open_folder(tmp_path, *HOLDOUT, holdout=0.3)
    again = open_dataset(folder_config(tmp_path, holdout=0.3))
    assert values(first.train) == values(again.train)
    assert values(first.eval) == values(again.eval)


def test_holdout_is_not_simply_the_first_files(tmp_path):
    held = values(open_folder(tmp_path, *HOLDOUT, holdout=0.3).eval)
    assert [value for value, label in held if label == 0] != list(range(1, 7))


@pytest.mark.parametrize(
    ("files", "changes", "expected"),
    [
        (["train/a/1.png", "val/"], {}, "/val has no class folders in it"),
        (["train/1.png", "val/a/1.png"], {}, "/train has no class folders in it"),
        (["1.png"], {"holdout": 0.2}, "has no class folders in it"),
        (["train/a/1.png", "train/b/", "val/a/1.png"], {}, "/train/b has no images in it"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/"], {}, "/val/b has no images in it"),
        (["train/cat/1.png", "val/catt/1.png"], {}, "class 'catt' is in val/ but not in train/; did you mean cat?"),
        (["train/a/1.png"], {}, "train/ has no validation or val or valid or test/ beside it"),
        (["train/a/1.png", "val/a/1.png"], {"eval_split": "vall"}, "train/ has no vall/ beside it"),
        (["train/a/1.png", "val/a/1.png"], {"train_split": "trian"}, "no subfolder 'trian'; did you mean train?"),
        (["a/1.png", "b/1.png"], {}, "--config.data.holdout=0.2"),
        (["train/a/1.png", "val/a/1.png"], {"size": None}, "--config.data.image.size="),
    ],
)
def test_folder_with_a_fault_is_refused_in_a_line_that_names_it(tmp_path, files, changes, expected):
    write_images(tmp_path, *files)
    text = refusal(folder_config(tmp_path, **changes))
    assert str(tmp_path) in text
    assert expected in text


def test_folder_that_is_not_there_or_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        assert refusal(folder_config(tmp_path / name)) == f"folder:{tmp_path / name}: no such folder"


def read_refusal(split: Split) -> str:
    with pytest.raises(UserError) as e:
        read_all(split)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_image_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path):
    dataset = open_folder(tmp_path, "train/a/1.png", "train/a/2.png", "val/a/3.png")
    bad = tmp_path / "train" / "a" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    images, labels, broken = parts(dataset.train.read(np.array([0, 1]), None))
    assert broken == {1: (str(bad), "not an image that can be decoded (40 bytes)")}
    assert [len(set(image.ravel())) for image in images] == [1, 1]
    assert images[1].max() == 0
    assert labels.tolist() == [0, 0]
    assert values(dataset.eval) == [(3, 0)]


def test_image_that_has_gone_is_named_when_it_is_read(tmp_path):
    dataset = open_folder(tmp_path, "train/a/1.png", "val/a/3.png")
    (tmp_path / "train" / "a" / "1.png").unlink()
    text = read_refusal(dataset.train)
    assert text.startswith(f"train split: {tmp_path / 'train' / 'a' / '1.png'}: ")
    assert "No such file" in text


def test_label_out_of_range_is_named_when_it_is_read():
    png = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    for label in (-1, 3):
        records = [(png, 0, "record 0"), (png, label, "record 1")]
        pixels = Pixels.of(data_config("").image, 4)
        split = EncodedSplit("train", pixels, 2, lambda i, r=records: [r[j] for j in i], 3)
        expected = f"train split: record 1 has label {label}; labels must lie in 0 … 2"
        assert read_refusal(split) == expected


@pytest.mark.parametrize(("channels", "expected"), [(3, (200, 100, 50)), (1, (124,))])
def test_folder_of_colour_and_grey_images_has_the_channels_asked_for(tmp_path, channels, expected):
    write_images(tmp_path, "val/a/1.png")
    (tmp_path / "train" / "a").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "train" / "a" / "colour.png"), np.full((6, 9, 3), (50, 100, 200), np.uint8))
    cv2.imwrite(str(tmp_path / "train" / "a" / "grey.png"), np.full((5, 4), 77, np.uint8))
    images, _ = read_all(open_dataset(folder_config(tmp_path, channels=channels)).train)
    np.testing.assert_array_equal(images[0], np.broadcast_to(expected, (4, 4, channels)))
    np.testing.assert_array_equal(images[1], np.full((4, 4, channels), 77))


def test_evaluation_reads_the_centre_and_training_a_random_part(tmp_path):
    columns = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))[..., None].repeat(3, axis=-1)  # 16×24
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "a" / "1.png"), columns)
    dataset = open_dataset(folder_config(tmp_path, size=14, crop="random_resized"))  # 14 / 0.875 = 16
    np.testing.assert_array_equal(read_all(dataset.eval)[0][0], columns[1:15, 5:19])
    drawn = [parts(dataset.train.read(np.array([0]), [np.random.default_rng(seed)]))[0].tobytes() for seed in range(5)]
    assert len(set(drawn)) == 5
    np.testing.assert_array_equal(read_all(dataset.train)[0][0], columns[1:15, 5:19])


def test_scaled_and_stretched_crops_are_boxes_of_the_image_and_evaluation_sees_its_centre_or_all_of_it(tmp_path):
    rows, columns = np.mgrid[:160, :240].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)  # as OpenCV writes it, red last: the row is in it and in blue
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "a" / "1.png"), image)
    # Of the side 8·f, f from 2 to 4, a square of 8: 1/f of the short side, or of both.
    extents = {"scaled": (160, 160), "stretched": (160, 240)}
    for crop, (height, width) in extents.items():
        how = {"size": 8, "crop_resize": (16, 32), "antialias": True}
        dataset = open_dataset(folder_config(tmp_path, crop=crop, **how))
        shares = {}
        for size in (None, 8, 12, 4):  # with progressive sizes the box is the same
            drawn = [
                parts(dataset.train.read(np.array([0]), [np.random.default_rng(seed)], size))[0][0].astype(float)
                for seed in range(40)
            ]
            side = size or 8
            spans = np.array([(np.ptp(x[..., 0]) / height, np.ptp(x[..., 1]) / width) for x in drawn])
            shares[size] = spans * side / (side - 1)  # between the centres of the outermost pixels
            np.testing.assert_allclose(shares[size][:, 0], shares[size][:, 1], atol=0.03)
            assert 0.22 < shares[size].min() < 0.3
            assert 0.44 < shares[size].max() < 0.53
        for size in (12, 4):
            np.testing.assert_allclose(
                shares[size], shares[8], atol=0.06
            )  # the outermost pixels weigh what is inside more
        assert (shares[None] == shares[8]).all()
    how = {"size": 80, "crop_resize": (90, 99), "eval_crop": 1.0}
    scaled, stretched = (
        read_all(open_dataset(folder_config(tmp_path, crop=crop, **how)).eval)[0][0] for crop in extents
    )
    np.testing.assert_allclose(scaled[..., 1], image[::2, 40:200:2, 1], atol=1)
    np.testing.assert_allclose(stretched[..., 1], np.broadcast_to(np.arange(80) * 3 + 1, (80, 80)), atol=1)
    np.testing.assert_allclose(stretched[..., 0], image[::2, ::3, 0], atol=1)


def test_images_in_memory_resized_to_less_than_a_crop_are_refused(tmp_path):
    text = refusal(data_config(write_npz(tmp_path), channels=1, crop="scaled", crop_resize=(1, 40)))
    assert text.startswith("config.data.image.crop_resize=(1, 40): is less than the")
    assert text.endswith("for config.data.image.crop=scaled")


def test_splits_that_would_be_ignored_are_refused(tmp_path):
    npz = write_npz(tmp_path)
    assert "only a folder is split" in refusal(data_config("digits", channels=1, holdout=0.2))
    assert "only a folder is split" in refusal(data_config(f"npz:{npz}", holdout=0.2))
    for name in (npz, "digits"):
        expected = f"config.data.train_split and eval_split: {name} has train and test, and no others"
        assert refusal(data_config(name, eval_split="validation")) == expected
