"""Images that are odd are read; those that are broken give their places to others, up to a point, and are named."""

import io
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_main
from PIL import Image
from tiny import data_config

from jax_resnet.data.batches import Ledger, eval_batch, train_batch
from jax_resnet.data.dataset import Split
from jax_resnet.data.sampling import Phase, train_indices
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import UserError
from jax_resnet.runs.metrics_reader import read_metrics

TINY = ROOT / "tests" / "tiny.py"


def photo(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(pixels, (width, height)))


def as_bytes(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def odd_files() -> dict[str, bytes]:
    """Images as people have them, all of which can be read."""
    image, turned = photo(1), Image.Exif()
    turned[0x0112] = 6
    sixteen = np.asarray(image.convert("L")).astype(np.uint16) * 257
    alpha = image.copy()
    alpha.putalpha(128)
    return {
        "grey.jpg": as_bytes(image.convert("L")),
        "cmyk.jpg": as_bytes(image.convert("CMYK")),
        "progressive.jpg": as_bytes(image, progressive=True),
        "turned.jpg": as_bytes(image, exif=turned),
        "alpha.png": as_bytes(alpha, "PNG"),
        "grey_alpha.png": as_bytes(alpha.convert("LA"), "PNG"),
        "sixteen_bits.png": as_bytes(Image.fromarray(sixteen), "PNG"),
        "palette.png": as_bytes(image.quantize(16), "PNG"),
        "one_bit.png": as_bytes(image.convert("1"), "PNG"),
        "png_named.jpg": as_bytes(image, "PNG"),
        "jpeg_named.png": as_bytes(image),
        "picture.webp": as_bytes(image, "WEBP"),
        "picture.bmp": as_bytes(image, "BMP"),
        "one_pixel.png": as_bytes(photo(2, 1, 1), "PNG"),
        "line.jpg": as_bytes(photo(3, 400, 2)),
    }


def broken_files() -> dict[str, bytes]:
    """What cannot be read."""
    jpeg, png = as_bytes(photo(4)), as_bytes(photo(4), "PNG")
    return {
        "empty.jpg": b"",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "zeros.jpg": bytes(2000),
        "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "header_only.jpg": jpeg[:200],
        "no_pixels.png": png[:33],
    }


def write_folder(root: Path, files: dict[str, bytes], good: int) -> Path:
    """`good` images of two classes and the files beside them to train on; four to evaluate."""
    for i in range(good + 4):
        file = root / ("train" if i < good else "val") / f"class{i % 2}" / f"good{i:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(as_bytes(photo(100 + i)))
    for i, (name, data) in enumerate(files.items()):
        (root / "train" / f"class{i % 2}" / name).write_bytes(data)
    return root


def train(folder: Path, workdir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_main(
        f"--config={TINY}:none", f"--workdir={workdir}", f"--config.data.name=folder:{folder}",
        "--config.data.image.size=12", "--config.data.image.channels=3", "--config.data.image.mean=(.5,.5,.5)",
        "--config.data.image.std=(.2,.2,.2)", "--config.train.epochs=2", *more,
    )  # fmt: skip


def opened(folder: Path) -> Split:
    return open_dataset(data_config(name=f"folder:{folder}", size=8)).train


# ---- by the command --------------------------------------------------------------------------------------------------


def test_a_folder_of_odd_and_broken_files_trains_and_names_the_broken(tmp_path: Path) -> None:
    assert len(odd_files()) + len(broken_files()) > 15
    folder = write_folder(tmp_path / "photos", odd_files() | broken_files(), good=60)
    (folder / "val" / "class0" / "cut.jpg").write_bytes(broken_files()["cut.jpg"])
    done = train(folder, tmp_path / "run", "--config.data.max_broken=0.3")
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    named = {(row["split"], Path(row["name"]).name) for row in rows if row["kind"] == "broken"}
    assert named == {("train", name) for name in broken_files()} | {("val", "cut.jpg")}
    for name in broken_files():
        assert done.stdout.count(f"/{name}: not an image that can be decoded") == (2 if name == "cut.jpg" else 1)
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert {(row["examples"], row["undecodable"]) for row in evaluations} == {(4, 1)}
    assert "images that cannot be decoded: 7 of train, 1 of val" in done.stdout
    assert all(0 <= row["input_wait"] <= 1 for row in rows if "images_per_second" in row)


def test_a_folder_of_which_a_third_is_broken_stops_naming_them(tmp_path: Path) -> None:
    broken = {f"bad{i:02}.jpg": data for i, data in enumerate(3 * list(broken_files().values()))}
    folder = write_folder(tmp_path / "photos", broken, good=49)
    done = train(folder, tmp_path / "run")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    named = [name for name in broken if name in done.stderr + done.stdout]
    assert sum(name in last for name in broken) >= 8
    assert 8 <= len(named) <= 21  # of 70 images seven would be a tenth; a batch may bring several more
    assert "more than config.data.max_broken=0.1 allows" in last
    assert "Traceback" not in done.stderr
    mended = train(folder, tmp_path / "run", "--config.data.max_broken=0.4")
    assert mended.returncode == 0, mended.stderr


# ---- by what a batch holds -------------------------------------------------------------------------------------------


def phase(batch_size: int) -> Phase:
    return Phase(0, 10**9, None, batch_size, 0)


def test_another_record_takes_the_place_of_a_broken_one(tmp_path: Path) -> None:
    split = opened(write_folder(tmp_path, {"a.jpg": b"", "b.jpg": b"no image"}, good=10))
    records, _ = train_indices(5, 0, 12, 12)
    batch = train_batch(split, 0, seed=5, phase=phase(12), rows=np.arange(12))
    assert sorted(Path(name).name for name, _ in batch["broken"])[:2] == ["a.jpg", "b.jpg"]
    rows = split.read(np.arange(12), None)
    labels, broken = rows.arrays["label"], rows.broken
    assert sorted(broken) == [0, 6]  # in each class first by name
    for row, record in enumerate(records):
        alone = train_batch(split, 0, seed=5, phase=phase(12), rows=np.array([row]))
        np.testing.assert_array_equal(alone["image"][0], batch["image"][row])
        assert batch["image"][row].max() > 0
        if record not in broken:
            assert batch["label"][row] == labels[record]
    other = train_batch(split, 0, seed=6, phase=phase(12), rows=np.arange(12))
    assert other["image"].tobytes() != batch["image"].tobytes()


def test_substitutes_differ_between_epochs_and_are_drawn_from_all(tmp_path: Path) -> None:
    split = opened(write_folder(tmp_path, {"bad.jpg": b""}, good=9))  # record 0: first by name
    taken = []
    for epoch in range(60):
        records, _ = train_indices(0, 10 * epoch, 10, 10)
        row = np.flatnonzero(records == 0)
        taken.append(int(train_batch(split, epoch, seed=0, phase=phase(10), rows=row)["label"][0]))
    assert 15 < sum(taken) < 50  # five of class1, four of class0: 33 on average


def test_evaluation_leaves_out_what_is_broken(tmp_path: Path) -> None:
    split = opened(write_folder(tmp_path, {"bad.jpg": b""}, good=5))
    batches = [eval_batch(split, number, batch_size=4, rows=np.arange(4)) for number in (0, 1)]
    mask, broken = (np.concatenate([b[name] for b in batches]) for name in ("mask", "undecodable"))
    assert mask.tolist() == [False, True, True, True, True, True, False, False]
    assert broken.tolist() == [True] + 7 * [False]
    assert [len(b["broken"]) for b in batches] == [1, 0]


def test_a_folder_without_a_single_image_is_refused(tmp_path: Path) -> None:
    split = opened(only_broken(tmp_path))
    with pytest.raises(UserError, match="nor can any of 100 others be decoded"):
        train_batch(split, 0, seed=0, phase=phase(2), rows=np.arange(2))


def only_broken(root: Path) -> Path:
    for part in ("train", "val"):
        (root / part / "a").mkdir(parents=True)
        for i in range(3):
            (root / part / "a" / f"{i}.jpg").write_bytes(b"")
    return root


# ---- the ledger ------------------------------------------------------------------------------------------------------


class Numbered:
    name = "train"

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count


def test_the_ledger_reports_once_and_counts_against_the_whole_split() -> None:
    said: list[str] = []
    ledger = Ledger(Numbered(100), lambda _, name, why: said.append(name), 0.05)  # type: ignore[arg-type]
    for i in range(5):
        ledger.add([(f"{i}", "why"), ("0", "why")], 10)
    assert said == ["0", "1", "2", "3", "4"]
    with pytest.raises(UserError, match=r"^train split: 6 images of 71 read .*: 0, 1, 2, 3, 4, 5$"):
        ledger.add([("5", "why")], 10)


def test_the_ledger_does_not_wait_for_an_epoch_of_a_large_split() -> None:
    ledger = Ledger(Numbered(1_000_000), lambda *_: None, 0.05)  # type: ignore[arg-type]
    ledger.add([(f"{i}", "why") for i in range(19)], 20)
    with pytest.raises(UserError, match="20 images of 120 read"):
        ledger.add([("19", "why")], 80)
    rare = Ledger(Numbered(1_000_000), lambda *_: None, 0.05)  # type: ignore[arg-type]
    for i in range(100):
        rare.add([(f"{i}", "why")], 100)
