"""The command that makes images ready: what is written, what is left out, and going on after kill -9."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import programs
import pytest
import simplejpeg
import squares
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from conftest import ROOT
from ml_collections import ConfigDict
from PIL import Image, ImageOps
from tiny import data_config

from jax_resnet.commands import prepare as command_prepare
from jax_resnet.data import prepare, raw
from jax_resnet.data.image.images import decode
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import UserError

ENV = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "jax_resnet", "prepare", *map(str, args)]


def run(*args: Any) -> subprocess.CompletedProcess[str]:
    return programs.run(command(*args), env=ENV)


def here(monkeypatch: pytest.MonkeyPatch, *args: Any) -> None:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
    command_prepare.main()


def refusal(monkeypatch: pytest.MonkeyPatch, *args: Any) -> str:
    with pytest.raises(UserError) as e:
        here(monkeypatch, *args)
    assert "\n" not in str(e.value)
    return str(e.value)


def jpeg(value: int, height: int = 24, width: int = 32) -> bytes:
    """A JPEG of grey noise around `value`."""
    noise = np.random.default_rng(value).integers(-20, 20, (height, width, 1)).repeat(3, axis=-1)
    return simplejpeg.encode_jpeg(np.clip(value + noise, 0, 255).astype(np.uint8), 90)


def write_images(root: Path, count: int, *, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """`count` images for each split, in turn of the classes cat, dog and eel, of three sizes."""
    for split in splits:
        for i in range(count):
            file = root / split / ("cat", "dog", "eel")[i % 3] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(i % 200, *[(24, 32), (60, 40), (50, 50)][i % 3]))
    return root


def files(folder: Path) -> dict[str, bytes]:
    """The shards."""
    return {f.name: f.read_bytes() for f in folder.glob("images-*") if f.suffix != ".part"}


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prepare.json").read_text())


def broken_lines(folder: Path) -> list[str]:
    return [line for file in facts(folder)["files"].values() for line in file["broken"]]


def config(folder: Path, **changes: Any) -> ConfigDict:
    return data_config(**{"name": f"prepared:{folder}", "crop": "none", "size": 16} | changes)


def stored(folder: Path, split: str = "train") -> list[tuple[bytes, int]]:
    """The bytes and the label of each record, as TFDS reads them."""
    builder = tfds.builder_from_directory(folder)
    records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return [(record["image"], int(record["label"])) for record in (records[i] for i in range(len(records)))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("source"), 30)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of at least 8 images, so that there are several."""
    monkeypatch.setattr(prepare, "SHARD_IMAGES", 8)


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_bytes_are_copied_and_the_package_trains_on_them(source, tmp_path, monkeypatch, capsys):
    here(monkeypatch, source, tmp_path / "to", "--workers=2")
    names = sorted(files(tmp_path / "to"))
    assert names == [f"images-{s}.array_record-0000{i}-of-00004" for s in ("train", "val") for i in range(4)]
    expected = [(f.read_bytes(), ["cat", "dog", "eel"].index(f.parent.name)) for f in (source / "train").rglob("*.jpg")]
    found = stored(tmp_path / "to")
    assert sorted(found) == sorted(expected)
    assert len({label for _, label in found[:9]}) == 3  # a part of it is of all classes
    dataset = open_dataset(config(tmp_path / "to"))
    assert (len(dataset.train), len(dataset.eval), dataset.eval.name) == (30, 30, "val")
    assert dataset.class_names == ("cat", "dog", "eel")
    images, labels = dataset.train.read(np.arange(30), None).arrays.values()
    assert labels.tolist() == [label for _, label in found]
    assert abs(images.mean() - np.mean([decode(data, 3).mean() for data, _ in found])) < 3
    out = capsys.readouterr().out
    assert "train: 30 images, 45×41 px on average" in out
    assert out.endswith(f"to train on it: --config.data.name=prepared:{tmp_path / 'to'}\n")


def areas(size: int, to: int) -> np.ndarray:
    """[to, size]: what share of each of `to` equal parts of a line each of its `size` pixels covers."""
    edges, pixels = np.arange(to + 1) * size / to, np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(overlap, 0) * to / size


