"""What the tests share: the command as a user runs it, small data, a tiny config."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import programs  # first: it says where JAX keeps what it compiles
import pytest
import tiny
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SOAK = bool(os.environ.get("SOAK"))  # as `make soak` sets it: also what takes long or measures time
# Beside the environment, not in it: JAX would look for a TPU, and say that there is none, in every test.
LIBTPU = Path(sys.prefix) / "libtpu"
needs_libtpu = pytest.mark.skipif(not LIBTPU.is_dir(), reason="needs libtpu in .venv/libtpu, as .ci/run installs it")


def run_main(*args: str, devices: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python -m jax_resnet.main ARGS` in a process of its own, with `devices` simulated devices."""
    return programs.run(main_command(*args), env=main_env(devices), cwd=cwd)


def main_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "jax_resnet.main", *map(str, args)]


def main_env(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, or the last of them would be waited for by one worker alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden answers beside the project."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training and 37 test images, 12×12 grey, 4 classes told apart by which corner is bright."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 100), ("test", 37)):
        labels = rng.integers(0, 4, count)
        labels[:4] = range(4)
        images = rng.integers(0, 100, (count, 12, 12))
        for image, label in zip(images, labels, strict=True):
            image[6 * (label // 2) :, 6 * (label % 2) :][:6, :6] += 120
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(file, **arrays)
    return file


@pytest.fixture
def tiny_config(tiny_npz: Path) -> ConfigDict:
    """The config of tests/tiny.py on `tiny_npz`."""
    return tiny.get_config(str(tiny_npz))
