"""What the tests share: the command as a user runs it, small data, a tiny config."""

import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import programs
import pytest

gc.set_threshold(100_000)  # as the command does: a tenth of tracing is a search for garbage by Python's 700

SOAK = bool(os.environ.get("SOAK"))  # as `make soak` sets it: also what takes long or measures time
programs.set_up(quickly=not SOAK)

import tiny  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# Beside the environment, not in it: JAX would look for a TPU, and say that there is none, in every test.
LIBTPU = Path(sys.prefix) / "libtpu"
needs_libtpu = pytest.mark.skipif(not LIBTPU.is_dir(), reason="needs libtpu in .venv/libtpu, as .ci/run installs it")


# A shell ignores these for what it runs in the background, and programs inherit that: here they are what is tested.
for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, usual)


def run_main(*args: str, devices: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python -m jax_resnet.main ARGS` in a process of its own, with `devices` simulated devices."""
    return programs.run(main_command(*args), env=main_env(devices), cwd=cwd)


def main_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "jax_resnet.main", *map(str, args)]


def main_env(devices: int = 1) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the picture of the curves, which takes as long as a short training, where nobody looks at it."""
    if "curves" not in request.node.keywords:
        monkeypatch.setattr("jax_resnet.runs.log.draw_curves", lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long ones first, or the last of them would be waited for by one worker alone."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("soak", "slow")])


@pytest.fixture
def turn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have the tests that compile something large take turns: each needs gigabytes, and both cores."""
    with (tmp_path_factory.getbasetemp().parent / "turn").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