def test_resizing_shrinks_the_short_side_and_enlarges_nothing(source, tmp_path, monkeypatch):
    here(monkeypatch, source, tmp_path / "to", "--resize=30", "--quality=100")
    listed = raw.list_folder(source)
    names = [listed.read("train", i)[2] for i in range(30)]
    shapes = []
    for name, (data, _) in zip(names, stored(tmp_path / "to"), strict=True):
        original, found = (source / name).read_bytes(), decode(data, 1)
        shapes.append(found.shape)
        if found.shape == (24, 32, 1):
            assert data == original
        else:
            image = decode(original, 1)[..., 0]
            means = areas(image.shape[0], found.shape[0]) @ image @ areas(image.shape[1], found.shape[1]).T
            assert np.abs(means - found[..., 0]).mean() < 1
    assert Counter(shapes) == {(24, 32, 1): 10, (45, 30, 1): 10, (30, 30, 1): 10}
    found = facts(tmp_path / "to")["splits"]["train"]
    assert (found["images"], found["mean_height"], found["mean_width"]) == (30, 33.0, 30.7)
    assert found["classes"] == {"cat": 10, "dog": 10, "eel": 10}


@pytest.mark.usefixtures("small")
def test_the_same_source_gives_the_same_bytes_whatever_the_workers(source, tmp_path, monkeypatch):
    here(monkeypatch, source, tmp_path / "a", "--resize=30", "--workers=1")
    here(monkeypatch, source, tmp_path / "b", "--resize=30", "--workers=7")
    assert files(tmp_path / "a") == files(tmp_path / "b") != {}


def test_images_of_one_size_are_kept_in_memory(tmp_path, monkeypatch):
    for i, name in enumerate(("train/a", "train/b", "val/a")):
        (tmp_path / "from" / name).mkdir(parents=True)
        (tmp_path / "from" / name / "1.jpg").write_bytes(jpeg(50 * i))
    here(monkeypatch, tmp_path / "from", tmp_path / "to")
    dataset = open_dataset(config(tmp_path / "to", size=None))
    assert dataset.train.shape() == (24, 32, 3)


def test_class_folders_alone_become_one_split_that_can_be_cut(tmp_path, monkeypatch, capsys):
    write_images(tmp_path, 30, splits=("from",))
    here(monkeypatch, tmp_path / "from", tmp_path / "to")
    assert "--config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'" in capsys.readouterr().out
    dataset = open_dataset(config(tmp_path / "to", train_split="train[:50%]", eval_split="train[50%:]"))
    assert (len(dataset.train), len(dataset.eval)) == (15, 15)
    for part in (dataset.train, dataset.eval):
        assert set(part.read(np.arange(15), None).arrays["label"]) == {0, 1, 2}


def test_a_tfds_dataset_is_written_as_it_is(tmp_path, monkeypatch):
    squares.prepare(tmp_path / "tfds")
    here(monkeypatch, "tfds:squares", tmp_path / "to", f"--data_dir={tmp_path / 'tfds'}")
    ours = open_dataset(config(tmp_path / "to", channels=1, size=None))
    theirs = open_dataset(config(tmp_path, name="squares", channels=1, size=None, data_dir=str(tmp_path / "tfds")))
    for a, b in ((ours.train, theirs.train), (ours.eval, theirs.eval)):
        for x, y in zip(*(split.read(np.arange(len(split)), None).arrays.values() for split in (a, b)), strict=True):
            np.testing.assert_array_equal(x, y)
    assert "not prepared in" in refusal(monkeypatch, "tfds:cifar10", tmp_path / "no", f"--data_dir={tmp_path}")
    assert refusal(monkeypatch, "tfds:squarez", tmp_path / "no").startswith("tfds:squarez: unknown dataset")
    assert "nothing need be prepared" in refusal(monkeypatch, "tfds:digits", tmp_path / "no")


