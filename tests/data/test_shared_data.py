"""Real data from ../shared, through the command: CIFAR-10, Fashion-MNIST, ImageNet JPEGs in class folders."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import run_main


def splits(workdir: Path, *args: str) -> dict:
    done = run_main(f"--workdir={workdir}", *args)
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "result.json").read_text())["splits"]


@pytest.mark.parametrize(
    ("file", "examples", "steps"),
    [("cifar10_lossless_subset.npz", 1_000, 40), ("fashion_mnist.npz", 10_000, 30)],
)
@pytest.mark.soak
def test_resnet20_on_arrays(shared: Path, tmp_path: Path, file: str, examples: int, steps: int) -> None:
    found = splits(
        tmp_path,
        "--config=configs/resnet_cifar.py:20",
        f"--config.data.name=npz:{shared / 'data' / file}",
        f"--config.train.steps={steps}",
        "--config.schedule.name=cosine",
        f"--config.eval.every.steps={steps}",
    )
    assert found["test"]["examples"] == examples
    assert found["test"]["accuracy_top1"] > 0.2  # twice chance


@pytest.mark.soak
def test_imagenet_jpegs_in_class_folders(shared: Path, tmp_path: Path) -> None:
    for file in (shared / "data" / "imagenet_jpegs").iterdir():
        cls = tmp_path / "jpegs" / file.name[:3]  # n01 … n13: broad groups of WordNet
        cls.mkdir(parents=True, exist_ok=True)
        (cls / file.name).symlink_to(file)
    counts = Counter(f.parent.name for f in (tmp_path / "jpegs").rglob("*.JPEG"))
    held_out = sum(min(n - 1, max(1, round(n * 0.2))) for n in counts.values())
    found = splits(
        tmp_path / "run",
        "--config=configs/resnet50_imagenet.py:18",
        "--config.batch_size=16",
        "--config.model.bn_group_size=16",
        f"--config.data.name=folder:{tmp_path / 'jpegs'}",
        "--config.data.holdout=0.2",
        "--config.train.steps=8",
        "--config.schedule.warmup.steps=2",
    )
    assert found["holdout"]["examples"] == held_out