class HalfLabelled(tfds.core.GeneratorBasedBuilder):
    """The labels of its test split are not told, as with ImageNet."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        labels = {"train": [0, 1, 2], "validation": [2, 0], "test": [-1, -1, -1]}
        return {split: self._generate_examples(of) for split, of in labels.items()}

    def _generate_examples(self, labels: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, label in enumerate(labels):
            yield i, {"image": io.BytesIO(jpeg(i)), "label": label}


def test_a_split_without_labels_is_left_out(tmp_path, monkeypatch, capsys):
    HalfLabelled(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    here(monkeypatch, "tfds:half_labelled", tmp_path / "to", f"--data_dir={tmp_path}")
    assert "test: left out, it has no labels" in capsys.readouterr().out
    assert facts(tmp_path / "to")["splits"].keys() == {"train", "validation"}
    assert sorted(label for _, label in stored(tmp_path / "to", "validation")) == [0, 2]


# ---- odd and broken images -------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def odd_kinds() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files that are read, and files that are refused."""
    rows, columns = np.mgrid[:24, :36]
    image = Image.fromarray(np.stack([rows * 10, columns * 7, np.full_like(rows, 90)], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, png, turned = saved(image, "JPEG"), saved(image, "PNG"), image.copy()
    turned.putalpha(Image.fromarray((columns * 7).astype(np.uint8)))
    read = {
        "png_named.jpg": png,
        "jpeg_named.png": plain,
        "grey.jpg": saved(image.convert("L"), "JPEG"),
        "grey.png": saved(image.convert("L"), "PNG"),
        "two_tone.png": saved(image.convert("1"), "PNG"),
        "palette.png": saved(image.convert("P"), "PNG", transparency=3),
        "rgba.png": saved(turned, "PNG"),
        "grey_alpha.png": saved(turned.convert("LA"), "PNG"),
        "sixteen.png": cv2.imencode(".png", np.asarray(image)[..., ::-1].astype(np.uint16) * 257)[1].tobytes(),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
        "exif6.jpg": saved(image, "JPEG", exif=exif),
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "bitmap.bmp": saved(image, "BMP"),
        "web.webp": saved(image, "WEBP", lossless=True),
        "tag.tiff": saved(image, "TIFF"),
    }
    refused = {
        "truncated.jpg": plain[: len(plain) // 2],
        "truncated.png": png[: len(png) // 2],
        "zero.jpg": b"",
        "text.jpg": b"hello",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "noise.jpg": b"\xff\xd8\xff" + bytes(range(256)),
    }
    return read, refused


def test_odd_kinds_are_read_as_pillow_reads_them_and_broken_ones_named(tmp_path, monkeypatch, capsys):
    read, refused = odd_kinds()
    folder = write_images(tmp_path / "from", 6)
    for name, data in (read | refused).items():
        (folder / "train" / "cat" / name).write_bytes(data)
    monkeypatch.setattr(prepare, "BROKEN_SHARE", 0.5)
    here(monkeypatch, folder, tmp_path / "to")
    stored_bytes = [data for data, _ in stored(tmp_path / "to")]
    for name, data in read.items():
        assert data in stored_bytes, name
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
        np.testing.assert_allclose(decode(data, 3).astype(int), expected, atol=1, err_msg=name)
    assert len(stored_bytes) == 6 + len(read)
    lines = sorted(broken_lines(tmp_path / "to"))
    assert [line.partition(":")[0] for line in lines] == sorted(f"train/cat/{name}" for name in refused)
    assert f"train/cat/text.jpg: not an image that can be decoded ({len(refused['text.jpg'])} bytes)" in lines
    out = capsys.readouterr().out
    assert all(line in out for line in lines)
    assert "left out: 6 broken images" in out


@pytest.mark.parametrize(("broken", "stops"), [(2, False), (3, True)])
def test_more_than_one_in_a_hundred_broken_stops(tmp_path, monkeypatch, capsys, broken, stops):
    folder = write_images(tmp_path / "from", 100)
    for i in range(broken):
        (folder / "train" / "cat" / f"{3 * i}.jpg").write_bytes(b"x")
    if stops:
        text = refusal(monkeypatch, folder, tmp_path / "to")
        assert "3 of 200 images are broken, more than 1 %" in text
        assert capsys.readouterr().out.count("not an image that can be decoded (1 bytes)") == 3
        with pytest.raises(UserError, match="not finished; run the command that began it again"):
            open_dataset(config(tmp_path / "to"))
    else:
        here(monkeypatch, folder, tmp_path / "to")
        assert len(open_dataset(config(tmp_path / "to")).train) == 98
        next((tmp_path / "to").glob("images-train*")).unlink()
        here(monkeypatch, folder, tmp_path / "to")  # they are not counted twice
        assert len(broken_lines(tmp_path / "to")) == 2


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_finished_files_are_not_written_again(source, tmp_path, monkeypatch):
    here(monkeypatch, source, tmp_path / "to")
    before = files(tmp_path / "to")
    kept, gone = sorted(before)[0], sorted(before)[1]
    (tmp_path / "to" / gone).unlink()
    at = (tmp_path / "to" / kept).stat().st_mtime_ns
    here(monkeypatch, source, tmp_path / "to")
    assert files(tmp_path / "to") == before
    assert (tmp_path / "to" / kept).stat().st_mtime_ns == at


def other_records(file: Path) -> bytes:
    """As many records as in the file, whole, but others."""
    writer = ArrayRecordWriter(str(file) + ".other", "group_size:1,uncompressed")
    reader = ArrayRecordReader(str(file))
    first = reader.read()
    for _ in range(reader.num_records()):
        writer.write(first)
    writer.close()
    return Path(str(file) + ".other").read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.read_bytes()[: f.stat().st_size // 2],
        lambda f: f.read_bytes().replace(b"\xff\xda", b"\xff\xdb"),
        lambda f: (f.parent / f.name.replace("val", "train")).read_bytes(),
        other_records,
    ],
    ids=["cut", "bits", "another file", "other records"],
)
def test_a_damaged_file_is_named(tmp_path, monkeypatch, spoil):
    source = write_images(tmp_path / "from", 30)
    (source / "train" / "cat" / "more.jpg").write_bytes(jpeg(7))
    here(monkeypatch, source, tmp_path / "to")
    (shard,) = (tmp_path / "to").glob("images-val*")
    shard.write_bytes(spoil(shard))
    assert refusal(monkeypatch, source, tmp_path / "to").startswith(f"{shard}: damaged (")
    shard.unlink()
    here(monkeypatch, source, tmp_path / "to")
    assert len(stored(tmp_path / "to", "val")) == 30


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (["--resize=30"], ["--resize=20"], "begun with resize=30"),
        ([], ["--resize=20"], "begun with resize=None"),
        (["--resize=30"], ["--resize=30", "--quality=80"], "begun with quality=90"),
    ],
)
def test_another_command_is_refused(source, tmp_path, monkeypatch, first, second, expected):
    here(monkeypatch, source, tmp_path / "to", *first)
    before = files(tmp_path / "to")
    assert expected in refusal(monkeypatch, source, tmp_path / "to", *second)
    assert files(tmp_path / "to") == before


def test_other_images_are_refused(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "from", 6)
    here(monkeypatch, folder, tmp_path / "to")
    (folder / "train" / "cat" / "0.jpg").write_bytes(jpeg(1, 8, 8))
    assert "begun with contents=" in refusal(monkeypatch, folder, tmp_path / "to")


# Files of 8 images. Once there are as many as the last argument says, it waits in the middle of the next.
SMALL_FILES = """
import sys, time
import jax_resnet.data.prepare as p
from jax_resnet.commands import cli, prepare
write, most = p.write, int(sys.argv.pop())
def held(file, *args):
    *args, tick = args
    def wait():
        tick()
        while len(list(file.parent.glob("images-*"))) >= most:
            time.sleep(0.01)
    return write(file, *args, wait)
p.SHARD_IMAGES, p.write = 8, held
cli.run(prepare.main)
"""


def begin_and_signal(folder: Path, to: Path, number: int, after: int) -> programs.Program:
    """The command in a process of its own, with files of 8 images, sent a signal once so many of them are there."""
    process = programs.start(
        [sys.executable, "-c", SMALL_FILES, folder, to, "--resize=20", "--workers=2", after], env=ENV
    )
    programs.until(lambda: len(files(to)) == after, process)
    process.send_signal(number)
    return process


def test_killed_and_interrupted_while_writing_then_run_again(tmp_path, monkeypatch):
    """kill -9 leaves whole files and a folder to sweep; the next run goes on from there, and so does the one after."""
    folder = write_images(tmp_path / "from", 80, splits=("train",))
    to = tmp_path / "to"
    killed = begin_and_signal(folder, to, signal.SIGKILL, after=3)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    first = files(to)
    assert len(first) == 3
    assert (to / ".unfinished").is_dir()
    with pytest.raises(UserError, match="not finished; run the command that began it again"):
        open_dataset(config(to))
    interrupted = begin_and_signal(folder, to, signal.SIGINT, after=len(first) + 3)
    _, err = interrupted.communicate()
    assert (interrupted.returncode, err) == (130, "interrupted\n")
    assert len(files(to)) == 6
    assert not (to / ".unfinished").exists()
    monkeypatch.setattr(prepare, "SHARD_IMAGES", 8)
    here(monkeypatch, folder, to, "--resize=20")
    here(monkeypatch, folder, tmp_path / "whole", "--resize=20")
    assert files(to) == files(tmp_path / "whole")
    assert len(files(to)) == 10
    assert files(to).items() >= first.items()
    for name in ("dataset_info.json", "features.json", "label.labels.txt"):
        assert (to / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_runs_at_once_are_refused(source, tmp_path, monkeypatch):
    with prepare.claim(tmp_path / "to"):
        assert "another run is writing to it" in refusal(monkeypatch, source, tmp_path / "to")
        assert (tmp_path / "to" / ".unfinished").is_dir()  # the first run's


# ---- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
@pytest.mark.parametrize("inside", ["", "flowers"], ids=["splits", "one folder"])
def test_an_archive_gives_what_its_folder_gives(source, tmp_path, monkeypatch, kind, inside):
    archive = tmp_path / f"images.{kind}"
    with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as tar:
        tar.add(source, inside or ".")
        tar.addfile(member("._of_macos"))
        tar.addfile(member("README.txt"))
    here(monkeypatch, archive, tmp_path / "a")
    here(monkeypatch, source, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert facts(tmp_path / "a")["source"] == str(archive)
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == sorted(f.name for f in (tmp_path / "b").iterdir())


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil.jpg"),
        member("train/../../evil.jpg"),
        member("train/cat/link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        member("train/cat/inside.jpg", tarfile.SYMTYPE, "0.jpg"),
        member("train/cat/hard.jpg", tarfile.LNKTYPE, "train/cat/0.jpg"),
        member("train/cat/device.jpg", tarfile.CHRTYPE),
        member("train/cat/pipe.jpg", tarfile.FIFOTYPE),
    ],
    ids=lambda m: m.name,
)
def test_an_archive_that_reaches_out_is_refused(source, tmp_path, monkeypatch, evil):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "images.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(source / "train" / "cat" / "0.jpg", "train/cat/0.jpg")
        tar.addfile(evil)
    text = refusal(monkeypatch, archive, tmp_path / "in" / "to")
    assert text.startswith(f"{archive}: cannot be unpacked as a .tar ({evil.name!r} ")
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["images.tar", "in", "to"]


def test_an_absolute_path_in_an_archive_stays_inside(source, tmp_path, monkeypatch):
    archive, target = tmp_path / "images.tar", tmp_path / "evil.jpg"
    with tarfile.open(archive, "w") as tar:
        tar.add(source, ".")
        tar.addfile(member(str(target)))
    here(monkeypatch, archive, tmp_path / "to")
    assert not target.exists()
    assert len(stored(tmp_path / "to")) == 30


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("tar", lambda data, end: data[: len(data) // 2]),
        ("tar", lambda data, end: data[:end]),  # between two members, where nothing looks amiss
        ("tar.gz", lambda data, end: data[: len(data) // 2]),
        ("tar.xz", lambda data, end: data[: len(data) // 2]),
        ("tar", lambda data, end: b""),
        ("tar", lambda data, end: b"hello"),
    ],
    ids=["tar", "between", "gz", "xz", "empty", "text"],
)
def test_an_archive_that_is_none_or_cut_short_is_refused(source, tmp_path, monkeypatch, kind, cut):
    archive = tmp_path / f"images.{kind}"
    with tarfile.open(archive, "w:" + kind[4:]) as tar:
        tar.add(source, ".")
        end = tar.offset
    archive.write_bytes(cut(archive.read_bytes(), end))
    assert refusal(monkeypatch, archive, tmp_path / "to").startswith(f"{archive}: cannot be unpacked as a .tar (")
    assert not list((tmp_path / "to").iterdir())


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(source, tmp_path, monkeypatch):
    to = tmp_path / "to"
    assert refusal(monkeypatch, tmp_path / "none", to).startswith(f"{tmp_path / 'none'}: no such folder or .tar")
    assert "--resize=0: must be a whole number, from 1 to 999999999" in refusal(monkeypatch, source, to, "--resize=0")
    assert "--quality=101: must be" in refusal(monkeypatch, source, to, "--resize=9", "--quality=101")
    assert "--workers=two: must be" in refusal(monkeypatch, source, to, "--workers=two")
    assert "did you mean --resize" in refusal(monkeypatch, source, to, "--resise=4")
    assert f"lies in {source}" in refusal(monkeypatch, source, source / "train" / "to")
    (tmp_path / "empty").mkdir()
    assert "has no class folders in it" in refusal(monkeypatch, tmp_path / "empty", to)
    (tmp_path / "empty" / "cat").mkdir()
    assert "empty/cat has no images in it" in refusal(monkeypatch, tmp_path / "empty", to)
    for name in ("train/cat/1.jpg", "val/cta/1.jpg"):
        (tmp_path / "odd" / name).parent.mkdir(parents=True)
        (tmp_path / "odd" / name).write_bytes(jpeg(1))
    assert "val/cta: train/ has no such class; did you mean cat?" in refusal(monkeypatch, tmp_path / "odd", to)
    assert not list(to.iterdir())
    (to / "thesis.part").write_text("mine")
    assert "has thesis.part in it, not by this command" in refusal(monkeypatch, source, to)
    assert [f.name for f in to.iterdir()] == ["thesis.part"]
    (tmp_path / "file").write_text("")
    assert refusal(monkeypatch, source, tmp_path / "file").startswith(f"{tmp_path / 'file'}: ")


def test_the_command_ends_with_status_2_after_one_line(tmp_path):
    done = run(tmp_path / "none", tmp_path / "to")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")


def test_a_folder_that_is_not_prepared_is_refused(tmp_path):
    for name, text in ((tmp_path / "none", "no such folder"), (tmp_path, "no dataset in it")):
        with pytest.raises(UserError, match=f"^config.data.name=prepared:{name}: {text}$"):
            open_dataset(config(name))


def test_an_image_that_cannot_be_read_stops(source, tmp_path, monkeypatch):
    listed = raw.list_folder(source)

    def vanishes(split, index):
        raise FileNotFoundError(2, "No such file or directory", "gone.jpg")

    monkeypatch.setattr(command_prepare, "list_folder", lambda _: listed._replace(read=vanishes))
    assert refusal(monkeypatch, source, tmp_path / "to") == "gone.jpg: No such file or directory"


def test_a_disk_that_is_full_is_one_line(source, tmp_path):
    """Limits stand in for it: no file may grow beyond 4 KiB."""
    args = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *command(source, tmp_path / "to")]
    done = programs.run(args, env=ENV)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'to'}")


# ---- Apache Beam -----------------------------------------------------------------------------------------------------

BEAM_BUILDER = '''
import importlib.util
import io
import tensorflow_datasets as tfds

def example(i):
    import cv2
    import numpy as np
    pixels = np.random.default_rng(i).integers(0, 256, (12, 16, 3), np.uint8)
    return i, {"image": io.BytesIO(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()), "label": i % 3}

class Photos(tfds.core.GeneratorBasedBuilder):
    """Random pixels."""
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(12, 16, 3))
        features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=3)})
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 40), "test": self._generate_examples(40, 50)}

    def _generate_examples(self, first, last):
        import apache_beam as beam
        return beam.Create(range(first, last)) | beam.Map(example)
'''


@pytest.mark.slow
def test_what_tfds_wrote_through_beam_is_read(tmp_path):
    """`tfds build` with Beam's options, in worker processes of the direct runner; then its folder as prepared:…"""
    if missing := [m for m in ("apache_beam", "tensorflow", "mlcroissant") if importlib.util.find_spec(m) is None]:
        pytest.skip(f"needs the extra `prepare`: {missing[0]} is not installed")
    (tmp_path / "builders").mkdir()
    (tmp_path / "builders" / "photos.py").write_text(BEAM_BUILDER)
    # What DirectRunner comes down to where it cannot download another; tests shall not download.
    runner = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
    args = [
        *(sys.executable, "-m", "tensorflow_datasets.scripts.cli.main", "build", "photos.py"),
        *("--file_format=array_record", f"--data_dir={tmp_path}", "--num_shards=2"),
        f"--beam_pipeline_options=runner={runner},direct_num_workers=2,direct_running_mode=multi_processing",
    ]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}  # workers import builders.photos
    done = programs.run(args, cwd=tmp_path / "builders", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Python sdk harness exiting" in done.stderr  # as only such a process says
    dataset = open_dataset(config(tmp_path / "photos" / "1.0.0", size=None))
    for split, expected in ((dataset.train, range(40)), (dataset.eval, range(40, 50))):
        images, labels = split.read(np.arange(len(split)), None).arrays.values()
        found = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        assert found == {
            np.random.default_rng(i).integers(0, 256, (12, 16, 3), np.uint8).tobytes(): i % 3 for i in expected
        }
